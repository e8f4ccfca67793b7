"""``relu-deploy lint``: what is wrong with a Q/DQ file, as one target takes it; and a file without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand
from relu_deploy.targets import TARGETS

if TYPE_CHECKING:
    from relu_deploy.int8.lint import Finding, LintReport
    from relu_deploy.int8.lint.fix import Fixed

# So many nodes of one fault are named before they are only counted.
_FEW = 3
_COLOURS = {"rejected": "red", "wrong": "red", "float": "yellow"}


@click.command("lint", cls=FileCommand, short_help="Name the faults of a Q/DQ file, and mend them.")
@click.argument("model", type=INPUT_FILE, metavar="MODEL.onnx")
@click.option("--target", type=click.Choice(TARGETS), default="ort", show_default=True, help="Runtime to judge by.")
@click.option("--fix", "fixed_path", type=OUTPUT_FILE, metavar="OUT.onnx", help="Also write the file, mended.")
@click.option("--each", is_flag=True, help="One line for each node, not for each kind of fault.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, model: Path, target: str, fixed_path: Path | None, each: bool, json_path: str | None
) -> None:
    """Say what is wrong with MODEL.onnx, a quantised network of any tool, as the target takes it.

    Every rule says what the target was seen to do: TensorRT-RTX 1.7's compiler and ONNX Runtime's optimiser were asked.
    tensorrt is taken to be like tensorrt-rtx, and was not tried.

    --fix writes a network without the faults that can be mended without data, and says what each change does to the
    numbers. The fixed network is checked, run beside the original, and linted again.

    Exit code 1: the target rejects the file, gets other numbers than it says, or runs a quantised layer in float; with
    --fix that is asked of the mended file.

    \b
    Examples:
      relu-deploy lint theirs.int8.onnx --target tensorrt-rtx
      relu-deploy lint theirs.int8.onnx --target tensorrt-rtx --fix mended.int8.onnx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.graph import read_model, save_model
    from relu_deploy.int8.lint import lint
    from relu_deploy.int8.lint.fix import fix

    network = read_model(model)
    if fixed_path is None:
        report = lint(network, target)  # type: ignore[arg-type]  # click.Choice has checked it
        emit(report, json_path, lambda: render(report, each=each))
        ctx.exit(bool(report.faults))
    mended, done = fix(network, target)  # type: ignore[arg-type]
    save_model(mended, fixed_path)
    emit(done, json_path, lambda: _render_fixed(done, fixed_path, each=each))
    ctx.exit(bool(done.after.faults))


def render(report: LintReport, *, each: bool = False) -> RenderableType:
    """The report as a person reads it: one row for each kind of fault, or for each node."""
    parts: list[RenderableType] = [
        Text(
            f"{report.target}: {report.quantized_layers} of {report.layers} linear layers quantised, "
            f"{report.quantizers} Q and DQ, opset {report.opset}, IR {report.ir_version}"
        )
    ]
    if report.findings:
        table = Table("what", "rule", "n", "where", "consequence", "fix", box=None)
        for group in _groups(report.findings, each=each):
            table.add_row(*_row(group))
        parts.append(table)
    counts = ", ".join(f"{number} {rule}" for rule, number in report.counts().items())
    parts.append(Text(f"findings: {counts or 'none'}"))
    return Group(*parts)


def _groups(findings: tuple[Finding, ...], *, each: bool) -> list[list[Finding]]:
    """Findings that differ in node and numbers only."""
    groups: dict[object, list[Finding]] = {}
    for number, finding in enumerate(findings):
        key = (number if each else None, finding.rule, finding.severity, finding.fix, finding.automatic)
        groups.setdefault(key, []).append(finding)
    return list(groups.values())


def _row(group: list[Finding]) -> tuple[Text, ...]:
    first = group[0]
    where = ", ".join(finding.node or "the file" for finding in group[:_FEW]) + (", ..." if len(group) > _FEW else "")
    fix = first.fix + (" (--fix)" if first.automatic else "")
    cells = (first.severity, first.rule, str(len(group)), where, first.consequence, fix)
    return Text(cells[0], style=_COLOURS.get(first.severity, "")), *map(Text, cells[1:])


def _render_fixed(done: Fixed, output: Path, *, each: bool) -> RenderableType:
    """What was found, what was changed, how far the outputs moved, and what is left."""
    parts: list[RenderableType] = [render(done.before, each=each)]
    for report in done.passes:
        if report.changed:
            parts.append(Text(f"{report.name}: {len(report.changed)} nodes; {report.notes.get('', '')}"))
        parts += [Text(f"  left: {skip.name}: {skip.reason}") for skip in report.skipped]
    for name, decibels in done.sqnr_db.items():
        moved = "equal" if decibels is None else f"SQNR {decibels:.1f} dB"
        parts.append(Text(f"output {name}, mended against unmended, random inputs: {moved}"))
    parts += [Text(f"note: {note}", style="dim") for note in done.notes]
    parts += [Text("after mending:", style="bold"), render(done.after, each=each), Text(f"wrote {output}")]
    return Group(*parts)
