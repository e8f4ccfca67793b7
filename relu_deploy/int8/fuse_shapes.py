"""Shapes that inference leaves open where the batch is: what a Reshape computes from the shape of another tensor.

Exporters write the heads of attention as ``Reshape(x, Concat(batch, tokens, -1, 8))``, the batch read from a tensor.
ONNX's inference forgets all of it; the numbers among it tell where channels go.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import dims, int_values, is_standard, producer_of
from relu_deploy.passes.region import constant_values

_SAME_SHAPE = ("Relu", "Softmax", "Add", "Sub", "Mul", "Div", "Where", "Identity", "Dropout", "Cast", "Clip", "Sigmoid")
_PASS_NUMBERS = ("Unsqueeze", "Squeeze", "Cast", "Identity")


@contextlib.contextmanager
def sharp_shapes(graph: gs.Graph) -> Iterator[None]:
    """Within the block, shapes of tensors hold the extents that follow from shapes computed at run time.

    Afterwards they are what they were: what a runtime fuses, and so how it rounds, can depend on the shapes in a file.
    """
    before = [(tensor, tensor.shape) for node in graph.nodes for tensor in node.outputs]
    _sharpen(graph)
    try:
        yield
    finally:
        for tensor, shape in before:
            tensor.shape = shape


def _sharpen(graph: gs.Graph) -> None:
    for node in graph.nodes:
        found: list[Any] | None = None
        if is_standard(node, "Reshape"):
            found = _reshaped(node)
        elif is_standard(node, "Transpose"):
            before = _known(node.inputs[0])
            found = before and [before[axis] for axis in node.attrs.get("perm", range(len(before))[::-1])]
        elif is_standard(node, "MatMul"):
            found = _product(node)
        elif is_standard(node, *_SAME_SHAPE):
            found = next((shape for t in node.inputs if (shape := _known(t)) and _same_rank(t, node.outputs[0])), None)
            # What is broadcast has extents of 1, or fewer of them.
            found = found and [None if size == 1 else size for size in found]
        if found:
            _refine(node.outputs[0], found)


def _refine(tensor: gs.Tensor, found: list[Any]) -> None:
    """Take what was found for extents that are no numbers yet."""
    old = _known(tensor)
    if old is not None and len(old) == len(found):
        tensor.shape = [
            was if isinstance(was, (int, np.integer)) or new is None else new
            for was, new in zip(old, found, strict=True)
        ]


def _known(tensor: gs.Tensor) -> list[Any] | None:
    return None if dims(tensor) is None or tensor.shape is None else list(tensor.shape)


def _same_rank(one: gs.Tensor, other: gs.Tensor) -> bool:
    return isinstance(one, gs.Variable) and len(one.shape or ()) == len(other.shape or ()) > 0


def _product(node: gs.Node) -> list[Any] | None:
    left, right = (_known(tensor) for tensor in node.inputs)
    if left is None or right is None or len(left) < 2 or len(right) != len(left):
        return None
    return [*(a if a != 1 else None for a in left[:-2]), left[-2], right[-1]]


def _reshaped(node: gs.Node) -> list[Any] | None:
    """Numbers, names of open extents, None for what nothing tells; a single -1 is found by dividing."""
    before, computed = _known(node.inputs[0]), _numbers(node.inputs[1])
    if before is None or computed is None:
        return None
    if not node.attrs.get("allowzero", 0):
        computed = [before[at] if size == 0 and at < len(before) else size for at, size in enumerate(computed)]
    missing = [at for at, size in enumerate(computed) if size is None or size == -1]
    if len(missing) == 1 and None not in before:
        computed[missing[0]] = _divided(before, [size for at, size in enumerate(computed) if at != missing[0]])
    return [None if size == -1 else size for size in computed]


def _divided(whole: list[Any], parts: list[Any]) -> int | None:
    """Elements of a shape over those of the extents given, where open extents are the same on both sides."""
    names = [sorted(size for size in shape if isinstance(size, str)) for shape in (whole, parts)]
    size, known = (math.prod(int(size) for size in shape if not isinstance(size, str)) for shape in (whole, parts))
    return size // known if names[0] == names[1] and known and size % known == 0 else None


def _numbers(tensor: gs.Tensor) -> list[Any] | None:
    """A list of extents: numbers, names, None for unknown ones; None where not even their count is known."""
    values, node = constant_values(tensor), producer_of(tensor)
    if values is not None:
        return [int(value) for value in values.reshape(-1)]
    found: list[Any] | None = None
    if node is None:
        found = None
    elif node.op in _PASS_NUMBERS:
        found = _numbers(node.inputs[0])
    elif node.op == "Concat":
        parts = [_numbers(part) for part in node.inputs]
        found = None if any(part is None for part in parts) else [size for part in parts for size in part or ()]
    elif node.op == "Shape" and (shape := _known(node.inputs[0])) is not None:
        found = shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    elif node.op == "Gather":
        whole, index = _numbers(node.inputs[0]), constant_values(node.inputs[1])
        found = None if whole is None or index is None else [whole[int(at)] for at in index.reshape(-1)]
    elif node.op == "Slice" and len(node.inputs) < 5:
        whole, start, end = _numbers(node.inputs[0]), int_values(node, "starts", 1), int_values(node, "ends", 2)
        found = None if whole is None or start is None or end is None else whole[start[0] : end[0]]
    if found is None and dims(tensor) in ((), (1,)):
        return [None]
    return found
