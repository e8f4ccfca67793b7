"""Ranges of tensors whose channels are scaled: what they were, times the factors, with no second calibration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from calib.choose import Bounds, choose_range
from calib.histogram import Histogram, merge_histograms
from calib.ranges import Ranges, TensorRange
from relu_deploy.int8.fuse_groups import Labels, labelled_axes
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.fuse_rules import Labelling

# Every value goes to exactly one place, so the extremes are those of the other side.
_ONE_TO_ONE = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity", "DepthToSpace", "SpaceToDepth")


@dataclasses.dataclass(frozen=True)
class Extents:
    """One tensor's extremes by channel.

    Attributes:
        labels: Of its channels, ``(C,)``.
        low: Smallest value of each, ``(C,)``, not above 0.
        high: Largest, not below 0.
    """

    labels: Labels
    low: Array
    high: Array

    @property
    def top(self) -> Array:
        """Largest magnitude of each channel, ``(C,)``."""
        return np.maximum(-self.low, self.high)


def channel_extents(labels: Labels, measured: TensorRange, bounds: Bounds) -> Extents | None:
    """Extremes by label; None where the range was not measured along the axis that the channels are on.

    Bounds that a method chose inside the extremes cut each channel: values beyond them are clipped either way.
    """
    low, high = measured.channel_min, measured.channel_max
    if low is None or high is None or not labels.ndim:
        low, high = np.array([measured.min], np.float32), np.array([measured.max], np.float32)
        if labels.ndim:
            return None
    elif labelled_axes(labels) != [measured.axis] or labels.size != low.size:
        return None
    below = np.asarray(np.clip(low, min(bounds[0], 0.0), 0.0), dtype=np.float64)
    above = np.asarray(np.clip(high, 0.0, max(bounds[1], 0.0)), dtype=np.float64)
    return Extents(labels.reshape(-1), below, above)


def followed(
    graph: gs.Graph, state: Labelling, ranges: Ranges, bounds: Mapping[str, Bounds]
) -> tuple[dict[str, Extents], dict[str, str]]:
    """Which ranges can be scaled exactly, and how.

    Returns:
        Extents by channel, by tensor name; and, for tensors that hold the same values as one of those in another order,
        its name.
    """
    tensors = {t.name: t for node in graph.nodes for t in node.outputs if t.name in ranges.tensors}
    known: dict[str, Extents] = {}
    for name, tensor in tensors.items():
        extents = channel_extents(state.of(tensor), ranges.tensors[name], bounds[name])
        if extents is not None:
            known[name] = extents
    same: dict[str, str] = {}
    ordered = [node for node in graph.nodes if node.op in _ONE_TO_ONE]
    for node in (*ordered, *reversed(ordered)):
        for name, other in ((node.outputs[0].name, node.inputs[0].name), (node.inputs[0].name, node.outputs[0].name)):
            if name in tensors and name not in known and name not in same:
                if other in known:
                    same[name] = other
                elif other in same:
                    same[name] = same[other]
    return known, same


def scaled_ranges(ranges: Ranges, same: Mapping[str, str], factor_of: Mapping[str, Array]) -> Ranges:
    """Ranges of the network with its channels scaled.

    Extremes are multiplied. Histograms by channel have bins that a power of two moves onto others, and are moved; what
    only counts a whole tensor is dropped, since nobody knows whose values it counted.

    Args:
        ranges: Before.
        same: See :func:`followed`.
        factor_of: Factors by channel of the tensors that are scaled: ``(C,)`` as measured, or ``(1,)`` for all.
    """
    tensors = dict(ranges.tensors)
    for name, factors in factor_of.items():
        tensors[name] = _scaled(tensors[name], factors)
    for name, other in same.items():
        if other in factor_of:
            source = tensors[other]
            tensors[name] = dataclasses.replace(
                tensors[name], min=source.min, max=source.max, axis=None, channel_min=None, channel_max=None,
                histogram=source.histogram, channel_histograms=None,
            )  # fmt: skip
    return dataclasses.replace(ranges, tensors=tensors)


def scaled_bounds(
    ranges: Ranges,
    bounds: Mapping[str, Bounds],
    known: Mapping[str, Extents],
    same: Mapping[str, str],
    factor_of: Mapping[str, Array],
    *,
    unsigned: bool,
) -> dict[str, Bounds]:
    """The range that each tensor's quantiser is to cover, after :func:`scaled_ranges`.

    Chosen anew where the method's histogram could be scaled; else what was chosen before, channel by channel.
    """
    new = dict(bounds)
    for name, factors in factor_of.items():
        measured = ranges.tensors[name]
        if ranges.method == "max" or measured.histogram is not None:
            new[name] = choose_range(
                measured, ranges.method, unsigned=unsigned, percentile=ranges.percentile, name=name
            )
        else:
            low, high = (known[name].low * factors).min(), (known[name].high * factors).max()
            new[name] = float(np.float32(low)), float(np.float32(high))
    new.update({name: new[other] for name, other in same.items() if other in factor_of})
    return new


def _scaled(measured: TensorRange, factors: Array) -> TensorRange:
    low, high, counts = measured.channel_min, measured.channel_max, measured.channel_histograms
    if low is None or high is None:
        low, high = np.array([measured.min], np.float32), np.array([measured.max], np.float32)
    low, high = ((ends * factors).astype(np.float32) for ends in (low, high))
    shifts = np.log2(factors)
    exact = bool((shifts == np.rint(shifts)).all())
    whole = None
    if measured.histogram is not None and exact and (factors == factors[0]).all():
        whole = shifted(measured.histogram, int(shifts[0]))
    moved = None
    if counts is not None and exact:
        moved = tuple(map(shifted, counts, np.broadcast_to(shifts, len(counts)).astype(int).tolist()))
        whole = whole or merge_histograms(moved)
    by_channel = measured.axis is not None
    return dataclasses.replace(
        measured, min=float(low.min()), max=float(high.max()), channel_min=low if by_channel else None,
        channel_max=high if by_channel else None, histogram=whole, channel_histograms=moved,
    )  # fmt: skip


def shifted(counts: Histogram, exponent: int) -> Histogram:
    """The histogram of the values times ``2**exponent``: bins begin with the number's exponent.

    >>> from calib.histogram import histogram_of
    >>> values = np.float32([-3, 0, 0.1, 5])
    >>> shifted(histogram_of(values), -2) == histogram_of(values / 4)
    True
    """
    size = np.abs(counts.bins).astype(np.int64)
    # Subnormal numbers have no exponent to change; they are as good as 0.
    moved = np.where(size >> counts.bits == 0, 0, size + exponent * (1 << counts.bits))
    moved = np.clip(moved, 0, (255 << counts.bits) - 1)
    bins = np.sign(counts.bins) * moved
    found, places = np.unique(bins, return_inverse=True)
    sums = np.bincount(places, counts.counts).astype(np.int64)
    return Histogram(counts.bits, found.astype(np.int32), sums)
