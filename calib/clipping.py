"""Where to clip, so that quantising to 8 bits does the least harm: squared error, or divergence of distributions.

Values are taken as spread evenly within each bin of their histogram, under which both measures are exact sums.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from calib.histogram import Histogram

Bounds = tuple[float, float]
_Floats = NDArray[np.float64]

_UNSIGNED_STEPS = 255
_SIGNED_STEPS = 127  # to each side
# Candidates lie a quarter of a power of two apart, then a 32nd around the best.
_COARSE: float = 2.0**-0.25
_FINE: float = 2.0 ** (-1 / 32)
_HOPELESS = 16
# Clipping further than this cannot pay: the error of the largest value alone is then that of 3e9 values that are
# quantised over the whole range (1 / (12 * 127**2) of its square each, and four times less for each halving).
_MOST_OCTAVES = 14
# Cells between 0 and the least range that is tried: as TensorRT has, where it starts at a 16th of 2048 cells, with the
# 16 cells to a code that it has at the other end.
_CELLS = 2048
# How many ranges are tried before those around the best.
_CANDIDATES = 128


@dataclasses.dataclass(frozen=True)
class _Grid:
    """The codes of a quantiser: ``step * k`` for ``first <= k <= last``, 0 among them."""

    step: float
    first: int
    last: int


def _grid(low: float, high: float, *, unsigned: bool) -> _Grid:
    """The codes that cover a range, 0 included."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not unsigned:
        return _Grid(max(-low, high) / _SIGNED_STEPS, -_SIGNED_STEPS, _SIGNED_STEPS)
    step = (high - low) / _UNSIGNED_STEPS
    zero = round(-low / step)
    return _Grid(step, -zero, _UNSIGNED_STEPS - zero)


def squared_error(histogram: Histogram, bounds: Bounds, *, unsigned: bool, extremes: Bounds | None = None) -> float:
    """Sum of squared errors of all values, quantised with codes that cover ``bounds``.

    Args:
        histogram: The values, spread evenly within each bin.
        bounds: What the codes cover; beyond, values are clipped.
        unsigned: As in :func:`calib.choose.choose_range`.
        extremes: Smallest and largest value, where the outermost bins reach past them.

    >>> from calib.histogram import histogram_of
    >>> h = histogram_of(np.linspace(0.5, 1, 10_000, endpoint=False))
    >>> step = 1 / 255
    >>> round(squared_error(h, (0.0, 1.0), unsigned=True) / (10_000 * step**2 / 12), 2)  # noise of even rounding
    1.0
    """
    return _error(*_spread(histogram, extremes), _grid(*bounds, unsigned=unsigned))


def _spread(histogram: Histogram, extremes: Bounds | None) -> tuple[_Floats, _Floats, _Floats]:
    """Ends of the bins, and how many values there are to a unit of width. The extremes are bins of no width."""
    low, high = histogram.edges()
    counts = histogram.counts.astype(np.float64)
    if extremes is not None:
        counts[0] -= 1
        counts[-1] -= 1
        counts = np.append(counts, [1.0, 1.0])
        low, high = (np.append(np.clip(ends, *extremes), extremes) for ends in (low, high))
        # The last bit of a float32 stands for no width.
        high = np.maximum(high, low + np.abs(low) * 2.0**-24 + 2.0**-160)
    return low, high, counts / (high - low)


def _error(low: _Floats, high: _Floats, density: _Floats, grid: _Grid) -> float:
    """Integrate the squared distance to the nearest code over all bins."""

    def integral(x: _Floats) -> _Floats:
        # From 0 to x: step**3 / 12 for each whole cell around a code, and a cubic from the last code on.
        code = np.clip(np.rint(x / grid.step), grid.first, grid.last)
        off = x - grid.step * code
        cubic: _Floats = grid.step**3 / 12 * code + off * off * off / 3
        return cubic

    return float(np.sum(density * (integral(high) - integral(low))))


def least_error(histogram: Histogram, extremes: Bounds, *, unsigned: bool) -> Bounds:
    """The range whose quantiser has the least squared error.

    Both sides are cut to one magnitude first; where codes need not be symmetric, each side is then tried alone.
    """
    spread = _spread(histogram, extremes)

    def cost(bounds: Bounds) -> float:
        return _error(*spread, _grid(*bounds, unsigned=unsigned))

    low, high = extremes
    size = _search(lambda t: cost((max(low, -t), min(high, t))), max(-low, high))
    best = max(low, -size), min(high, size)
    if unsigned and low < 0 < high:
        lowest = _search(lambda t: cost((-t, best[1])), -best[0])
        best = -lowest, _search(lambda t: cost((-lowest, t)), best[1])
    return best


