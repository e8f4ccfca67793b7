"""``relu-deploy rewrite``: the graph passes on a file."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, OUTPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand
from relu_deploy.targets import TARGETS, Target

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from calib.ranges import Ranges
    from relu_deploy.passes.approximate import Approximation
    from relu_deploy.passes.fold_dynamic import Folding
    from relu_deploy.passes.run import RewriteReport
    from relu_deploy.report import PassReport

# Samples that networks are compared on.
_MOST_SAMPLES = 16
# Names listed for one line of a table; the JSON report has them all.
_NAMES = 3


def _parse_range(_context: click.Context, _parameter: click.Parameter, text: str | None) -> tuple[float, float] | None:
    """Two finite numbers, the smaller one first."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is not two numbers with a comma between them, such as -8,8") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise click.BadParameter(f"{text!r} is no range: give two finite numbers, the smaller one first")
    return low, high


def _domain(
    tolerance: float | None, fold: float | None, ends: tuple[float, float] | None, ranges_path: Path | None
) -> tuple[float, float] | Ranges | None:
    """Where bounds have to hold."""
    from calib.ranges import load

    if ends and ranges_path:
        raise click.UsageError("--range and --ranges both say where the bound has to hold; give one of them")
    if fold is not None and not (math.isfinite(fold) and fold >= 0):
        raise click.UsageError("--fold-dynamic takes a finite number from 0 on, such as 0.01")
    if fold is not None and not ranges_path:
        raise click.UsageError("--fold-dynamic needs --ranges: what calibrate measured on MODEL")
    if tolerance is None and (ends or (ranges_path and fold is None)):
        raise click.UsageError(
            f"{'--range' if ends else '--ranges'} needs --collapse-tolerance; 0 collapses what is exactly ReLU there"
        )
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise click.UsageError("--collapse-tolerance takes a finite number from 0 on, such as 0.005")
    return load(ranges_path) if ranges_path else ends


def _samples(data: str, model: onnx.ModelProto) -> list[Mapping[str, np.ndarray]]:
    """The first samples of what a user named, one batch each."""
    from calib.batches import batches
    from calib.inputs import model_inputs
    from calib.sources import open_source

    specs = model_inputs(model)
    source = itertools.islice(open_source(data, specs), _MOST_SAMPLES)
    return [batch.feeds for batch in batches(source, specs, batch_size=1)]


