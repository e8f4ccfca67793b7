"""What ``quantize --format qoperator`` and ``--multipliers`` write beside or instead of the Q/DQ file."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx

from relu_deploy.errors import QuantizationError
from relu_deploy.graph import save_model
from relu_deploy.int8.multipliers_table import Table, build_table, save_table
from relu_deploy.int8.qoperator import to_qoperator
from relu_deploy.report import Skip

FORMATS = ("qdq", "qoperator")


@dataclasses.dataclass(frozen=True)
class IntegerReport:
    """What became of a network in integers.

    Attributes:
        format: ``qdq`` or ``qoperator``, of the file written.
        operators: Integer operator -> how many.
        skipped: Operators at codes that stay float between Q/DQ, and why.
        multipliers: How many factors the table holds; 0 without one.
        worst_error: Largest relative error of a factor.
        widest_sum: Most bits that a sum may need, of those whose length is known.
        overflows: Layers whose sum may leave int32.
    """

    format: str
    operators: dict[str, int]
    skipped: tuple[Skip, ...]
    multipliers: int = 0
    worst_error: float = 0.0
    widest_sum: int = 0
    overflows: tuple[str, ...] = ()


def check_integer_options(target: str, form: str, multipliers: Path | None) -> None:
    """Refuse what cannot be written for a target, before any work.

    Raises:
        QuantizationError: TensorRT is to get integer operators, or a table is asked of its placement.
    """
    if target == "ort":
        return
    if form == "qoperator":
        raise QuantizationError(
            f"{target} reads no integer operators: its parser takes Q/DQ, and finds the integers by itself",
            hint="leave --format at qdq, or use --target ort",
        )
    if multipliers is not None:
        raise QuantizationError(
            f"{target} gets no quantiser behind its layers, so that there is no output scale to make a multiplier of",
            hint="use --target ort, which quantises every tensor between two layers",
        )


def write_integers(
    quantized: onnx.ModelProto, output: Path, *, form: str = "qdq", multipliers: Path | None = None
) -> IntegerReport:
    """Write a quantised network in a format, and its multipliers where a path is given.

    Everything is computed before anything is written.

    Args:
        quantized: Q/DQ for target ``ort``.
        output: ONNX file.
        form: ``qdq`` writes it as it is, ``qoperator`` as integer operators.
        multipliers: JSON file for the table; it carries the fingerprint of ``output``.

    Raises:
        FileError: a file cannot be written.
        QuantizationError: no operator computes on codes.
    """
    integer, fused = to_qoperator(quantized)
    written = integer if form == "qoperator" else quantized
    table = None if multipliers is None else build_table(written)[0]
    save_model(written, output)
    if table is not None and multipliers is not None:
        save_table(table, multipliers)
    report = IntegerReport(form, dict(Counter(fused.notes.values())), fused.skipped)
    return report if table is None else _with_table(report, table)


def _with_table(report: IntegerReport, table: Table) -> IntegerReport:
    """The report, with what a person asks of a table first."""
    factors = [each for entry in table.entries for row in entry.multipliers for each in row]
    sums = {entry.name: entry.accumulator for entry in table.entries if entry.accumulator is not None}
    return dataclasses.replace(
        report,
        multipliers=len(factors),
        worst_error=max((abs(each.relative_error) for each in factors), default=0.0),
        widest_sum=max((found.bits for found in sums.values()), default=0),
        overflows=tuple(name for name, found in sums.items() if not found.int32),
    )
