"""Minimum and maximum of any stretch of a table, many stretches at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Stretches:
    """Extremes of all stretches of every power of two: two of them cover any stretch.

    >>> Stretches(np.array([3.0, 1.0, 2.0])).of_index(np.array([0.0, -1.0]), np.array([1.0, 0.0]))
    (array([1., 2.]), array([3., 3.]))
    """

    def __init__(self, table: Array) -> None:
        self._size = len(table)
        values = np.concatenate([table, table])  # so that indices from the end come before those from the start
        self._levels = [(values, values)]
        while (width := 1 << len(self._levels)) <= len(values):
            (low, high), half = self._levels[-1], width // 2
            self._levels.append((np.minimum(low[:-half], low[half:]), np.maximum(high[:-half], high[half:])))

    def of_index(self, first: Array, last: Array) -> tuple[Array, Array]:
        """Extremes of ``table[first]`` to ``table[last]``.

        Args:
            first: Whole numbers, any shape; negative ones count from the end.
            last: The same, ``>= first``; included.

        Returns:
            Two arrays; NaN where an end is outside the table.
        """
        legal = (first >= -self._size) & (last < self._size)
        start, stop = (np.where(legal, end, 0).astype(np.int64) + self._size for end in (first, last))
        lo, hi = np.full(start.shape, np.nan), np.full(start.shape, np.nan)
        levels = np.frexp(stop - start + 1)[1] - 1
        for level in np.unique(levels):
            here = (levels == level) & legal
            low, high = self._levels[level]
            left, right = start[here], stop[here] + 1 - (1 << int(level))
            lo[here], hi[here] = np.minimum(low[left], low[right]), np.maximum(high[left], high[right])
        return lo, hi
