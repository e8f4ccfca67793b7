"""Spell ONNX Runtime's integer operators as Q/DQ around float ones: the same numbers, in a form that TensorRT reads.

``y = Q(f(DQ(a), DQ(b)))`` is how each of them is defined; their kernels differ from it by one code at most, where
they round a product that falls between two codes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from relu_deploy.int8.lint.edit import add_constant
from relu_deploy.int8.lint.network import Network, attribute
from relu_deploy.report import PassReport, Skip

# Operator -> float operator, first input of each quantised operand, first input of (scale, zero point) of the result.
_FORMS: dict[str, tuple[str, tuple[int, ...], int]] = {
    "QLinearConv": ("Conv", (0, 3), 6), "QLinearMatMul": ("MatMul", (0, 3), 6), "QGemm": ("Gemm", (0, 3), 7),
    "QLinearAdd": ("Add", (0, 3), 6), "QLinearMul": ("Mul", (0, 3), 6), "QLinearSigmoid": ("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 3), "QLinearAveragePool": ("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3), "QLinearSoftmax": ("Softmax", (0,), 3),
}  # fmt: skip
_BIAS = {"QLinearConv": 8, "QGemm": 6}
# Attributes of ONNX Runtime's operators that ONNX's do not have.
_FOREIGN = {"channels_last": 0, "opset": None}


def spell_integer_operators(model: onnx.ModelProto) -> PassReport:
    """Rewrite QLinearConv, QLinearMatMul, QGemm and the QLinear operators of com.microsoft as Q/DQ."""
    net, nodes = Network(model), []
    changed: list[str] = []
    skipped: list[Skip] = []
    for node in model.graph.node:
        spelled = None
        if node.op_type in _FORMS or node.op_type == "QLinearConcat":
            reason = _why_not(net, node)
            if reason:
                skipped.append(Skip(node.name, reason))
            else:
                spelled = _concat(node) if node.op_type == "QLinearConcat" else _spell(model.graph, net, node)
                changed.append(node.name)
        nodes += spelled if spelled is not None else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    notes = {"": "integer kernels round some results to the neighbouring code"} if changed else {}
    return PassReport("spell_integer_operators", tuple(changed), tuple(skipped), notes)


def _why_not(net: Network, node: onnx.NodeProto) -> str:
    """Why an operator cannot be spelled; empty where it can."""
    if attribute(node, "channels_last", 0):
        return "it keeps channels last, which the float operator cannot"
    bias = _BIAS.get(node.op_type)
    if bias is not None and len(node.input) > bias and node.input[bias]:
        scales = [net.constant(node.input[i]) for i in (1, 4)]
        if net.constant(node.input[bias]) is None or any(scale is None for scale in scales):
            return "its bias or scales are computed at run time"
    return ""


def _spell(graph: onnx.GraphProto, net: Network, node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """DQ of each operand, the float operator, Q of the result."""
    op, operands, result = _FORMS[node.op_type]
    made, inputs = [], []
    for number, first in enumerate(operands):
        output = f"{node.name}/operand_{number}"
        axis = _axis(net, node, op) if number == 1 else None
        made.append(_dequantize(output, list(node.input[first : first + 3]), axis))
        inputs.append(output)
    bias = _BIAS.get(node.op_type)
    if bias is not None and len(node.input) > bias and node.input[bias]:
        inputs.append(_float_bias(graph, net, node, bias))
    extra = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute if entry.name not in _FOREIGN}
    quantized = len(node.input) > result and node.input[result]
    real = f"{node.name}/real" if quantized else node.output[0]
    made.append(helper.make_node(op, inputs, [real], node.name, **extra))
    if quantized:
        made.append(_quantize(node, real, list(node.input[result : result + 2])))
    return made


def _concat(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """QLinearConcat has its result's scale first, and any number of operands."""
    made, inputs = [], []
    for number, first in enumerate(range(2, len(node.input), 3)):
        inputs.append(f"{node.name}/operand_{number}")
        made.append(_dequantize(inputs[-1], list(node.input[first : first + 3]), None))
    real = f"{node.name}/real"
    made.append(helper.make_node("Concat", inputs, [real], node.name, axis=attribute(node, "axis", 1)))
    return [*made, _quantize(node, real, list(node.input[:2]))]


def _axis(net: Network, node: onnx.NodeProto, op: str) -> int | None:
    """Axis of a second operand's scales; None for one scale."""
    scale, dims = net.constant(node.input[4]), net.dims(node.input[3])
    if scale is None or scale.size == 1:
        return None
    if op == "Conv":
        return 0
    if op == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return len(dims) - 1 if dims is not None else 1


def _dequantize(output: str, operands: list[str], axis: int | None) -> onnx.NodeProto:
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    return helper.make_node("DequantizeLinear", operands, [output], f"{output}/DequantizeLinear", **attributes)


def _quantize(node: onnx.NodeProto, real: str, grid: list[str]) -> onnx.NodeProto:
    return helper.make_node("QuantizeLinear", [real, *grid], [node.output[0]], f"{node.name}/QuantizeLinear")


def _float_bias(graph: onnx.GraphProto, net: Network, node: onnx.NodeProto, place: int) -> str:
    """The int32 bias as float: its scale is that of the data times that of the weights."""
    codes, data, weight = (net.constant(node.input[i]) for i in (place, 1, 4))
    assert codes is not None and data is not None and weight is not None  # noqa: S101, PT018 - _why_not has looked
    scale = data.astype(np.float64).reshape(-1)[0] * weight.astype(np.float64)
    scale = scale.reshape(-1)[0] if scale.size == 1 else scale
    alpha = float(attribute(node, "alpha", 1.0)) if node.op_type == "QGemm" else 1.0
    return add_constant(graph, f"{node.name}/bias", np.asarray(codes * scale * alpha, np.float32))
