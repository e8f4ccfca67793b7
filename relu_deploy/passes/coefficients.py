"""How a coefficient is cut from the vector that a small network computes: one operator after the other, in numpy.

Each of them changes the layout, or is monotone in each element and mixes none.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import RefusedError
from relu_deploy.passes.lines import axes_of, rank_of
from relu_deploy.passes.region import constant_values

Array = npt.NDArray[np.float64]

_AFFINE = ("Add", "Sub", "Mul", "Div", "Neg")
_LAYOUT = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice", "Gather", "Transpose", "Identity")


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """``scale * source[:, places] + shift``, with one entry on the batch axis.

    Attributes:
        source: (batch, length).
        length: Of a sample.
        scale: Shape of the coefficient.
        shift: Likewise.
        places: Likewise, integers.
    """

    source: gs.Tensor
    length: int
    scale: Array
    shift: Array
    places: npt.NDArray[np.int64]


def affine_of(tensor: gs.Tensor) -> Affine | None:
    """Follow a coefficient up through constant factors, addends and cuts; None where that leads to no vector."""
    path: list[tuple[gs.Node, gs.Tensor]] = []
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in (*_AFFINE, *_LAYOUT):
        (node,) = tensor.inputs
        live = [side for side in node.inputs if constant_values(side) is None and not side.is_empty()]
        if len(live) != 1:
            break
        path.append((node, tensor))
        tensor = live[0]
    if rank_of(tensor) != 2 or not isinstance(tensor.shape[1], int):
        return None
    length = tensor.shape[1]
    try:
        shift, one = (_along(path, np.full((1, length), value)) for value in (0.0, 1.0))
        places = _along([step for step in path if step[0].op in _LAYOUT], np.arange(length, dtype=np.float64)[None])
    except (RefusedError, ValueError):  # numpy's word for shapes that do not fit: a batch that is not 1
        return None
    return Affine(tensor, length, one - shift, shift, places.astype(np.int64))


def _along(path: list[tuple[gs.Node, gs.Tensor]], row: Array) -> Array:
    """Values after the path, which is given from its end."""
    for node, made in reversed(path):
        row = STEPS[node.op](row, node, made)
    return row


def _shaped(row: Array, node: gs.Node, made: gs.Tensor) -> Array:
    """A change of layout in which every axis but the batch's is known."""
    shape = made.shape
    if shape is None or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
        raise RefusedError(f"the shape of {made.name} is not known")
    if math.prod(shape[1:]) != row.size:
        raise RefusedError(f"{node.op} {node.name} moves the batch axis")
    return row.reshape(1, *shape[1:])


def _unsqueezed(row: Array, node: gs.Node, made: gs.Tensor) -> Array:
    axes = axes_of(node)
    return np.expand_dims(row, tuple(axes)) if axes and 0 not in axes else _shaped(row, node, made)


def _split(row: Array, node: gs.Node, made: gs.Tensor) -> Array:
    """One part; sizes from the inferred shapes."""
    axis = int(node.attrs.get("axis", 0))
    places = [0]
    for output in node.outputs:
        size = None if output.shape is None else output.shape[axis]
        if not isinstance(size, int):
            raise RefusedError(f"the shape of {output.name} is not known")
        places.append(places[-1] + size)
    index = next(i for i, output in enumerate(node.outputs) if output is made)
    return np.take(row, range(places[index], places[index + 1]), axis=axis)


def _slice(row: Array, node: gs.Node, _made: gs.Tensor) -> Array:
    """A part, by constant starts and ends."""
    parts = [constant_values(tensor) for tensor in node.inputs[1:]]
    if len(parts) < 2 or any(part is None for part in parts):
        raise RefusedError(f"Slice {node.name} has no constant bounds")
    starts, ends, *rest = [part.reshape(-1).tolist() for part in parts if part is not None]
    axes = rest[0] if rest else range(len(starts))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    index = [slice(None)] * row.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    if index[0] != slice(None):
        raise RefusedError(f"Slice {node.name} cuts the batch")
    part: Array = row[tuple(index)]
    return part


def _gather(row: Array, node: gs.Node, _made: gs.Tensor) -> Array:
    """One or some entries along an axis."""
    places, axis = constant_values(node.inputs[1]), int(node.attrs.get("axis", 0))
    if places is None or axis % row.ndim == 0:
        raise RefusedError(f"Gather {node.name} has no constant places, or takes samples out of a batch")
    return np.take(row, places, axis=axis)


def _arithmetic(operation: Callable[[Array, Array], Array]) -> Callable[[Array, gs.Node, gs.Tensor], Array]:
    """An operator with a constant on one side; monotone in the other, whatever the constant."""

    def step(row: Array, node: gs.Node, _made: gs.Tensor) -> Array:
        sides = [constant_values(tensor) for tensor in node.inputs]
        left, right = (row if side is None else side.astype(np.float64) for side in sides)
        if all(side is None for side in sides) or (node.op == "Div" and sides[1] is None):
            raise RefusedError(f"{node.op} {node.name} is not monotone in one tensor")
        result = operation(left, right)
        if result.size != row.size or result.shape[0] != 1:
            raise RefusedError(f"{node.op} {node.name} changes the shape")
        return result

    return step


def _function(function: Callable[[Array, gs.Node], Array]) -> Callable[[Array, gs.Node, gs.Tensor], Array]:
    """An operator of one tensor."""
    return lambda row, node, _made: function(row, node)


def _sigmoid(row: Array, _node: gs.Node) -> Array:
    return 0.5 + 0.5 * np.tanh(0.5 * row)


def _hard_sigmoid(row: Array, node: gs.Node) -> Array:
    return np.asarray(np.clip(node.attrs.get("alpha", 0.2) * row + node.attrs.get("beta", 0.5), 0, 1))


def _clip(row: Array, node: gs.Node, _made: gs.Tensor) -> Array:
    bounds = [None if t.is_empty() else constant_values(t) for t in node.inputs[1:]]
    low, high = (*bounds, None, None)[:2]
    if any(not tensor.is_empty() and bound is None for tensor, bound in zip(node.inputs[1:], bounds, strict=True)):
        raise RefusedError(f"Clip {node.name} has no constant bounds")
    low = node.attrs.get("min", -np.inf) if low is None else low
    return np.asarray(np.clip(row, low, node.attrs.get("max", np.inf) if high is None else high))


def _transposed(row: Array, node: gs.Node, _made: gs.Tensor) -> Array:
    return np.transpose(row, node.attrs.get("perm"))


STEPS: dict[str, Callable[[Array, gs.Node, gs.Tensor], Array]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze"), _shaped),
    "Unsqueeze": _unsqueezed,
    **dict.fromkeys(("Identity", "Cast", "Dropout"), _function(lambda row, _: row)),
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Transpose": _transposed,
    "Add": _arithmetic(np.add),
    "Sub": _arithmetic(np.subtract),
    "Mul": _arithmetic(np.multiply),
    "Div": _arithmetic(np.divide),
    "Neg": _function(lambda row, _: -row),
    "Sigmoid": _function(_sigmoid),
    "HardSigmoid": _function(_hard_sigmoid),
    "Tanh": _function(lambda row, _: np.tanh(row)),
    "Relu": _function(lambda row, _: np.maximum(row, 0)),
    "Clip": _clip,
}
