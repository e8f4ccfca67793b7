"""Continuous piecewise-linear functions in floats: as points, and as the sum of hinges that a graph computes.

A hinge is ``k relu(x - b)``, and its mirror image ``k relu(b - x)``: as ``relu(x - b) = (x - b) + relu(b - x)``, each
bend may be spelled either way, which moves ``k (b - x)`` into the straight part. A unit whose bends lie at 1000 and
whose first piece is flat is best written with all hinges to the right; the same unit with a flat last piece, mirrored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Unit roundoff of float32.
_UNIT = 2.0**-24


@dataclasses.dataclass(frozen=True, eq=False)
class Polyline:
    """A continuous piecewise-linear function, a ray at each end.

    Attributes:
        breaks: Abscissae, rising strictly; float64 ``(n,)``, n >= 1. A straight line has one, anywhere on it.
        values: Value at each of them; float64 ``(n,)``.
        slope_left: Slope before the first.
        slope_right: Slope after the last.

    Raises:
        ValueError: lengths differ or are 0, a number is not finite, or the breaks do not rise strictly.

    >>> float(Polyline(np.zeros(1), np.zeros(1), 0.0, 1.0)(np.array(-2.0)))
    0.0
    """

    breaks: Array
    values: Array
    slope_left: float
    slope_right: float

    def __post_init__(self) -> None:
        if self.breaks.ndim != 1 or self.breaks.shape != self.values.shape or not self.breaks.size:
            raise ValueError(f"{self.breaks.shape} breaks and {self.values.shape} values make no polyline")
        if not all(np.isfinite(part).all() for part in (self.breaks, self.values, self.slope_left, self.slope_right)):
            raise ValueError("a polyline has finite breaks, values and slopes")
        if (self.breaks[1:] <= self.breaks[:-1]).any():
            raise ValueError("the breaks of a polyline rise strictly")

    def __call__(self, x: Array) -> Array:
        """Values at ``x``, any shape."""
        inside = np.interp(x, self.breaks, self.values)
        left = np.minimum(x - self.breaks[0], 0.0) * self.slope_left
        return np.asarray(inside + left + np.maximum(x - self.breaks[-1], 0.0) * self.slope_right)

    def slopes(self) -> Array:
        """Slope of each piece from left to right, ``(n + 1,)``."""
        inner = np.diff(self.values) / np.diff(self.breaks)
        return np.concatenate([[self.slope_left], inner, [self.slope_right]])

    @property
    def bends(self) -> int:
        """How often it bends, taking each break for a bend: 0 for a straight line."""
        straight = len(self.breaks) == 1 and self.slope_left == self.slope_right
        return 0 if straight else len(self.breaks)


@dataclasses.dataclass(frozen=True, eq=False)
class Hinges:
    """``y = intercept + slope x + sum_i weights_i relu(x - breaks_i)``, of each channel; the first ones mirrored.

    Attributes:
        intercept: float64 ``(C,)``.
        slope: float64 ``(C,)``.
        weights: float64 ``(C, H)``; 0 where a channel has fewer bends than another.
        breaks: float64 ``(C, H)``.
        mirrored: For this many of the H, from the first, the term is ``weights_i relu(breaks_i - x)``.
        rounding: Bound of what float32 adds to the error on the domain that :func:`stack` was given, in its constants,
            products and sums, in any order; ``(C,)``, in units of y.
    """

    intercept: Array
    slope: Array
    weights: Array
    breaks: Array
    mirrored: int
    rounding: Array

    def __call__(self, x: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Values at ``x``, ``(C, ...)``, computed in its type as a graph would."""
        dtype, wide = x.dtype, (-1, *(1,) * (x.ndim - 1))
        y = x * self.slope.astype(dtype).reshape(wide) + self.intercept.astype(dtype).reshape(wide)
        for index in range(self.weights.shape[1]):
            k, b = (part[:, index].astype(dtype).reshape(wide) for part in (self.weights, self.breaks))
            y = y + k * np.maximum(b - x if index < self.mirrored else x - b, 0)
        return np.asarray(y)