@click.command("rewrite", cls=FileCommand, short_help="Collapse what is ReLU, and clean the graph up.")
@click.argument("model", type=INPUT_FILE)
@click.option("-o", "--output", type=OUTPUT_FILE, required=True, help="Where the rewritten network goes.")
@click.option(
    "--collapse-tolerance",
    "tolerance",
    type=float,
    metavar="EPS",
    help="Also collapse what is proven to be within EPS of ReLU, in units of the tensor; 0: nothing but ReLU itself, "
    "on the range that is given. Without it, only what is exactly ReLU everywhere.",
)
@click.option(
    "--range",
    "ends",
    metavar="LO,HI",
    callback=_parse_range,
    help="With --collapse-tolerance: the bound has to hold for inputs from LO to HI of every region. Without it and "
    "--ranges: for every finite number.",
)
@click.option(
    "--ranges",
    "ranges_path",
    type=INPUT_FILE,
    metavar="FILE",
    help="With --collapse-tolerance: the bound has to hold on what calibration measured of each region's input, "
    "channel by channel where it can. FILE is what calibrate wrote for MODEL.",
)
@click.option(
    "--fold-dynamic",
    "fold",
    type=float,
    metavar="EPS",
    help="Also make a DY-ReLU static where --ranges shows that its coefficients hardly move: its output is then off by "
    "at most EPS, in its own units. With --ranges.",
)
@click.option(
    "--data",
    metavar="DATA",
    help=f"As --calib of calibrate: compare on its first {_MOST_SAMPLES} samples.  [default: random inputs]",
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    help="Also spell learned activations (PWLU) in the operators that are best on this runtime in float. Without it "
    "each stays one node, with its definition in the file. quantize and build-engine spell them by themselves.",
)
@click.option("--no-verify", is_flag=True, help="Do not compare its outputs with the original's.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random inputs of that comparison.")
@json_option
def command(
    model: Path,
    output: Path,
    tolerance: float | None,
    ends: tuple[float, float] | None,
    ranges_path: Path | None,
    fold: float | None,
    data: str | None,
    target: Target | None,
    no_verify: bool,
    seed: int,
    json_path: str | None,
) -> None:
    """Collapse what is ReLU into Relu nodes, and clean the graph up for INT8.

    MODEL is an ONNX file. A region of nodes is replaced only if it is proven to be ReLU, whatever its spelling:
    exactly, or within EPS of it. Every collapse is listed with its bound and where that holds, every other activation
    with what it is and, when there is an EPS, how far it is from ReLU. Where nothing is to be done, the output is a
    copy of the input.

    \b
    Examples:
      relu-deploy rewrite student.onnx -o student.relu.onnx
      relu-deploy rewrite student.onnx -o student.relu.onnx --collapse-tolerance 0.005
      relu-deploy rewrite student.onnx -o student.relu.onnx --collapse-tolerance 0.005 --range -8,8
      relu-deploy rewrite student.onnx -o student.relu.onnx --collapse-tolerance 0.005 --ranges ranges.json
      relu-deploy rewrite student.onnx -o student.static.onnx --fold-dynamic 0.01 --ranges ranges.json
      relu-deploy rewrite pwlu.onnx -o pwlu.rtx.onnx --target tensorrt-rtx
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.graph import load_model, save_model
    from relu_deploy.passes.run import rewrite

    domain = _domain(tolerance, fold, ends, ranges_path)
    original = load_model(model)
    samples = None if data is None else _samples(data, original)
    result, report = rewrite(
        original, verify=not no_verify, samples=samples, seed=seed, collapse_tolerance=tolerance, domain=domain,
        fold_tolerance=fold, target=target,
    )  # fmt: skip
    save_model(result, output)
    emit(report, json_path, lambda: render(report, output))


def render(report: RewriteReport, output: Path | None = None) -> Group:
    """A table of what changed and what did not, and how the result was checked."""
    table = Table("pass", "", "nodes", "why")
    for entry in report.passes:
        for row in _rows(entry):
            table.add_row(*row)
    written = "" if output is None else f": {output}"
    lines = [Text(f"{report.nodes_before} nodes -> {report.nodes_after}{written}")]
    loose, folding = report.approximation, report.folding
    approximate = bool((loose is not None and loose.collapses) or (folding is not None and folding.units))
    if not approximate or report.verification is not None:
        lines.append(_verdict(report))
    if folding is not None and folding.units:
        lines.append(_folding_verdict(folding))
    if loose is not None and loose.collapses:
        lines.append(_loose_verdict(loose))
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


def _loose_verdict(loose: Approximation) -> Text:
    """What collapsing to a tolerance changed, as far as it was measured."""
    from relu_deploy.passes.certificate import above

    worst = max(row.eps for row in loose.collapses)
    count = f"{len(loose.collapses)} region{'s' if len(loose.collapses) > 1 else ''}"
    proven = f"{count} collapsed to a tolerance of {loose.tolerance:g}, the largest bound is {above(worst)}"
    if not loose.samples:
        return Text(f"{proven}; outputs were not compared with the original's. {loose.note}".rstrip(), style="yellow")
    measured = max(row.measured or 0.0 for row in loose.collapses)
    outside = max(row.outside or 0.0 for row in loose.collapses)
    moved = max((output.error for output in loose.outputs), default=0.0)
    text = (
        f"{proven}, the largest difference seen on {loose.samples} inputs {measured:.3g}; "
        f"outputs moved by up to {moved:.2g} relative to their largest magnitude"
    )
    if outside:
        text += f"; up to {outside:.1%} of a region's values lay outside its range, where nothing is claimed"
    return Text(text, style="yellow" if outside else "green")


def _folding_verdict(folding: Folding) -> Text:
    """What making dynamic units static changed, as far as it was measured."""
    from relu_deploy.passes.certificate import above

    count = f"{len(folding.units)} dynamic unit{'s' if len(folding.units) > 1 else ''}"
    proven = (
        f"{count} made static, each off by at most {above(max(unit.bound for unit in folding.units))} on its ranges"
    )
    if not folding.samples:
        return Text(f"{proven}; outputs were not compared with the original's. {folding.note}".rstrip(), style="yellow")
    measured = max(unit.measured or 0.0 for unit in folding.units)
    beyond = sum((unit.measured or 0.0) > unit.bound for unit in folding.units)
    moved = max((output.error for output in folding.outputs), default=0.0)
    text = (
        f"{proven}; the largest error seen on {folding.samples} {'samples' if folding.given else 'random inputs'} is "
        f"{measured:.3g}, and outputs moved by up to {moved:.2g} relative to their largest magnitude"
    )
    if beyond:
        text += f"; {beyond} went beyond the ranges that were measured, where nothing is claimed"
    return Text(text, style="yellow" if beyond else "green")


def _verdict(report: RewriteReport) -> Text:
    check = report.verification
    if not report.changed:
        return Text("nothing to change: the network stays as it was")
    if check is None:
        return Text("outputs were not compared with the original's", style="yellow")
    if not check.samples:
        return Text(f"outputs could not be compared with the original's: {check.note}", style="yellow")
    worst = max((output.error for output in check.outputs), default=0.0)
    how = "equal bit for bit" if report.exact and not worst else f"largest relative error {worst:.2g}"
    return Text(
        f"outputs compared on {check.samples} random inputs in ONNX Runtime: {how}. {check.note}".rstrip(),
        style="green",
    )