def least_divergence(histogram: Histogram, extremes: Bounds, *, unsigned: bool) -> Bounds:
    """The range whose quantiser keeps the distribution best: least Kullback-Leibler divergence.

    As in TensorRT, clipped values count as values of the last cell in the original and are missing in the quantised
    distribution, which is even over those cells of a code that are not empty. The cells are the bins of the histogram,
    where TensorRT has 2048 of equal width: so one outlier does not move all else into one cell. Values that are 0 do
    not count: every quantiser keeps them.
    """
    kept = histogram.bins != 0
    if not kept.any():
        return extremes
    counted = Histogram(histogram.bits, histogram.bins[kept], histogram.counts[kept])
    sizes = counted.magnitudes()
    two_sided = unsigned and extremes[0] < 0 < extremes[1]
    ends = sizes.edges()[1]
    # A quantiser that clips a tenth of all values is none.
    tenth = int(np.searchsorted(np.cumsum(sizes.counts), 0.9 * sizes.total))
    cells = _Cells.of(counted if two_sided else sizes, ends[tenth] / _CELLS)

    def cost(size: float) -> float:
        low, high = (max(extremes[0], -size), min(extremes[1], size)) if two_sided else (0.0, size)
        return cells.divergence((low, high), _grid(low, high, unsigned=unsigned))

    candidates = np.minimum(ends[tenth:], max(-extremes[0], extremes[1]))
    stride = -(-len(candidates) // _CANDIDATES)
    best = min(range(0, len(candidates), stride), key=lambda i: cost(candidates[-1 - i]))
    near = range(max(best - stride + 1, 0), min(best + stride, len(candidates)))
    size = float(candidates[-1 - min(near, key=lambda i: cost(candidates[-1 - i]))])
    return max(extremes[0], -size), min(extremes[1], size)


@dataclasses.dataclass(frozen=True)
class _Cells:
    """A distribution: the middle of each cell, ascending, its width, and how many values it holds, which is never 0."""

    middle: _Floats
    width: _Floats
    mass: _Floats

    @classmethod
    def of(cls, histogram: Histogram, width: float) -> _Cells:
        """The bins of a histogram, those narrower than ``width`` joined into cells as wide."""
        low, high = histogram.edges()
        middle = (low + high) / 2
        narrow = high - low < width
        place = np.where(narrow, (np.floor(middle / width) + 0.5) * width, middle)
        starts = np.flatnonzero(np.diff(place, prepend=-np.inf))
        wide = np.where(narrow, width, high - low)[starts]
        return cls(place[starts], wide, np.add.reduceat(histogram.counts, starts).astype(np.float64))

    def divergence(self, bounds: Bounds, grid: _Grid) -> float:
        """Divergence of the quantised distribution from this one, in nats."""
        first, last = np.searchsorted(self.middle, bounds)
        if first >= last:
            return np.inf
        middle, width, mass = (part[first:last] for part in (self.middle, self.width, self.mass))
        starts = np.flatnonzero(np.diff(np.rint(middle / grid.step), prepend=-np.inf))
        density = np.add.reduceat(mass, starts) / np.add.reduceat(width, starts)
        quantised = np.repeat(density, np.diff([*starts, len(mass)])) * width / mass.sum()
        original = mass / self.mass.sum()
        original[0] += self.mass[:first].sum() / self.mass.sum()
        original[-1] += self.mass[last:].sum() / self.mass.sum()
        return float(np.sum(original * np.log(original / quantised)))


def _search(cost: Callable[[float], float], most: float) -> float:
    """The cheapest size at most ``most``: a coarse scan down, then a fine one around its best."""
    best, least = most, cost(most)
    for i in range(1, 4 * _MOST_OCTAVES):
        size = most * _COARSE**i
        found = cost(size)
        if found < least:
            best, least = size, found
        # What is not clipped is quantised ever better, so all of this is clipping, which only grows.
        elif found > _HOPELESS * least:
            break
    steps = round(np.log2(_COARSE) / np.log2(_FINE))
    near: list[float] = [min(best * _FINE**i, most) for i in range(-steps, steps + 1)]
    return min(near, key=cost)
