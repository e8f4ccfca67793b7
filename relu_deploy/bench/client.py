"""The bench's side of a worker: start it, ask it, notice when it hangs or dies, and never leave it behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

import relu_deploy.errors
from calib.errors import ToolkitError
from relu_deploy.bench.subject import Subject
from relu_deploy.errors import EngineError, FileError
from relu_deploy.tensors import TensorSpec

_TAIL_LINES, _TAIL_CHARACTERS = 8, 1500


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a worker tells of the engine it opened.

    Attributes:
        inputs: What the engine takes.
        outputs: What it gives.
        seconds: How long opening took.
        clock: ``host``, or ``engine`` when the engine times its own runs.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    seconds: float
    clock: str


class Worker:
    """A process that holds one engine open."""

    def __init__(self, subject: Subject, *, timeout: float, folder: Path) -> None:
        self.subject = subject
        self.peak_bytes = 0
        self._timeout = timeout
        self._folder = folder
        self._buffer = b""
        self._count = 0
        self._errors = folder / "stderr.txt"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "relu_deploy.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                # -m looks in the current folder first; there it would find a user's own calib/ or onnx.py.
                cwd=Path(relu_deploy.errors.__file__).parents[1],
                start_new_session=True,  # Ctrl-C reaches the bench alone, and the bench ends its workers
            )
        assert self._process.stdin is not None  # noqa: S101
        assert self._process.stdout is not None  # noqa: S101
        self._requests, self._answers = self._process.stdin, self._process.stdout

    @property
    def pid(self) -> int:
        """Process id, for whoever wants to watch it."""
        return self._process.pid

    def load(self, *, threads: int) -> Loaded:
        """Open the engine."""
        subject = self.subject
        request = {"do": "load", "engine": str(subject.path.resolve()), "target": subject.target, "threads": threads}
        answer = self._ask("while it was opened", request)
        inputs, outputs = (tuple(TensorSpec.from_json(v) for v in answer[key]) for key in ("inputs", "outputs"))
        return Loaded(inputs, outputs, float(answer["seconds"]), str(answer["clock"]))

    def feed(self, feeds: dict[str, npt.NDArray[Any]]) -> None:
        """Set the inputs of every later run."""
        self._ask("while it read its inputs", {"do": "feed", "feed": self._write(feeds)})

    def warm_up(self, *, seconds: float, runs: int) -> list[float]:
        """Run for some seconds, and at least some runs; nanoseconds of each."""
        request = {"do": "warmup", "seconds": seconds, "runs": runs}
        return self._numbers(self._ask("in the warm-up", request, seconds)["samples"])

    def round(self, *, settle: float, seconds: float, number: int) -> tuple[list[float], list[float]]:
        """One round: nanoseconds of the runs that settle, and of those that count."""
        request = {"do": "round", "settle": settle, "seconds": seconds}
        answer = self._ask(f"in round {number}", request, settle + seconds)
        return self._numbers(answer["settle"]), self._numbers(answer["samples"])

    def usage(self) -> float:
        """Processor seconds of the process so far; brings ``peak_bytes`` up to date."""
        answer = self._ask("while it was measured", {"do": "usage"})
        self.peak_bytes = int(answer["peak_bytes"])
        return float(answer["cpu_seconds"])

    def outputs(self, feeds: dict[str, npt.NDArray[Any]], names: list[str]) -> dict[str, npt.NDArray[Any]]:
        """Results of one inference on data."""
        out = self._folder / "outputs.npz"
        self._ask("on the data", {"do": "outputs", "feed": self._write(feeds), "names": names, "out": str(out)})
        with np.load(out, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}

    def close(self) -> None:
        """End the process and whatever it started, and wait for it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):
            self._requests.close()
        self._answers.close()

    def _numbers(self, values: list[float]) -> list[float]:
        if not values or min(values) <= 0:
            raise EngineError(f"{self.subject.path}: its clock gave no positive times")
        return values

    def _write(self, feeds: dict[str, npt.NDArray[Any]]) -> str:
        path = self._folder / "feed.npz"
        try:
            with path.open("wb") as stream:
                np.savez(stream, **feeds)  # type: ignore[arg-type]
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror}", hint="free space there, or set TMPDIR") from error
        return str(path)

    def _ask(self, when: str, request: dict[str, Any], seconds: float = 0.0) -> Any:
        try:
            self._requests.write(json.dumps(request).encode() + b"\n")
            self._requests.flush()
        except BrokenPipeError:
            self._died(when)
        line = self._line(when, time.monotonic() + seconds + self._timeout)
        try:
            answer = json.loads(line)
        except ValueError:
            raise EngineError(f"{self.subject.path}: its worker answered {line[:80]!r} {when}") from None
        if "error" in answer:
            raise _rebuild(answer["error"])
        return answer["ok"]

    def _line(self, when: str, until: float) -> bytes:
        """The next whole line of the worker."""
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(until - time.monotonic(), 0.0))
            if not ready:
                raise EngineError(
                    f"{self.subject.path} gave no answer {when} within {self._timeout:g} s{self._tail()}",
                    hint="raise --timeout if it is only slow; lower --batch or --shape if it is too large",
                )
            chunk = os.read(self._answers.fileno(), 1 << 16)
            if not chunk:
                self._died(when)
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _died(self, when: str) -> NoReturn:
        code = self._process.wait()
        tail = self._tail()
        if code == -signal.SIGKILL:
            raise EngineError(
                f"{self.subject.path}: its process was killed from outside (SIGKILL) {when}{tail}",
                hint="the system does so when memory runs out; lower --batch or --shape, or free memory",
            )
        if code < 0:
            raise EngineError(f"{self.subject.path}: the runtime crashed ({signal.Signals(-code).name}) {when}{tail}")
        raise EngineError(f"{self.subject.path}: the runtime failed {when}{tail}")

    def _tail(self) -> str:
        """What the worker last wrote to standard error, as a part of a message."""
        text = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        lines = text.splitlines()[-_TAIL_LINES:]
        if "Traceback (most recent call last):" in text:
            lines = lines[-1:]  # the frames are ours and say nothing to a user; the last line is the runtime's message
        tail = "\n  ".join(lines)[-_TAIL_CHARACTERS:]
        return f":\n  {tail}" if tail else ""


@contextlib.contextmanager
def start_worker(subject: Subject, *, timeout: float, folder: Path) -> Iterator[Worker]:
    """A worker that is gone when the block ends, however it ends."""
    folder.mkdir()
    worker = Worker(subject, timeout=timeout, folder=folder)
    try:
        yield worker
    finally:
        worker.close()


def _rebuild(error: dict[str, Any]) -> ToolkitError:
    """The worker's error, of its own class where it is one of ours with the plain signature."""
    kind = getattr(relu_deploy.errors, str(error["type"]), EngineError)
    if not issubclass(kind, ToolkitError) or kind is relu_deploy.errors.MissingExtraError:
        kind = EngineError
    rebuilt: ToolkitError = kind(str(error["message"]), hint=error["hint"])
    return rebuilt
