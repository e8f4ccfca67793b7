"""What a region does far out: ``p x + q + e(x)`` with exact ``p`` and ``q`` and an ``e`` that dies out.

Interval arithmetic is helpless at ``x sigmoid(x) - x`` for large ``x``: the difference of two numbers of size ``x`` is
known to ``x`` units of roundoff only. Here every step is a line plus a remainder with bounds on ``t^k |e|``, ``k`` from
0 to ``MOMENTS - 1``, for all ``t = |x| >= T``; a product with ``x`` shifts them by one. Functions that saturate turn a
growing argument into a constant and a remainder below ``exp(-c t - d)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from relu_deploy.passes.program import INTEGER, Program, Step
from relu_deploy.passes.tail_arithmetic import MOMENTS, OUT, Arithmetic, Growth, Line, Value, size_of, times

__all__ = ["MOMENTS", "Line", "tail"]


def tail(program: Program, constants: Sequence[float], side: int, start: float) -> Line | None:
    """One channel of a region beyond ``side * start``.

    Args:
        program: The region.
        constants: One column of ``program.channels()``.
        side: 1 for ``x >= start``, -1 for ``x <= -start``.
        start: ``T``; positive.

    Returns:
        The line and the bounds of its remainder; None where it approaches no line, or not yet at ``start``.
    """
    try:
        result = _run(program, constants, _Rules(side, start))
    except OverflowError:  # a product of constants that float64 does not hold
        return None
    return result if isinstance(result, Line) and math.isfinite(result.moments[0]) else None


def _run(program: Program, constants: Sequence[float], rules: _Rules) -> Value:
    values: list[Value] = []
    for step in program.steps:
        args = [values[index] for index in step.args]
        if step.op not in ("max", "min", "gt", "ge", "eq", "select"):
            args = [None if isinstance(arg, Growth) and math.isinf(arg.rate) else arg for arg in args]
        values.append(rules.apply(step, args, constants))
    return values[-1]


class _Rules(Arithmetic):
    """Functions on top of the arithmetic."""

    def apply(self, step: Step, args: list[Value], constants: Sequence[float]) -> Value:
        if step.op == "x":
            return Line(Fraction(1), Fraction(0))
        if step.op == "const":
            number = float(constants[int(step.param)])
            # An infinite bound of a Clip is a Growth that everything finite stays below.
            return (
                Line(Fraction(0), Fraction(number))
                if math.isfinite(number)
                else Growth(1 if number > 0 else -1, math.inf, math.inf)
            )
        if step.op == "fn":
            return self._function(str(step.param), args[0])
        if step.op == "random":
            ends = [arg.constant if isinstance(arg, Line) else None for arg in args]
            return None if None in ends else _bounded(max(abs(float(end)) for end in ends if end is not None))
        if step.op == "bernoulli":
            return _bounded(1.0)
        rules: dict[str, Callable[..., Value]] = {
            "add": self.add, "mul": self.mul, "div": self.div, "select": self.select,
            "max": lambda a, b: self.extreme(a, b, 1), "min": lambda a, b: self.extreme(a, b, -1),
            "gt": lambda a, b: self.compare("gt", a, b), "ge": lambda a, b: self.compare("ge", a, b),
            "eq": lambda a, b: self.compare("eq", a, b),
        }  # fmt: skip
        return rules[step.op](*args) if step.op in rules else None

    def _function(self, name: str, a: Value) -> Value:
        if a is None:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        if isinstance(a, Line) and not a.slope:
            return _near(name, a)
        growth = a if isinstance(a, Growth) else self.growth(a)
        if name in INTEGER and isinstance(a, Line):
            return Line(a.slope, a.offset, (a.moments[0] + 1, *((math.inf,) * (MOMENTS - 1))))
        if growth is None:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        return self._far(name, a, growth)  # an exponential growth is a linear one too: exp(u) > u

    def _far(self, name: str, a: Line | Growth, growth: Growth) -> Value:
        """A function of what goes to plus or minus infinity."""
        rate, shift, sign = growth.rate, growth.shift, growth.sign
        if name == "cube":
            return self.grown_product(growth, self._grown_square(growth))
        if name == "exp" and sign > 0 and not growth.exponential:
            return Growth(1, rate, shift, exponential=True)
        if name == "softplus" and sign > 0:
            if isinstance(a, Growth):
                return a
            return self.add(a, Line(Fraction(0), Fraction(0), self.decay(rate, shift)))
        limits = {"sigmoid": (0, 1), "tanh": (-1, 1), "erf": (-1, 1), "exp": (0, 0), "softplus": (0, 0)}
        if name not in limits:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        least = rate * self.start + shift
        if least <= 0:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        if name == "tanh":  # 1 - tanh(u) < 2 exp(-2 u)
            moments = self.decay(2 * rate, 2 * shift, 2.0)
        elif name == "erf":  # 1 - erf(u) < exp(-u u) <= exp(-least u)
            moments = self.decay(least * rate, least * shift)
        else:  # 1 - sigmoid(u), exp(-u) and softplus(-u) are at most exp(-u)
            moments = self.decay(rate, shift)
        return Line(Fraction(0), Fraction(limits[name][sign > 0]), moments)

    def _grown_square(self, growth: Growth) -> Growth | None:
        square = self.grown_product(growth, growth)
        return square if isinstance(square, Growth) else None


# What a function never exceeds in magnitude.
_BOUNDS = {"sigmoid": 1.0, "tanh": 1.0, "erf": 1.0, "softsign": 1.0, "atan": 1.5708, "sin": 1.0, "cos": 1.0}
# Functions with an exact value at 0, and a bound of their slope within 1 of it.
_AT_ZERO: dict[str, tuple[Fraction, float]] = {
    "tanh": (Fraction(0), 1.0), "erf": (Fraction(0), 1.13), "sigmoid": (Fraction(1, 2), 0.25),
    "exp": (Fraction(1), 2.72), "softsign": (Fraction(0), 1.0), "atan": (Fraction(0), 1.0),
    "asinh": (Fraction(0), 1.0), "sinh": (Fraction(0), 1.55), "sin": (Fraction(0), 1.0), "cos": (Fraction(1), 1.0),
    "cosh": (Fraction(1), 1.18),
}  # fmt: skip


def _near(name: str, a: Line) -> Value:
    """A function of what stays near a constant."""
    exact: dict[str, Callable[[Fraction], int]] = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round": round,
        "integer": math.trunc,
    }
    if name in exact and a.is_exact:
        return Line(Fraction(0), Fraction(exact[name](a.offset)))
    if name == "cube":
        size = size_of(a.offset)
        factor = 3 * size * size + 3 * size * a.moments[0] + a.moments[0] ** 2
        return Line(Fraction(0), a.offset**3, tuple(OUT * times(factor, m) for m in a.moments))
    if name in _AT_ZERO and not a.offset and a.moments[0] <= 1:
        value, slope = _AT_ZERO[name]
        return Line(Fraction(0), value, tuple(OUT * slope * m for m in a.moments))
    return _bounded(_BOUNDS[name]) if name in _BOUNDS else None


def _bounded(size: float) -> Line:
    return Line(Fraction(0), Fraction(0), (size, *((math.inf,) * (MOMENTS - 1))))
