"""Counts by channel: a histogram for each, with wider bins than those of whole tensors."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from calib.histogram import CHANNEL_BITS, Histogram

_SHIFT = 23 - CHANNEL_BITS
_MAGNITUDES = (1 << (8 + CHANNEL_BITS)) - 1


class ChannelCounter:
    """Counts the values of all channels of a tensor.

    Memory is eight bytes for each channel, sign, and bin between the smallest and the largest magnitude in the tensor:
    5 KiB a channel where values span twenty powers of two.
    """

    def __init__(self) -> None:
        self._first = 1  # the lowest bin that ``_counts`` has, after the one of zero
        self._counts: NDArray[np.int64] | None = None  # (channels, 2 signs, zero and a window of bins)

    def add(self, values: NDArray[np.float32], times: int = 1, share: int = 1) -> None:
        """Count values, channels on axis 0, ``times`` times; of ``share`` equal ones, one."""
        codes = np.ascontiguousarray(values, np.float32).reshape(len(values), -1).view(np.uint32) >> _SHIFT
        sizes = (codes & _MAGNITUDES).astype(np.int64)
        self._make_room(len(values), sizes)
        assert self._counts is not None  # noqa: S101 - there is room now
        channels, signs, bins = self._counts.shape
        places = np.maximum(sizes - (self._first - 1), 0)
        places += bins * (codes > _MAGNITUDES)
        places += (bins * signs) * np.arange(channels)[:, None]
        found = np.bincount(places.reshape(-1), minlength=self._counts.size).reshape(self._counts.shape)
        self._counts += -(-found // share) * times

    def _make_room(self, channels: int, sizes: NDArray[np.int64]) -> None:
        """Widen the window so that all sizes lie in it."""
        high = int(sizes.max(initial=0))
        low = int(np.where(sizes > 0, sizes, _MAGNITUDES).min(initial=_MAGNITUDES))
        if self._counts is None:
            self._first, bins = min(low, high) or 1, 0
            self._counts = np.zeros((channels, 2, 1), np.int64)
        else:
            bins = self._counts.shape[2] - 1
        first, end = min(low, self._first), max(high + 1, self._first + bins)
        if end - first > bins:
            grown = np.zeros((channels, 2, 1 + end - first), np.int64)
            grown[:, :, 0] = self._counts[:, :, 0]
            start = 1 + self._first - first
            grown[:, :, start : start + bins] = self._counts[:, :, 1:]
            self._first, self._counts = first, grown

    def result(self) -> tuple[Histogram, ...] | None:
        """A histogram for each channel; None where nothing was counted."""
        return None if self._counts is None else tuple(map(self._one, self._counts))

    def _one(self, counts: NDArray[np.int64]) -> Histogram:
        """The histogram of one channel."""
        zero = counts[:, :1].sum(axis=0)
        places = np.arange(counts.shape[1] - 1) + self._first
        bins = np.concatenate([-places[::-1], [0], places])
        every = np.concatenate([counts[1, :0:-1], zero, counts[0, 1:]])
        hit = np.flatnonzero(every)
        return Histogram(CHANNEL_BITS, bins[hit].astype(np.int32), every[hit])
