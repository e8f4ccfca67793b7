"""What a region does far out: ``p x + q + e(x)`` with exact ``p`` and ``q`` and an ``e`` that dies out.

Interval arithmetic is helpless at ``x sigmoid(x) - x`` for large ``x``: the difference of two numbers of size ``x`` is
known to ``x`` units of roundoff only. Here every step is a line plus a remainder with bounds on ``t^k |e|``, ``k`` from
0 to ``MOMENTS - 1``, for all ``t = |x| >= T``; a product with ``x`` shifts them by one. Functions that saturate turn a
growing argument into a constant and a remainder below ``exp(-c t - d)``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TypeAlias

from relu_deploy.passes.program import INTEGER, Program, Step

# A cubic of a saturating function needs four; bounds of higher powers cost little.
MOMENTS = 8
# Bounds are computed in float64, in some ten operations each: what has to be above is enlarged, what has to be below
# reduced by this much.
_SLACK = 2.0**-40
_OUT = 1 + _SLACK
# A remainder that float64 cannot hold is not 0.
_LEAST = 1e-300


@dataclasses.dataclass(frozen=True)
class Line:
    """``slope x + offset + e(x)``.

    Attributes:
        slope: Exact.
        offset: Exact.
        moments: Bounds of ``t^k |e|`` for ``k = 0, 1, ...``; all 0 where there is no remainder.
    """

    slope: Fraction
    offset: Fraction
    moments: tuple[float, ...] = (0.0,) * MOMENTS

    @property
    def is_exact(self) -> bool:
        """Whether there is no remainder."""
        return not any(self.moments)

    @property
    def constant(self) -> Fraction | None:
        """The number that it is, exactly; None where it is none."""
        return self.offset if self.is_exact and not self.slope else None


@dataclasses.dataclass(frozen=True)
class Growth:
    """Without bound of the given sign: ``sign * value >= rate t + shift``, or ``>= exp`` of that; ``rate > 0``."""

    sign: int
    rate: float
    shift: float
    exponential: bool = False


# None: nothing is known.
Value: TypeAlias = Line | Growth | None
_ZERO = Line(Fraction(0), Fraction(0))


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


class _Rules:
    """One rule a primitive, for ``t >= start`` on one side."""

    def __init__(self, side: int, start: float) -> None:
        self.side, self.start = side, start

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
            "add": self._add, "mul": self._mul, "div": self._div, "select": self._select,
            "max": lambda a, b: self._extreme(a, b, 1), "min": lambda a, b: self._extreme(a, b, -1),
            "gt": lambda a, b: self._compare("gt", a, b), "ge": lambda a, b: self._compare("ge", a, b),
            "eq": lambda a, b: self._compare("eq", a, b),
        }  # fmt: skip
        return rules[step.op](*args) if step.op in rules else None

    def _add(self, a: Value, b: Value) -> Value:
        if isinstance(a, Line) and isinstance(b, Line):
            moments = tuple(_OUT * (m + n) for m, n in zip(a.moments, b.moments, strict=True))
            return Line(a.slope + b.slope, a.offset + b.offset, moments)
        if isinstance(a, Growth) and isinstance(b, Growth):
            if a.sign != b.sign:
                return None
            slow = a if b.exponential else b
            other = b if slow is a else a
            if slow.exponential or other.exponential:
                return other if self._positive(slow) else None
            return _growth_of(a.sign, a.rate + b.rate, a.shift + b.shift, abs(a.shift) + abs(b.shift))
        growth, line = (a, b) if isinstance(a, Growth) else (b, a)
        return self._lifted(growth, line) if isinstance(growth, Growth) and isinstance(line, Line) else None

    def _positive(self, growth: Growth) -> bool:
        return growth.exponential or growth.rate * self.start + growth.shift > 0

    def _lifted(self, growth: Growth, line: Line) -> Value:
        """A growth plus a line."""
        slope, offset = float(line.slope) * self.side * growth.sign, float(line.offset) * growth.sign
        if growth.exponential:
            least = offset + slope * self.start - line.moments[0]
            return growth if slope >= 0 and least >= 0 else None
        rate = growth.rate + slope - _SLACK * (growth.rate + abs(slope))
        scale = abs(growth.shift) + abs(offset) + line.moments[0]
        shift = growth.shift + offset - line.moments[0]
        return _growth_of(growth.sign, rate, shift, scale) if rate > 0 and math.isfinite(scale) else None

    def _mul(self, a: Value, b: Value) -> Value:
        if (isinstance(a, Line) and a.constant == 0) or (isinstance(b, Line) and b.constant == 0):
            return _ZERO
        if isinstance(a, Line) and isinstance(b, Line):
            if a.slope and b.slope:
                return self._grown_product(self._growth(a), self._growth(b))
            first, second = (b, a) if b.slope else (a, b)
            return self._line_product(first, second)
        growth, other = (a, b) if isinstance(a, Growth) else (b, a)
        if not isinstance(growth, Growth) or other is None:
            return None
        if isinstance(other, Growth):
            return self._grown_product(growth, other)
        if other.slope:
            return self._grown_product(growth, self._growth(other))
        least = (abs(float(other.offset)) - other.moments[0]) * (1 - _SLACK)
        return self._scaled(growth, least, 1 if other.offset > 0 else -1) if least > 0 else None

    def _line_product(self, a: Line, b: Line) -> Line:
        """Of a line and something that stays near a constant."""
        p, q, other = _size(a.slope), _size(a.offset), _size(b.offset)
        moments = []
        for k in range(MOMENTS):
            above = b.moments[k + 1] if k + 1 < MOMENTS else (0.0 if b.is_exact else math.inf)
            terms = (_times(p, above), _times(q, b.moments[k]), _times(other, a.moments[k]),
                     _times(a.moments[0], b.moments[k]))  # fmt: skip
            moments.append(_OUT * sum(terms))
        return Line(a.slope * b.offset, a.offset * b.offset, tuple(moments))

    def _scaled(self, growth: Growth, factor: float, sign: int) -> Value:
        if growth.exponential:
            shift = growth.shift + math.log(factor) - _SLACK * (1 + abs(growth.shift))
            return Growth(growth.sign * sign, growth.rate, shift, exponential=True)
        return _growth_of(growth.sign * sign, growth.rate * factor, growth.shift * factor)

    def _grown_product(self, a: Growth | None, b: Growth | None) -> Value:
        """Of two growths: the least value of one times the other."""
        if a is None or b is None:
            return None
        if a.exponential or b.exponential:
            fast, slow = (a, b) if a.exponential else (b, a)
            least = 1.0 if slow.exponential else slow.rate * self.start + slow.shift
            return Growth(a.sign * b.sign, fast.rate, fast.shift, exponential=True) if least >= 1 else None
        least = a.rate * self.start + a.shift
        if least <= 0 or not self._positive(b):
            return None
        return _growth_of(a.sign * b.sign, b.rate * least, b.shift * least)

    def _growth(self, line: Line) -> Growth | None:
        """A line that is not level, as a growth; None where it may still be of either sign at the start."""
        sign = self.side if line.slope > 0 else -self.side
        rate, offset = abs(float(line.slope)), float(line.offset) * sign
        growth = _growth_of(sign, rate, offset - line.moments[0], abs(offset) + line.moments[0])
        return growth if math.isfinite(growth.shift) and rate > 0 and self._positive(growth) else None

    def _div(self, a: Value, b: Value) -> Value:
        if isinstance(b, Line) and b.slope:
            b = self._growth(b)
        if isinstance(b, Growth):
            return self._mul(a, Line(Fraction(0), Fraction(0), self._reciprocal_moments(b)))
        if not isinstance(b, Line) or not b.offset:
            return None
        size = abs(float(b.offset))
        left = size * (size - b.moments[0]) * (1 - _SLACK)
        if left <= 0:
            return None
        moments = tuple(_OUT * m / left for m in b.moments)
        return self._mul(a, Line(Fraction(0), 1 / b.offset, moments))

    def _reciprocal_moments(self, growth: Growth) -> tuple[float, ...]:
        if growth.exponential:
            return self._decay(growth.rate, growth.shift)
        least = growth.rate * self.start + growth.shift
        if least <= 0 or math.isinf(least):
            return (math.inf,) * MOMENTS
        # t / (rate t + shift) falls or rises towards 1 / rate.
        return (_OUT / least, _OUT * max(self.start / least, 1 / growth.rate), *((math.inf,) * (MOMENTS - 2)))

    def _sign(self, a: Value, b: Value) -> int | None:
        """Sign of ``a - b`` for all ``t >= start``; 0 where they are equal; None where it is open."""
        if isinstance(a, Growth) and math.isinf(a.rate):
            return a.sign if isinstance(b, Line) or (isinstance(b, Growth) and math.isfinite(b.rate)) else None
        if isinstance(b, Growth) and math.isinf(b.rate):
            return -b.sign if a is not None else None
        gap = self._add(a, self._mul(Line(Fraction(0), Fraction(-1)), b))
        if isinstance(gap, Growth):
            return gap.sign if self._positive(gap) else None
        if not isinstance(gap, Line):
            return None
        if gap.constant == 0:
            return 0
        if gap.slope:
            growth = self._growth(gap)
            return growth.sign if growth else None
        decided = abs(float(gap.offset)) > gap.moments[0] * _OUT
        return (1 if gap.offset > 0 else -1) if decided else None

    def _compare(self, op: str, a: Value, b: Value) -> Value:
        sign = self._sign(a, b)
        if sign is None:
            return None
        truth = {"gt": sign > 0, "ge": sign >= 0, "eq": sign == 0}[op]
        return Line(Fraction(0), Fraction(int(truth)))

    def _select(self, condition: Value, yes: Value, no: Value) -> Value:
        chosen = condition.constant if isinstance(condition, Line) else None
        return {Fraction(1): yes, Fraction(0): no}.get(chosen) if chosen is not None else None

    def _extreme(self, a: Value, b: Value, want: int) -> Value:
        sign = self._sign(a, b)
        if sign is not None:
            return a if sign * want >= 0 else b
        if isinstance(a, Line) and isinstance(b, Line) and (a.slope, a.offset) == (b.slope, b.offset):
            return Line(a.slope, a.offset, tuple(map(max, a.moments, b.moments)))
        return None

    def _decay(self, rate: float, shift: float, factor: float = 1.0) -> tuple[float, ...]:
        """Bounds of ``t^k factor exp(-rate t - shift)`` for ``t >= start``."""
        moments = []
        for k in range(MOMENTS):
            at = max(self.start, k / rate)
            exponent = k * math.log(at) - rate * at - shift
            slack = _SLACK * (abs(rate * at) + abs(shift) + k)
            moments.append(max(factor * math.exp(exponent + slack), _LEAST) if exponent + slack < 700 else math.inf)
        return tuple(moments)

    def _function(self, name: str, a: Value) -> Value:
        if a is None:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        if isinstance(a, Line) and not a.slope:
            return _near(name, a)
        growth = a if isinstance(a, Growth) else self._growth(a)
        if name in INTEGER and isinstance(a, Line):
            return Line(a.slope, a.offset, (a.moments[0] + 1, *((math.inf,) * (MOMENTS - 1))))
        if growth is None:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        return self._far(name, a, growth)  # an exponential growth is a linear one too: exp(u) > u

    def _far(self, name: str, a: Line | Growth, growth: Growth) -> Value:
        """A function of what goes to plus or minus infinity."""
        rate, shift, sign = growth.rate, growth.shift, growth.sign
        if name == "cube":
            return self._grown_product(growth, self._grown_square(growth))
        if name == "exp" and sign > 0 and not growth.exponential:
            return Growth(1, rate, shift, exponential=True)
        if name == "softplus" and sign > 0:
            if isinstance(a, Growth):
                return a
            return self._add(a, Line(Fraction(0), Fraction(0), self._decay(rate, shift)))
        limits = {"sigmoid": (0, 1), "tanh": (-1, 1), "erf": (-1, 1), "exp": (0, 0), "softplus": (0, 0)}
        if name not in limits:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        least = rate * self.start + shift
        if least <= 0:
            return _bounded(_BOUNDS[name]) if name in _BOUNDS else None
        if name == "tanh":  # 1 - tanh(u) < 2 exp(-2 u)
            moments = self._decay(2 * rate, 2 * shift, 2.0)
        elif name == "erf":  # 1 - erf(u) < exp(-u u) <= exp(-least u)
            moments = self._decay(least * rate, least * shift)
        else:  # 1 - sigmoid(u), exp(-u) and softplus(-u) are at most exp(-u)
            moments = self._decay(rate, shift)
        return Line(Fraction(0), Fraction(limits[name][sign > 0]), moments)

    def _grown_square(self, growth: Growth) -> Growth | None:
        square = self._grown_product(growth, growth)
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
        size = _size(a.offset)
        factor = 3 * size * size + 3 * size * a.moments[0] + a.moments[0] ** 2
        return Line(Fraction(0), a.offset**3, tuple(_OUT * _times(factor, m) for m in a.moments))
    if name in _AT_ZERO and not a.offset and a.moments[0] <= 1:
        value, slope = _AT_ZERO[name]
        return Line(Fraction(0), value, tuple(_OUT * slope * m for m in a.moments))
    return _bounded(_BOUNDS[name]) if name in _BOUNDS else None


def _bounded(size: float) -> Line:
    return Line(Fraction(0), Fraction(0), (size, *((math.inf,) * (MOMENTS - 1))))


def _growth_of(sign: int, rate: float, shift: float, scale: float | None = None) -> Growth:
    """A linear growth, a little less of it than was computed from numbers as large as ``scale``."""
    return Growth(sign, rate * (1 - _SLACK), shift - _SLACK * (abs(shift) if scale is None else scale))


def _size(number: Fraction) -> float:
    """A bound of the magnitude; 0 only for 0."""
    return max(abs(float(number)) * _OUT, _LEAST) if number else 0.0


def _times(a: float, b: float) -> float:
    """A product in which 0 wins over infinity: a remainder that is not there, or a factor that is not."""
    return a * b if a and b else 0.0
