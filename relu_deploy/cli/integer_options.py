"""``--format`` and ``--multipliers``, and how what they made is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click
from rich.console import RenderableType
from rich.text import Text

from relu_deploy.cli.common import OUTPUT_FILE

if TYPE_CHECKING:
    from relu_deploy.int8.qoperator_files import IntegerReport


def integer_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--format`` (handed over as ``form``) and ``--multipliers``."""
    function = click.option(
        "--multipliers", type=OUTPUT_FILE, metavar="TABLE.json",
        help="Also write the integer multipliers of every operator on codes (mantissa and right shift, bias, "
        "accumulator bits), for accelerators without floats. Target ort.",
    )(function)  # fmt: skip
    return click.option(
        "--format", "form", type=click.Choice(["qdq", "qoperator"]), default="qdq", show_default=True,
        help="qdq: floats between QuantizeLinear and DequantizeLinear, which a runtime fuses. qoperator: the integer "
        "operators written out (QLinearConv, QGemm, QLinearAdd, ...), target ort.",
    )(function)  # fmt: skip


def integer_lines(report: IntegerReport) -> Iterator[RenderableType]:
    """What a person reads of it."""
    if report.format == "qoperator":
        parts = ", ".join(f"{count} {op}" for op, count in sorted(report.operators.items()))
        yield Text(f"integer operators: {parts}")
        for reason, count in Counter(skip.reason for skip in report.skipped).most_common():
            yield Text(f"{count} x stays between Q/DQ: {reason}")
    if report.multipliers:
        yield Text(
            f"{report.multipliers} multipliers, each within {report.worst_error:.1e} of its factor; "
            f"sums take up to {report.widest_sum} bits"
        )
    for name in report.overflows:
        yield Text(f"warning: the sum of {name} may leave int32 for some input", style="yellow")
