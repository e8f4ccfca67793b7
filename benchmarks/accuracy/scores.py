"""Scores that are sums over samples, and how far a quantised network's lies from the float network's.

Every metric here is a ratio of two sums over the same test samples: right answers to samples, right characters to
characters, twice the boxes found to all boxes. So one paired bootstrap over the samples serves all of them: the float
and the quantised network see the same samples, and what makes a sample hard is in both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RESAMPLES, LEVEL = 2000, 0.95


@dataclasses.dataclass(frozen=True)
class Score:
    """One metric.

    Attributes:
        got: What was reached on each sample, float64 (samples,).
        most: What there was to reach, float64 (samples,).
    """

    got: Array
    most: Array

    @property
    def value(self) -> float:
        """The metric, of all samples."""
        return float(self.got.sum() / self.most.sum())


@dataclasses.dataclass(frozen=True)
class Difference:
    """A metric of the quantised network less that of the float one.

    Attributes:
        value: In the metric's own units.
        low, high: Ends of the bootstrap interval (95 %).
    """

    value: float
    low: float
    high: float


def each(got: Sequence[float] | Array) -> Score:
    """A mean over samples.

    >>> each([1, 0, 1, 1]).value
    0.75
    """
    values = np.asarray(got, np.float64)
    return Score(values, np.ones_like(values))


def difference(score: Score, reference: Score, *, seed: int = 0) -> Difference:
    """Paired percentile bootstrap over the samples.

    >>> same = each([1, 0, 1])
    >>> difference(same, same)
    Difference(value=0.0, low=0.0, high=0.0)
    """
    if score.got.shape != reference.got.shape:
        raise ValueError(f"{score.got.shape} samples against {reference.got.shape}")
    rng = np.random.default_rng(seed)
    count = len(score.got)
    drawn = []
    for _ in range(RESAMPLES):  # one at a time: 2000 x 10,000 indices at once are 160 MB
        times = np.bincount(rng.integers(count, size=count), minlength=count).astype(np.float64)
        drawn.append(_ratio(score, times) - _ratio(reference, times))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(score.value - reference.value, float(low), float(high))


def _ratio(score: Score, times: Array) -> float:
    most = float(score.most @ times)
    return float(score.got @ times) / most if most else 0.0


def edit_distance(first: str, second: str) -> int:
    """Fewest insertions, deletions and replacements of characters that turn one text into the other.

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def matched_boxes(found: Array, wanted: Array, *, least: float = 0.5) -> int:
    """How many boxes have a partner: each found box, best first, takes the free wanted box that it overlaps most.

    Args:
        found: (N, 5), best first: x1, y1, x2, y2, class.
        wanted: (M, 5), likewise.
        least: Intersection over union that counts.

    >>> box = np.array([[0.0, 0, 10, 10, 1]])
    >>> matched_boxes(box, box), matched_boxes(box, box + [0, 0, 0, 0, 1]), matched_boxes(np.vstack([box, box]), box)
    (1, 0, 1)
    """
    free = np.ones(len(wanted), bool)
    for box in found:
        overlap = _overlaps(box, wanted) * free
        if overlap.size and overlap.max() >= least:
            free[overlap.argmax()] = False
    return int((~free).sum())


def _overlaps(box: Array, boxes: Array) -> Array:
    """Intersection over union, 0 where the classes differ."""
    shared = (np.minimum(box[2:4], boxes[:, 2:4]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(1)
    areas = (boxes[:, 2:4] - boxes[:, :2]).prod(1)
    union = (box[2:4] - box[:2]).prod() + areas - shared
    return np.where(box[4] == boxes[:, 4], shared / union.clip(1e-9), 0.0)  # type: ignore[no-any-return]


def f1(found: Sequence[Array], wanted: Sequence[Array]) -> Score:
    """2 TP / (found + wanted), summed over all images; an image without any box has nothing to add."""
    hits = np.array([matched_boxes(f, w) for f, w in zip(found, wanted, strict=True)], np.float64)
    counts = np.array([len(f) + len(w) for f, w in zip(found, wanted, strict=True)], np.float64)
    return Score(2 * hits, counts)
