"""``relu-deploy export``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from relu_deploy.export.report import ExportReport


@click.command("export", cls=FileCommand, short_help="Export a torch model; written only if ONNX Runtime agrees.")
@click.argument("model")
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="The ONNX file to write.")
@click.option("--weights", type=INPUT_FILE, help="The model's state_dict: .safetensors, or .pt without pickled code.")
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=SHAPE[:DTYPE[:LO..HI]]",
    help="One input: image=1x3x32x32, ids=1x16:int64:0..999. Repeat for more. A .pt2 of fixed shapes needs none.",
)  # fmt: skip
@click.option(
    "--dynamic",
    multiple=True,
    metavar="NAME:AXIS=MIN..MAX",
    help="An axis whose size may vary: image:0=1..64. Repeat for more.",
)
@click.option("--opset", type=int, default=20, show_default=True, help="Operator set of the file.")
@click.option("--exporter", type=click.Choice(["dynamo", "torchscript"]), default="dynamo", show_default=True)
@click.option(
    "--rtol", type=float, help="Largest error allowed, relative to an output's largest magnitude [float32: 1e-4]."
)
@click.option("--atol", type=float, help="Added to it [float32: 1e-6].")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs compared.")
@json_option
def command(
    model: str,
    output: Path,
    weights: Path | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    opset: int,
    exporter: Literal["dynamo", "torchscript"],
    rtol: float | None,
    atol: float | None,
    seed: int,
    json_path: str | None,
) -> None:
    """Export a torch MODEL to ONNX, and write it only when ONNX Runtime computes what torch computes.

    MODEL is module:factory or path/to/file.py:factory (called without arguments; your code is run), or a .pt2 archive
    of torch.export.save. Weights and archives are read as data: what needs pickle to run code is refused.

    \b
    Example, after relu-deploy demo:
      relu-deploy export relu_deploy.demo.network:build_relu_network --weights demo-run/student.safetensors \\
          --input image=1x1x32x32 --dynamic image:0=1..64 -o student.onnx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.export.run import export_model
    from relu_deploy.export.source import load_factory, own_inputs
    from relu_deploy.export.specs import parse_dynamic, parse_input

    specs = [parse_input(text) for text in inputs]
    axes = [parse_dynamic(text) for text in dynamic]
    module = load_factory(model, weights=weights)
    if not specs:
        specs = list(own_inputs(module))
    with progress_bar() as progress:
        report = export_model(
            module, specs, output, dynamic=axes, opset=opset, exporter=exporter, source=model,
            rtol=rtol, atol=atol, seed=seed, progress=progress,
        )  # fmt: skip
    emit(report, json_path, lambda: _render(report))


def _render(report: ExportReport) -> Group:
    table = Table("output", "dtype", "worst error", "allowed")
    for check in report.outputs:
        table.add_row(check.name, check.dtype, f"{check.worst:.2g}", f"{check.limit:.2g}")
    inputs = ", ".join(map(str, report.inputs))
    lines = [
        f"{report.source} -> {report.path} (opset {report.opset}, IR {report.ir_version}, {report.exporter})",
        f"inputs: {inputs}",
        f"compared with ONNX Runtime on {report.samples} sets of inputs:",
    ]
    return Group(*(Text(line) for line in lines), table, *(Text(f"note: {note}") for note in report.notes))
