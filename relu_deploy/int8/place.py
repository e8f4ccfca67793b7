"""Which tensors of a graph become INT8, and which layers therefore compute in integers.

Two rules, because two kinds of runtime read the result:

* ``ort``: ONNX Runtime fuses an operator into its integer kernel when *all* its inputs and its output carry Q/DQ:
  :mod:`relu_deploy.int8.place_ort`.
* ``tensorrt``, ``tensorrt-rtx``: the compiler moves and fuses by itself and wants Q/DQ in front of every quantised
  layer: :mod:`relu_deploy.int8.place_tensorrt`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.place_attention import with_attention
from relu_deploy.int8.place_ort import place_ort
from relu_deploy.int8.place_tensorrt import before_splits, place_tensorrt, quantised_behind, with_pooled
from relu_deploy.int8.placement import (
    LINEAR_OPS,
    MOVING_OPS,
    RECURRENT_OPS,
    STAND_IN,
    Layer,
    Placement,
    clip_bounds,
    fused_relu,
    is_clipping,
)

__all__ = (
    "LINEAR_OPS", "MOVING_OPS", "STAND_IN", "Layer", "Placement", "clip_bounds", "fused_relu", "is_clipping", "place",
    "quantised_behind", "with_attention", "with_pooled",
)  # fmt: skip

# TensorRT-RTX 1.7.1 reads a ConvTranspose with Q/DQ, then silently multiplies in float. Tried: SM 89 and 120; kernels
# of 1 to 4, strides 1 and 2, with and without groups; weights per channel and per tensor; float32 and float16. Part is
# in tests/engines/test_quantizer_engines.py. The data-centre library was not tried: it keeps its Q/DQ.
_FLOAT_CONV_TRANSPOSE: dict[str, str] = {
    "ort": "ONNX Runtime has no integer ConvTranspose",
    "tensorrt-rtx": "TensorRT-RTX 1.7 computes every ConvTranspose in float, also one with Q/DQ",
}


def place(
    graph: gs.Graph, measured: Iterable[str], number: NumberFormat, *, keep_float: Iterable[str] = (),
    half: Mapping[str, str] = MappingProxyType({}), splits: Iterable[str] = (),
) -> Placement:  # fmt: skip
    """Decide where INT8 goes.

    Args:
        graph: Sorted topologically, constants folded.
        measured: Names of the tensors that have a range.
        number: The target's format.
        keep_float: Names of linear layers that the user wants left alone.
        half: Layer -> why it is left in float16, from :mod:`relu_deploy.int8.cheaper`.
        splits: Names of the nodes that cut up what siblings, merged to one layer, give.
    """
    known, kept = set(measured), dict.fromkeys(keep_float, "kept in float on request") | dict(half)
    layers = tuple(_judge(node, known, kept, number) for node in graph.nodes if node.op in LINEAR_OPS)
    layers += tuple(_float_layers(graph))
    chosen = {layer.name for layer in layers if layer.int8}
    if number.unsigned:
        return place_ort(graph, known, chosen, layers)
    return before_splits(graph, place_tensorrt(graph, known, chosen, layers, number), set(splits), known)


def _judge(node: gs.Node, known: set[str], kept: Mapping[str, str], number: NumberFormat) -> Layer:
    reason = _why_float(node, known, number) or kept.get(node.name, "")
    return Layer(node.name, node.op, not reason, reason)


def _float_layers(graph: gs.Graph) -> Iterator[Layer]:
    """Layers that multiply and are never quantised: recurrent ones, and all inside If, Loop and Scan."""
    for node in graph.nodes:
        if node.op in RECURRENT_OPS:
            yield Layer(node.name, node.op, False, "a recurrent layer computes in float")
        for inner in node.subgraphs(recursive=True):
            for layer in inner.nodes:
                if layer.op in (*LINEAR_OPS, *RECURRENT_OPS):
                    yield Layer(layer.name, layer.op, False, f"it lies in a graph inside {node.op} {node.name}")


def _why_float(node: gs.Node, known: set[str], number: NumberFormat) -> str:
    """Reason why a linear layer cannot be quantised; empty when it can."""
    data, weight = node.inputs[0], node.inputs[1]
    if isinstance(data, gs.Constant):
        return "its left operand is the constant one"
    if not isinstance(weight, gs.Constant):
        return (
            "both operands are computed at run time" if node.op == "MatMul" else "its weights are computed at run time"
        )
    if weight.values.dtype not in (np.float32, np.float16):
        return f"its weights are {weight.values.dtype}"
    if number.unsigned and weight.values.dtype == np.float16:
        return "ONNX Runtime's integer kernels give float32, not float16: export the network in float32"
    if node.op == "ConvTranspose" and number.target in _FLOAT_CONV_TRANSPOSE:
        return _FLOAT_CONV_TRANSPOSE[number.target]
    if data.name not in known:
        return f"its input {data.name} has no range"
    if node.op == "Gemm" and number.unsigned and node.attrs.get("transA", 0):
        return "ONNX Runtime has no integer Gemm with transA"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op == "Gemm" and isinstance(bias, gs.Constant) and not _is_row(bias.values.shape, node):
        return "its addend differs from row to row, so it is no bias"
    if number.integer_bias and isinstance(bias, gs.Variable) and not bias.is_empty():
        return "its bias is computed at run time"
    return ""


def _is_row(shape: tuple[int, ...], gemm: gs.Node) -> bool:
    """Whether the third operand of a Gemm is one number, or one for each column."""
    columns = gemm.inputs[1].values.shape[0 if gemm.attrs.get("transB", 0) else 1]
    return shape in ((), (1,), (1, 1), (columns,), (1, columns))
