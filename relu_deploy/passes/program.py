"""A region as a straight-line program over a dozen primitives, so that each analysis has a rule for each of them only.

Constants are scalars or vectors with one entry a channel; everything else is a function of the one input ``x``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

# One-input functions that are not piecewise linear, or have no bounded number of pieces.
SMOOTH = (
    "exp", "log", "sqrt", "erf", "tanh", "sigmoid", "softplus", "softsign", "atan", "asinh", "sinh",
    "sin", "cos", "cosh", "floor", "ceil", "round", "float16", "bfloat16", "integer", "cube",
)  # fmt: skip
# Those of them that give integers: rising, and each integer is its own image.
INTEGER = ("floor", "ceil", "round", "integer")


@dataclasses.dataclass(frozen=True)
class Step:
    """One primitive.

    Attributes:
        op: One of ``x``, ``const``, ``add``, ``mul``, ``div``, ``max``, ``min``, ``gt``, ``ge``, ``eq``, ``select``
            (condition, yes, no), ``fn``, ``lookup`` (index, from 0; a negative one counts from the end), ``random``
            (low, high: a draw from ``[low, high)``) or ``bernoulli`` (probability of 1).
        args: Indices of earlier steps.
        param: For ``const`` the row of ``Program.constants``; for ``fn`` one of ``SMOOTH``; for ``lookup`` the table,
            float64 in bytes; for ``random`` and ``bernoulli`` the node, since two draws are not one.
    """

    op: str
    args: tuple[int, ...] = ()
    param: int | str | bytes = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Steps in order of execution; the last one is the result.

    Attributes:
        steps: The primitives; equal steps are one step.
        constants: Shape ``(number of constants, channels)``, float64; ``channels`` is 1 when none varies.
        origin: For each step, the node of the graph that it came from.
        axis: Where the channels are, counted from the last axis (-1); None where no constant varies.
    """

    steps: tuple[Step, ...]
    constants: np.ndarray
    origin: tuple[str, ...]
    axis: int | None = None

    def channels(self) -> np.ndarray:
        """The distinct columns of ``constants``, shape ``(constants, distinct channels)``."""
        if self.constants.shape[1] <= 1:
            return self.constants
        return np.unique(self.constants, axis=1)


class Builder:
    """Collects steps; asking for the same step twice gives the same index."""

    def __init__(self) -> None:
        self.node = ""
        self._steps: dict[Step, int] = {}
        self._origin: list[str] = []
        self._constants: list[np.ndarray] = []
        self._rows: dict[tuple[int, bytes], int] = {}

    def step(self, op: str, *args: int, param: int | str | bytes = 0) -> int:
        """Add one primitive and return its index. Sides that commute in floats too are put in order."""
        step = Step(op, tuple(sorted(args)) if op in ("add", "mul", "max", "min", "eq") else args, param)
        if step not in self._steps:
            self._steps[step] = len(self._origin)
            self._origin.append(self.node)
        return self._steps[step]

    def const(self, values: float | np.ndarray) -> int:
        """A scalar, or a vector with one entry a channel; a vector of equal entries is a scalar."""
        row = np.atleast_1d(np.asarray(values, dtype=np.float64)).reshape(-1)
        if row.size > 1 and (row == row[0]).all():
            row = row[:1]
        key = (row.size, row.tobytes())
        if key not in self._rows:
            self._rows[key] = len(self._constants)
            self._constants.append(row)
        return self.step("const", param=self._rows[key])

    def fn(self, name: str, arg: int) -> int:
        """Apply one of ``SMOOTH``."""
        return self.step("fn", arg, param=name)

    def neg(self, arg: int) -> int:
        """``-arg``."""
        return self.step("mul", arg, self.const(-1.0))

    def chain(self, op: str, args: Sequence[int]) -> int:
        """Fold a two-argument primitive over several arguments, from the left."""
        result = args[0]
        for arg in args[1:]:
            result = self.step(op, result, arg)
        return result

    def lookup(self, table: np.ndarray, index: int) -> int:
        """``table[index]``, one table for all channels."""
        return self.step("lookup", index, param=np.asarray(table, dtype=np.float64).tobytes())

    def finish(self, result: int, axis: int | None = None) -> Program:
        """Close the program; steps after ``result`` are dropped. ``axis`` is that of the channels."""
        width = max((row.size for row in self._constants), default=1)
        table = np.empty((len(self._constants), width))
        for index, row in enumerate(self._constants):
            table[index] = row
        steps = tuple(self._steps)[: result + 1]
        return Program(steps, table, tuple(self._origin[: result + 1]), axis if width > 1 else None)
