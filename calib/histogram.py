"""Histograms whose bins are fixed for ever: every float32 that begins with the same bits lies in one bin.

With 7 bits of mantissa the bins are the bfloat16 numbers: 128 to each power of two, each 0.4 to 0.8 % wide, from the
smallest float32 to the largest. So no range has to be known beforehand, nothing is rescaled as it grows, 1e30 beside
1e-3 costs neither any precision, and counts are integers that add up exactly: in any order, batches or shards.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Bits of mantissa: of a whole tensor, and of one channel, of which there are many.
TENSOR_BITS = 7
CHANNEL_BITS = 4
_MANTISSA = 23  # of a float32
_BIAS = 127


@dataclasses.dataclass(frozen=True, eq=False)
class Histogram:
    """How often each bin was hit.

    Bin ``k > 0`` holds magnitudes ``v`` with ``float32_bits(v) >> (23 - bits) == k``, bin ``-k`` the same below zero,
    bin 0 what is zero or of no size (below 2**-133 with 7 bits).

    Attributes:
        bits: Bits of mantissa that tell bins apart; ``2**bits`` bins to each power of two.
        bins: int32 ``(K,)``, ascending: the bins that were hit.
        counts: int64 ``(K,)``, all positive: how often.

    >>> h = histogram_of(np.float32([0, 1, 1, -2.5]))
    >>> h.bins.tolist(), h.counts.tolist()
    ([-16416, 0, 16256], [1, 1, 2])
    >>> [(float(low), float(high)) for low, high in zip(*h.edges(), strict=True)][-1]
    (1.0, 1.0078125)
    """

    bits: int
    bins: NDArray[np.int32]
    counts: NDArray[np.int64]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        same = self.bits == other.bits and np.array_equal(self.bins, other.bins)
        return same and np.array_equal(self.counts, other.counts)

    def __hash__(self) -> int:
        return hash((self.bits, self.bins.tobytes(), self.counts.tobytes()))

    @property
    def total(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    def edges(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Ends of each bin, ``low < high``; an end is part of the bin where it is the one nearer to zero."""
        inner, outer = (_magnitude(np.abs(self.bins) + step, self.bits) for step in (0, 1))
        inner = np.where(self.bins == 0, -outer, inner)
        return np.where(self.bins < 0, -outer, inner), np.where(self.bins < 0, -inner, outer)

    def magnitudes(self) -> Histogram:
        """The histogram of ``|v|``."""
        return collected(self.bits, np.abs(self.bins), self.counts)


def histogram_of(values: NDArray[Any], *, bits: int = TENSOR_BITS) -> Histogram:
    """Count values, all finite, of any shape; floats are taken as float32."""
    counter = Counter(bits)
    counter.add(np.asarray(values, np.float32))
    return counter.result()


def bins_of(values: NDArray[np.float32], bits: int) -> NDArray[np.int32]:
    """The bin of each value.

    >>> bins_of(np.float32([-2, -0.0, 1]), 7).tolist()
    [-16384, 0, 16256]
    """
    codes = np.asarray(values, np.float32).view(np.uint32)
    magnitudes = ((codes & 0x7FFFFFFF) >> (_MANTISSA - bits)).astype(np.int32)
    return np.where(codes >> 31, -magnitudes, magnitudes).astype(np.int32)


def merge_histograms(parts: Iterable[Histogram]) -> Histogram:
    """Add counts up: the histogram of all values together, bit for bit.

    Raises:
        ValueError: the bins are of different widths, or there is nothing to merge.

    >>> a, b = histogram_of(np.float32([1, 2])), histogram_of(np.float32([2, -3]))
    >>> merge_histograms([a, b]) == histogram_of(np.float32([-3, 2, 1, 2]))
    True
    """
    parts = tuple(parts)
    if len({part.bits for part in parts}) != 1:
        raise ValueError(f"histograms with bins of {sorted({part.bits for part in parts})} bits cannot be added up")
    bins, counts = (np.concatenate([getattr(part, name) for part in parts]) for name in ("bins", "counts"))
    return collected(parts[0].bits, bins, counts)


def collected(bits: int, bins: NDArray[np.int32], counts: NDArray[np.int64]) -> Histogram:
    """A histogram of these bins in any order, the counts of equal ones added up."""
    found, places = np.unique(bins, return_inverse=True)
    sums = np.zeros(len(found), np.int64)
    np.add.at(sums, places, counts)
    return Histogram(bits, found.astype(np.int32), sums)


def _magnitude(index: NDArray[Any], bits: int) -> NDArray[np.float64]:
    """The smallest magnitude in a bin, ``index >= 0``; 2**128 past the last one."""
    exponent, mantissa = index >> bits, index & ((1 << bits) - 1)
    # Exponent 0 is that of the subnormal numbers, which lack the leading one and share the scale of exponent 1.
    whole = np.where(exponent > 0, mantissa + (1 << bits), mantissa).astype(np.float64)
    magnitude: NDArray[np.float64] = np.ldexp(whole, np.maximum(exponent, 1) - _BIAS - bits)
    return magnitude


