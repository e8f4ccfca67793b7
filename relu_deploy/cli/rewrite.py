"""``relu-deploy rewrite``: the graph passes on a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from relu_deploy.passes.run import RewriteReport
    from relu_deploy.report import PassReport

# Names listed for one line of a table; the JSON report has them all.
_NAMES = 3


@click.command("rewrite", cls=FileCommand, short_help="Collapse what is exactly ReLU, and clean the graph up.")
@click.argument("model", type=INPUT_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="Where the rewritten network goes.")
@click.option("--no-verify", is_flag=True, help="Do not compare its outputs with the original's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs of that comparison.")
@json_option
def command(model: Path, output: Path, no_verify: bool, seed: int, json_path: str | None) -> None:
    """Collapse what is exactly ReLU into Relu nodes, and clean the graph up for INT8.

    MODEL is an ONNX file. A region of nodes is replaced only if it is proven to be ReLU, whatever its spelling; every
    other activation is listed with what it is. Where nothing is to be done, the output is a copy of the input.

    \b
    Example:
      relu-deploy rewrite student.onnx -o student.relu.onnx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.graph import load_model, save_model
    from relu_deploy.passes.run import rewrite

    original = load_model(model)
    result, report = rewrite(original, verify=not no_verify, seed=seed)
    save_model(result, output)
    emit(report, json_path, lambda: render(report, output))


def render(report: RewriteReport, output: Path | None = None) -> Group:
    """A table of what changed and what did not, and how the result was checked."""
    table = Table("pass", "", "nodes", "why")
    for entry in report.passes:
        for row in _rows(entry):
            table.add_row(*row)
    written = "" if output is None else f": {output}"
    lines = [Text(f"{report.nodes_before} nodes -> {report.nodes_after}{written}"), _verdict(report)]
    return Group(table, *lines) if table.row_count else Group(*lines)


def _rows(entry: PassReport) -> list[tuple[str, str, str, str]]:
    """Nodes of the same fate and reason share a line."""
    fates = [("changed", name, entry.notes.get(name, "")) for name in entry.changed]
    fates += [("skipped", skip.name, skip.reason) for skip in entry.skipped]
    counts = Counter((fate, reason) for fate, _, reason in fates)
    rows = []
    for (fate, reason), count in counts.items():
        names = [name for f, name, r in fates if (f, r) == (fate, reason)]
        shown = ", ".join(names[:_NAMES]) + (", ..." if count > _NAMES else "")
        rows.append((entry.name, f"{fate} {count}", shown, reason))
    return rows


def _verdict(report: RewriteReport) -> Text:
    check = report.verification
    if not report.changed:
        return Text("nothing to change: the network stays as it was")
    if check is None:
        return Text("outputs were not compared with the original's", style="yellow")
    if not check.samples:
        return Text(f"outputs could not be compared with the original's: {check.note}", style="yellow")
    worst = max((output.error for output in check.outputs), default=0.0)
    how = "equal bit for bit" if report.exact else f"largest relative error {worst:.2g}"
    return Text(
        f"outputs compared on {check.samples} random inputs in ONNX Runtime: {how}. {check.note}".rstrip(),
        style="green",
    )
