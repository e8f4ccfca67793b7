"""``relu-deploy build-engine``: an ONNX file to an engine, with the steps between as needed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.text import Text

from relu_deploy.cli import inspect, quantize, rewrite
from relu_deploy.cli.accuracy_options import Kept, accuracy_options, check_needs_data, write_report
from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.data_options import data_options, method_options
from relu_deploy.cli.int8_options import int8_options, parse_weight_bits
from relu_deploy.cli.safety import FileCommand, OutputPath
from relu_deploy.targets import TARGETS

if TYPE_CHECKING:
    from relu_deploy.engines.base import ShapeRange
    from relu_deploy.flow import EngineBuilt
    from relu_deploy.int8.drift import OutputDrift

_EXTENTS = r"\d+(?:x\d+)*"
_SHAPES = re.compile(rf"(?P<name>.+)=(?P<first>{_EXTENTS})(?:\.\.(?P<second>{_EXTENTS})\.\.(?P<third>{_EXTENTS}))?")


# An engine has its manifest beside it, and its weights when they are too large for one file.
_ENGINE = OutputPath(beside=(".json", ".data"))
_KEPT = OutputPath(holds=("rewritten.onnx", "ranges.json", "int8.onnx", "steps.json"))


def _read_shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, ShapeRange]:
    """``NAME=MIN..OPT..MAX`` or ``NAME=SHAPE``, any number of times."""
    from relu_deploy.engines.base import ShapeRange

    ranges = {}
    for value in values:
        if (found := _SHAPES.fullmatch(value)) is None:
            raise click.BadParameter(f"{value!r} is not of the form NAME=1x3x32x32..8x3x32x32..64x3x32x32", ctx, param)
        first, second, third = (
            tuple(int(extent) for extent in (found[part] or found["first"]).split("x"))
            for part in ("first", "second", "third")
        )
        ranges[found["name"]] = ShapeRange(first, second, third)
    return ranges


@click.command(
    "build-engine", cls=FileCommand, short_help="Build an engine; rewrites, calibrates and quantises as needed."
)
@click.argument("model", type=INPUT_FILE, metavar="MODEL.onnx")
@click.option("-o", "--output", required=True, type=_ENGINE, metavar="ENGINE", help="The engine to write.")
@click.option("--target", type=click.Choice(TARGETS), default="ort", show_default=True, help="Runtime to build for.")
@click.option(
    "--int8", "to_int8", is_flag=True, help="Quantise to INT8 first; without it the network is built as it is."
)
@data_options(required=False)
@method_options("--calib-method", "--calib-percentile")
@click.option("--ranges", type=INPUT_FILE, help="Ranges measured by calibrate on MODEL, instead of --calib.")
@int8_options
@click.option(
    "--sm",
    multiple=True,
    metavar="SM",
    default=("89",),
    show_default=True,
    help="tensorrt-rtx: compute capability without the dot; several for one engine that runs on all of them.",
)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_read_shapes,
    metavar="NAME=MIN..OPT..MAX",
    help="TensorRT: shapes of an input with dynamic axes, as image=1x3x32x32..8x3x32x32..64x3x32x32.",
)
@click.option(
    "--optimization-level", type=click.IntRange(0, 5), help="TensorRT: how long to search.  [default: its own]"
)
@click.option(
    "--workspace", type=click.IntRange(min=1), metavar="MIB", help="TensorRT: most scratch memory on the card."
)
@accuracy_options
@click.option(
    "--require-int8", is_flag=True, help="Write no engine (exit 1) when a layer given INT8 would run in float."
)
@click.option("--log", type=OUTPUT_FILE, help="TensorRT: also write the compiler's verbose log here.")
@click.option("--keep", type=_KEPT, metavar="DIR", help="Keep what lies between: rewritten and INT8 ONNX, ranges.")
@json_option
def command(
    model: Path, output: Path, target: str, to_int8: bool, data: str | None, preprocess: str | None,
    samples: int | None, batch_size: int, method: str, percentile: float | None, ranges: Path | None, weight_bits: str,
    weight_granularity: str, float_part: str, channel_fusion: str, keep_float: tuple[str, ...], sm: tuple[str, ...],
    shapes: dict[str, ShapeRange], optimization_level: int | None, workspace: int | None, require_int8: bool,
    min_sqnr: float, correct: bool, report_path: Path | None, allow_collapse: bool,
    log: Path | None, keep: Path | None, json_path: str | None,
) -> None:  # fmt: skip
    """Build an engine from MODEL.onnx.

    The float network is rewritten (activations that are exactly ReLU collapse, BatchNorm folds); with --int8 it is then
    calibrated on DATA, or takes --ranges, and quantised in the number format of the target. What the compiler made of
    it is read back and reported: layers in int8 and in float, activations left, kernels, bytes moved.

    \b
    Examples:
      relu-deploy build-engine student.onnx --int8 --calib train.npy -o student.ort.onnx
      relu-deploy build-engine student.onnx --int8 --ranges ranges.json --target tensorrt-rtx --sm 89 -o student.engine
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib.inputs import model_inputs
    from calib.sources import open_source
    from relu_deploy.engines.base import BuildConfig
    from relu_deploy.flow import Int8Plan, build_engine
    from relu_deploy.graph import load_model

    config = BuildConfig(
        target=target,  # type: ignore[arg-type]  # click.Choice has checked it
        sm=sm, shapes=shapes, optimization_level=optimization_level, workspace_mib=workspace, require_int8=require_int8,
        log=log,
    )  # fmt: skip
    if not to_int8 and (data is not None or ranges is not None):
        raise click.UsageError("--calib and --ranges are for INT8 builds: add --int8, or leave them out")
    if data is None and (method, percentile) != ("max", None):
        raise click.UsageError("--calib-method is for --calib; a ranges file has its own method")
    if percentile is not None and method != "percentile":
        raise click.UsageError("--calib-percentile is for --calib-method percentile")
    network, plan = load_model(model), None
    kept = Kept.parse(keep_float, network)
    check_needs_data(data, kept, report_path)
    if to_int8:
        width = parse_weight_bits(weight_bits)
        source = None if data is None else open_source(data, model_inputs(network), preprocess=preprocess)
        plan = Int8Plan(
            source=source,
            ranges=ranges,
            samples=samples,
            batch_size=batch_size,
            weight_bits=width,
            keep_float=kept.names,
            weight_granularity=weight_granularity,
            channel_fusion=channel_fusion,
            method=method,
            percentile=percentile,
            float_part=float_part,
            keep_worst=kept.worst,
            min_sqnr=min_sqnr,
            correct=correct,
            rank=report_path is not None,
            allow_collapse=allow_collapse,
        )
    with progress_bar() as progress:
        built = build_engine(network, output, config, int8=plan, keep=keep, progress=progress)
    if report_path is not None and built.quantize is not None:
        write_report(report_path, built.quantize)
    emit(built, json_path, lambda: render(built, output))


