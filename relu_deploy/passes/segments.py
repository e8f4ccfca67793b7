"""Approximate a continuous piecewise-linear function by one with the fewest segments.

``f - eps`` and ``f + eps`` are the walls of a tunnel, and an approximation within eps is a path through it that bends
as rarely as possible. Greedy is optimal: from where the last link can start, take the line that sees furthest. Where it
leaves the tunnel, say through the floor at X after it touched the ceiling for the last time at b, the piece between the
two is a window; whatever comes next crosses it from below, hence stays under the ceiling from b on and over the floor
from X on, and every such line does cross it. So each step is the same question: how far is there a line under these
points of the ceiling and over those of the floor? A pair of them, floor before ceiling, bounds its slope from above;
ceiling before floor, from below.

Source: Imai and Iri 1986, "An optimal algorithm for approximating a piecewise linear function", J. Inf. Process. 9(3).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from relu_deploy.passes.polyline import Array, Hinges, Polyline, stack

Point = tuple[float, float]

__all__ = ["Hinges", "Polyline", "fewest_segments", "stack"]

# Rounding of a value that is a short sum of products, relative to what went into it.
_ROUNDING = 2.0**-49
# What an error may exceed eps by: the walls are met exactly, and meeting them is computed.
_EXCESS = 1e-9
# Where a line hangs on two close points, rounding moves its far end by more than that; this much is then given up, and
# twice what values round where the bound is as small as that.
_MARGIN = 1e-6


def fewest_segments(function: Polyline, eps: float, lo: float = -math.inf, hi: float = math.inf) -> Polyline:
    """The polyline of fewest bends that stays within ``eps`` of ``function`` from ``lo`` to ``hi``.

    Args:
        function: What is approximated.
        eps: Largest error, in units of the values, >= 0. At 0 the result is ``function`` without the breaks at which it
            does not bend, and without those outside the domain.
        lo: Start of the domain. At ``-inf`` the first slope is kept as it is, since any other goes astray.
        hi: End of the domain, ``>= lo``; ``inf`` alike.

    Returns:
        The approximation. Its error has been computed at every break of either and at the ends of the domain, and is at
        most ``eps (1 + 1e-9)``, plus what rounds in computing values as large as these in float64; where ``eps`` is not
        well above that, there may be a bend more than needed. What it does outside the domain is not specified.

    Raises:
        ValueError: ``eps`` is negative or NaN, or ``lo`` and ``hi`` are no domain.

    >>> noisy = Polyline(np.array([-1.0, 0.0, 1.0]), np.array([0.01, 0.0, 1.01]), 0.0, 1.0)
    >>> fewest_segments(noisy, 0.02).bends
    1
    """
    if not eps >= 0 or not lo <= hi or lo == math.inf or hi == -math.inf:
        raise ValueError(f"eps {eps} is negative, or {lo} to {hi} is no domain")
    exact = _restricted(function, lo, hi)
    ends = [x for x in {lo, hi} if math.isfinite(x)]
    spots = np.unique(np.concatenate([exact.breaks, ends]))
    plain = _without_straight(exact)
    plain = plain if _within(plain, exact, 0.0, lo, hi) else exact
    left, right = (exact.slope_left if lo == -math.inf else None), (exact.slope_right if hi == math.inf else None)
    if eps == 0 or lo == hi:
        return plain
    slack = _slack(exact, spots)
    for width in (eps + slack, np.full(spots.shape, eps * (1 - _MARGIN)), eps * (1 - _MARGIN) - 2 * slack):
        best = _minimum_link(spots, exact(spots), width, left, right) if (width > 0).all() else None
        if best is not None and best.bends < plain.bends and _within(best, exact, eps, lo, hi):
            return best
    return plain


def _restricted(function: Polyline, lo: float, hi: float) -> Polyline:
    """The same on the domain, without breaks outside or at its ends."""
    slopes, x = function.slopes(), function.breaks
    inside = (x > lo) & (x < hi)
    first, last = int(np.searchsorted(x, lo, "right")), int(np.searchsorted(x, hi, "left"))
    if inside.any():
        return Polyline(x[inside], function.values[inside], float(slopes[first]), float(slopes[last]))
    slope = float(slopes[min(first, last)])
    anchor = np.array([x[0] if math.isinf(lo) and math.isinf(hi) else hi if math.isinf(lo) else lo])
    return Polyline(anchor, function(anchor), slope, slope)


def _slack(function: Polyline, spots: Array) -> Array:
    """How far values at ``spots`` may be off by rounding, among others because the breaks are rounded."""
    slopes = np.abs(function.slopes())
    steep = np.maximum(*(slopes[np.searchsorted(function.breaks, spots, side)] for side in ("left", "right")))
    return np.asarray(_ROUNDING * (np.abs(function(spots)) + steep * np.abs(spots)))


def _without_straight(function: Polyline) -> Polyline:
    """Drop breaks at which the slope stays, as far as rounded values can tell."""
    x, y = function.breaks.tolist(), function.values.tolist()
    slack = _slack(function, function.breaks).tolist()
    kept: list[int] = []
    for index in range(len(x)):
        before, after, doubt = function.slope_left, function.slope_right, 0.0
        for last in kept[-1:]:
            before = (y[index] - y[last]) / (x[index] - x[last])
            doubt += (slack[index] + slack[last]) / (x[index] - x[last])
        for following in range(index + 1, len(x))[:1]:
            after = (y[following] - y[index]) / (x[following] - x[index])
            doubt += (slack[index] + slack[following]) / (x[following] - x[index])
        if abs(after - before) > doubt:
            kept.append(index)
    if kept:
        return dataclasses.replace(function, breaks=function.breaks[kept], values=function.values[kept])
    return Polyline(function.breaks[:1], function.values[:1], function.slope_left, function.slope_left)


def _within(found: Polyline, exact: Polyline, eps: float, lo: float, hi: float) -> bool:
    """Whether the error is at most eps; it is largest at a break of one of the two or at an end."""
    if lo == -math.inf and found.slope_left != exact.slope_left:
        return False
    if hi == math.inf and found.slope_right != exact.slope_right:
        return False
    spots = np.concatenate([found.breaks, exact.breaks, [x for x in (lo, hi) if math.isfinite(x)]])
    spots = np.unique(spots[(spots >= lo) & (spots <= hi)])
    error = np.abs(found(spots) - exact(spots))
    return bool((error <= eps * (1 + _EXCESS) + 4 * _slack(exact, spots)).all())


@dataclasses.dataclass(frozen=True)
class _Line:
    """A straight line through a point; ``window`` is where the next link takes over."""

    x: float
    y: float
    slope: float
    window: tuple[float, float] = (0.0, 0.0)

    def at(self, x: float) -> float:
        return self.y + self.slope * (x - self.x)


@dataclasses.dataclass
class _Feasible:
    """Lines over ``floor`` and under ``ceiling``: the range of their slopes."""

    floor: list[Point]
    ceiling: list[Point]
    least: float = -math.inf
    most: float = math.inf

    def bounds(self, low: Sequence[Point], high: Sequence[Point]) -> tuple[float, float]:
        """Range of slopes once ``low`` and ``high`` have joined the walls, to the right of their points."""
        most = min((_slope(p, q) for q in high for p in self.floor if p[0] < q[0]), default=math.inf)
        least = max((_slope(p, q) for q in low for p in self.ceiling if p[0] < q[0]), default=-math.inf)
        return max(self.least, least), min(self.most, most)

    def highest(self, slope: float) -> Point:
        """Where a line of this slope under the ceiling touches it, the last such point."""
        x0 = self.ceiling[0][0]
        return min(reversed(self.ceiling), key=lambda p: p[1] - slope * (p[0] - x0))

    def lowest(self, slope: float) -> Point:
        """Where a line of this slope over the floor touches it, the last such point."""
        x0 = self.floor[0][0]
        return max(reversed(self.floor), key=lambda p: p[1] - slope * (p[0] - x0))

    def middle(self) -> _Line:
        """A line well inside."""
        slope = (self.least + self.most) / 2
        high, low = self.highest(slope), self.lowest(slope)
        return _Line(high[0], (high[1] + low[1] + slope * (high[0] - low[0])) / 2, slope)


def _slope(p: Point, q: Point) -> float:
    return (q[1] - p[1]) / (q[0] - p[0])


def _minimum_link(
    spots: Array, target: Array, width: Array, left: float | None, right: float | None
) -> Polyline | None:
    """The path of fewest bends; None where rounding broke the argument.

    Args:
        spots: Where the walls bend, ``(n,)``.
        target: Middle of the tunnel there, ``(n,)``.
        width: Half its height there, ``(n,)``.
        left: Slope of the first link and of the tunnel before the first spot; None for an end there.
        right: The same on the other side.
    """
    floor = list(zip(spots.tolist(), (target - width).tolist(), strict=True))
    ceiling = list(zip(spots.tolist(), (target + width).tolist(), strict=True))
    start = _Feasible(floor[:1], ceiling[:1])
    if left is not None:
        start.least = start.most = left
    links: list[_Line] = []
    at = 1
    while len(links) <= len(floor) + 1:
        end = _advance(start, floor, ceiling, at, right)
        if end is None:
            links.append(start.middle())
            return _joined(links)
        at, ahead = end
        link, following = _leave(start, floor[at - 1], ceiling[at - 1], ahead)
        if link is None or following is None:
            return None
        links.append(link)
        start = following
    return None


def _advance(
    start: _Feasible, floor: list[Point], ceiling: list[Point], at: int, right: float | None
) -> tuple[int, tuple[Point, Point]] | None:
    """Let ``start`` take in walls from spot ``at`` on, as far as one line goes.

    Returns:
        None where it goes to the end; else the first spot that it does not reach, and the walls there.
    """
    for index in range(at, len(floor)):
        least, most = start.bounds([floor[index]], [ceiling[index]])
        if least > most:
            return index, (floor[index], ceiling[index])
        start.least, start.most = least, most
        start.floor.append(floor[index])
        start.ceiling.append(ceiling[index])
    if right is None:
        return None
    if start.least <= right <= start.most:
        start.least = start.most = right
        return None
    return len(floor), _far_walls(start, floor[-1], ceiling[-1], right)


def _far_walls(start: _Feasible, floor: Point, ceiling: Point, right: float) -> tuple[Point, Point]:
    """A spot on the last rays that no line of ``start`` reaches."""
    apart = start.most - right if start.most < right else start.least - right
    reach = 4 * (ceiling[1] - floor[1]) / abs(apart)
    return (floor[0] + reach, floor[1] + right * reach), (ceiling[0] + reach, ceiling[1] + right * reach)


def _leave(
    start: _Feasible, floor: Point, ceiling: Point, ahead: tuple[Point, Point]
) -> tuple[_Line | None, _Feasible | None]:
    """The line that sees furthest between two spots, and what the link after it has to respect."""
    best: tuple[float, _Line, _Feasible] | None = None
    touch = start.highest(start.most) if math.isfinite(start.most) else None
    leave = touch and _crossing(_Line(*touch, start.most), floor, ahead[0], above=True)
    if touch and leave:
        walls = _Feasible([leave], [p for p in start.ceiling if p[0] >= touch[0]])
        best = leave[0], _Line(*touch, start.most, (touch[0], leave[0])), walls
    touch = start.lowest(start.least) if math.isfinite(start.least) else None
    leave = touch and _crossing(_Line(*touch, start.least), ceiling, ahead[1], above=False)
    if touch and leave and (best is None or leave[0] < best[0]):
        walls = _Feasible([p for p in start.floor if p[0] >= touch[0]], [leave])
        best = leave[0], _Line(*touch, start.least, (touch[0], leave[0])), walls
    if best is None:
        return None, None
    following = best[2]
    following.least, following.most = _window_bounds(following)
    return best[1], following


def _window_bounds(walls: _Feasible) -> tuple[float, float]:
    """Slopes of lines that cross the window in the right direction."""
    return _Feasible(walls.floor, walls.ceiling).bounds(walls.floor, walls.ceiling)


def _crossing(line: _Line, here: Point, there: Point, *, above: bool) -> Point | None:
    """Where the line meets the wall from ``here`` to ``there``; None if it stays on its side of it."""
    sign = 1.0 if above else -1.0
    near, far = sign * (line.at(here[0]) - here[1]), sign * (line.at(there[0]) - there[1])
    if not far < 0:
        return None
    part = min(max(near / (near - far), 0.0), 1.0) if near > far else 0.0
    return here[0] + part * (there[0] - here[0]), here[1] + part * (there[1] - here[1])


def _joined(links: list[_Line]) -> Polyline | None:
    """The polyline whose pieces lie on the links."""
    knots: list[Point] = []
    for one, two in pairwise(links):
        low, high = one.window
        bend = two.slope - one.slope
        x = one.x - (two.at(one.x) - one.y) / bend if bend else high
        x = min(max(x, low), high)
        knots.append((x, (one.at(x) + two.at(x)) / 2))
    knots = knots or [(links[0].x, links[0].y)]
    try:
        breaks, values = np.array(knots, np.float64).T
        return Polyline(breaks, values, links[0].slope, links[-1].slope)
    except ValueError:
        return None
