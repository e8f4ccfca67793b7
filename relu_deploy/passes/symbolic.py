"""Evaluate a region in real arithmetic, exactly: piecewise-linear coefficients times products of opaque smooth atoms.

``1 * relu(x) + 0 * silu(x)`` becomes ``relu(x)`` because the coefficient of the atom is the zero function, and
``silu(x) + (relu(x) - silu(x))`` because the two coefficients cancel: no spelling is known here, only what the
primitives mean. What floats make of it (0 * inf) is the business of :mod:`relu_deploy.passes.floats`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from relu_deploy.passes.program import Program, Step
from relu_deploy.passes.pwl import NotPiecewiseLinearError, PiecewiseLinear

# Products of sums multiply out; past this many terms a product is kept as one opaque atom.
MAX_TERMS = 32

Monomial: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """A sum of piecewise-linear coefficient times product of atoms; atoms are numbers given out by the evaluation.

    Attributes:
        terms: Pairs (sorted atom numbers, coefficient), sorted, no coefficient zero; ``()`` is the term without atoms.
    """

    terms: tuple[tuple[Monomial, PiecewiseLinear], ...]

    @property
    def piecewise_linear(self) -> PiecewiseLinear | None:
        """The function, when no atom is left in it."""
        if not self.terms:
            return _ZERO
        (monomial, coefficient), *rest = self.terms
        return coefficient if monomial == () and not rest else None


_ZERO = PiecewiseLinear.constant(0)


def evaluate(program: Program, constants: Sequence[float]) -> PiecewiseLinear | None:
    """The function of one channel, or None when smooth parts are left in it.

    Args:
        program: The region.
        constants: One column of ``program.channels()``.

    Returns:
        The exact function in real arithmetic; None where it is not piecewise linear or not known to be.
    """
    evaluation = _Evaluation()
    values: list[Value | float] = []
    try:
        for number, step in enumerate(program.steps):
            evaluation.number = number
            values.append(evaluation.apply(step, [values[index] for index in step.args], constants))
    except NotPiecewiseLinearError:
        return None
    result = values[-1]
    return result.piecewise_linear if isinstance(result, Value) else None


class _Evaluation:
    """One run; keeps the table of atoms, so that equal expressions are the same atom."""

    def __init__(self) -> None:
        self._atoms: dict[object, int] = {}
        self.number = 0  # of the step at hand; equal steps are one step, so one atom

    def apply(self, step: Step, args: list[Value | float], constants: Sequence[float]) -> Value | float:
        """Apply one primitive. A float is an infinite constant, which only ``max`` and ``min`` can take."""
        if step.op == "x":
            return _pure(PiecewiseLinear.identity())
        if step.op == "const":
            number = float(constants[int(step.param)])
            return _pure(PiecewiseLinear.constant(Fraction(number))) if math.isfinite(number) else number
        if step.op in ("max", "min"):
            return self._extreme(step.op, args[0], args[1])
        values = [arg for arg in args if isinstance(arg, Value)]
        if len(values) < len(args):
            raise NotPiecewiseLinearError("arithmetic with an infinite constant")
        if step.op == "fn":
            return self._opaque()
        operations: dict[str, Callable[..., Value]] = {
            "add": _add, "mul": self._mul, "div": self._div, "select": self._select,
        }  # fmt: skip
        if step.op in operations:
            return operations[step.op](*values)
        return self._compare(step.op, *values)

    def _opaque(self) -> Value:
        """The value of the current step as an atom: what a runtime computes there once, whatever it is."""
        return self._atom(self.number)

    def _atom(self, key: object) -> Value:
        number = self._atoms.setdefault(key, len(self._atoms))
        return Value((((number,), PiecewiseLinear.constant(1)),))

    def _mul(self, a: Value, b: Value) -> Value:
        if len(a.terms) * len(b.terms) > MAX_TERMS:
            return self._opaque()
        total = Value(())
        for left, f in a.terms:
            for right, g in b.terms:
                try:
                    part = Value((((*sorted((*left, *right)),), f.times(g)),))
                except NotPiecewiseLinearError:
                    parts = sorted((self._atom(f).terms[0][0][0], self._atom(g).terms[0][0][0]))
                    part = Value((((*sorted((*left, *right, *parts)),), PiecewiseLinear.constant(1)),))
                total = _add(total, part)
        return total

    def _div(self, a: Value, b: Value) -> Value:
        divisor = b.piecewise_linear
        try:
            inverse = divisor.reciprocal() if divisor else None
        except NotPiecewiseLinearError:
            inverse = None
        return self._mul(a, _pure(inverse) if inverse else self._opaque())

    def _compare(self, op: str, a: Value, b: Value) -> Value:
        difference = _add(a, _scaled(b, -1)).piecewise_linear
        if difference is None:
            return self._opaque()
        tests = {"gt": difference.greater, "ge": difference.greater_equal, "eq": difference.equal_zero}
        return _pure(tests[op]())

    def _select(self, condition: Value, yes: Value, no: Value) -> Value:
        chosen = condition.piecewise_linear
        if chosen is None or not chosen.is_step:
            return yes if yes == no else self._opaque()
        other = _pure(PiecewiseLinear.constant(1).minus(chosen))
        return _add(self._mul(_pure(chosen), yes), self._mul(other, no))

    def _extreme(self, op: str, a: Value | float, b: Value | float) -> Value | float:
        if isinstance(a, float) or isinstance(b, float):
            return _extreme_of_infinity(op, a, b)
        if _add(a, _scaled(b, -1)).piecewise_linear is None:
            return a if a == b else self._opaque()
        first, second = (a, b) if op == "max" else (b, a)
        return self._select(self._compare("gt", a, b), first, second)


def _extreme_of_infinity(op: str, a: Value | float, b: Value | float) -> Value | float:
    """``max`` or ``min`` where a side is infinite: one of the two sides."""
    infinite, other = (a, b) if isinstance(a, float) else (b, a)
    wins = infinite == (math.inf if op == "max" else -math.inf)
    return infinite if wins else other


def _pure(function: PiecewiseLinear) -> Value:
    return Value(() if function == _ZERO else (((), function),))


def _scaled(value: Value, factor: int) -> Value:
    return Value(tuple((monomial, f.scaled(factor)) for monomial, f in value.terms))


def _add(a: Value, b: Value) -> Value:
    terms = dict(a.terms)
    for monomial, function in b.terms:
        total = terms[monomial].plus(function) if monomial in terms else function
        if total == _ZERO:
            terms.pop(monomial, None)
        else:
            terms[monomial] = total
    return Value(tuple(sorted(terms.items(), key=lambda item: item[0])))
