"""Exact piecewise-linear functions of one real variable, over the rationals.

Every float is a dyadic rational, so a network's ReLU, Clip, PReLU, Where and their blends with constant weights are
such functions with no rounding at all, and two of them can be compared for equality on the whole line instead of on
samples.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Iterable
from fractions import Fraction

# A network's own activations have a handful of breakpoints and a learned unit some twenty; towers of Abs double them at
# each storey, and past this many the arithmetic is no longer cheap.
MAX_BREAKS = 1024

Line = tuple[Fraction, Fraction]
ZERO, ONE = Fraction(0), Fraction(1)


class NotPiecewiseLinearError(ArithmeticError):
    """The result has no piecewise-linear form, or one with more than ``MAX_BREAKS`` breakpoints."""


@dataclasses.dataclass(frozen=True)
class PiecewiseLinear:
    """``n`` breakpoints, the value at each, and ``n + 1`` open pieces between them; canonical, so ``==`` is equality.

    Attributes:
        breaks: Strictly rising abscissae at which the function bends or jumps.
        points: Value at each of them: ``x > 0`` and ``x >= 0`` differ exactly there.
        lines: ``(slope, intercept)`` of each open piece, from left to right.

    >>> x = PiecewiseLinear.identity()
    >>> x.maximum(PiecewiseLinear.constant(0)) == x.greater().times(x)
    True
    """

    breaks: tuple[Fraction, ...]
    points: tuple[Fraction, ...]
    lines: tuple[Line, ...]

    @classmethod
    def identity(cls) -> PiecewiseLinear:
        """``f(x) = x``."""
        return cls((), (), ((ONE, ZERO),))

    @classmethod
    def constant(cls, value: Fraction | int) -> PiecewiseLinear:
        """``f(x) = value``."""
        return cls((), (), ((ZERO, Fraction(value)),))

    def __call__(self, x: Fraction | int) -> Fraction:
        """Value at ``x``."""
        index = bisect.bisect_left(self.breaks, x)
        if index < len(self.breaks) and self.breaks[index] == x:
            return self.points[index]
        slope, intercept = self.lines[index]
        return slope * x + intercept

    @property
    def is_constant(self) -> bool:
        """Whether it has one value everywhere."""
        return not self.breaks and self.lines[0][0] == 0

    @property
    def is_affine(self) -> bool:
        """Whether it is one straight line."""
        return not self.breaks

    @property
    def is_step(self) -> bool:
        """Whether every piece is flat."""
        return all(slope == 0 for slope, _ in self.lines)

    @property
    def is_bounded(self) -> bool:
        """Whether its values stay between two numbers: both outer pieces are flat."""
        return self.lines[0][0] == 0 == self.lines[-1][0]

    @property
    def is_continuous(self) -> bool:
        """Whether no breakpoint is a jump."""
        return all(
            point == a * x + b == c * x + d
            for x, point, (a, b), (c, d) in zip(self.breaks, self.points, self.lines[:-1], self.lines[1:], strict=True)
        )

    @property
    def largest_jump(self) -> Fraction:
        """How far apart two of the left limit, the value and the right limit are, at worst; 0 where it is continuous.

        A table of rounded slopes and offsets gives a function that is off by that rounding at each of its points.
        """
        sides = zip(self.breaks, self.points, self.lines[:-1], self.lines[1:], strict=True)
        triples = [(point, a * x + b, c * x + d) for x, point, (a, b), (c, d) in sides]
        return max((max(triple) - min(triple) for triple in triples), default=ZERO)

    def plus(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """``self + other``."""
        return self._zip(other, lambda f, g: (f[0] + g[0], f[1] + g[1]), lambda a, b: a + b)

    def scaled(self, factor: Fraction | int) -> PiecewiseLinear:
        """``factor * self``."""
        return self.times(PiecewiseLinear.constant(factor))

    def minus(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """``self - other``."""
        return self.plus(other.scaled(-1))

    def times(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """``self * other``, where on every piece one of the two is flat.

        Raises:
            NotPiecewiseLinearError: on some piece neither is, so that the product is a parabola.
        """
        return self._zip(other, _line_product, lambda a, b: a * b)

    def reciprocal(self) -> PiecewiseLinear:
        """``1 / self`` for a step function that is nowhere zero.

        Raises:
            NotPiecewiseLinearError: it is not one.
        """
        if not self.is_step or 0 in self.points or any(value == 0 for _, value in self.lines):
            raise NotPiecewiseLinearError("the reciprocal of this function is not piecewise linear")
        lines = tuple((ZERO, 1 / value) for _, value in self.lines)
        return PiecewiseLinear(self.breaks, tuple(1 / point for point in self.points), lines)

    def mapped(self, value_of: Callable[[Fraction], Fraction]) -> PiecewiseLinear:
        """``value_of(self(x))`` for a step function.

        Raises:
            NotPiecewiseLinearError: it is not one.
        """
        if not self.is_step:
            raise NotPiecewiseLinearError("only the values of a step function can be mapped one by one")
        lines = [(ZERO, value_of(value)) for _, value in self.lines]
        return _canonical(list(self.breaks), [value_of(point) for point in self.points], lines)

    def rounded(self, integer_of: Callable[[Fraction], int]) -> PiecewiseLinear:
        """``integer_of(self(x))`` for a rising function that changes only at integers and half integers.

        Raises:
            NotPiecewiseLinearError: ``self`` is not bounded, or there are more than ``MAX_BREAKS`` steps.
        """
        if not self.is_bounded:
            raise NotPiecewiseLinearError("a rounded function that is not bounded has no end of steps")
        spots: set[Fraction] = set()
        for index, (slope, intercept) in enumerate(self.lines):
            if slope:
                ends = sorted(2 * (slope * x + intercept) for x in self.breaks[index - 1 : index + 1])
                if ends[1] - ends[0] > 2 * MAX_BREAKS:
                    raise NotPiecewiseLinearError(f"more than {MAX_BREAKS} breakpoints")
                halves = range(math.ceil(ends[0]), math.floor(ends[1]) + 1)
                spots |= {(Fraction(half, 2) - intercept) / slope for half in halves}
        breaks, lines, points = self._refined(spots)
        values = [slope * _inside(breaks, index) + intercept for index, (slope, intercept) in enumerate(lines)]
        flat = [(ZERO, Fraction(integer_of(value))) for value in values]
        return _canonical(breaks, [Fraction(integer_of(point)) for point in points], flat)

    def distance(self, other: PiecewiseLinear, low: Fraction, high: Fraction) -> Fraction:
        """``sup |self - other|`` over ``low <= x <= high``, exactly.

        >>> PiecewiseLinear.identity().distance(RELU, Fraction(-3), Fraction(1))
        Fraction(3, 1)
        """
        difference = self.minus(other)
        first, last = bisect.bisect_left(difference.breaks, low), bisect.bisect_right(difference.breaks, high)
        inner = difference.breaks[first:last]
        # A piece that only touches the domain in one point, which then is a breakpoint, has no share in it.
        ends = [low, *inner, high]
        pieces = [
            abs(slope * x + intercept)
            for (slope, intercept), left, right in zip(
                difference.lines[first : last + 1], ends[:-1], ends[1:], strict=True
            )
            if left < right
            for x in (left, right)
        ]
        return max([abs(difference(low)), abs(difference(high)), *map(abs, difference.points[first:last]), *pieces])

    def greater(self) -> PiecewiseLinear:
        """1 where ``self > 0``, else 0."""
        return self._signs(lambda value: value > 0)

    def greater_equal(self) -> PiecewiseLinear:
        """1 where ``self >= 0``, else 0."""
        return self._signs(lambda value: value >= 0)

    def equal_zero(self) -> PiecewiseLinear:
        """1 where ``self == 0``, else 0."""
        return self._signs(lambda value: value == 0)

    def choose(self, yes: PiecewiseLinear, no: PiecewiseLinear) -> PiecewiseLinear:
        """``yes`` where ``self`` (0 or 1 everywhere) is 1, ``no`` where it is 0: pieces are taken, none computed."""
        if len(self.breaks) == 1:
            left, right = ((yes if side[1] else no) for side in self.lines)
            return _joined(self.breaks[0], left, right, (yes if self.points[0] else no)(self.breaks[0]))
        breaks, sides, side_points = self._refined((*yes.breaks, *no.breaks))
        _, yes_lines, yes_points = yes._refined(breaks)
        _, no_lines, no_points = no._refined(breaks)
        lines = [y if side[1] else n for side, y, n in zip(sides, yes_lines, no_lines, strict=True)]
        points = [y if side else n for side, y, n in zip(side_points, yes_points, no_points, strict=True)]
        return _canonical(breaks, points, lines)

    def maximum(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """The larger of the two, pointwise."""
        return self.minus(other).greater().choose(self, other)

    def minimum(self, other: PiecewiseLinear) -> PiecewiseLinear:
        """The smaller of the two, pointwise."""
        return self.minus(other).greater().choose(other, self)

    def after(self, inner: PiecewiseLinear) -> PiecewiseLinear:
        """Composition: ``self(inner(x))``."""
        spots = {
            (value - intercept) / slope for slope, intercept in inner.lines if slope for value in self.breaks
        }  # a superset of the bends: spots outside their piece vanish in canonical form
        breaks, lines, points = inner._refined(spots)
        new_lines = []
        for index, (slope, intercept) in enumerate(lines):
            inside = slope * _inside(breaks, index) + intercept
            if slope == 0:
                new_lines.append((ZERO, self(intercept)))
                continue
            a, b = self.lines[bisect.bisect_left(self.breaks, inside)]
            new_lines.append((a * slope, a * intercept + b))
        return _canonical(breaks, [self(point) for point in points], new_lines)

    def equals_on(self, other: PiecewiseLinear, limit: Fraction) -> bool:
        """Whether the two agree at every ``x`` with ``|x| <= limit``."""
        difference = self.minus(other)
        if any(abs(x) <= limit and point for x, point in zip(difference.breaks, difference.points, strict=True)):
            return False
        first, last = bisect.bisect_right(difference.breaks, -limit), bisect.bisect_left(difference.breaks, limit)
        return all(difference.lines[i] == (ZERO, ZERO) for i in range(first, last + 1))

    def is_relu(self, limit: Fraction | None = None) -> bool:
        """Whether it is ``max(x, 0)`` on the whole line, or wherever ``|x| <= limit``."""
        if (limit is None or limit >= 1) and (self(1) != 1 or self(-1) != 0):
            return False  # two values settle most cases without any algebra
        return self == RELU if limit is None else self.equals_on(RELU, limit)

    def _zip(
        self,
        other: PiecewiseLinear,
        on_lines: Callable[[Line, Line], Line],
        on_points: Callable[[Fraction, Fraction], Fraction],
    ) -> PiecewiseLinear:
        """Apply an operation piece by piece on the common refinement."""
        if not self.breaks and not other.breaks:
            return PiecewiseLinear((), (), (on_lines(self.lines[0], other.lines[0]),))
        breaks, mine, theirs, points = _merged(self, other)
        lines = [on_lines(f, g) for f, g in zip(mine, theirs, strict=True)]
        return _canonical(breaks, [on_points(a, b) for a, b in points], lines)

    def _refined(self, extra: Iterable[Fraction]) -> tuple[list[Fraction], list[Line], list[Fraction]]:
        """The same function cut at more places: breaks, lines, points."""
        breaks = sorted({*self.breaks, *extra})
        if len(breaks) > MAX_BREAKS:
            raise NotPiecewiseLinearError(f"more than {MAX_BREAKS} breakpoints")
        places = [bisect.bisect_left(self.breaks, x) for x in breaks]
        # The piece left of breaks[k] is the piece of self that ends at or after it.
        return breaks, [*(self.lines[p] for p in places), self.lines[-1]], [self(x) for x in breaks]

    def _signs(self, test: Callable[[Fraction], bool]) -> PiecewiseLinear:
        """1 where ``test`` holds; it may change only at a breakpoint or where a piece crosses zero."""
        breaks, lines, points = self._refined(-b / a for a, b in self.lines if a)
        values = [a * _inside(breaks, index) + b for index, (a, b) in enumerate(lines)]
        return _canonical(
            breaks, [ONE if test(p) else ZERO for p in points], [(ZERO, ONE if test(v) else ZERO) for v in values]
        )


def _merged(
    f: PiecewiseLinear, g: PiecewiseLinear
) -> tuple[list[Fraction], list[Line], list[Line], list[tuple[Fraction, Fraction]]]:
    """Two functions cut at the breakpoints of both: breaks, lines of each, and their values at the breaks."""
    breaks: list[Fraction] = []
    points: list[tuple[Fraction, Fraction]] = []
    mine, theirs = [f.lines[0]], [g.lines[0]]
    i = j = 0
    while i < len(f.breaks) or j < len(g.breaks):
        x = f.breaks[i] if j == len(g.breaks) or (i < len(f.breaks) and f.breaks[i] <= g.breaks[j]) else g.breaks[j]
        here = i < len(f.breaks) and f.breaks[i] == x, j < len(g.breaks) and g.breaks[j] == x
        points.append((
            f.points[i] if here[0] else f.lines[i][0] * x + f.lines[i][1],
            g.points[j] if here[1] else g.lines[j][0] * x + g.lines[j][1],
        ))  # fmt: skip
        i, j = i + here[0], j + here[1]
        breaks.append(x)
        mine.append(f.lines[i])
        theirs.append(g.lines[j])
    if len(breaks) > MAX_BREAKS:
        raise NotPiecewiseLinearError(f"more than {MAX_BREAKS} breakpoints")
    return breaks, mine, theirs, points


def _joined(x: Fraction, left: PiecewiseLinear, right: PiecewiseLinear, here: Fraction) -> PiecewiseLinear:
    """``left`` before ``x``, ``right`` behind it, ``here`` at it: chains of choices cost what they add."""
    i, j = bisect.bisect_left(left.breaks, x), bisect.bisect_right(right.breaks, x)
    slope, intercept = left.lines[i]
    bends = left.lines[i] != right.lines[j] or here != slope * x + intercept
    breaks = (*left.breaks[:i], *((x,) if bends else ()), *right.breaks[j:])
    if len(breaks) > MAX_BREAKS:
        raise NotPiecewiseLinearError(f"more than {MAX_BREAKS} breakpoints")
    points = (*left.points[:i], *((here,) if bends else ()), *right.points[j:])
    return PiecewiseLinear(breaks, points, (*left.lines[: i + bends], *right.lines[j:]))


def _inside(breaks: list[Fraction], index: int) -> Fraction:
    """A point strictly inside open piece ``index``."""
    if not breaks:
        return ZERO
    if index == 0:
        return breaks[0] - 1
    if index == len(breaks):
        return breaks[-1] + 1
    return (breaks[index - 1] + breaks[index]) / 2


def _line_product(f: Line, g: Line) -> Line:
    if f[0] and g[0]:
        raise NotPiecewiseLinearError("a product of two sloped pieces is a parabola")
    return f[0] * g[1] + g[0] * f[1], f[1] * g[1]


def _canonical(breaks: list[Fraction], points: list[Fraction], lines: list[Line]) -> PiecewiseLinear:
    """Drop breakpoints at which nothing happens."""
    keep = [k for k, x in enumerate(breaks) if lines[k] != lines[k + 1] or points[k] != lines[k][0] * x + lines[k][1]]
    kept_lines = (*(lines[k] for k in keep), lines[-1])
    return PiecewiseLinear(tuple(breaks[k] for k in keep), tuple(points[k] for k in keep), kept_lines)


RELU = PiecewiseLinear.identity().maximum(PiecewiseLinear.constant(0))