def render(built: EngineBuilt, output: Path) -> RenderableType:
    """All steps, one paragraph each."""
    from relu_deploy.engines.inspect import inspect_engine

    parts: list[RenderableType] = [rewrite.render(built.rewrite)]
    if built.calibration is not None:
        used = built.calibration
        parts.append(Text(f"calibration: {used.method} over {used.samples} samples, {used.tensors} tensors"))
    if built.quantize is not None:
        parts.append(quantize.render(built.quantize))
    parts.extend(_drift(output) for output in built.drift)
    parts.append(inspect.render(inspect_engine(output), layers=False))
    parts.extend(Text(f"kept {file}") for file in built.kept)
    return Group(*parts)


def _drift(output: OutputDrift) -> Text:
    """One output of the INT8 network against the float one's."""
    found = "equal" if output.max_abs_error == 0 else "not finite"
    if output.sqnr_db is not None:
        found = f"SQNR {output.sqnr_db:.1f} dB, largest error {output.max_abs_error:.3g}"
    text = f"INT8 against float, output {output.name}, {output.samples} calibration samples: {found}"
    if not output.collapsed:
        return Text(text)
    why = "COLLAPSED: check that the calibration data is what the network is fed in use, or keep layers in float"
    return Text(f"{text}. {why}", style="bold red")
