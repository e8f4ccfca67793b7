"""What every command does for its files: outputs are checked first, and an interruption leaves no litter."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import click

from calib.files import check_writable
from relu_deploy.errors import FileError

# What shells report for a command that a signal ended.
SIGNALLED = 128


class OutputPath(click.Path):
    """A file that the command writes, or a folder that it fills.

    Args:
        beside: What is added to the file's name for files that are written beside it.
        holds: Names of the files in a folder; None: this is a file.
    """

    def __init__(self, *, beside: tuple[str, ...] = (), holds: tuple[str, ...] | None = None) -> None:
        super().__init__(path_type=Path)
        self.beside, self.holds = beside, holds

    def files(self, path: Path) -> list[Path]:
        """Everything that is written where ``path`` is given."""
        if self.holds is not None:
            return [path / name for name in self.holds]
        return [path, *(path.parent / (path.name + suffix) for suffix in self.beside)]


class FileCommand(click.Command):
    """A command that refuses, before any work, outputs that cannot be written or would replace what it reads."""

    def invoke(self, ctx: click.Context) -> Any:
        """Check the files named in the call, then run."""
        given: dict[click.Parameter, Any] = {param: ctx.params.get(param.name or "") for param in self.params}
        writing = {param: value for param, value in given.items() if _writes(param, value)}
        inputs = [path for param, value in given.items() if not _is_output(param) for path in _paths(value)]
        taken: list[Path] = []
        for param, value in writing.items():
            files = _files(param, Path(value))
            for path in files:
                _refuse_replacing(param.opts[-1], path, inputs, taken)
            taken += files
        for param, value in writing.items():
            if getattr(param.type, "holds", None) is None:
                check_writable(Path(value))
        return super().invoke(ctx)


def _refuse_replacing(option: str, path: Path, inputs: list[Path], outputs: list[Path]) -> None:
    """Refuse a file that is also read, or also written by another option. Raises: FileError."""
    for file in inputs:
        if _same(path, file):
            raise FileError(
                f"{option} writes {path}, which is also an input that it would replace", hint="give it another name"
            )
    if any(_same(path, other) for other in outputs):
        raise FileError(
            f"{option} writes {path}, which is another output too: one would replace the other",
            hint="give each output a name of its own",
        )


def _files(param: click.Parameter, path: Path) -> list[Path]:
    return param.type.files(path) if isinstance(param.type, OutputPath) else [path]


def _is_output(param: click.Parameter) -> bool:
    return isinstance(param.type, OutputPath) or param.name == "json_path"


def _writes(param: click.Parameter, value: Any) -> bool:
    """Whether a parameter names something to be written; ``--json -`` does not."""
    return _is_output(param) and value is not None and str(value) != "-"


def _paths(value: Any) -> list[Path]:
    """Files that a value names: paths, ``file.py:function``, and lists of them."""
    if isinstance(value, (list, tuple)):
        return [path for item in value for path in _paths(item)]
    if not isinstance(value, (str, Path)) or not str(value):
        return []
    named = (Path(value), Path(str(value).rpartition(":")[0]))
    return [path for path in named if path.name and _exists(path)]


def _exists(path: Path) -> bool:
    """Whether it does; a text that is no path (too long, say) names no file."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _same(first: Path, second: Path) -> bool:
    """Whether two paths name one file, also through links."""
    if _exists(first) and _exists(second):
        return first.samefile(second)
    return first.resolve() == second.resolve()


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the command as SIGINT does: by an exception, so that temporary files are removed."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - what signal hands over
        for each in before:
            signal.signal(each, signal.SIG_IGN)  # a second one must not break the clean-up off
        raise SystemExit(SIGNALLED + number)

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        wanted = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
        # A command started with nohup stays deaf to SIGHUP.
        before = {each: signal.signal(each, stop) for each in wanted if signal.getsignal(each) == signal.SIG_DFL}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
