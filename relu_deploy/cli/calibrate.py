"""``relu-deploy calibrate``: measure the range of every activation."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table

from relu_deploy.cli.common import INPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.data_options import data_options, method_options
from relu_deploy.cli.safety import FileCommand, OutputPath

if TYPE_CHECKING:
    from calib.ranges import Ranges
    from calib.summary import DeadChannels
    from relu_deploy.report import Skip

_PARTIAL = ".partial"
_RANGES = OutputPath(beside=(_PARTIAL,))


@dataclasses.dataclass(frozen=True)
class CalibrationReport:
    """What was measured.

    Attributes:
        output: The ranges file.
        method: How ranges were chosen.
        samples: Samples fed.
        tensors: Tensors measured.
        seconds_per_sample: Wall time, loading included, of the samples of this run.
        widest: Tensors with the largest magnitudes.
        dead_channels: Channels that a Relu or Clip never let through.
        skipped: Tensors without a range.
        model: Fingerprint of the network.
        data: Fingerprint of the data.
        percentile: Of the method of that name.
        resumed: Samples that an earlier run had measured.
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
    percentile: float | None = None
    resumed: int = 0


@click.command("calibrate", cls=FileCommand, short_help="Measure the range of every activation over data.")
@click.argument("model_path", metavar="IN.onnx", type=INPUT_FILE)
@data_options()
@click.option("-o", "--output", required=True, metavar="RANGES.json", type=_RANGES, help="The ranges file to write.")
@method_options("--method", "--percentile")
@click.option("--channels", is_flag=True, help="Keep a histogram of each channel too; files get several times larger.")
@click.option(
    "--shard",
    "shard_text",
    metavar="I/N",
    help="Only every N-th sample, from the I-th on; see 'relu-deploy calib merge'.",
)
@click.option("--resume", is_flag=True, help="Go on where a run that was stopped left RANGES.json.partial.")
@click.option(
    "--cluster",
    metavar="ADDRESS",
    help="Spread samples over a Dask cluster: its scheduler, as tcp://host:8786, or local:N for N processes here.",
)
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
    percentile: float | None,
    channels: bool,
    shard_text: str | None,
    resume: bool,
    cluster: str | None,
    threads: int | None,
    json_path: str | None,
) -> None:
    """Measure the range of every activation of IN.onnx over DATA, for quantize.

    With the methods percentile, entropy and mse, RANGES.json also keeps histograms, from which quantize chooses the
    range for its target. A run that takes longer than half a minute keeps what it measured in RANGES.json.partial.

    \b
    Examples:
      relu-deploy calibrate student.onnx --calib train.npy -o ranges.json
      relu-deploy calibrate detector.onnx --calib photos/ --preprocess letterbox,scale=1 -o ranges.json
      relu-deploy calibrate student.onnx --calib train.npy --method entropy --shard 1/4 -o part1.json
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.checkpoint import Checkpoint
    from calib.cluster import Job, calibrate_on, connect
    from calib.inputs import model_inputs
    from calib.run import calibrate
    from calib.shards import parse_shard
    from calib.sources import open_source
    from calib.summary import dead_channels
    from relu_deploy.graph import load_model

    if percentile is not None and method != "percentile":
        raise click.UsageError("--percentile is for --method percentile")
    if cluster and (resume or shard_text):
        raise click.UsageError("--cluster makes shards of its own, and does not resume: leave --shard and --resume out")
    model = load_model(model_path)
    shard = parse_shard(shard_text) if shard_text else None
    options = {
        "method": method, "percentile": percentile, "channels": channels, "batch_size": batch_size,
        "max_samples": samples, "threads": threads,
    }  # fmt: skip
    checkpoint = Checkpoint(output.with_name(output.name + _PARTIAL), resume=resume)
    started = time.perf_counter()
    with progress_bar() as progress:
        if cluster:
            job = Job(model_path.resolve(), data, preprocess, options)
            with connect(cluster) as client:
                ranges = calibrate_on(client, job, progress=progress)
        else:
            source = open_source(data, model_inputs(model), preprocess=preprocess)
            ranges = calibrate(
                model,
                source,
                shard=shard,
                checkpoint=checkpoint,
                progress=progress,
                **options,  # type: ignore[arg-type]
            )
    seconds = (time.perf_counter() - started) / max(ranges.samples - checkpoint.resumed, 1)
    ranges_file.save(ranges, output)
    checkpoint.remove()
    report = _report(ranges, output, seconds, dead_channels(ranges, model), checkpoint.resumed)
    emit(report, json_path, lambda: render(report))


def _report(
    ranges: Ranges, output: Path, seconds: float, dead: tuple[DeadChannels, ...], resumed: int
) -> CalibrationReport:
    """Put the report together."""
    from calib.summary import widest
    from relu_deploy.report import Skip

    skipped = tuple(Skip(name, reason) for name, reason in ranges.skipped.items())
    return CalibrationReport(
        output, ranges.method, ranges.samples, len(ranges.tensors), seconds, dict(widest(ranges)), dead, skipped,
        ranges.model, ranges.data, ranges.percentile, resumed,
    )  # fmt: skip


def render(report: CalibrationReport) -> RenderableType:
    """Show a report to a person."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("ranges", str(report.output))
    name = report.method if report.percentile is None else f"{report.method} {report.percentile:g}"
    earlier = f" ({report.resumed} of them in an earlier run)" if report.resumed else ""
    facts.add_row(
        "method", f"{name} over {report.samples} samples{earlier}, {1e3 * report.seconds_per_sample:.3g} ms a sample"
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
