"""What ``quantize`` does with calibration data: rank layers, keep the worst in float, refuse a collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import RenderableType
from rich.text import Text

from relu_deploy.cli.common import OUTPUT_FILE

if TYPE_CHECKING:
    import onnx

    from relu_deploy.int8.run import QuantReport


def accuracy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--min-sqnr``, ``--correct``, ``--report`` and ``--allow-collapse``."""
    function = click.option(
        "--allow-collapse", is_flag=True, help="Write the file even where an output is destroyed by INT8."
    )(function)
    function = click.option(
        "--report", "report_path", type=OUTPUT_FILE, metavar="FILE",
        help="Write as JSON the layers ranked by the damage that INT8 does to each, and the signal over noise of each "
        "before and after correction. Needs --calib.",
    )(function)  # fmt: skip
    function = click.option(
        "--correct/--no-correct", default=True, show_default=True,
        help="With --calib: choose weight codes and biases by what they do on the data, not each by itself.",
    )(function)  # fmt: skip
    return click.option(
        "--min-sqnr", type=click.FloatRange(min=0), metavar="DB", default=10.0, show_default=True,
        help="Signal over noise that every output is to have, with --calib; exit 1 and no file where it is not "
        "reached. Where corrected outputs have less than 30 dB, or hardly more than this, layers that INT8 damages "
        "most are left in float, a tenth of them at most.",
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


def check_needs_data(data: str | None, kept: Kept, report_path: Path | None) -> None:
    """Refuse options that only data can answer. Raises: click.UsageError."""
    if data is None and (kept.worst or report_path is not None):
        which = "--keep-float with a number" if kept.worst else "--report"
        raise click.UsageError(f"{which} ranks layers by what INT8 does to the outputs, on data: add --calib DATA")


def write_report(path: Path, report: QuantReport) -> None:
    """What ``--report`` writes."""
    from calib.files import write_json
    from relu_deploy.report import to_json

    write_json(
        path, to_json({"outputs": report.drift, "sensitivity": report.sensitivity, "correction": report.correction})
    )


def accuracy_lines(report: QuantReport) -> Iterator[RenderableType]:
    """What a person reads of what was measured on the data."""
    if (found := report.sensitivity) is not None:
        text = f"INT8 alone leaves {found.before_db:.1f} dB at the worst output ({found.samples} samples)"
        kept = f"; {found.after_db:.1f} dB with {len(found.kept)} layers in float" if found.kept else ""
        yield Text(text + kept)
    if (done := report.correction) is not None:
        rounded, shifted = sum(x.rounded for x in done.layers), sum(x.shifted for x in done.layers)
        how = f"codes of {rounded} channels and {shifted} biases chosen on {done.learned} samples"
        judged = f"{done.before_db:.1f} to {done.after_db:.1f} dB at the worst output ({done.compared} samples)"
        yield Text(f"correction: {how}; {judged}" + ("" if done.used else "; no gain, so they are left as they were"))
