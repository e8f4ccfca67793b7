"""Tensors whose range follows from that of others, to the bit, so that nobody has to look at them.

``Relu`` and ``Clip`` move values to a bound and leave the others: extremes are clipped, and of a histogram the bins
beyond a bound are counted in the bound's own. ``Concat`` holds the values of its inputs. Half of the values of a
convolutional network are of these.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from calib.histogram import Histogram, bins_of, collected, merge_histograms
from calib.model import STANDARD_DOMAINS, is_constant
from calib.observers import MAX_CHANNELS, Tensor
from calib.ranges import TensorRange

Bounds = tuple[float, float]
_LARGEST = float(np.finfo(np.float32).max)


@dataclasses.dataclass(frozen=True)
class Derived:
    """How a tensor follows from others.

    Attributes:
        inputs: Tensors that it is made of.
        bounds: Its values are those of the only input, clipped to this; None: they are those of all inputs.
        along_channels: The inputs are side by side on the axis of channels.
    """

    inputs: tuple[str, ...]
    bounds: Bounds | None = None
    along_channels: bool = False


def derivable(model: onnx.ModelProto, tensors: Mapping[str, Tensor], fixed: set[str]) -> dict[str, Derived]:
    """Find what need not be measured.

    Args:
        model: The network.
        tensors: What would be measured, by name.
        fixed: Names of tensors whose extents, but for the first, are always the same.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    constants |= {node.output[0]: node.attribute[0].t for node in model.graph.node if is_constant(node)}
    fed = {value.name for value in model.graph.input}
    constants = {name: tensor for name, tensor in constants.items() if name not in fed}
    found: dict[str, Derived] = {}
    for node in model.graph.node:
        inputs = [tensors[name] for name in node.input if name in tensors]
        output = tensors.get(node.output[0]) if node.output and node.domain in STANDARD_DOMAINS else None
        if output is None or not inputs or any(t.dtype != output.dtype or t.axis != output.axis for t in inputs):
            continue
        if node.op_type in ("Relu", "Clip") and node.input[0] == inputs[0].name:
            if (bounds := _bounds(node, constants)) is not None:
                found[output.name] = Derived((inputs[0].name,), bounds)
        elif node.op_type == "Concat" and len(inputs) == len(node.input):
            names = tuple(node.input)
            # With extents that vary, one of them may be empty, or have other channels.
            if fixed.issuperset((*names, output.name)) and len({t.shared for t in (*inputs, output)}) == 1:
                axis = next(attribute.i for attribute in node.attribute if attribute.name == "axis")
                found[output.name] = Derived(names, along_channels=axis % output.rank == output.axis)
    return found


def _bounds(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Bounds | None:
    """What Relu and Clip clip to; None where it is not known before the network runs, or makes no sense."""
    if node.op_type == "Relu":
        return 0.0, math.inf
    given = {attribute.name: attribute.f for attribute in node.attribute}
    limits = [given.get("min", -math.inf), given.get("max", math.inf)]
    for index, name in enumerate(node.input[1:3]):
        if not name:
            continue
        if name not in constants:
            return None
        limits[index] = float(numpy_helper.to_array(constants[name]).reshape(-1)[0])
    return (limits[0], limits[1]) if limits[0] <= limits[1] else None


def derive(how: Derived, inputs: Sequence[TensorRange]) -> TensorRange:
    """The range of a tensor from those of its inputs."""
    return _clipped(inputs[0], how.bounds) if how.bounds else _joined(inputs, along_channels=how.along_channels)


def _clipped(measured: TensorRange, bounds: Bounds) -> TensorRange:
    """The range of clipped values."""

    def clip(values: NDArray[np.float32]) -> NDArray[np.float32]:
        # 0 is added for the sign of zero that a measurement would give.
        clipped: NDArray[np.float32] = np.clip(values, *bounds).astype(np.float32) + np.float32(0)
        return clipped

    counts = measured.channel_histograms
    low, high = clip(np.array([measured.min, measured.max], np.float32)).tolist()
    return dataclasses.replace(
        measured,
        min=low,
        max=high,
        channel_min=None if measured.channel_min is None else clip(measured.channel_min),
        channel_max=None if measured.channel_max is None else clip(measured.channel_max),
        histogram=None if measured.histogram is None else _clipped_histogram(measured.histogram, bounds),
        channel_histograms=None if counts is None else tuple(_clipped_histogram(one, bounds) for one in counts),
    )


def _clipped_histogram(histogram: Histogram, bounds: Bounds) -> Histogram:
    """Counts of clipped values: those beyond a bound are in the bound's bin, and those in it stay there."""
    finite = np.clip(bounds, -_LARGEST, _LARGEST).astype(np.float32)
    low, high = bins_of(finite, histogram.bits)
    return collected(histogram.bits, np.clip(histogram.bins, low, high), histogram.counts)


def _joined(parts: Sequence[TensorRange], *, along_channels: bool) -> TensorRange:
    """The range of the values of all parts."""
    counts = [part.histogram for part in parts if part.histogram is not None]
    whole = TensorRange(
        min(part.min for part in parts), max(part.max for part in parts), parts[0].dtype, parts[0].count,
        histogram=merge_histograms(counts) if counts else None,
    )  # fmt: skip
    lows = [part.channel_min for part in parts if part.channel_min is not None]
    highs = [part.channel_max for part in parts if part.channel_max is not None]
    by_channel = [part.channel_histograms for part in parts if part.channel_histograms is not None]
    # As an observer has it: no channels where there are none in a part, or too many in all.
    if len(lows) < len(parts) or (along_channels and sum(map(len, lows)) > MAX_CHANNELS):
        return whole
    if along_channels:
        channels = tuple(one for part in by_channel for one in part)
    else:
        channels = tuple(map(merge_histograms, zip(*by_channel, strict=True)))
    return dataclasses.replace(
        whole,
        axis=parts[0].axis,
        channel_min=np.concatenate(lows) if along_channels else np.minimum.reduce(lows),
        channel_max=np.concatenate(highs) if along_channels else np.maximum.reduce(highs),
        channel_histograms=channels or None,
    )
