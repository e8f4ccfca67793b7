"""What of the operators gives out, entry for entry, a tensor that exists already.

Each rule takes a node and returns that tensor: the node's own input, or one further up where two nodes undo each other
(a Transpose and its inverse, Unsqueeze and Squeeze, a Cast to a wider type and back). None where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from relu_deploy.passes.edit import (
    array_values,
    dims,
    given,
    int_values,
    is_standard,
    known_shape,
    least_rank,
    producer_of,
)
from relu_deploy.passes.extents import extents
from relu_deploy.passes.region import onnx_type

Rule = Callable[[gs.Node], "gs.Tensor | None"]

# An end at or past this is "up to the end" whatever the size: exporters write the largest int32 or int64.
_TO_THE_END = (1 << 31) - 1
# They change the shape and keep the order of the entries.
RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
# Bits of the significand, then largest exponent, of floats; bits of the magnitude, then whether signed, of integers.
_FLOATS: dict[int, tuple[int, int]] = {
    TensorProto.FLOAT16: (11, 15), TensorProto.BFLOAT16: (8, 127), TensorProto.FLOAT: (24, 127),
    TensorProto.DOUBLE: (53, 1023),
}  # fmt: skip
_INTEGERS: dict[int, tuple[int, bool]] = {
    TensorProto.BOOL: (1, False), TensorProto.UINT8: (8, False), TensorProto.INT8: (7, True),
    TensorProto.UINT16: (16, False), TensorProto.INT16: (15, True), TensorProto.UINT32: (32, False),
    TensorProto.INT32: (31, True), TensorProto.UINT64: (64, False), TensorProto.INT64: (63, True),
}  # fmt: skip


def cast_target(node: gs.Node) -> int:
    """ONNX type number that a Cast or CastLike gives; 0 where it is not known."""
    if node.op == "CastLike":
        return onnx_type(node.inputs[1])
    to = node.attrs.get("to", 0)
    return to if isinstance(to, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to)))


def cast(node: gs.Node) -> gs.Tensor | None:
    """To the type that is there already, or back from a type that holds every value of it."""
    source, target = node.inputs[0], cast_target(node)
    if target and onnx_type(source) == target:
        return source
    before = producer_of(source)
    if before is None or not is_standard(before, "Cast", "CastLike") or not target:
        return None
    return before.inputs[0] if onnx_type(before.inputs[0]) == target and holds(cast_target(before), target) else None


def holds(wide: int, narrow: int) -> bool:
    """Whether one type represents every value of another.

    >>> holds(TensorProto.FLOAT, TensorProto.FLOAT16), holds(TensorProto.FLOAT16, TensorProto.BFLOAT16)
    (True, False)
    >>> holds(TensorProto.FLOAT, TensorProto.INT32), holds(TensorProto.DOUBLE, TensorProto.INT32)
    (False, True)
    """
    if narrow in _FLOATS:
        return wide in _FLOATS and all(a >= b for a, b in zip(_FLOATS[wide], _FLOATS[narrow], strict=True))
    if narrow not in _INTEGERS:
        return False
    bits, signed = _INTEGERS[narrow]
    if wide in _FLOATS:
        return _FLOATS[wide][0] >= bits
    if wide not in _INTEGERS:
        return False
    return _INTEGERS[wide][0] >= bits and _INTEGERS[wide][1] >= signed


def transpose(node: gs.Node) -> gs.Tensor | None:
    """No axis moves; or it undoes the Transpose before it."""
    source = node.inputs[0]
    order = permutation(node)
    if order is None:
        return None
    if order == sorted(order):
        return source
    before = producer_of(source)
    first = permutation(before) if before is not None and is_standard(before, "Transpose") else None
    if before is None or first is None or len(first) != len(order):
        return None
    return before.inputs[0] if [first[axis] for axis in order] == sorted(order) else None


def permutation(node: gs.Node) -> list[int] | None:
    """Where the axes of a Transpose come from; None where even their number is not known."""
    if "perm" in node.attrs:
        return [int(axis) for axis in node.attrs["perm"]]
    shape = dims(node.inputs[0])
    return None if shape is None else list(range(len(shape)))[::-1]


def reshape(node: gs.Node) -> gs.Tensor | None:
    """The shape was there already, here or some reshaping nodes before."""
    if (undone := _undone(node)) is not None:
        return undone
    if node.op == "Reshape" and _keeps_shape(node):
        return node.inputs[0]
    if node.op == "Flatten" and len(dims(node.inputs[0]) or ()) == 2 and int(node.attrs.get("axis", 1)) in (1, -1):
        return node.inputs[0]
    wanted, tensor = known_shape(node.outputs[0]), node.inputs[0]
    for _ in range(4):
        if wanted is not None and known_shape(tensor) == wanted:
            return tensor
        before = producer_of(tensor)
        if before is None or not is_standard(before, *RESHAPES):
            return None
        tensor = before.inputs[0]
    return None


def _undone(node: gs.Node) -> gs.Tensor | None:
    """Squeeze of what Unsqueeze made, or the other way round: both count the axes of the longer shape."""
    before = producer_of(node.inputs[0])
    if (
        before is None
        or not is_standard(before, "Squeeze", "Unsqueeze")
        or {node.op, before.op} != {"Squeeze", "Unsqueeze"}
    ):
        return None
    ours, theirs = int_values(node, "axes", 1), int_values(before, "axes", 1)
    if not ours or not theirs:
        return None
    longer = dims(node.inputs[0] if node.op == "Squeeze" else before.inputs[0])
    if longer is not None:
        ours, theirs = ([axis % len(longer) for axis in axes] for axes in (ours, theirs))
    return before.inputs[0] if sorted(ours) == sorted(theirs) else None


def _keeps_shape(node: gs.Node) -> bool:
    """Whether a Reshape gives the shape it is given, though part of that is open."""
    target, shape = extents(node.inputs[1]) if len(node.inputs) > 1 else None, dims(node.inputs[0])
    if target is None or shape is None or len(target) != len(shape) or 0 in shape:
        return False
    copied = 0 if not node.attrs.get("allowzero", 0) else None
    own = [(id(node.inputs[0]), axis) for axis in range(len(shape))]
    pairs = enumerate(zip(shape, target, own, strict=True))
    open_axes = [axis for axis, (size, asked, itself) in pairs if asked not in (size, copied, itself)]
    return not open_axes or (len(open_axes) == 1 and target[open_axes[0]] == -1)


def expand(node: gs.Node) -> gs.Tensor | None:
    """To what is there already."""
    source = node.inputs[0]
    target, shape = extents(node.inputs[1]), dims(source)
    if shape is not None and target is not None and len(target) <= len(shape):
        ahead = len(shape) - len(target)
        if all(asked in (1, shape[ahead + i], (id(source), ahead + i)) for i, asked in enumerate(target)):
            return source
    wanted = known_shape(node.outputs[0])
    return node.inputs[0] if wanted is not None and wanted == known_shape(node.inputs[0]) else None


def fits_into(extents: Sequence[int], shape: Sequence[int | None]) -> bool:
    """Whether a shape of these extents changes nothing of ``shape`` when the two are broadcast."""
    behind = shape[len(shape) - len(extents) :] if len(extents) <= len(shape) else ()
    return len(behind) == len(extents) and all(a in (1, b) for a, b in zip(extents, behind, strict=True))


def tile(node: gs.Node) -> gs.Tensor | None:
    """Once along every axis."""
    repeats = int_values(node, "repeats", 1)
    return node.inputs[0] if repeats is not None and all(times == 1 for times in repeats) else None


def slicing(node: gs.Node) -> gs.Tensor | None:
    """All of every axis, forwards."""
    source, steps = node.inputs[0], int_values(node, "steps", 4)
    if (steps is None and given(node, 4) is not None) or any(step != 1 for step in steps or ()):
        return None
    wanted = known_shape(node.outputs[0])
    if wanted is not None and wanted == known_shape(source):
        return source
    starts, ends = int_values(node, "starts", 1), int_values(node, "ends", 2)
    axes, shape = int_values(node, "axes", 3), dims(source)
    if starts is None or ends is None or (axes is None and given(node, 3) is not None):
        return None
    for axis, start, end in zip(axes if axes is not None else range(len(starts)), starts, ends, strict=True):
        size = shape[axis] if shape is not None else None
        if start != 0 or end < (_TO_THE_END if size is None else size):
            return None
    return source


def pad(node: gs.Node) -> gs.Tensor | None:
    """By nothing."""
    amounts = int_values(node, "pads", 1)
    return node.inputs[0] if amounts is not None and not any(amounts) else None


def alone(node: gs.Node) -> gs.Tensor | None:
    """One operand of an operator that joins any number of them."""
    return node.inputs[0] if len(node.inputs) == 1 else None


def split(node: gs.Node) -> gs.Tensor | None:
    """Into one part."""
    return node.inputs[0] if len(node.outputs) == 1 else None


def twice(node: gs.Node) -> gs.Tensor | None:
    """Neg of Neg, Not of Not."""
    before = producer_of(node.inputs[0])
    return before.inputs[0] if before is not None and is_standard(before, node.op) else None


def where(node: gs.Node) -> gs.Tensor | None:
    """A condition that is the same everywhere."""
    condition = array_values(node.inputs[0])
    if condition is None or not condition.size or condition.any() != condition.all():
        return None
    taken, wanted = node.inputs[1 if condition.all() else 2], known_shape(node.outputs[0])
    if condition.ndim == 0 and known_shape(node.inputs[1]) == known_shape(node.inputs[2]) is not None:
        return taken
    return taken if wanted is not None and known_shape(taken) == wanted else None


def neutral(node: gs.Node) -> gs.Tensor | None:
    """Times or divided by one, to the power of one, minus zero, plus minus zero; plus zero for integers.

    ``x + 0.0`` is not among them: it turns -0.0 into 0.0. For that see :func:`adds_positive_zero`.
    """
    position, values = _constant_side(node)
    if values is None or (position == 0 and node.op in ("Sub", "Div", "Pow")):
        return None
    if node.op in ("Mul", "Div", "Pow"):
        is_neutral = bool((values == 1).all()) and (node.op != "Pow" or values.dtype.kind == "f")
    else:
        zero = bool((values == 0).all())
        is_negative = np.signbit(values) if values.dtype.kind == "f" else np.full(values.shape, node.op == "Add")
        is_neutral = zero and bool((is_negative == (node.op == "Add")).all())
    return node.inputs[1 - position] if is_neutral else None


def adds_positive_zero(node: gs.Node) -> gs.Tensor | None:
    """The tensor that 0.0 is added to, or -0.0 is taken from: equal to the result but for the sign of zeros."""
    position, values = _constant_side(node)
    if values is None or node.op not in ("Add", "Sub") or (position == 0 and node.op == "Sub"):
        return None
    return node.inputs[1 - position] if values.dtype.kind == "f" and bool((values == 0).all()) else None


def _constant_side(node: gs.Node) -> tuple[int, np.ndarray | None]:
    """Position and values of a constant operand that changes nothing of the other's shape."""
    for position in (1, 0):
        values, shape = array_values(node.inputs[position]), dims(node.inputs[1 - position])
        if values is None or values.dtype.kind not in "fiu" or not values.size:
            continue
        if shape is not None and not fits_into(values.shape, shape):
            continue
        if shape is not None or (values.size == 1 and values.ndim <= least_rank(node.inputs[1 - position])):
            return position, values
    return 0, None


RULES: dict[str, Rule] = {
    "Identity": lambda node: node.inputs[0],
    "Cast": cast, "CastLike": cast, "Transpose": transpose, **dict.fromkeys(RESHAPES, reshape), "Expand": expand,
    "Tile": tile, "Slice": slicing, "Pad": pad, **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), alone),
    "Split": split, "Neg": twice, "Not": twice, "Where": where,
    **dict.fromkeys(("Mul", "Div", "Pow", "Add", "Sub"), neutral),
}  # fmt: skip
