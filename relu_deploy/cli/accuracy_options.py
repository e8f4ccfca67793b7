"""What ``quantize`` does with calibration data: rank layers, keep the worst in float, refuse a collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relu_deploy.cli.common import OUTPUT_FILE

if TYPE_CHECKING:
    import onnx

    from calib.progress import Progress
    from calib.sources import Source
    from relu_deploy.int8.sensitivity import Draft, Sensitivity

allow_collapse_option = click.option(
    "--allow-collapse", is_flag=True, help="Write the file even where an output is destroyed by INT8."
)


def accuracy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--min-sqnr``, ``--report`` and ``--allow-collapse``."""
    function = allow_collapse_option(function)
    function = click.option(
        "--report", "report_path", type=OUTPUT_FILE, metavar="FILE",
        help="Write the layers, ranked by the damage that INT8 does to each, as JSON. Needs --calib.",
    )(function)  # fmt: skip
    return click.option(
        "--min-sqnr", type=click.FloatRange(min=0), metavar="DB", default=10.0, show_default=True,
        help="Signal over noise that every output is to have, with --calib: layers that lose the most are left in "
        "float for it, a tenth of them at most; exit 1 and no file where that is not enough.",
    )(function)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kept:
    """``--keep-float``: names of layers, and a number of the worst."""

    names: tuple[str, ...]
    worst: int

    @classmethod
    def parse(cls, values: Iterable[str], model: onnx.ModelProto) -> Kept:
        """A number is how many, unless a node has it for a name."""
        named = {node.name for node in model.graph.node}
        numbers = [value for value in values if value.isdecimal() and value not in named]
        return cls(tuple(value for value in values if value not in numbers), sum(map(int, numbers)))


def inspector(source: Source, kept: Kept, floor_db: float, progress: Progress) -> Callable[[Draft], Sensitivity]:
    """What :func:`relu_deploy.int8.run.quantize` calls before it writes."""
    from relu_deploy.int8.sensitivity import measure_sensitivity

    return lambda draft: measure_sensitivity(draft, source, keep=kept.worst, floor_db=floor_db, progress=progress)


def check_needs_data(data: str | None, kept: Kept, report_path: Path | None) -> None:
    """Refuse options that only data can answer. Raises: click.UsageError."""
    if data is None and (kept.worst or report_path is not None):
        which = "--keep-float with a number" if kept.worst else "--report"
        raise click.UsageError(f"{which} ranks layers by what INT8 does to the outputs, on data: add --calib DATA")
