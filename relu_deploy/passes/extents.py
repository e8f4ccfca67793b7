"""Shape arithmetic that only rearranges: which extents of which tensor a vector of integers holds.

``x.reshape(x.shape)`` arrives as Shape, a Gather for each axis, and a Concat. Nothing of it is constant, and yet it is
the shape of ``x``.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import array_values, dims, int_values, is_standard, producer_of

# A number, or (identity of a tensor, axis).
Extent = int | tuple[int, int]
_SAME_ENTRIES = ("Identity", "Unsqueeze", "Squeeze", "Reshape")
_DEEPEST = 8


def extents(tensor: gs.Tensor, depth: int = _DEEPEST) -> list[Extent] | None:
    """Entries of a tensor of integers, in order; None where they are computed in a way that is not followed."""
    values, node = array_values(tensor), producer_of(tensor)
    if values is not None:
        return [int(value) for value in values.reshape(-1)] if values.dtype.kind in "iu" else None
    if node is None or depth == 0:
        return None
    if is_standard(node, "Shape"):
        shape = dims(node.inputs[0])
        every: list[Extent] = [(id(node.inputs[0]), axis) for axis in range(len(shape or ()))]
        return None if shape is None else every[node.attrs.get("start", 0) : node.attrs.get("end", len(every))]
    if is_standard(node, *_SAME_ENTRIES):
        return extents(node.inputs[0], depth - 1)
    if is_standard(node, "Concat"):
        parts = [extents(part, depth - 1) for part in node.inputs]
        return None if any(part is None for part in parts) else [entry for part in parts if part for entry in part]
    return _taken(node, depth)


def _taken(node: gs.Node, depth: int) -> list[Extent] | None:
    """Entries that a Gather or a Slice of a vector takes."""
    if not is_standard(node, "Gather", "Slice") or (every := extents(node.inputs[0], depth - 1)) is None:
        return None
    if node.op == "Gather":
        places = array_values(node.inputs[1])
        if places is None or (places < -len(every)).any() or (places >= len(every)).any():
            return None
        return [every[int(place)] for place in places.reshape(-1)]
    bounds = [int_values(node, name, position) for name, position in (("starts", 1), ("ends", 2))]
    steps = int_values(node, "steps", 4) if len(node.inputs) > 4 else [1]
    if any(bound is None or len(bound) != 1 for bound in (*bounds, steps)):
        return None
    (start,), (end,), (step,) = (bound for bound in (*bounds, steps) if bound is not None)
    return every[start:end:step] if step > 0 else None
