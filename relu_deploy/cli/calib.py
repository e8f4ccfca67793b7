"""``relu-deploy calib``: what can be done with ranges files: joining shards, exchange with TensorRT."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calib.options import METHODS
from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from calib.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class RangesReport:
    """What was made.

    Attributes:
        output: The file that was written.
        method: How ranges are to be chosen.
        samples: Samples that they rest on; 0 where that is not known.
        tensors: Tensors with a range.
        skipped: Tensors without one, with the reason.
        notes: What a person should know of the file.
    """

    output: Path
    method: str
    samples: int
    tensors: int
    skipped: dict[str, str]
    notes: tuple[str, ...] = ()


@click.group("calib", short_help="Join shards of a calibration; read and write TensorRT's calibration cache.")
def command() -> None:
    """Work with ranges files, which calibrate writes.

    \b
    Examples:
      relu-deploy calib merge part1.json part2.json -o ranges.json
      relu-deploy calib to-tensorrt ranges.json -o calibration.cache
      relu-deploy calib from-tensorrt calibration.cache student.onnx -o ranges.json
    """  # noqa: D301  \b is click's mark for text that keeps its lines


@command.command("merge", cls=FileCommand, short_help="Join what shards measured.")
@click.argument("parts", metavar="PART.json...", nargs=-1, required=True, type=INPUT_FILE)
@click.option(
    "-o", "--output", required=True, metavar="RANGES.json", type=OUTPUT_FILE, help="The ranges file to write."
)
@click.option(
    "--allow-overlap", is_flag=True, help="Join also parts that hold the same samples, which then count twice."
)
@json_option
def merge_command(parts: tuple[Path, ...], output: Path, allow_overlap: bool, json_path: str | None) -> None:
    """Join ranges files of one network into what one run over all their samples would have measured, bit for bit.

    Parts of other networks, methods or settings are refused, and so are parts that hold the same samples.

    \b
    Example:
      relu-deploy calib merge part1.json part2.json part3.json -o ranges.json
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.merge import merge, shared_samples
    from relu_deploy.errors import RangesError

    loaded = [ranges_file.load(part) for part in parts]
    shared = shared_samples(*loaded)
    if shared and not allow_overlap:
        raise RangesError(
            f"the parts share samples: at least {shared} are in more than one of them",
            hint="leave out the part that is given twice, or say --allow-overlap where the data itself repeats samples",
        )
    ranges = merge(*loaded)
    ranges_file.save(ranges, output)
    notes = (f"{shared} samples are known to be in more than one part, and count twice",) if shared else ()
    _tell(_report(output, ranges, notes), json_path)


@command.command("to-tensorrt", cls=FileCommand, short_help="Write a calibration cache for TensorRT 10 and older.")
@click.argument("ranges_path", metavar="RANGES.json", type=INPUT_FILE)
@click.option(
    "-o", "--output", required=True, metavar="CACHE", type=OUTPUT_FILE, help="The calibration cache to write."
)
@click.option(
    "--method", type=click.Choice(METHODS), help="Choose ranges so, where the file has histograms.  [default: its own]"
)
@click.option(
    "--version",
    default="8601",
    show_default=True,
    metavar="DIGITS",
    help="TensorRT that shall read it, as in the first line of a cache that it wrote: others refuse it.",
)
@click.option(
    "--algorithm",
    default="EntropyCalibration2",
    show_default=True,
    metavar="NAME",
    help="Calibrator that the builder is given: EntropyCalibration2, MinMaxCalibration, EntropyCalibration.",
)
@json_option
def to_tensorrt_command(
    ranges_path: Path, output: Path, method: str | None, version: str, algorithm: str, json_path: str | None
) -> None:
    """Write the scales of RANGES.json as a calibration cache, which TensorRT's builder takes up to version 10.

    \b
    Example:
      relu-deploy calib to-tensorrt ranges.json --version 10300 -o calibration.cache
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.trt_cache import to_cache, write_cache

    ranges = ranges_file.load(ranges_path)
    cache, skipped = to_cache(ranges, method=method, version=version, algorithm=algorithm)
    write_cache(cache, output)
    used = method or ranges.method
    _tell(RangesReport(output, used, ranges.samples, len(cache.scales), skipped, (cache.header,)), json_path)


@command.command("from-tensorrt", cls=FileCommand, short_help="Read a calibration cache of TensorRT.")
@click.argument("cache_path", metavar="CACHE", type=INPUT_FILE)
@click.argument("model_path", metavar="MODEL.onnx", type=INPUT_FILE)
@click.option(
    "-o", "--output", required=True, metavar="RANGES.json", type=OUTPUT_FILE, help="The ranges file to write."
)
@json_option
def from_tensorrt_command(cache_path: Path, model_path: Path, output: Path, json_path: str | None) -> None:
    """Make a ranges file for MODEL.onnx of a calibration cache that TensorRT wrote for it.

    \b
    Example:
      relu-deploy calib from-tensorrt calibration.cache student.onnx -o ranges.json
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.graph import activations
    from calib.trt_cache import from_cache, read_cache
    from relu_deploy.graph import load_model

    cache, model = read_cache(cache_path), load_model(model_path)
    ranges = from_cache(cache, model)
    ranges_file.save(ranges, output)
    unknown = len(cache.scales.keys() - set(activations(model)))
    notes = (
        f"{cache.header}: that it was made for this network cannot be told from it, nor on which data",
        "ranges are symmetric unless the network shows that a tensor is never negative, and there are none of channels",
        *(
            (f"{unknown} names in the cache are not in the network (TensorRT names some tensors itself)",)
            if unknown
            else ()
        ),
    )
    _tell(_report(output, ranges, notes), json_path)


def _report(output: Path, ranges: Ranges, notes: tuple[str, ...]) -> RangesReport:
    """What is in a ranges file."""
    return RangesReport(output, ranges.method, ranges.samples, len(ranges.tensors), dict(ranges.skipped), notes)


def _tell(report: RangesReport, json_path: str | None) -> None:
    """Print a report."""
    emit(report, json_path, lambda: render(report))


def render(report: RangesReport) -> RenderableType:
    """Show a report to a person."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("wrote", str(report.output))
    samples = f"over {report.samples} samples" if report.samples else "over samples that are not known"
    facts.add_row("method", f"{report.method} {samples}")
    facts.add_row("tensors", str(report.tensors))
    for name, reason in list(report.skipped.items())[:8]:
        facts.add_row("skipped", f"{name}: {reason}")
    if len(report.skipped) > 8:
        facts.add_row("", f"and {len(report.skipped) - 8} more")
    return Group(facts, *(Text(f"note: {note}") for note in report.notes))