class Counter:
    """Counts values as they come; memory is that of the bins between the smallest and the largest magnitude seen."""

    # Elements counted at once: bincount widens its keys to eight bytes, which stays in the cache with this many.
    _CHUNK = 1 << 17

    def __init__(self, bits: int = TENSOR_BITS) -> None:
        self.bits = bits
        self._zero = 0
        self._positive, self._negative = _Window(), _Window()

    def add(self, values: NDArray[np.float32], times: int = 1, share: int = 1) -> None:
        """Count every value ``times`` times; of ``share`` equal ones, one."""
        if share > 1:
            whole = Counter(self.bits)
            whole.add(values)
            self._positive.add_all(whole._positive, times, share)
            self._negative.add_all(whole._negative, times, share)
            self._zero += -(-whole._zero // share) * times
            return
        flat = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
        for start in range(0, flat.size, self._CHUNK):
            self._add_counts(np.bincount(flat[start : start + self._CHUNK] >> (_MANTISSA - self.bits)), times)

    def _add_counts(self, counts: NDArray[np.int64], times: int = 1) -> None:
        """Add counts by the first bits of the number, of which the very first is its sign; -0.0 is zero."""
        half = 1 << (8 + self.bits)
        for window, side in ((self._positive, counts[:half]), (self._negative, counts[half:])):
            self._zero += int(side[:1].sum()) * times
            window.add(side[1:], times)

    def result(self) -> Histogram:
        """What was counted."""
        up, down = self._positive.found(), self._negative.found()
        zero = np.zeros(1 if self._zero else 0, np.int64)
        bins = np.concatenate([-1 - down[0][::-1], zero, up[0] + 1]).astype(np.int32)
        return Histogram(self.bits, bins, np.concatenate([down[1][::-1], zero + self._zero, up[1]]))


class _Window:
    """Counts of neighbouring bins; grows towards both ends."""

    def __init__(self) -> None:
        self._first, self._counts = 0, np.zeros(0, np.int64)

    def add(self, dense: NDArray[np.int64], times: int) -> None:
        """Add counts of bins 0, 1, 2, ..., ``times`` times."""
        first, end = self._first, self._first + len(self._counts)
        if np.count_nonzero(dense[:first]) or np.count_nonzero(dense[end:]):
            self._grow(np.flatnonzero(dense))
            first, end = self._first, self._first + len(self._counts)
        inside = dense[first:end]
        self._counts[: len(inside)] += inside * times if times > 1 else inside

    def _grow(self, hit: NDArray[np.int64]) -> None:
        """Make room for these bins, ascending."""
        low, high = int(hit[0]), int(hit[-1]) + 1
        if not self._counts.size:
            self._first, self._counts = low, np.zeros(high - low, np.int64)
            return
        start, end = min(low, self._first), max(high, self._first + len(self._counts))
        grown = np.zeros(end - start, np.int64)
        grown[self._first - start : self._first - start + len(self._counts)] = self._counts
        self._first, self._counts = start, grown

    def add_all(self, other: _Window, times: int, share: int) -> None:
        """Add the counts of another, divided by ``share``."""
        bins, counts = other.found()
        dense = np.zeros(int(bins[-1]) + 1 if bins.size else 0, np.int64)
        dense[bins] = -(-counts // share)
        self.add(dense, times)

    def found(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Bins that were hit, ascending, and their counts."""
        hit = np.flatnonzero(self._counts)
        return hit + self._first, self._counts[hit]


def to_runs(histogram: Histogram) -> list[list[int]]:
    """The counts of a histogram as JSON: for each run of neighbouring bins ``[first bin, count, count, ...]``.

    >>> to_runs(histogram_of(np.float32([1, 1, 1.01, 4])))
    [[16256, 2, 1], [16512, 1]]
    """
    starts = np.flatnonzero(np.diff(histogram.bins, prepend=np.int32(-(1 << 30))) != 1).tolist()
    counts = histogram.counts.tolist()
    ends = itertools.pairwise([*starts, len(counts)])
    return [[int(histogram.bins[start]), *counts[start:end]] for start, end in ends]


def from_runs(bits: int, runs: list[list[int]]) -> Histogram:
    """Read what :func:`to_runs` wrote.

    Raises:
        ValueError: a count or a bin is no possible one, or bins are not in ascending order.
    """
    if type(bits) is not int or not 0 <= bits <= _MANTISSA:
        raise ValueError(f"a histogram with bins of {bits!r} bits")
    bins: list[int] = []
    counts: list[int] = []
    for run in runs:
        if len(run) < 2 or any(type(number) is not int for number in run):
            raise ValueError("a histogram with a run that is no list of whole numbers")
        bins.extend(range(run[0], run[0] + len(run) - 1))
        counts.extend(run[1:])
    order, hits = np.array(bins, np.int64), np.array(counts, np.int64)
    if (hits < 1).any() or (np.diff(order) < 1).any() or (np.abs(order) >= 255 << bits).any():
        raise ValueError("a histogram with bins or counts that cannot be")
    return Histogram(bits, order.astype(np.int32), hits)
