"""Evaluate a region in real arithmetic, exactly: piecewise-linear coefficients times products of opaque smooth atoms.

``1 * relu(x) + 0 * silu(x)`` becomes ``relu(x)`` because the coefficient of the atom is the zero function, and
``silu(x) + (relu(x) - silu(x))`` because the two coefficients cancel: no spelling is known here, only what the
primitives mean. What floats make of it (0 * inf) is the business of :mod:`relu_deploy.passes.floats`.

``floor(x)`` has no end of pieces, and the indices of tables are floors that something clips. So a floor is an atom that
is known to be one: ``max(floor(a) + k, c) = floor(max(a, c - k)) + k`` for integers, and when its argument has become
bounded it is a step function like any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from relu_deploy.passes.program import INTEGER, Program, Step
from relu_deploy.passes.pwl import NotPiecewiseLinearError, PiecewiseLinear

_TO_INTEGER: dict[str, Callable[[Fraction], int]] = {
    "floor": math.floor, "ceil": math.ceil, "round": round, "integer": math.trunc,
}  # fmt: skip
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
_FLAT = _ZERO.lines[0]


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
        # Of atoms that are integers: which function, and of what.
        self._floors: dict[int, tuple[str, PiecewiseLinear]] = {}
        # Of atoms that are drawn at random: from where, and up to where (excluded).
        self._draws: dict[int, tuple[Fraction, Fraction]] = {}
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
            return self._integer(str(step.param), values[0]) if step.param in INTEGER else self._opaque()
        if step.op == "lookup" and isinstance(step.param, bytes):
            return self._lookup(np.frombuffer(step.param).tolist(), values[0])
        if step.op == "bernoulli":
            return values[0] if _is_true_or_false(values[0]) else self._opaque()
        if step.op == "random":
            return self._draw(*values)
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

    def _integer(self, name: str, a: Value) -> Value:
        """A function of ``INTEGER``: an integer is its own image, a bounded argument gives a step function."""
        if self._is_integer(a):
            return a
        inner = a.piecewise_linear
        if inner is None:
            return self._opaque()
        try:
            return _pure(inner.rounded(_TO_INTEGER[name]))
        except NotPiecewiseLinearError:
            atom = self._atom((name, inner))
            self._floors[atom.terms[0][0][0]] = (name, inner)
            return atom

    def _is_integer(self, value: Value) -> bool:
        """Whether all of it is known to be integers: steps of integers, and floors times such steps."""
        known = all(
            monomial == () or (len(monomial) == 1 and monomial[0] in self._floors) for monomial, _ in value.terms
        )
        return known and all(
            f.is_step and all(v.denominator == 1 for v in (*f.points, *(b for _, b in f.lines))) for _, f in value.terms
        )

    def _floor_form(self, value: Value) -> tuple[str, PiecewiseLinear, Fraction, Fraction] | None:
        """Name, inner, sign and offset of ``sign * floor(inner) + offset`` with a constant offset and sign 1 or -1."""
        offset = Fraction(0)
        floors = []
        for monomial, f in value.terms:
            if not f.is_constant:
                return None
            if monomial == ():
                offset = f.lines[0][1]
            elif len(monomial) == 1 and monomial[0] in self._floors and abs(f.lines[0][1]) == 1:
                floors.append((*self._floors[monomial[0]], f.lines[0][1]))
            else:
                return None
        if len(floors) != 1:
            return None
        name, inner, sign = floors[0]
        return name, inner, sign, offset

    def _clipped_floor(self, op: str, value: Value, bound: Value) -> Value | None:
        """``max`` or ``min`` of an integer and an integer constant, with the clip pushed under the floor."""
        form, limit = self._floor_form(value), bound.piecewise_linear
        if form is None or limit is None or not limit.is_constant:
            return None
        name, inner, sign, offset = form
        edge = (limit.lines[0][1] - offset) * sign
        if edge.denominator != 1:
            return None
        at = PiecewiseLinear.constant(edge)
        clipped = inner.maximum(at) if (op == "max") == (sign > 0) else inner.minimum(at)
        return _add(_scaled(self._integer(name, _pure(clipped)), sign), _pure(PiecewiseLinear.constant(offset)))

    def _lookup(self, table: Sequence[float], index: Value) -> Value:
        """A table at a step function is a step function."""
        steps, entries = index.piecewise_linear, table
        if steps is None or not steps.is_step:
            return self._opaque()
        used = {*steps.points, *(value for _, value in steps.lines)}
        if not all(value.denominator == 1 and -len(entries) <= value < len(entries) for value in used):
            return self._opaque()  # past the end it is an error, which no function is
        if not all(math.isfinite(entries[int(value)]) for value in used):
            return self._opaque()
        return _pure(steps.mapped(lambda value: Fraction(float(entries[int(value)]))))

    def _compare(self, op: str, a: Value, b: Value) -> Value:
        gap = _add(a, _scaled(b, -1))
        difference = gap.piecewise_linear or self._near_zero(gap)
        if difference is None:
            return self._compare_draw(op, gap) or self._opaque()
        tests = {"gt": difference.greater, "ge": difference.greater_equal, "eq": difference.equal_zero}
        return _pure(tests[op]())

    def _draw(self, low: Value, high: Value) -> Value:
        """A number of ``[low, high)``, another one each time."""
        atom = self._opaque()
        ends = [end.piecewise_linear for end in (low, high)]
        if all(end is not None and end.is_constant for end in ends):
            self._draws[atom.terms[0][0][0]] = (ends[0].lines[0][1], ends[1].lines[0][1])  # type: ignore[union-attr]
        return atom

    def _compare_draw(self, op: str, gap: Value) -> Value | None:
        """``sign * draw + offset`` against zero, where every draw decides alike: probabilities 0 and 1."""
        terms = dict(gap.terms)
        offset = terms.pop((), _ZERO)
        (monomial, factor), *rest = [*terms.items()] or [((), _ZERO)]
        if (
            rest
            or len(monomial) != 1
            or monomial[0] not in self._draws
            or not (offset.is_constant and factor.is_constant)
        ):
            return None
        low, high = self._draws[monomial[0]]
        turn = -offset.lines[0][1] / factor.lines[0][1]
        rising = factor.lines[0][1] > 0
        if op == "eq":
            return _pure(_ZERO) if not low <= turn < high else None
        if high <= turn:  # every draw lies below
            return _pure(PiecewiseLinear.constant(0 if rising else 1))
        if low > turn or (low == turn and rising == (op == "ge")):
            return _pure(PiecewiseLinear.constant(1 if rising else 0))
        return None

    def _near_zero(self, gap: Value) -> PiecewiseLinear | None:
        """A piecewise-linear function with the sign of ``gap``, where that is an integer and a constant."""
        form = self._floor_form(gap)
        if form is None:
            return None
        name, inner, sign, offset = form
        turn = -offset * sign
        low, high = (PiecewiseLinear.constant(edge) for edge in (math.floor(turn) - 1, math.ceil(turn) + 1))
        near = self._integer(name, _pure(inner.maximum(low).minimum(high)))
        return _add(_scaled(near, sign), _pure(PiecewiseLinear.constant(offset))).piecewise_linear

    def _select(self, condition: Value, yes: Value, no: Value) -> Value:
        chosen = condition.piecewise_linear
        if chosen is None or not chosen.is_step:
            return yes if yes == no else self._opaque()
        first, second = yes.piecewise_linear, no.piecewise_linear
        if first is not None and second is not None:
            return _pure(chosen.choose(first, second))
        other = _pure(PiecewiseLinear.constant(1).minus(chosen))
        return self._settled(_add(self._mul(_pure(chosen), yes), self._mul(other, no)))

    def _settled(self, value: Value) -> Value:
        """With floors that count on a bounded interval only turned into the steps that they have there."""
        total = Value(())
        for monomial, f in value.terms:
            part = Value(((monomial, f),))
            if len(monomial) == 1 and monomial[0] in self._floors and f.breaks and f.lines[0] == f.lines[-1] == _FLAT:
                name, inner = self._floors[monomial[0]]
                low, high = (PiecewiseLinear.constant(edge) for edge in (f.breaks[0], f.breaks[-1]))
                inside = inner.after(PiecewiseLinear.identity().maximum(low).minimum(high))
                part = self._mul(_pure(f), self._integer(name, _pure(inside)))
            total = _add(total, part)
        return total

    def _extreme(self, op: str, a: Value | float, b: Value | float) -> Value | float:
        if isinstance(a, float) or isinstance(b, float):
            return _extreme_of_infinity(op, a, b)
        clipped = self._clipped_floor(op, a, b) or self._clipped_floor(op, b, a)
        if clipped is not None:
            return clipped
        if _add(a, _scaled(b, -1)).piecewise_linear is None:
            return a if a == b else self._opaque()
        first, second = (a, b) if op == "max" else (b, a)
        return self._select(self._compare("gt", a, b), first, second)


def _extreme_of_infinity(op: str, a: Value | float, b: Value | float) -> Value | float:
    """``max`` or ``min`` where a side is infinite: one of the two sides."""
    infinite, other = (a, b) if isinstance(a, float) else (b, a)
    wins = infinite == (math.inf if op == "max" else -math.inf)
    return infinite if wins else other


def _is_true_or_false(value: Value) -> bool:
    """Whether a function takes no values but 0 and 1."""
    function = value.piecewise_linear
    return function is not None and function.is_step and {*function.points, *(b for _, b in function.lines)} <= {0, 1}


def _pure(function: PiecewiseLinear) -> Value:
    return Value(() if function == _ZERO else (((), function),))


def _scaled(value: Value, factor: Fraction | int) -> Value:
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
