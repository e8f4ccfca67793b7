"""What a node reads: constants, fills of one number, draws at random, and what is live."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_graphsurgeon as gs

STANDARD = (None, "", "ai.onnx")


def constant_values(tensor: gs.Tensor) -> np.ndarray | None:
    """Values of a constant tensor, whether an initializer or the output of a Constant node; None for a live one."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    node = _producer(tensor)
    value = node.attrs.get("value") if node is not None and node.op == "Constant" else None
    return np.asarray(value.values) if isinstance(value, gs.Constant) else None


def constant_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Shape of a constant tensor, without loading its values; None for a live one."""
    node = _producer(tensor)
    held = tensor if node is None or node.op != "Constant" else node.attrs.get("value")
    return tuple(held.shape) if isinstance(held, gs.Constant) else None


def onnx_type(tensor: gs.Tensor) -> int:
    """ONNX type number of a tensor; 0 where it is not known."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype or 0
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known before the network runs."""
    node = _producer(tensor)
    return isinstance(tensor, gs.Constant) or (node is not None and node.op == "Constant")


def fill(tensor: gs.Tensor) -> tuple[np.ndarray, gs.Tensor | None] | None:
    """What a tensor of run-time shape is filled with, and the tensor whose shape it has if that is known.

    ``Expand(number, Shape(x))`` and ``ConstantOfShape(Shape(x))``, as ``full_like`` is exported; and a vector of
    channels that is expanded to be an index.
    """
    node = _producer(tensor)
    if node is None or node.domain not in STANDARD or node.op not in ("Expand", "ConstantOfShape"):
        return None
    if node.op == "Expand":
        number = constant_values(node.inputs[0])
    else:
        value = node.attrs.get("value")
        number = np.asarray(value.values) if isinstance(value, gs.Constant) else np.zeros(1, np.float32)
    if number is None or not one_axis(number.shape):
        return None
    maker = _producer(node.inputs[-1])
    known = maker is not None and maker.op == "Shape" and not {"start", "end"} & maker.attrs.keys()
    return number, maker.inputs[0] if maker is not None and known else None


def draw(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor at random without reading any, or reading a constant."""
    node = _producer(tensor)
    if node is None or node.domain not in STANDARD:
        return None
    of_constant = node.op in ("RandomUniformLike", "Bernoulli") and is_constant(node.inputs[0])
    return node if of_constant or node.op == "RandomUniform" else None


def table_and_coordinates(node: gs.Node) -> tuple[gs.Tensor, list[gs.Tensor]] | None:
    """The constant table that a node reads, and the tensors that say where; None for any other node.

    ``GatherND`` of an index that Unsqueeze, and Concat of several, make of one tensor an axis; and ``Reshape(Reshape(
    Gather(table, index), -1), Shape(index))``, which the older exporter of torch makes of ``table[channel, index]``.
    """
    if node.domain not in STANDARD or node.op not in ("GatherND", "Reshape") or len(node.inputs) != 2:
        return None
    if node.op == "Reshape":
        return _reshaped_gather(node)
    shape, index = constant_shape(node.inputs[0]), _producer(node.inputs[1])
    if not shape or 0 in shape or index is None or node.attrs.get("batch_dims", 0):
        return None
    columns = [index] if index.op == "Unsqueeze" else []
    if index.op == "Concat" and index.attrs.get("axis") in (-1, rank_or(index.outputs[0], 1) - 1):
        columns = [column for tensor in index.inputs if (column := _producer(tensor)) is not None]
    right = len(columns) == len(shape) and all(
        column.op == "Unsqueeze" and adds_last_axis(column) for column in columns
    )
    return (node.inputs[0], [column.inputs[0] for column in columns]) if right else None


# From a coordinate to the read there are Unsqueeze and Concat, or Gather and two Reshape.
_MOST_BETWEEN = 3


