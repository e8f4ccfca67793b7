"""What the commands share: ``--json``, progress bars, and how a report reaches the screen."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from calib.errors import FileError
from calib.files import write_json
from calib.progress import Progress
from relu_deploy.cli.safety import OutputPath
from relu_deploy.cli.screen import SafeConsole

INPUT_FILE = click.Path(path_type=Path)
OUTPUT_FILE = OutputPath()
OUTPUT_FOLDER = OutputPath(holds=())

# Columns of a report that goes to a file or a pipe: wide enough that names of nodes are not cut short.
_FILE_WIDTH = 200


def json_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json PATH``, handed to the command as ``json_path``."""
    return click.option(
        "--json", "json_path", metavar="PATH", help="Also write the report as JSON to PATH; '-' is standard output."
    )(function)


def emit(report: Any, json_path: str | None, render: Callable[[], RenderableType]) -> None:
    """Print a report for a person, and as JSON where asked. With ``--json -`` only JSON reaches standard output.

    Raises:
        FileError: where it goes cannot be written.
    """
    from relu_deploy.report import to_json  # needs numpy, which no --help should wait for

    value = to_json(report)
    console = SafeConsole(stderr=json_path == "-", soft_wrap=True)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    with _screen():
        console.print(render())
        if json_path == "-":
            click.echo(json.dumps(value, indent=2, allow_nan=False))
    if json_path and json_path != "-":
        write_json(Path(json_path), value)


@contextlib.contextmanager
def _screen() -> Iterator[None]:
    """Standard output may be a file on a full disk; that a reader went away is click's to see to.

    Raises:
        FileError: it cannot be written.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        # What did not get out is still in the buffer, and would fail again, untold, when the program ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
        raise FileError(f"the report cannot be written to standard output: {error.strerror or error}") from error


class _Rate(ProgressColumn):
    """Units of work a second: samples, where samples are counted."""

    def render(self, task: Task) -> Text:
        """The rate, once it is known."""
        if task.speed is None:
            return Text("")
        return Text(f"{task.speed:.0f}/s" if task.speed >= 100 else f"{task.speed:.3g}/s")


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A ``Progress`` that draws a bar for each kind of work on standard error; nothing where that is no terminal."""
    console = SafeConsole(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with RichProgress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield update
