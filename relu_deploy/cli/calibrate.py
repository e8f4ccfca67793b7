"""``relu-deploy calibrate``: measure the range of every activation."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table

from calib.options import METHODS
from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.data_options import data_options
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from calib.ranges import Ranges
    from calib.summary import DeadChannels
    from relu_deploy.report import Skip


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What was measured.

    Attributes:
        output: The ranges file.
        method: How ranges were chosen.
        samples: Samples fed.
        tensors: Tensors measured.
        seconds_per_sample: Wall time, loading included.
        widest: Tensors with the largest magnitudes.
        dead_channels: Channels that a Relu or Clip never let through.
        skipped: Tensors without a range.
        model: Fingerprint of the network.
        data: Fingerprint of the data.
    """

    output: Path
    method: str
    samples: int
    tensors: int
    seconds_per_sample: float
    widest: dict[str, float]
    dead_channels: tuple[DeadChannels, ...]
    skipped: tuple[Skip, ...]
    model: str
    data: str


@click.command("calibrate", cls=FileCommand, short_help="Measure the range of every activation over data.")
@click.argument("model_path", metavar="IN.onnx", type=INPUT_FILE)
@data_options()
@click.option(
    "-o", "--output", required=True, metavar="RANGES.json", type=OUTPUT_FILE, help="The ranges file to write."
)
@click.option("--method", type=click.Choice(METHODS), default="max", show_default=True, help="How a range is chosen.")
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Of onnxruntime.  [default: one a core]")
@json_option
def command(
    model_path: Path,
    data: str,
    preprocess: str | None,
    samples: int | None,
    batch_size: int,
    output: Path,
    method: str,
    threads: int | None,
    json_path: str | None,
) -> None:
    """Measure the range of every activation of IN.onnx over DATA, for quantize.

    \b
    Examples:
      relu-deploy calibrate student.onnx --calib train.npy -o ranges.json
      relu-deploy calibrate detector.onnx --calib photos/ --preprocess letterbox,scale=1 -o ranges.json
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.inputs import model_inputs
    from calib.run import calibrate
    from calib.sources import open_source
    from calib.summary import dead_channels
    from relu_deploy.graph import load_model

    model = load_model(model_path)
    source = open_source(data, model_inputs(model), preprocess=preprocess)
    started = time.perf_counter()
    with progress_bar() as progress:
        ranges = calibrate(
            model, source, method=method, batch_size=batch_size, max_samples=samples, threads=threads, progress=progress
        )
    seconds = (time.perf_counter() - started) / ranges.samples
    ranges_file.save(ranges, output)
    report = _report(ranges, output, seconds, dead_channels(ranges, model))
    emit(report, json_path, lambda: render(report))


def _report(ranges: Ranges, output: Path, seconds: float, dead: tuple[DeadChannels, ...]) -> CalibrationReport:
    """Put the report together."""
    from calib.summary import widest
    from relu_deploy.report import Skip

    skipped = tuple(Skip(name, reason) for name, reason in ranges.skipped.items())
    return CalibrationReport(
        output, ranges.method, ranges.samples, len(ranges.tensors), seconds, dict(widest(ranges)), dead, skipped,
        ranges.model, ranges.data,
    )  # fmt: skip


def render(report: CalibrationReport) -> RenderableType:
    """Show a report to a person."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("ranges", str(report.output))
    facts.add_row(
        "method", f"{report.method} over {report.samples} samples, {1e3 * report.seconds_per_sample:.3g} ms a sample"
    )
    facts.add_row("tensors", str(report.tensors))
    facts.add_row("widest", ", ".join(f"{name} {value:.4g}" for name, value in report.widest.items()))
    for dead in report.dead_channels:
        shown = ", ".join(map(str, dead.channels[:8])) + (", ..." if len(dead.channels) > 8 else "")
        facts.add_row("dead", f"{dead.tensor}: {len(dead.channels)} of {dead.of} channels are never above 0 ({shown})")
    for skip in report.skipped[:8]:
        facts.add_row("skipped", f"{skip.name}: {skip.reason}")
    if len(report.skipped) > 8:
        facts.add_row("", f"and {len(report.skipped) - 8} more")
    facts.add_row("model", report.model[:16])
    facts.add_row("data", report.data[:16])
    return Group(facts)
