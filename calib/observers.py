"""What is measured of a tensor while the network runs, as operators appended to the network itself.

The runtime reduces each tensor to a few numbers where it lies, so activations are never copied out or kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from calib.ranges import TensorRange

# Beyond this an axis holds positions or a vocabulary, not channels; its extremes would only fill the file.
MAX_CHANNELS = 1 << 16


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is measured.

    Attributes:
        name: In the network.
        dtype: float32 or float16.
        rank: Number of axes.
        axis: The axis that channels are on; None where there are none.
    """

    name: str
    dtype: str
    rank: int
    axis: int | None


class Observer(Protocol):
    """Measures one tensor: operators that go into the graph, and what becomes of their outputs."""

    tensor: Tensor

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph outputs that :meth:`update` is given the values of."""

    def nodes(self, opset: int) -> list[NodeProto]:
        """Operators that compute the outputs."""

    def update(self, values: Sequence[NDArray[Any]], samples: int) -> None:
        """Take in one batch of ``samples`` samples."""

    def result(self) -> TensorRange | None:
        """What was measured; None where the tensor never held an element."""


class MaxObserver:
    """Smallest and largest value, per channel and in all.

    Float16 is widened first, which is exact. Extremes are exact under any grouping of samples, so the result depends on
    neither batches nor order.
    """

    def __init__(self, tensor: Tensor, prefix: str) -> None:
        self.tensor = tensor
        self.outputs: tuple[str, ...] = (f"{prefix}/min", f"{prefix}/max")
        self._prefix = prefix
        self._low: NDArray[np.float32] | None = None
        self._high: NDArray[np.float32] | None = None
        self._channels = tensor.axis is not None
        self._count = 0

    def nodes(self, opset: int) -> list[NodeProto]:
        """ReduceMin and ReduceMax over all axes but the channels'."""
        source, nodes = widened(self.tensor, self._prefix)
        axes = [axis for axis in range(self.tensor.rank) if axis != self.tensor.axis]
        if self.tensor.axis is None:  # no axes given: all of them
            return nodes + [
                helper.make_node(op, [source], [out], keepdims=0)
                for op, out in zip(("ReduceMin", "ReduceMax"), self.outputs, strict=True)
            ]
        inputs, attributes = [source], cast("dict[str, Any]", {"axes": axes})
        if opset >= 18:  # axes became an input
            inputs, attributes = [source, f"{self._prefix}/axes"], {}
            value = helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)
            nodes.append(helper.make_node("Constant", [], [inputs[1]], value=value))
        return nodes + [
            helper.make_node(op, inputs, [out], keepdims=0, **attributes)
            for op, out in zip(("ReduceMin", "ReduceMax"), self.outputs, strict=True)
        ]

    def update(self, values: Sequence[NDArray[Any]], samples: int) -> None:
        """Take in minima and maxima; an empty tensor gives +inf and -inf, or no value at all."""
        low, high = (np.atleast_1d(np.asarray(value, np.float32)) for value in values)
        if not low.size or (low > high).any():
            return
        self._count += samples
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            return
        if low.shape != self._low.shape:
            # The axis varies in length between samples, so it holds no channels.
            self._channels = False
        if not self._channels:
            low, high, self._low, self._high = low.min(), high.max(), self._low.min(), self._high.max()
        self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)

    def result(self) -> TensorRange | None:
        """The extremes of all batches."""
        if self._low is None or self._high is None:
            return None
        total = float(self._low.min()), float(self._high.max())
        if not self._channels or self._low.size > MAX_CHANNELS:
            return TensorRange(*total, self.tensor.dtype, self._count)
        return TensorRange(*total, self.tensor.dtype, self._count, self.tensor.axis, self._low, self._high)


def widened(tensor: Tensor, prefix: str) -> tuple[str, list[NodeProto]]:
    """Name of the tensor as float32, and the operators that make it so."""
    if tensor.dtype == "float32":
        return tensor.name, []
    return f"{prefix}/f32", [helper.make_node("Cast", [tensor.name], [f"{prefix}/f32"], to=TensorProto.FLOAT)]


def make_observer(method: str, tensor: Tensor, prefix: str) -> Observer:
    """Build the observer of a method in ``calib.options.METHODS``."""
    return {"max": MaxObserver}[method](tensor, prefix)
