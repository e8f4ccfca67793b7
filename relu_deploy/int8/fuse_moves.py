"""Labels through operators that move, select or interpolate values: the same move, made on the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.fuse_groups import Channels, Labels, labelled_axes, lift, reshape_labels
from relu_deploy.passes.edit import RefusedError, dims, given, int_values
from relu_deploy.passes.region import constant_values


def transpose(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Axes in another order; without ``perm`` reversed."""
    return [labels.transpose(node.attrs.get("perm"))]


def reshape(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Reshape, Flatten, Squeeze, Unsqueeze: by the shapes before and after."""
    return [reshape_labels(labels, _shape(node.inputs[0]), _shape(node.outputs[0]))]


def slice_(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Parts of axes. What is cut from an axis without channels may be computed at run time."""
    axes = int_values(node, "axes", 3)
    starts, ends = int_values(node, "starts", 1), int_values(node, "ends", 2)
    steps = int_values(node, "steps", 4) if given(node, 4) is not None else None
    if axes is None and given(node, 3) is None:
        axes = list(range(len(starts) if starts is not None else labels.ndim))
    touched = {axis % labels.ndim: at for at, axis in enumerate(axes or ())}
    if axes is None or any(axis in touched for axis in labelled_axes(labels)):
        if axes is None or starts is None or ends is None or (steps is None and given(node, 4) is not None):
            raise RefusedError(f"Slice {node.name} cuts channels at places computed at run time")
        for axis in labelled_axes(labels):
            if axis in touched:
                at = touched[axis]
                cut = [slice(None)] * axis + [slice(starts[at], ends[at], steps[at] if steps else 1)]
                labels = labels[tuple(cut)]
    return [labels]


def split(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Parts of one axis."""
    axis = int(node.attrs.get("axis", 0)) % labels.ndim
    if labels.shape[axis] == 1:
        return [labels] * len(node.outputs)
    sizes = int_values(node, "split", 1)
    if sizes is None:
        each = math.ceil(labels.shape[axis] / len(node.outputs))
        sizes = [each] * len(node.outputs)
    parts = np.split(labels, np.cumsum(sizes)[:-1], axis=axis)
    return list(parts)


def gather(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Channels, or positions, by index."""
    axis = int(node.attrs.get("axis", 0)) % labels.ndim
    index = constant_values(node.inputs[1])
    if labels.shape[axis] > 1:
        if index is None:
            raise RefusedError(f"Gather {node.name} takes channels by numbers computed at run time")
        return [labels.take(index.astype(np.int64), axis=axis)]
    shape = index.shape if index is not None else _shape(node.inputs[1])
    return [labels.reshape(*labels.shape[:axis], *(1,) * len(shape), *labels.shape[axis + 1 :])]


def expand(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Repeats along axes of size 1, which no channel depends on; may add axes in front."""
    return [lift(labels, len(_shape(node.outputs[0])))]


def tile(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Repeats whole axes."""
    repeats = int_values(node, "repeats", 1)
    if repeats is None:
        raise RefusedError(f"Tile {node.name} repeats a number of times computed at run time")
    return [np.tile(labels, [times if size > 1 else 1 for times, size in zip(repeats, labels.shape, strict=True)])]


def depth_to_space(channels: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """``b * b`` channels become the positions of one, so they share its factor."""
    labels, block = channels.tie_along(labels, (0, 2, 3)), int(node.attrs["blocksize"]) ** 2
    if labels.size == 1:
        return [labels]
    column_first = node.attrs.get("mode", "DCR") == "CRD"
    grid = labels.reshape(-1, block).T if column_first else labels.reshape(block, -1)
    first = channels.tie_along(grid, (0,))
    return [first.reshape(1, -1, 1, 1)]


def space_to_depth(channels: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """The positions of a channel become ``b * b`` channels, block by block."""
    labels = channels.tie_along(labels, (0, 2, 3))
    return [np.tile(labels, (1, int(node.attrs["blocksize"]) ** 2, 1, 1)) if labels.size > 1 else labels]


def pad(channels: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Zeros are zeros in any scale; along channels they are channels of their own."""
    mode = node.attrs.get("mode", "constant")
    value, given_value = given(node, 2), node.attrs.get("value", 0.0)
    zeros = float(given_value) == 0 if value is None else constant_values(value) is not None and not _any(value)
    if mode == "constant" and not zeros:
        raise RefusedError(f"Pad {node.name} pads with another number than 0")
    if not labels.ndim:
        return [labels]
    amounts, axes = int_values(node, "pads", 1), list(range(labels.ndim))
    if given(node, 3) is not None:
        axes = [axis % labels.ndim for axis in int_values(node, "axes", 3) or ()]
    if amounts is None or len(amounts) != 2 * len(axes):
        raise RefusedError(f"Pad {node.name} pads by an amount computed at run time")
    for at, axis in enumerate(axes):
        before, after = amounts[at], amounts[at + len(axes)]
        if labels.shape[axis] == 1 or before == after == 0:
            continue
        if mode != "constant" or before < 0 or after < 0:
            raise RefusedError(f"Pad {node.name} repeats or cuts channels")
        shape = list(labels.shape)
        new = [channels.fresh((*shape[:axis], count, *shape[axis + 1 :])) for count in (before, after)]
        labels = np.concatenate([new[0], labels, new[1]], axis=axis)
    return [labels]


def resize(_: Channels, node: gs.Node, labels: Labels) -> list[Labels]:
    """Weighted means of neighbours: homogeneous where channels are not among the neighbours."""
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise RefusedError(f"Resize {node.name} puts a constant beyond the border")
    before, after = dims(node.inputs[0]), dims(node.outputs[0])
    scales = given(node, 1 if node.op == "Upsample" else 2)
    factors = None if scales is None else constant_values(scales)
    for axis in labelled_axes(labels):
        fixed = before is not None and after is not None and before[axis] is not None and before[axis] == after[axis]
        if scales is not None and factors is not None and factors.size == labels.ndim:
            fixed = float(factors[axis]) == 1
        elif scales is not None and "axes" not in node.attrs:
            fixed = False
        if not fixed:
            raise RefusedError(f"{node.op} {node.name} may interpolate between channels")
    return [labels]


def join(node: gs.Node, parts: Sequence[Labels], axis: int, rank: int) -> Labels:
    """Labels of a Concat along channels: each part keeps its own."""
    parts = [lift(part, rank) if part.ndim else part.reshape((1,) * rank) for part in parts]
    others = np.broadcast_shapes(*((*p.shape[:axis], 1, *p.shape[axis + 1 :]) for p in parts))
    full = []
    for part, tensor in zip(parts, node.inputs, strict=True):
        size = tensor.shape[axis] if tensor.shape is not None and len(tensor.shape) == rank else None
        if not isinstance(size, (int, np.integer)):
            raise RefusedError(f"the channels of {tensor.name}, an operand of Concat {node.name}, are not known")
        full.append(np.broadcast_to(part, (*others[:axis], int(size), *others[axis + 1 :])))
    return np.concatenate(full, axis=axis)


def _shape(tensor: gs.Tensor) -> Sequence[Any]:
    """Shape with the names of open extents. Raises: RefusedError where not even the rank is known."""
    if dims(tensor) is None or tensor.shape is None:
        raise RefusedError(f"the shape of {tensor.name} is not known")
    return list(tensor.shape)


def _any(tensor: gs.Tensor) -> bool:
    values = constant_values(tensor)
    return values is None or bool(np.any(values))
