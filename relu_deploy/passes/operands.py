"""What a node reads: constants, fills of one number, draws at random, and what is live."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
    """The number that a tensor of run-time shape is filled with, and the tensor whose shape it has if it is known.

    ``Expand(number, Shape(x))`` and ``ConstantOfShape(Shape(x))``, as ``full_like`` is exported.
    """
    node = _producer(tensor)
    if node is None or node.domain not in STANDARD or node.op not in ("Expand", "ConstantOfShape"):
        return None
    if node.op == "Expand":
        number = constant_values(node.inputs[0])
    else:
        value = node.attrs.get("value")
        number = np.asarray(value.values) if isinstance(value, gs.Constant) else np.zeros(1, np.float32)
    if number is None or number.size != 1:
        return None
    maker = _producer(node.inputs[-1])
    known = maker is not None and maker.op == "Shape" and not {"start", "end"} & maker.attrs.keys()
    return number.reshape(()), maker.inputs[0] if maker is not None and known else None


def draw(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor at random without reading any."""
    node = _producer(tensor)
    return node if node is not None and node.domain in STANDARD and node.op == "RandomUniform" else None


def read_inputs(node: gs.Node) -> list[gs.Tensor]:
    """Inputs whose values a node reads: of the second input of CastLike it takes the type alone."""
    return list(node.inputs[:1] if node.op == "CastLike" else node.inputs)


def live_inputs(node: gs.Node) -> Iterator[gs.Tensor]:
    """Inputs of a node that carry data of the network."""
    return (t for t in read_inputs(node) if not (t.is_empty() or is_constant(t) or draw(t) is not None or fill(t)))


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
