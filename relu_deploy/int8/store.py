"""Weights and biases of linear layers as they are stored: codes and scales."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat, half_scales, quantize_symmetric, weight_scales, widen_for_bias
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.passes.linear import bias_behind


@dataclasses.dataclass(frozen=True)
class Stored:
    """One layer.

    Attributes:
        codes: int8, the shape of the weights.
        scales: Weight units a step, float32, ``(C,)`` or ``()``.
        axis: Of the scales in the weights; None for one scale.
        bias: ``(C,)`` float, or None where the layer has none.
    """

    codes: npt.NDArray[np.int8]
    scales: npt.NDArray[np.float32]
    axis: int | None
    bias: npt.NDArray[np.floating] | None

    @property
    def steps(self) -> npt.NDArray[np.float32]:
        """The scales, in a shape that multiplies the codes."""
        if self.axis is None or not self.scales.ndim:
            return self.scales
        return self.scales.reshape([-1 if at == self.axis else 1 for at in range(self.codes.ndim)])

    @property
    def weight(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, float32."""
        return np.asarray(self.codes * self.steps, dtype=np.float32)


def store(node: gs.Node, number: NumberFormat, input_scale: float) -> Stored:
    """Codes of a layer's weights, each the nearest to its weight.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul with constant weights; not changed.
        number: The target's format.
        input_scale: Of what it reads, which an int32 bias is stored with.
    """
    weight, bias = layer_operands(node)
    if node.op == "MatMul" and (place := bias_place(node)) is not None:
        bias = place[0].inputs[place[1]].values.reshape(-1)
    axis = None if shares_scale(node, number) else weight_axis(node)
    scales, dtype = weight_scales(weight, axis, number.weight_max), node.inputs[1].values.dtype
    scales = half_scales(scales) if number.half and dtype == np.float32 else scales
    if bias is not None and integer_bias(node, number):
        scales = widen_for_bias(scales, input_scale, bias, alive(weight, axis))
    codes = quantize_symmetric(weight, scales, axis, number.weight_max).astype(np.int8)
    return Stored(codes, scales, axis, bias)


def bias_place(node: gs.Node) -> tuple[gs.Node, int] | None:
    """Where the bias of a layer is, or would be: a node and the position of its operand; None where there is no place.

    That of a product of matrices is the constant vector that an Add behind it adds, also where Q/DQ are in between.
    """
    if node.op != "MatMul":
        return node, 2
    add = bias_behind(node, set(), past=("QuantizeLinear", "DequantizeLinear"))
    if add is None:
        return None
    return add, next(at for at, tensor in enumerate(add.inputs) if isinstance(tensor, gs.Constant))


def integer_bias(node: gs.Node, number: NumberFormat) -> bool:
    """Whether the bias of a layer is stored as int32; the Add behind a product of matrices computes in float."""
    return number.integer_bias and node.op != "MatMul"


def weight_axis(node: gs.Node) -> int | None:
    """Output-channel axis of a linear layer's weights; None where no single axis is (they get one scale).

    ConvTranspose keeps its output channels on axis 1 (TensorRT#2380), and with groups they are spread over two axes.
    """
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1 if node.attrs.get("group", 1) == 1 else None
    if node.op == "Gemm":
        return 0 if node.attrs.get("transB", 0) else 1
    return 1 if node.inputs[1].values.ndim == 2 else None


def layer_operands(node: gs.Node) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Weights and bias (shape ``(C,)``) with Gemm's alpha and beta multiplied in; the node is not changed."""
    weight = node.inputs[1].values
    third = node.inputs[2] if len(node.inputs) > 2 else None
    bias = third.values if isinstance(third, gs.Constant) else None
    if node.op == "Gemm":
        weight = weight * weight.dtype.type(node.attrs.get("alpha", 1.0))
        columns = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        if bias is not None:
            bias = np.broadcast_to(bias.reshape(-1) * bias.dtype.type(node.attrs.get("beta", 1.0)), (columns,))
    return weight, bias


def alive(weight: npt.NDArray[Any], axis: int | None) -> npt.NDArray[np.bool_]:
    """Where a channel holds a weight other than 0; shape ``(C,)``, or ``()`` without an axis."""
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    return np.asarray(np.any(weight != 0, axis=others))
