"""``relu-deploy quantize``: a float ONNX file and its ranges to an INT8 one."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.accuracy_options import Kept, accuracy_lines, accuracy_options, check_needs_data, write_report
from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.data_options import data_options
from relu_deploy.cli.int8_options import int8_options, parse_weight_bits
from relu_deploy.cli.integer_options import integer_lines, integer_options
from relu_deploy.cli.safety import FileCommand
from relu_deploy.targets import TARGETS

if TYPE_CHECKING:
    from relu_deploy.int8.fuse import FusionReport
    from relu_deploy.int8.run import QuantReport

_GRAIN = {"channel": "channel", "tensor": "layer", "auto": "layer or channel"}


@click.command(
    "quantize",
    cls=FileCommand,
    epilog="Example: relu-deploy quantize student.onnx --ranges ranges.json --target ort -o student.int8.onnx",
)
@click.argument("model", type=INPUT_FILE)
@click.option("--ranges", required=True, type=INPUT_FILE, help="Ranges that 'relu-deploy calibrate' measured on MODEL.")
@click.option("--target", type=click.Choice(TARGETS), default="ort", show_default=True, help="Runtime the file is for.")
@click.option("-o", "--output", required=True, type=OUTPUT_FILE, help="INT8 ONNX file to write.")
@data_options(required=False)
@int8_options
@accuracy_options
@integer_options
@json_option
def command(
    model: Path,
    ranges: Path,
    target: str,
    output: Path,
    data: str | None,
    preprocess: str | None,
    samples: int | None,
    batch_size: int,  # noqa: ARG001 - the same options of data everywhere; here one sample at a time is looked at
    weight_bits: str,
    weight_granularity: str,
    float_part: str,
    channel_fusion: str,
    keep_float: tuple[str, ...],
    min_sqnr: float,
    correct: bool,
    report_path: Path | None,
    allow_collapse: bool,
    form: str,
    multipliers: Path | None,
    json_path: str | None,
) -> None:
    """Quantise MODEL to INT8 with Q/DQ in the number format of the target.

    ort gets uint8 activations (zero point 0 behind a ReLU, which the quantiser then replaces), int8 weights per
    output channel and int32 biases. tensorrt-rtx and tensorrt get int8 symmetric activations, int8 weights, biases in
    float, and float16 for what is left in float.

    \b
    Example:
      relu-deploy quantize student.onnx --ranges ranges.json --target ort -o student.int8.onnx
      relu-deploy quantize student.onnx --ranges ranges.json --format qoperator --multipliers t.json -o student.q.onnx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from calib import ranges as ranges_file
    from calib.inputs import model_inputs
    from calib.sources import open_source
    from relu_deploy.graph import load_model, save_model
    from relu_deploy.int8.evidence import Evidence
    from relu_deploy.int8.qoperator_files import check_integer_options, write_integers
    from relu_deploy.int8.run import quantize
    from relu_deploy.int8.sensitivity import refuse_collapse

    check_integer_options(target, form, multipliers)
    source = load_model(model)
    kept = Kept.parse(keep_float, source)
    check_needs_data(data, kept, report_path)
    with progress_bar() as progress:
        evidence = None
        if data is not None:
            evidence = Evidence(
                open_source(data, model_inputs(source), preprocess=preprocess), samples, keep_worst=kept.worst,
                floor_db=min_sqnr, rank=report_path is not None, correct=correct, progress=progress,
            )  # fmt: skip
        quantized, report = quantize(
            source,
            ranges_file.load(ranges),
            target=target,
            weight_bits=parse_weight_bits(weight_bits),
            weight_granularity=weight_granularity,
            float_part=float_part,
            channel_fusion=channel_fusion,
            keep_float=kept.names,
            evidence=evidence,
        )
    if report_path is not None:
        write_report(report_path, report)
    if not allow_collapse:
        refuse_collapse(report.drift, report.sensitivity, min_sqnr)
    if form == "qdq" and multipliers is None:
        save_model(quantized, output)
    else:
        integer = write_integers(quantized, output, form=form, multipliers=multipliers)
        report = dataclasses.replace(report, integer=integer)
    emit(report, json_path, lambda: render(report, output))


def render(report: QuantReport, output: Path | None = None) -> RenderableType:
    """The report as a person reads it: a summary, the layers left in float, the warnings."""
    lines: list[RenderableType] = [Text(summary(report))]
    left = [layer for layer in report.layers if not layer.int8]
    if left:
        table = Table("layer in float", "operator", "why", box=None)
        for layer in left:
            table.add_row(layer.name, layer.op, layer.reason)
        lines.append(table)
    if report.fusion is not None and report.fusion.channels:
        lines.append(Text(fusion_line(report.fusion)))
    lines.extend(accuracy_lines(report))
    forms = Counter(note.split(",")[0] for note in report.folded.values())
    lines.extend(Text(f"{count} x {form}: activations without a kernel of their own") for form, count in forms.items())
    if report.integer is not None:
        lines.extend(integer_lines(report.integer))
    lines.extend(Text(f"warning: {warning}", style="yellow") for warning in report.warnings)
    if output is not None:
        lines.append(Text(f"wrote {output}"))
    return Group(*lines)


def fusion_line(fusion: FusionReport) -> str:
    """One line: how many channels were scaled, and what that is thought to bring."""
    layers = len(fusion.layers.changed)
    return f"channel fusion ({fusion.mode}): {fusion.channels} channels of {layers} layers scaled to fill their range"


def _float_part(report: QuantReport) -> str:
    """What became float16, and what did not, for the summary."""
    if report.float_part == "fp32":
        return ""
    kept = 0 if report.half is None else len(report.half.skipped)
    return "the rest in float16" + (f" but for {kept} nodes, " if kept else ", ")


def summary(report: QuantReport) -> str:
    """One line: how many layers, tensors and activations became what."""
    # Only an unsigned format has a lowest code of 0.0, which clips as a ReLU does.
    dropped = f"{len(report.dropped_activations)} ReLU or Clip became clipping, " if report.target == "ort" else ""
    return (
        f"{report.target}: {report.int8_layers} of {len(report.layers)} linear layers int8, "
        f"{report.weight_bits}-bit weights with a scale for each {_GRAIN[report.weight_granularity]}, "
        f"{len(report.activations)} tensors quantised, {dropped}{_float_part(report)}opset {report.opset}"
    )