def stack(polylines: Sequence[Polyline], lo: Array | float = -np.inf, hi: Array | float = np.inf) -> Hinges:
    """Write one polyline a channel with as many hinges for all, those with fewer bends padded by hinges of weight 0.

    How many are mirrored, and which piece of a channel is the straight part, is chosen such that float32 loses least in
    the worst channel, relative to its largest value.

    Args:
        polylines: One a channel, at least one.
        lo: Start of the domain that rounding is weighed on, ``(C,)`` or one for all. ``-inf``: as far before the first
            break as the last is behind it, or 1.
        hi: Its end, likewise.

    Raises:
        ValueError: there is no polyline.

    >>> prelu = Polyline(np.zeros(1), np.zeros(1), 0.25, 1.0)
    >>> stack([prelu]).weights.tolist()
    [[0.75]]
    """
    if not polylines:
        raise ValueError("there is no channel")
    count = len(polylines)
    total, lows, highs = max(line.bends for line in polylines), np.broadcast_to(lo, count), np.broadcast_to(hi, count)
    domains = [_ends(*domain) for domain in zip(polylines, lows, highs, strict=True)]
    losses = [_losses(line, ends, total) for line, ends in zip(polylines, domains, strict=True)]
    heights = [_height(line, ends) for line, ends in zip(polylines, domains, strict=True)]
    worst = [
        max(_choose(loss, mirrored, total)[1] / height for loss, height in zip(losses, heights, strict=True))
        for mirrored in range(total + 1)
    ]
    mirrored = int(np.argmin(worst))
    chosen = [_choose(loss, mirrored, total) for loss in losses]
    rows = [_row(line, piece, mirrored, total) for line, (piece, _) in zip(polylines, chosen, strict=True)]
    intercept, slope, weights, breaks = (np.array([row[part] for row in rows], np.float64) for part in range(4))
    return Hinges(intercept, slope, weights, breaks, mirrored, np.array([loss for _, loss in chosen]))


def _choose(losses: Array, mirrored: int, total: int) -> tuple[int, float]:
    """The piece that loses least, among those with no more bends on its sides than there are hinges."""
    bends = len(losses) - 1
    first, last = max(0, bends - (total - mirrored)), min(mirrored, bends)
    piece = first + int(np.argmin(losses[first : last + 1]))
    return piece, float(losses[piece])


def _parts(line: Polyline) -> tuple[Array, Array, Array, Array]:
    """Breaks and changes of slope ``(n,)``, slopes and intercepts of the pieces ``(n + 1,)``; n = bends."""
    bends, slopes = line.bends, line.slopes()
    if not bends:
        slopes = slopes[:1]
    anchors = np.concatenate([[0], np.arange(max(bends, 0))])[: len(slopes)]
    intercepts = line.values[anchors] - slopes * line.breaks[anchors]
    return line.breaks[:bends], np.diff(slopes), slopes, intercepts


def _ends(line: Polyline, lo: float, hi: float) -> Array:
    """Ends of the domain, made finite."""
    first, last = float(line.breaks[0]), float(line.breaks[-1])
    span = last - first or 1.0
    return np.array([lo if np.isfinite(lo) else first - span, hi if np.isfinite(hi) else last + span])


def _height(line: Polyline, ends: Array) -> float:
    """Largest magnitude on the domain, or 1 if it is 0 everywhere."""
    spots = np.concatenate([ends, line.breaks[(line.breaks >= ends[0]) & (line.breaks <= ends[1])]])
    return float(np.abs(line(spots)).max()) or 1.0


def _losses(line: Polyline, ends: Array, total: int) -> Array:
    """For each piece as the straight part: bound of the float32 error on the domain, ``(n + 1,)``.

    Each of the at most ``total + 2`` terms is rounded three times before, and ``total + 1`` times as, they are added;
    a rounded break moves its hinge by ``weight * unit * |break|``. Magnitudes of terms are convex in x, hence largest
    at an end.
    """
    breaks, bends, slopes, intercepts = _parts(line)
    ends = ends[:, None, None]
    mirrored = np.arange(len(breaks)) < np.arange(len(slopes))[:, None]
    hinges = np.abs(bends) * np.maximum(np.where(mirrored, breaks - ends, ends - breaks), 0)
    size = np.abs(intercepts) + np.abs(slopes * ends[:, :, 0]) + hinges.sum(axis=2)
    moved = float((np.abs(bends) * np.abs(breaks)).sum())
    return np.asarray(1.01 * _UNIT * ((total + 4) * size.max(axis=0) + moved))


def _row(line: Polyline, piece: int, mirrored: int, total: int) -> tuple[float, float, Array, Array]:
    """Intercept, slope, weights and breaks of one channel, padded on both sides of ``mirrored``."""
    breaks, bends, slopes, intercepts = _parts(line)
    wide, places = np.zeros((2, total)), np.arange(len(breaks))
    places = np.where(places < piece, places, mirrored + places - piece)
    wide[0, places], wide[1, places] = bends, breaks
    return float(intercepts[piece]), float(slopes[piece]), wide[0], wide[1]