def serves_tables(node: gs.Node, steps: int = _MOST_BETWEEN) -> bool:
    """Whether a node reads shapes only, or does nothing but bring an index to where tables are read."""
    if node.op == "Shape":
        return True
    if node.op not in ("Unsqueeze", "Concat", "Gather", "Reshape") or steps == 0:
        return False
    readers = [reader for tensor in node.outputs for reader in tensor.outputs]
    return bool(readers) and all(
        table_and_coordinates(reader) is not None or serves_tables(reader, steps - 1) for reader in readers
    )


def _reshaped_gather(node: gs.Node) -> tuple[gs.Tensor, list[gs.Tensor]] | None:
    flat, size = _producer(node.inputs[0]), _producer(node.inputs[1])
    if size is None or size.op != "Shape" or {"start", "end"} & size.attrs.keys():
        return None
    if flat is not None and flat.op == "Reshape":
        flat = _producer(flat.inputs[0])
    if flat is None or flat.op != "Gather" or flat.attrs.get("axis", 0) != 0 or len(flat.inputs) != 2:
        return None
    shape = constant_shape(flat.inputs[0])
    fits = shape is not None and math.prod(shape[1:]) == 1 and shape[0] > 0 and flat.inputs[1] is size.inputs[0]
    return (flat.inputs[0], [flat.inputs[1]]) if fits else None


def adds_last_axis(node: gs.Node) -> bool:
    """Whether an Unsqueeze puts one axis at the end."""
    axes = constant_values(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.attrs.get("axes", ()))
    return axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) in (-1, rank_or(node.inputs[0], 0))


def rank_or(tensor: gs.Tensor, unknown: int) -> int:
    """Number of axes of a tensor, or another number where that is not known."""
    return unknown if tensor.shape is None else len(tensor.shape)


# Side inputs of more elements are weights and embeddings, and are not searched for what repeats.
_MOST_ELEMENTS = 1 << 20


def varies_along_one_axis(tensor: gs.Tensor) -> bool:
    """Whether a constant is a scalar or varies along one axis, by its shape or, of a small one, by its values."""
    shape = constant_shape(tensor)
    if shape is None or one_axis(shape):
        return shape is not None
    if not 0 < math.prod(shape) <= _MOST_ELEMENTS:
        return False
    values = constant_values(tensor)
    return values is not None and one_axis(without_repeats(values).shape)


def without_repeats(values: np.ndarray) -> np.ndarray:
    """One entry for every axis along which nothing changes: constants of a whole shape are often folded fills."""
    for axis in range(values.ndim):
        first = values.take([0], axis)
        if values.shape[axis] > 1 and (values == first).all():
            values = first
    return values


def one_axis(shape: tuple[int, ...]) -> bool:
    """Whether an array is a scalar or varies along one axis."""
    return math.prod(shape) > 0 and sum(size != 1 for size in shape) <= 1


# How far up a rank is looked for that shape inference did not find.
_STEPS_UP = 4
_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Where", "Sum")
_SAME_SHAPE = ("Relu", "Sigmoid", "Tanh", "Erf", "Identity", "Cast", "Clip", "Softmax", "LayerNormalization", "Dropout")
_LEAST_RANKS = {
    "Conv": 3, "ConvTranspose": 3, "BatchNormalization": 2, "MaxPool": 3, "AveragePool": 3, "GlobalAveragePool": 3,
    "Gemm": 2,
}  # fmt: skip


def least_rank(tensor: gs.Tensor, steps: int = _STEPS_UP) -> int:
    """A number of axes that a tensor has at least: its own where it is known, else what its producers imply."""
    if tensor.shape is not None:
        return len(tensor.shape)
    node = _producer(tensor)
    if node is None or node.domain not in STANDARD or steps == 0:
        return 0
    if node.op in _LEAST_RANKS:
        return _LEAST_RANKS[node.op]
    ranks = [len(shape) if (shape := constant_shape(t)) is not None else least_rank(t, steps - 1) for t in node.inputs]
    if node.op in _BROADCASTING:
        return max(ranks, default=0)
    if node.op == "MatMul":
        return max(0, max(ranks, default=0) - 1)
    return ranks[0] if node.op in _SAME_SHAPE and ranks else 0


def _producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None
