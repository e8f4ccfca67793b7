"""What any part may ask of a whole ONNX model: its operators, its size, and whether it is quantised already."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import external_data_helper

# A protobuf message cannot be longer; what is larger keeps its weights in external data.
PROTOBUF_LIMIT = (1 << 31) - 1
# Left for what a message holds besides tensors: nodes, names, shapes. Ten thousand nodes take about 2 MiB.
_ROOM = 1 << 24
STANDARD_DOMAINS = ("", "ai.onnx")
# Integer arithmetic and its boundaries, onnx's own and ONNX Runtime's: QLinearConv, QGemm, MatMulIntegerToFloat, ...
# Operators with packed weights and float activations (MatMulNBits) are not among them: they still have float ranges.
_QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantize", "ConvInteger", "MatMulInteger", "QLinear", "QAttention",
    "QGemm",
)  # fmt: skip


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its attributes (If, Loop, Scan)."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            inner: Iterable[onnx.GraphProto] = (
                [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
            )
            for subgraph in inner:
                yield from all_nodes(subgraph)


def empty_like(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model without nodes, weights, inputs and outputs, in which those of another mean what they mean there."""
    empty = onnx.ModelProto(ir_version=model.ir_version)
    empty.opset_import.extend(model.opset_import)
    empty.functions.extend(model.functions)
    empty.graph.name = model.graph.name
    return empty


def is_constant(node: onnx.NodeProto) -> bool:
    """Whether a node gives a tensor that is written in it."""
    return node.op_type == "Constant" and node.attribute[0].name == "value"


def opset(model: onnx.ModelProto) -> int:
    """Version of the default operator set; 0 when the model imports none."""
    return max((entry.version for entry in model.opset_import if entry.domain in STANDARD_DOMAINS), default=0)


def first_quantized(model: onnx.ModelProto) -> onnx.NodeProto | None:
    """The first node, also inside If, Loop and Scan, that makes, takes or computes with integer codes; None without.

    >>> text = '<ir_version: 8, opset_import: ["": 17]> g (float[2] x, float s) => (int8[2] q) <int8 z = {0}>'
    >>> first_quantized(onnx.parser.parse_model(text + "{ y = Relu(x) q = QuantizeLinear(y, s, z) }")).op_type
    'QuantizeLinear'
    """
    return next((node for node in all_nodes(model.graph) if node.op_type.startswith(_QUANTIZED)), None)


def tensor_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all tensors; a lower bound of the file size that does not serialise anything."""
    return sum(
        len(t.raw_data) or t.ByteSize()
        for t in external_data_helper._get_all_tensors(model)  # noqa: SLF001
    )


def fits_one_message(model: onnx.ModelProto) -> bool:
    """Whether a model can be serialised as one protobuf message.

    Told by its tensors, because ``ModelProto.ByteSize`` raises where the answer is no.
    """
    return tensor_bytes(model) < PROTOBUF_LIMIT - _ROOM
