"""Q/DQ rewritten into operators that compute on codes: QLinearConv, QLinearMatMul, QGemm, QLinearAdd, ...

A Q/DQ graph says what is computed and leaves it to the runtime to find the integers. Accelerators and older runtimes
want them written out. Each rule is that of ONNX Runtime's own Q/DQ transformer (``qdq_selectors.cc``,
``qdq_actions.cc``), so that both files give the same codes:

==============================  ===================================================================================
operator between DQ and Q       becomes
==============================  ===================================================================================
Conv, MatMul                    QLinearConv, QLinearMatMul (ONNX)
Gemm                            QGemm (com.microsoft), with float output where no quantiser follows
MatMul without a quantiser      MatMulIntegerToFloat (com.microsoft)
Add, Mul, Concat, AveragePool,  QLinear... (com.microsoft)
GlobalAveragePool, Sigmoid,
LeakyRelu, Softmax
Relu                            QLinearLeakyRelu with slope 0, where the quantiser does not clip as it does
MaxPool, Reshape, Transpose...  the same operator on codes, where scale and zero point are the same on both sides
==============================  ===================================================================================
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from relu_deploy import graph as files
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.lower_pools import counts_otherwise
from relu_deploy.int8.qoperator_edges import Operand, Quantised, has_codes, read_operand, read_result
from relu_deploy.report import PassReport, Skip

CONTRIB = "com.microsoft"
# Operators that compute nothing and have a kernel for bytes in ONNX Runtime 1.20 and later.
MOVING = (
    "MaxPool", "Resize", "Expand", "Flatten", "Gather", "GatherElements", "Reshape", "Slice", "Squeeze", "Tile",
    "Transpose", "Unsqueeze", "Split", "Identity",
)  # fmt: skip
_UNARY = ("AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu", "Softmax", "Relu")
_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))
# The version of Softmax whose axis means one axis; before it meant where the matrix begins.
_SOFTMAX_OPSET = 13


@dataclasses.dataclass(frozen=True)
class _Form:
    """What replaces a node: operator, its domain, and everything in its place."""

    op: str
    domain: str
    inputs: list[gs.Tensor]
    outputs: list[gs.Tensor]
    attrs: dict[str, Any]
    gone: tuple[gs.Node, ...]


def to_qoperator(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
    """Rewrite a Q/DQ network for ONNX Runtime's integer operators.

    Args:
        model: Q/DQ with uint8 or int8 activations, from :func:`relu_deploy.int8.run.quantize` or from elsewhere. Not
            changed.

    Returns:
        The network, with the same inputs and outputs and the same names for nodes and codes; and what became of each
        operator that stands at codes.

    Raises:
        QuantizationError: it has no Q/DQ.
    """
    graph = files.import_graph(model)
    graph.import_domains = list(model.opset_import)  # or graphsurgeon adds to the list of the model given
    if not any(node.op in ("QuantizeLinear", "DequantizeLinear") for node in graph.nodes):
        raise QuantizationError("the network has no Q/DQ to rewrite", hint="quantise it first")
    report = fuse_qdq(graph)
    written = files.export_graph(graph, model)
    if any(node.domain == CONTRIB for node in written.graph.node):
        _import_contrib(written)
    files.check_model(written, "the network of integer operators")
    return written, report


def fuse_qdq(graph: gs.Graph) -> PassReport:
    """Replace each operator between DQ and Q by the one that computes on codes.

    Args:
        graph: Nodes named and sorted. Edited in place; constants are shared with the new nodes, never changed.

    Returns:
        Changed: nodes that compute on codes now, under their names; notes hold what each became. Skipped: nodes that
        stay between Q/DQ, and why.
    """
    changed: dict[str, str] = {}
    skipped: list[Skip] = []
    outputs = frozenset(id(tensor) for tensor in graph.outputs)
    for node in list(graph.nodes):
        if not has_codes(node):
            continue
        form = _integer_form(node, outputs)
        if isinstance(form, str):
            skipped.append(Skip(node.name, form))
            continue
        changed[node.name] = form.op
        _replace(node, form)
    files.tidy(graph)
    return PassReport("fuse_qdq", tuple(changed), tuple(skipped), changed)


def _replace(node: gs.Node, form: _Form) -> None:
    """Put the integer operator where the node was; the quantisers behind it lose everything, and are tidied away."""
    for old in form.gone:
        old.inputs.clear()
        old.outputs.clear()
    node.op, node.domain, node.attrs = form.op, form.domain or None, form.attrs
    node.inputs, node.outputs = form.inputs, form.outputs


def _integer_form(node: gs.Node, outputs: frozenset[int]) -> _Form | str:
    """The operator on codes that computes the same, or why there is none."""
    if node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} has no integer form"
    if node.op in ("Conv", "Gemm", "MatMul"):
        return _linear(node, outputs)
    if node.op in MOVING:
        return _moving(node, outputs)
    if node.op not in (*_UNARY, "Add", "Mul", "Concat"):
        return f"{node.op} has no integer form"
    operands = _all_operands(node)
    result = read_result(node.outputs[0], outputs)
    if isinstance(operands, str) or isinstance(result, str):
        return operands if isinstance(operands, str) else str(result)
    everything = (*operands, result.operand)
    if any(operand.dtype != result.operand.dtype or operand.axis is not None for operand in everything):
        return "its inputs and its output differ in type, or have a scale for each channel"
    out = [result.operand.scale, result.operand.zero_point]
    given = [tensor for operand in operands for tensor in operand.inputs]
    inputs = [*out, *given] if node.op == "Concat" else [*given, *out]
    attrs = _attributes(node)
    if isinstance(attrs, str):
        return attrs
    op = "LeakyRelu" if node.op == "Relu" else node.op
    return _Form(f"QLinear{op}", CONTRIB, inputs, [result.operand.codes], attrs, result.nodes)


def _attributes(node: gs.Node) -> dict[str, Any] | str:
    """Attributes of the operator on codes, or why it has none that mean the same."""
    attrs = dict(node.attrs)
    if node.op == "Softmax":
        return {"axis": attrs.get("axis", -1), "opset": _SOFTMAX_OPSET}
    if node.op == "Relu":
        return {"alpha": 0.0}
    if node.op == "AveragePool" and any(step != 1 for step in attrs.pop("dilations", ())):
        return "the integer AveragePool has no dilations"
    if counts_otherwise(node):
        return "the integer AveragePool counts padding otherwise where its windows hang over"
    return attrs


def _all_operands(node: gs.Node) -> tuple[Operand, ...] | str:
    """Every input as bytes, or which one is not."""
    operands: list[Operand] = []
    for tensor in node.inputs:
        operand = read_operand(tensor)
        if operand is None or operand.dtype not in _BYTES:
            return f"its input {tensor.name} is not quantised to bytes"
        operands.append(operand)
    return tuple(operands)


def _moving(node: gs.Node, outputs: frozenset[int]) -> _Form | str:
    """An operator that moves values, on codes."""
    operand = read_operand(node.inputs[0])
    if operand is None or operand.dtype not in _BYTES:
        return f"its input {node.inputs[0].name} is not quantised to bytes"
    if node.op == "MaxPool" and len(node.outputs) > 1:
        return "MaxPool also gives indices"
    if node.op == "Resize" and node.attrs.get("mode", "nearest") != "nearest":
        return "Resize computes values between those it is given"
    results = [read_result(tensor, outputs) for tensor in node.outputs]
    codes: list[gs.Tensor] = []
    gone: list[gs.Node] = []
    for result in results:
        if isinstance(result, str):
            return result
        if len(result.nodes) > 1 or not result.operand.same_grid(operand):
            return "its input and its output have different scales"
        codes.append(result.operand.codes)
        gone += result.nodes
    return _Form(node.op, "", [operand.codes, *node.inputs[1:]], codes, dict(node.attrs), tuple(gone))


def _linear(node: gs.Node, outputs: frozenset[int]) -> _Form | str:
    """A layer of products, with int32 bias and, for Gemm and MatMul, float output where no quantiser reads it."""
    data, weight = read_operand(node.inputs[0]), read_operand(node.inputs[1])
    result = read_result(node.outputs[0], outputs)
    bias = _bias(node, data, weight)
    if reason := _why_not_linear(node, data, weight, result):
        return reason
    if isinstance(bias, str):
        return bias
    assert data is not None  # noqa: S101 - _why_not_linear has looked
    assert weight is not None  # noqa: S101
    out, written, gone = _written(node, result)
    addend = [] if bias is None else [bias]
    if node.op == "Conv":
        return _Form("QLinearConv", "", [*data.inputs, *weight.inputs, *out, *addend], written, dict(node.attrs), gone)
    if node.op == "Gemm":
        attrs = {name: value for name, value in node.attrs.items() if name != "beta"}
        third = addend or ([gs.Variable.empty()] if out else [])
        return _Form("QGemm", CONTRIB, [*data.inputs, *weight.inputs, *third, *out], written, attrs, gone)
    if out:
        return _Form("QLinearMatMul", "", [*data.inputs, *weight.inputs, *out], written, {}, gone)
    pairs = zip(data.inputs, weight.inputs, strict=True)
    return _Form("MatMulIntegerToFloat", CONTRIB, [tensor for pair in pairs for tensor in pair], written, {}, gone)


def _written(node: gs.Node, result: Quantised | str) -> tuple[list[gs.Tensor], list[gs.Tensor], tuple[gs.Node, ...]]:
    """Scale and zero point of the output, what is written, and the quantisers that are gone with it."""
    if isinstance(result, str):
        return [], list(node.outputs), ()
    return [result.operand.scale, result.operand.zero_point], [result.operand.codes], result.nodes


def _why_not_linear(node: gs.Node, data: Operand | None, weight: Operand | None, result: Quantised | str) -> str:
    """Why a layer stays float; empty where it does not."""
    if data is None or weight is None:
        return f"its input {node.inputs[0 if data is None else 1].name} is not quantised"
    if data.axis is not None:
        return "its input has a scale for each channel"
    if data.dtype not in _BYTES or weight.dtype not in _BYTES or (data.dtype == np.int8 and weight.dtype != np.int8):
        return f"no integer kernel multiplies {data.dtype} by {weight.dtype}"
    if isinstance(result, str) and (node.op == "Conv" or _is_quantised_too(node)):
        return result
    if isinstance(result, Quantised) and (result.operand.dtype != data.dtype or result.operand.axis is not None):
        return "its input and its output differ in type, or have a scale for each channel"
    if node.op == "Gemm" and (node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1):
        return "its left operand is transposed, or its product scaled"
    if weight.axis is not None and not _is_output_axis(node, weight):
        return "its weights have scales along an axis that is not that of its output channels"
    return ""


def _is_quantised_too(node: gs.Node) -> bool:
    """Whether a quantiser reads a result that others read as floats: it would be computed from two roundings."""
    return any(reader.op == "QuantizeLinear" for reader in node.outputs[0].outputs)


def _is_output_axis(node: gs.Node, weight: Operand) -> bool:
    """Whether the scales of weights are those of the layer's output channels."""
    if weight.codes.shape is None or weight.axis is None:
        return False
    axis = weight.axis % len(weight.codes.shape)
    if node.op == "Conv":
        return axis == 0
    return len(weight.codes.shape) == 2 and axis == (0 if node.op == "Gemm" and node.attrs.get("transB", 0) else 1)


def _bias(node: gs.Node, data: Operand | None, weight: Operand | None) -> gs.Tensor | str | None:
    """The int32 bias of a layer, None without one; or why it is none that an integer kernel adds."""
    third = node.inputs[2] if len(node.inputs) > 2 else None
    if third is None or (isinstance(third, gs.Variable) and third.is_empty()):
        return None
    bias = read_operand(third)
    if bias is None or bias.dtype != np.int32 or data is None or weight is None:
        return "its bias is not quantised to int32"
    if node.attrs.get("beta", 1.0) != 1:
        return "its bias has a factor"
    wanted = data.scale.values.astype(np.float64) * weight.scale.values
    # The product of two float32 numbers, rounded to one: half a unit in the last place, and a float's own spacing.
    if np.any(bias.zero_point.values) or not np.allclose(bias.scale.values, wanted, rtol=2**-22, atol=0):
        return "its bias has another scale than the products it is added to"
    if bias.codes.shape is not None and len(bias.codes.shape) != 1:
        return "its bias is no vector"
    return bias.codes


def _import_contrib(model: onnx.ModelProto) -> None:
    """Say that the file uses ONNX Runtime's own operators, once."""
    if all(entry.domain != CONTRIB for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
