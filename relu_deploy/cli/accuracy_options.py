"""What ``quantize`` does with calibration data: rank layers, keep the worst in float, refuse a collapse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from relu_deploy.cli.common import OUTPUT_FILE
from relu_deploy.errors import CheckFailedError

if TYPE_CHECKING:
    import onnx

    from calib.progress import Progress
    from calib.sources import Source
    from relu_deploy.int8.drift import OutputDrift
    from relu_deploy.int8.run import QuantReport
    from relu_deploy.int8.sensitivity import Draft, Sensitivity

# Layers named by an error.
_WORST = 3


def accuracy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--min-sqnr``, ``--report`` and ``--allow-collapse``."""
    function = click.option(
        "--allow-collapse", is_flag=True, help="Write the file even where an output is below --min-sqnr."
    )(function)
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


def refuse_collapse(drift: Iterable[OutputDrift], report: QuantReport, floor_db: float) -> None:
    """Raise where an output is worse than it may be.

    Raises:
        CheckFailedError: names the outputs, the worst layers, and what to do.
    """
    bad = [out for out in drift if out.max_abs_error is None or (out.sqnr_db is not None and out.sqnr_db < floor_db)]
    if not bad:
        return
    outputs = ", ".join(f"{o.name} ({'not finite' if o.sqnr_db is None else f'{o.sqnr_db:.1f} dB'})" for o in bad)
    ranked = () if report.sensitivity is None else report.sensitivity.layers[:_WORST]
    layers = ", ".join(f"{layer.layer} ({layer.sqnr_db:.1f} dB alone)" for layer in ranked)
    raise CheckFailedError(
        f"INT8 destroys the outputs: {outputs}; at least {floor_db:g} dB are asked for"
        + (f". The worst layers: {layers}" if layers else ""),
        hint="check that the calibration data is what the network is fed in use; then --keep-float N leaves the N "
        "worst layers in float, --min-sqnr asks for less, and --allow-collapse writes the file as it is",
    )
