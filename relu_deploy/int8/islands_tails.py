"""Where a function no longer depends on what it is given: values beyond need no codes.

HardSwish is 0 below -3, SiLU and GELU are as good as 0 a little further down, a gate is 1 above 3. What a convolution
hands to them may reach ten times as far, and codes spent there are lost: the quantiser's saturation computes the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.passes.floats import sample
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.region import Cut, Forest, program_between

Array = npt.NDArray[np.float64]

# Change of the result that is as good as none: a part of its range. An eighth of the step of an 8-bit quantiser.
FLAT = 1 / 2048
_POINTS = 2049


def live_range(
    forest: Forest, tensor: gs.Variable, low: Array, high: Array, *, axis: int | None = None
) -> tuple[Array, Array]:
    """The part of each channel's range in which what is computed of a tensor depends on it.

    Args:
        forest: Of the graph.
        tensor: A root of the forest.
        low: Smallest value of each channel, ``(C,)``.
        high: Largest.
        axis: Where the channels are, counted from the last axis (-1); None where that is not known.

    Returns:
        The same, narrowed where every function of the tensor is flat; as given where not all that reads it is one.
    """
    cuts = [forest.cuts.get(id(node.outputs[0])) for node in tensor.outputs]
    if any(cut is None or _root(cut).tensor is not tensor for cut in cuts):
        return low, high
    ends = [cut for cut in forest.exits if _root(cut).tensor is tensor]
    try:
        parts = [_live(cut, low, high, axis) for cut in ends]
    except UnsupportedError:
        return low, high
    if not parts:
        return low, high
    first = np.min(np.broadcast_arrays(low, *(part[0] for part in parts))[1:], axis=0)
    last = np.max(np.broadcast_arrays(low, *(part[1] for part in parts))[1:], axis=0)
    return np.clip(low, first, np.maximum(first, last)), np.clip(high, np.minimum(first, last), last)


def _root(cut: Cut) -> Cut:
    while cut.parent is not None:
        cut = cut.parent
    return cut


def _live(cut: Cut, low: Array, high: Array, axis: int | None) -> tuple[Array, Array]:
    """Where one function is not flat, for each channel: ``(C,)`` twice, or ``()`` where all have one function.

    Also ``()`` where functions differ along another axis than that of the channels: where any of them is not flat.
    """
    program = program_between(_root(cut), cut)
    points = np.linspace(float(low.min()), float(high.max()), _POINTS)
    columns = program.constants.T if program.constants.shape[1] else [np.zeros(0)]
    values = np.array([sample(program, column, points) for column in columns])
    if not np.isfinite(values).all():
        raise UnsupportedError("it is not finite everywhere")
    allowed = FLAT * (values.max() - values.min())
    first = [_flat_until(row, allowed) for row in values]
    last = [_POINTS - 1 - _flat_until(row[::-1], allowed) for row in values]
    if len(first) > 1 and program.axis == axis:
        return points[first], points[last]
    return points[min(first)], points[max(last)]


def _flat_until(row: Array, allowed: float) -> int:
    """Index of the last point up to which the row stays close to what it is there."""
    highest, lowest = np.maximum.accumulate(row), np.minimum.accumulate(row)
    close = (highest - row <= allowed) & (row - lowest <= allowed)
    return int(np.flatnonzero(close)[-1]) if close.all() else max(int(np.argmin(close)) - 1, 0)
