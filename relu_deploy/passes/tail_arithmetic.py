"""Arithmetic far out: lines with a remainder, and what grows past any line.

Bounds that have to be above are enlarged, and those that have to be below reduced, by more than float64 loses.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction
from typing import TypeAlias

# A cubic of a saturating function needs four; bounds of higher powers cost little.
MOMENTS = 8
# In float64, some ten operations each.
SLACK = 2.0**-40
OUT = 1 + SLACK
# A remainder that float64 cannot hold is not 0.
LEAST = 1e-300


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


class Arithmetic:
    """One rule a primitive, for ``t = |x| >= start`` on one side.

    Attributes:
        side: 1 for large ``x``, -1 for small.
        start: Where the tail begins; positive.
    """

    def __init__(self, side: int, start: float) -> None:
        self.side, self.start = side, start

    def add(self, a: Value, b: Value) -> Value:
        """``a + b``."""
        if isinstance(a, Line) and isinstance(b, Line):
            moments = tuple(OUT * (m + n) for m, n in zip(a.moments, b.moments, strict=True))
            return Line(a.slope + b.slope, a.offset + b.offset, moments)
        if isinstance(a, Growth) and isinstance(b, Growth):
            if a.sign != b.sign:
                return None
            slow = a if b.exponential else b
            other = b if slow is a else a
            if slow.exponential or other.exponential:
                return other if self._positive(slow) else None
            return growth_of(a.sign, a.rate + b.rate, a.shift + b.shift, abs(a.shift) + abs(b.shift))
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
        rate = growth.rate + slope - SLACK * (growth.rate + abs(slope))
        scale = abs(growth.shift) + abs(offset) + line.moments[0]
        shift = growth.shift + offset - line.moments[0]
        return growth_of(growth.sign, rate, shift, scale) if rate > 0 and math.isfinite(scale) else None

    def mul(self, a: Value, b: Value) -> Value:
        """``a b``; exactly 0 wins over what is not known."""
        if (isinstance(a, Line) and a.constant == 0) or (isinstance(b, Line) and b.constant == 0):
            return _ZERO
        if isinstance(a, Line) and isinstance(b, Line):
            if a.slope and b.slope:
                return self.grown_product(self.growth(a), self.growth(b))
            first, second = (b, a) if b.slope else (a, b)
            return self._line_product(first, second)
        growth, other = (a, b) if isinstance(a, Growth) else (b, a)
        if not isinstance(growth, Growth) or other is None:
            return None
        if isinstance(other, Growth):
            return self.grown_product(growth, other)
        if other.slope:
            return self.grown_product(growth, self.growth(other))
        least = (abs(float(other.offset)) - other.moments[0]) * (1 - SLACK)
        return self._scaled(growth, least, 1 if other.offset > 0 else -1) if least > 0 else None

    def _line_product(self, a: Line, b: Line) -> Line:
        """Of a line and something that stays near a constant."""
        p, q, other = size_of(a.slope), size_of(a.offset), size_of(b.offset)
        moments = []
        for k in range(MOMENTS):
            above = b.moments[k + 1] if k + 1 < MOMENTS else (0.0 if b.is_exact else math.inf)
            terms = (times(p, above), times(q, b.moments[k]), times(other, a.moments[k]),
                     times(a.moments[0], b.moments[k]))  # fmt: skip
            moments.append(OUT * sum(terms))
        return Line(a.slope * b.offset, a.offset * b.offset, tuple(moments))

    def _scaled(self, growth: Growth, factor: float, sign: int) -> Value:
        if growth.exponential:
            shift = growth.shift + math.log(factor) - SLACK * (1 + abs(growth.shift))
            return Growth(growth.sign * sign, growth.rate, shift, exponential=True)
        return growth_of(growth.sign * sign, growth.rate * factor, growth.shift * factor)

    def grown_product(self, a: Growth | None, b: Growth | None) -> Value:
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
        return growth_of(a.sign * b.sign, b.rate * least, b.shift * least)

    def growth(self, line: Line) -> Growth | None:
        """A line that is not level, as a growth; None where it may still be of either sign at the start."""
        sign = self.side if line.slope > 0 else -self.side
        rate, offset = abs(float(line.slope)), float(line.offset) * sign
        growth = growth_of(sign, rate, offset - line.moments[0], abs(offset) + line.moments[0])
        return growth if math.isfinite(growth.shift) and rate > 0 and self._positive(growth) else None

    def div(self, a: Value, b: Value) -> Value:
        """``a / b``."""
        if isinstance(b, Line) and b.slope:
            b = self.growth(b)
        if isinstance(b, Growth):
            return self.mul(a, Line(Fraction(0), Fraction(0), self._reciprocal_moments(b)))
        if not isinstance(b, Line) or not b.offset:
            return None
        size = abs(float(b.offset))
        left = size * (size - b.moments[0]) * (1 - SLACK)
        if left <= 0:
            return None
        moments = tuple(OUT * m / left for m in b.moments)
        return self.mul(a, Line(Fraction(0), 1 / b.offset, moments))

    def _reciprocal_moments(self, growth: Growth) -> tuple[float, ...]:
        if growth.exponential:
            return self.decay(growth.rate, growth.shift)
        least = growth.rate * self.start + growth.shift
        if least <= 0 or math.isinf(least):
            return (math.inf,) * MOMENTS
        # t / (rate t + shift) falls or rises towards 1 / rate.
        return (OUT / least, OUT * max(self.start / least, 1 / growth.rate), *((math.inf,) * (MOMENTS - 2)))

    def _sign(self, a: Value, b: Value) -> int | None:
        """Sign of ``a - b`` for all ``t >= start``; 0 where they are equal; None where it is open."""
        if isinstance(a, Growth) and math.isinf(a.rate):
            return a.sign if isinstance(b, Line) or (isinstance(b, Growth) and math.isfinite(b.rate)) else None
        if isinstance(b, Growth) and math.isinf(b.rate):
            return -b.sign if a is not None else None
        gap = self.add(a, self.mul(Line(Fraction(0), Fraction(-1)), b))
        if isinstance(gap, Growth):
            return gap.sign if self._positive(gap) else None
        if not isinstance(gap, Line):
            return None
        if gap.constant == 0:
            return 0
        if gap.slope:
            growth = self.growth(gap)
            return growth.sign if growth else None
        decided = abs(float(gap.offset)) > gap.moments[0] * OUT
        return (1 if gap.offset > 0 else -1) if decided else None

    def compare(self, op: str, a: Value, b: Value) -> Value:
        """1 or 0, where the comparison is the same from the start on."""
        sign = self._sign(a, b)
        if sign is None:
            return None
        truth = {"gt": sign > 0, "ge": sign >= 0, "eq": sign == 0}[op]
        return Line(Fraction(0), Fraction(int(truth)))

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """One of the two, where the condition is decided."""
        chosen = condition.constant if isinstance(condition, Line) else None
        return {Fraction(1): yes, Fraction(0): no}.get(chosen) if chosen is not None else None

    def extreme(self, a: Value, b: Value, want: int) -> Value:
        """The larger (``want`` 1) or smaller (-1) of the two."""
        sign = self._sign(a, b)
        if sign is not None:
            return a if sign * want >= 0 else b
        if isinstance(a, Line) and isinstance(b, Line) and (a.slope, a.offset) == (b.slope, b.offset):
            return Line(a.slope, a.offset, tuple(map(max, a.moments, b.moments)))
        return None

    def decay(self, rate: float, shift: float, factor: float = 1.0) -> tuple[float, ...]:
        """Bounds of ``t^k factor exp(-rate t - shift)`` for ``t >= start``."""
        moments = []
        for k in range(MOMENTS):
            at = max(self.start, k / rate)
            exponent = k * math.log(at) - rate * at - shift
            slack = SLACK * (abs(rate * at) + abs(shift) + k)
            moments.append(max(factor * math.exp(exponent + slack), LEAST) if exponent + slack < 700 else math.inf)
        return tuple(moments)


def growth_of(sign: int, rate: float, shift: float, scale: float | None = None) -> Growth:
    """A linear growth, a little less of it than was computed from numbers as large as ``scale``."""
    return Growth(sign, rate * (1 - SLACK), shift - SLACK * (abs(shift) if scale is None else scale))


def size_of(number: Fraction) -> float:
    """A bound of the magnitude; 0 only for 0."""
    return max(abs(float(number)) * OUT, LEAST) if number else 0.0


def times(a: float, b: float) -> float:
    """A product in which 0 wins over infinity: a remainder that is not there, or a factor that is not."""
    return a * b if a and b else 0.0
