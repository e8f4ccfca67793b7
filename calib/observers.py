"""What is kept of a tensor while the network runs: its extremes, and how often each size of value occurred.

Arrays are looked at where the runtime left them, and never kept; of some tensors the runtime takes the extremes itself
(:mod:`calib.pooled`). ``numpy`` reduces them: its minimum and maximum hand
NaN on, which ReduceMin and ReduceMax of ONNX Runtime pass over (measured, 1.31), so that a sum would be needed too.
"""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.channel_counter import ChannelCounter
from calib.histogram import Counter
from calib.ranges import TensorRange

# Beyond this an axis holds positions or a vocabulary, not channels; its extremes would only fill the file.
MAX_CHANNELS = 1 << 16
_Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is measured.

    Attributes:
        name: In the network.
        dtype: float32 or float16.
        rank: Number of axes.
        axis: The axis that channels are on; None where there are none.
        shared: Its values depend on the shapes of the inputs alone, so a batch of many samples holds them once.
    """

    name: str
    dtype: str
    rank: int
    axis: int | None
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is to be kept beside the extremes: counts of the whole tensor, and of each channel."""

    histogram: bool = False
    channels: bool = False


class Observer:
    """Extremes and counts of one tensor; several threads may update it.

    Float16 is widened first, which is exact. Extremes and counts are exact under any grouping of samples, so the result
    depends on neither batches nor order.
    """

    def __init__(self, tensor: Tensor, wanted: Wanted) -> None:
        self.tensor = tensor
        self._low: _Floats | None = None
        self._high: _Floats | None = None
        self._channels = tensor.axis is not None
        self._count = 0
        self._lock = threading.Lock()
        self._counter = Counter() if wanted.histogram else None
        self._channel_counter = ChannelCounter() if wanted.channels and self._channels else None

    def extremes(self, values: _Floats) -> tuple[_Floats, _Floats]:
        """Smallest and largest value, by channel ``(C,)`` where there are channels, else ``(1,)``; NaN where one is."""
        others = None
        if self._channels:
            others = tuple(axis for axis in range(values.ndim) if axis != self.tensor.axis)
        # 0.0 is added for a sign of zero that does not depend on the order of samples.
        low, high = (np.atleast_1d(reduce(axis=others)) + np.float32(0) for reduce in (values.min, values.max))
        return low, high

    def update(self, values: _Floats, extremes: tuple[_Floats, _Floats], samples: int, *, copies: int = 1) -> None:
        """Take in one run.

        Args:
            values: Not empty, all finite.
            extremes: Of these values, from :meth:`extremes`.
            samples: How many samples were run.
            copies: How often each sample was in the batch, to fill it.
        """
        times = samples if self.tensor.shared else 1
        share = 1 if self.tensor.shared else copies
        self.widen(extremes, samples)
        with self._lock:
            if self._counter is not None:
                self._counter.add(values, times, share)
            if self._channel_counter is not None and self._channels:
                self._channel_counter.add(np.moveaxis(values, self.tensor.axis or 0, 0), times, share)

    def widen(self, extremes: tuple[_Floats, _Floats], samples: int) -> None:
        """Take in the extremes of so many samples."""
        with self._lock:
            self._count += samples
            self._extend(*extremes)

    def _extend(self, low: _Floats, high: _Floats) -> None:
        """Widen the range."""
        if self._low is None or self._high is None:
            self._low, self._high = low, high
            return
        if low.shape != self._low.shape:
            # The axis varies in length between samples, so it holds no channels.
            self._channels, self._channel_counter = False, None
            low, high = low.min(keepdims=True), high.max(keepdims=True)
            self._low, self._high = self._low.min(keepdims=True), self._high.max(keepdims=True)
        self._low, self._high = np.minimum(low, self._low), np.maximum(high, self._high)

    def result(self) -> TensorRange | None:
        """What was measured; None where the tensor never held an element."""
        if self._low is None or self._high is None:
            return None
        total = float(self._low.min()), float(self._high.max())
        histogram = None if self._counter is None else self._counter.result()
        if not self._channels or self._low.size > MAX_CHANNELS:
            return TensorRange(*total, self.tensor.dtype, self._count, histogram=histogram)
        channels = None if self._channel_counter is None else self._channel_counter.result()
        return TensorRange(
            *total, self.tensor.dtype, self._count, self.tensor.axis, self._low, self._high, histogram, channels
        )


def widened(value: Any) -> _Floats:
    """An array of floats as float32."""
    return np.asarray(value, np.float32)
