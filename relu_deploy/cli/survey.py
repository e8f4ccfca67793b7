"""``relu-deploy survey``: every activation of a network, and what it would become."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from relu_deploy.passes.survey import Site, Survey
    from relu_deploy.report import PassReport

_COUNTED = ("n", "kind", "spelling", "where", "after", "becomes", "bound")
_LEFT = ("n", "kind", "spelling", "where", "why")
# A screen of 80 columns has room for the longest names of kinds without a break.
_KIND_WIDTH = 12


@click.command("survey", cls=FileCommand, short_help="List every activation, and what it would become.")
@click.argument("model", type=INPUT_FILE)
@click.option("--each", is_flag=True, help="One line for each activation, not for each kind and spelling.")
@click.option(
    "--what-if",
    type=click.Choice(["relu"]),
    help="Also write the network with ReLU for every smooth activation, to -o.",
)
@click.option("-o", "--output", type=OUTPUT_FILE, help="Where the network of --what-if goes.")
@json_option
def command(model: Path, each: bool, what_if: str | None, output: Path | None, json_path: str | None) -> None:
    """List every activation of MODEL: what it is, where it is, what it would become, and what stays and why.

    MODEL is an ONNX file. Activations are recognised by what they compute, in whatever operators they are spelled.
    Those behind linear layers are counted; gates (squeeze-excite, GLU), heads, attention and whatever is inside If,
    Loop or LSTM are left alone.

    The bound is how far an activation is from ReLU at most, proven for every finite input of its type. "Relu" with
    bound 0 is what rewrite makes of it; "needs training" is work for distill.

    --what-if relu writes the network as it would be with ReLU, to measure how fast it is before a student is trained.
    It is not trained and computes nonsense; its metadata say so, and every command that reads it repeats it.

    \b
    Examples:
      relu-deploy survey original.onnx
      relu-deploy survey original.onnx --what-if relu -o untrained.onnx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    if (what_if is None) != (output is None):
        raise click.UsageError("--what-if and -o go together: the first says what to write, the second where")
    from relu_deploy.graph import load_model, save_model
    from relu_deploy.passes.survey import survey
    from relu_deploy.passes.what_if import replace_by_relu

    network = load_model(model)
    found = survey(network)
    if output is not None:
        untrained, replaced = replace_by_relu(network, found)
        save_model(untrained, output)
        found = dataclasses.replace(found, what_if=replaced)
    emit(found, json_path, lambda: render(found, each=each, output=output))


def render(found: Survey, *, each: bool = False, output: Path | None = None) -> RenderableType:
    """The survey as a person reads it."""
    parts: list[RenderableType] = []
    counted = [site for site in found.activations if site.left_alone is None]
    left = [site for site in found.activations if site.left_alone is not None]
    if counted:
        parts.append(_table(_COUNTED, _groups(counted, _counted_row, each=each)))
    if left:
        parts.append(Text("left alone:", style="bold"))
        parts.append(_table(_LEFT, _groups(left, _left_row, each=each)))
    parts.append(Text(f"activations: {_numbers(found.counts)}; left alone: {_numbers(found.left_alone)}"))
    parts += [Text(f"note: {note}", style="dim") for note in found.notes]
    return Group(*parts, *_what_if(found.what_if, output))


def _table(columns: Sequence[str], rows: list[tuple[str, ...]]) -> Table:
    table = Table()
    for column in columns:
        table.add_column(
            column,
            overflow="fold",
            justify="right" if column == "n" else "left",
            min_width=_KIND_WIDTH if column == "kind" else None,
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


Row = Callable[["list[Site]"], "tuple[str, ...]"]


def _groups(sites: list[Site], row: Row, *, each: bool) -> list[tuple[str, ...]]:
    """One row for each fate, in order of first appearance; for each activation where asked."""
    groups: dict[object, list[Site]] = {}
    for number, site in enumerate(sites):
        same = (site.detail, site.spelling, site.becomes, site.bound, site.left_alone)
        groups.setdefault((number if each else None, same), []).append(site)
    return [row(group) for group in groups.values()]


def _counted_row(sites: list[Site]) -> tuple[str, ...]:
    first = sites[0]
    from relu_deploy.passes.certificate import above

    return (*_place(sites), _after(sites), first.becomes, "" if first.bound is None else above(first.bound))


def _left_row(sites: list[Site]) -> tuple[str, ...]:
    return (*_place(sites), str(sites[0].left_alone))


def _place(sites: list[Site]) -> tuple[str, ...]:
    first = sites[0]
    said = first.kind.replace("_", "")
    what = first.kind if first.detail.lower().replace(" ", "") == said else f"{first.kind}: {first.detail}"
    spelling = first.spelling.replace("-", " ")  # so that lines break between operators
    return (str(len(sites)), what, spelling, first.name + (" ..." if len(sites) > 1 else ""))


def _after(sites: list[Site]) -> str:
    """The linear layers before: by name for one activation, by operator for several."""
    if len(sites) == 1:
        layer = sites[0].after
        return "none" if layer is None else f"{layer.op} {layer.name}"
    operators = Counter("none" if site.after is None else site.after.op for site in sites)
    return ", ".join(f"{number} {op}" if len(operators) > 1 else op for op, number in operators.items())


def _numbers(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "none"


def _what_if(replaced: PassReport | None, output: Path | None) -> list[Text]:
    """What --what-if did."""
    if replaced is None:
        return []
    reasons = Counter(skip.reason for skip in replaced.skipped)
    lines = [Text(f"{number} stay in {output}: {reason}") for reason, number in reasons.items()]
    if not replaced.changed:
        return [*lines, Text(f"nothing was replaced: {output} is the network as it was")]
    done = f"{output}: {len(replaced.changed)} activations are ReLU; not trained, for speed measurement only"
    return [*lines, Text(done, style="yellow")]
