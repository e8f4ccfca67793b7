"""Channels that must be scaled alike: union-find over channel numbers, and the label arrays that name them.

Every float tensor of a graph has *labels*: an integer array with as many axes as the tensor, of size 1 along every axis
that the channel does not depend on, or of no axes at all where one channel covers the whole tensor. A convolution's
output has labels of shape (1, C, 1, 1); reshaped for a channel shuffle (1, g, C/g, 1, 1); flattened (1, C H W). So
whatever moves values moves labels by the same rule, and what adds values ties the labels of both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.edit import RefusedError

Labels = npt.NDArray[np.int64]


class Channels:
    """Union-find over channels, some of which are pinned: their factor is 1, for a reason."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._why: dict[int, str] = {}  # by root

    def fresh(self, shape: Sequence[int]) -> Labels:
        """Labels of that shape for channels that are tied to nothing yet."""
        first = len(self._parent)
        self._parent.extend(range(first, first + int(np.prod(shape, dtype=np.int64))))
        return np.arange(first, len(self._parent), dtype=np.int64).reshape(shape)

    def pinned(self, reason: str) -> Labels:
        """Labels of a whole tensor that must stay as it is."""
        labels = self.fresh(())
        self.pin(labels, reason)
        return labels

    def pin(self, labels: Labels, reason: str) -> None:
        """Hold channels, and with them all that are or will be tied to them, at factor 1."""
        for label in np.unique(labels).tolist():
            self._why.setdefault(self._root(label), reason)

    def tie(self, one: Labels, other: Labels) -> None:
        """Channels that meet in one element of ``one + other`` get one factor."""
        pairs = np.stack(np.broadcast_arrays(one, other)).reshape(2, -1).T
        for left, right in np.unique(pairs, axis=0).tolist():
            lost, kept = self._root(left), self._root(right)
            if lost != kept:
                self._parent[lost] = kept
                if (reason := self._why.pop(lost, None)) is not None:
                    self._why.setdefault(kept, reason)

    def tie_along(self, labels: Labels, axes: Iterable[int]) -> Labels:
        """Make labels independent of some axes; returns them with size 1 there."""
        for axis in axes:
            if labels.ndim and labels.shape[axis] > 1:
                first = labels.take([0], axis=axis)
                self.tie(first, labels)
                labels = first
        return labels

    def are_pinned(self, labels: Labels) -> bool:
        """Whether all of the channels are known to be pinned already."""
        return all(self._root(label) in self._why for label in np.unique(labels).tolist())

    def settle(self) -> tuple[Labels, dict[int, str]]:
        """The root of every channel, int64 ``(channels,)``; and by root why it is pinned (the first reason given)."""
        roots = np.array([self._root(label) for label in range(len(self._parent))], dtype=np.int64)
        return roots, dict(self._why)

    def _root(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label


def compress(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Reduce an array to size 1 along every axis that its values do not depend on; to no axes where it is constant.

    >>> compress(np.array([[3, 3], [4, 4]])).tolist(), compress(np.zeros((1, 2))).shape
    ([[3], [4]], ())
    """
    for axis in range(values.ndim):
        first = values.take([0], axis=axis)
        if values.shape[axis] > 1 and bool((first == values).all()):
            values = first
    return values.reshape(()) if values.size == 1 else values


def lift(labels: Labels, rank: int) -> Labels:
    """Labels of a tensor that is broadcast to more axes; those without axes stay so."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape) if 0 < labels.ndim < rank else labels


def labelled_axes(labels: Labels) -> list[int]:
    """Axes that the channel depends on."""
    return [axis for axis, size in enumerate(labels.shape) if size > 1]


def reshape_labels(labels: Labels, before: Sequence[Any], after: Sequence[Any]) -> Labels:
    """Labels of a tensor after Reshape, Flatten, Squeeze or Unsqueeze.

    Args:
        labels: Before.
        before: Shape of the tensor: numbers, names of open extents, None for unknown ones.
        after: Shape that it gets; the same number of elements.

    Raises:
        RefusedError: the extents that the channels lie on are not known well enough to follow them.

    >>> reshape_labels(np.arange(6).reshape(1, 6, 1, 1), ("N", 6, 4, 4), ("N", 2, 3, 4, 4)).shape
    (1, 2, 3, 1, 1)
    >>> reshape_labels(np.array([[[7]], [[8]]])[None], (1, 2, 1, 2), (1, 4)).tolist()
    [[7, 7, 8, 8]]
    """
    if not labels.ndim:
        return labels
    head = _common(before, after)
    tail = _common(before[head:][::-1], after[head:][::-1])
    left, right = list(before[head : len(before) - tail]), list(after[head : len(after) - tail])
    core = labels.shape[head : len(before) - tail]
    outer, inner = labels.shape[:head], labels.shape[len(before) - tail :]
    axes = [axis for axis, size in enumerate(core) if size > 1]
    if not axes:
        return labels.reshape(*outer, *(1,) * len(right), *inner)
    for start in range(axes[0], -1, -1):
        extents = left[start:]
        stop = _same_size(extents, right)
        if stop is not None:
            full = np.broadcast_to(
                labels.reshape(*outer, *core[start:], *inner), (*outer, *(int(size) for size in extents), *inner)
            )
            return compress(full.reshape(*outer, *(1,) * stop, *(int(size) for size in right[stop:]), *inner))
    raise RefusedError("it is reshaped in a way that channels cannot be followed through")


def _same_size(extents: Sequence[Any], right: Sequence[Any]) -> int | None:
    """From which axis on ``right`` has as many elements as ``extents``; None where none has, or extents are open."""
    if not all(isinstance(size, (int, np.integer)) and size > 0 for size in extents):
        return None
    wanted, size = int(np.prod(extents, dtype=np.int64)), 1
    for stop in range(len(right) - 1, -1, -1):
        if not isinstance(right[stop], (int, np.integer)) or right[stop] <= 0:
            return None
        size *= int(right[stop])
        if size == wanted:
            return stop
    return None


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many leading extents are known to be equal."""
    count = 0
    for left, right in zip(one, other, strict=False):
        if left is None or left != right or (isinstance(left, (int, np.integer)) and left < 0):
            break
        count += 1
    return count
