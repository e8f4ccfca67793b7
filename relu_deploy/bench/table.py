"""A comparison as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relu_deploy.bench.accuracy import Accuracy
from relu_deploy.bench.report import BenchReport, EngineResult
from relu_deploy.bench.stats import Percentile


def render(report: BenchReport) -> RenderableType:
    """The tables, what they were measured on, and what they may not be used for."""
    results = (report.original, *report.engines)
    parts: list[RenderableType] = [_speed(report, results), Text()]
    if report.original.accuracy is not None:
        parts += [_judgement(results), Text()]
    parts += [Text(fact, style="dim") for fact in (*_facts(report), *(f"note: {note}" for note in _refusals(report)))]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in report.warnings]
    return Group(*parts)


def _speed(report: BenchReport, results: Sequence[EngineResult]) -> Table:
    headings = ["engine", "runs as", "MB", "median ms", *(f"p{p.percent:g}" for p in _shown(report.original))]
    headings += [report.unit, "x original", "95 % interval", "verdict"]
    return _table(headings, [_speed_row(result) for result in results], left=("engine", "runs as", "verdict"))


def _speed_row(result: EngineResult) -> list[str]:
    ratio = result.ratio
    low_high = (
        "-" if ratio is None or ratio.low is None or ratio.high is None else f"{ratio.low:.2f} to {ratio.high:.2f}"
    )
    return [
        result.name,
        _runs_as(result),
        f"{result.size_bytes / 1e6:.2f}",
        _number(result.median_ms),
        *("-" if p.value is None else _number(p.value) for p in _shown(result)),
        _number(result.throughput),
        "1" if ratio is None else f"{ratio.value:.2f}",
        low_high,
        "the original" if ratio is None else ratio.verdict,
    ]


def _runs_as(result: EngineResult) -> str:
    """Runtime and precision; for a built engine, how many of its linear layers are int8."""
    target = "ort" if result.target == "onnx" else result.target
    layers = result.layers
    return f"{target} {result.precision}" + (
        f" ({layers[0]} of {layers[1]})" if layers is not None and layers[0] else ""
    )


def _shown(result: EngineResult) -> list[Percentile]:
    """The median has a column of its own."""
    return [p for p in result.percentiles if p.percent != 50]


def _judgement(results: Sequence[EngineResult]) -> Table:
    rows = [(result.name, result.accuracy) for result in results if result.accuracy is not None]
    if rows[0][1].top1 is not None:
        headings = ["engine", "samples", "top-1", "95 % interval", "lost", "gained"]
        return _table(headings, [[name, *_top1_row(found)] for name, found in rows], left=("engine",))
    headings = ["engine", "samples", "SQNR dB", "max abs error", "same top-1"]
    return _table(headings, [[name, *_noise_row(found)] for name, found in rows], left=("engine",))


def _top1_row(found: Accuracy) -> list[str]:
    low_high = f"{found.top1_low:.1%} to {found.top1_high:.1%}"
    return [str(found.samples), f"{found.top1:.2%}", low_high, _or_dash(found.lost, "d"), _or_dash(found.gained, "d")]


def _noise_row(found: Accuracy) -> list[str]:
    noise = "equal" if found.max_abs_error == 0 else _or_dash(found.sqnr_db, ".1f")
    return [str(found.samples), noise, _or_dash(found.max_abs_error, ".3g"), _or_dash(found.agreement, ".2%")]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[str]) -> Table:
    """A table that is never narrowed: a cut number is worse than a long line."""
    widths = [max(len(heading), *(len(row[i]) for row in rows)) for i, heading in enumerate(headings)]
    # A width of its own keeps rich from dropping columns to fit the terminal; 2 is what it puts between columns.
    table = Table(box=None, pad_edge=False, header_style="bold", width=sum(widths) + 2 * (len(widths) - 1))
    for heading, width in zip(headings, widths, strict=True):
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True, min_width=width)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _facts(report: BenchReport) -> list[str]:
    settings, machine = report.settings, report.machine
    shapes = ", ".join(f"{plan.name} {'x'.join(map(str, plan.shape))}" for plan in report.inputs)
    versions = ", ".join(f"{name} {version}" for name, version in machine.packages.items())
    samples = sorted({result.samples for result in (report.original, *report.engines)})
    span = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
    how = f"batch {settings.batch}, {settings.threads} threads, {settings.rounds} rounds, {span} runs an engine"
    flags = " ".join(machine.flags) or "no vector flags"
    return [
        f"{how}; inputs: {shapes} ({report.data})",
        f"{machine.cpu}, {machine.logical_cpus} processors, {flags}; {versions}",
        "x original: median over rounds of (original's median / engine's median in the same round)",
    ]


def _refusals(report: BenchReport) -> list[str]:
    results = (report.original, *report.engines)
    notes = []
    for index, wanted in enumerate(report.original.percentiles):
        short = [r.samples for r in results if r.percentiles[index].value is None]
        if short:
            notes.append(f"p{wanted.percent:g} needs {wanted.needed} runs, there are {min(short)}: raise --seconds")
    verdicts = {result.ratio.verdict for result in report.engines if result.ratio is not None}
    if "not distinguishable" in verdicts:
        notes.append("not distinguishable: the interval of the ratio contains 1")
    if any(result.accuracy and result.accuracy.lost is not None for result in report.engines):
        notes.append("lost: samples the original has right and the engine wrong; gained: the other way round")
    return notes


def _number(value: float) -> str:
    """Three or more significant digits, no exponent.

    >>> [_number(v) for v in (0.01234, 1.234, 123.4, 54321.0)]
    ['0.0123', '1.23', '123', '54321']
    """
    digits = 4 if value < 0.1 else 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"
