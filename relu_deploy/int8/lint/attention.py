"""A product that gives the queries, keys and values of attention in one."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from relu_deploy.int8.granularity import CUTTING, SCALED
from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import Network, is_quantizer
from relu_deploy.int8.placement import MOVING_OPS
from relu_deploy.targets import Target


def cut_for_attention(net: Network, target: Target) -> Iterator[Finding]:
    """``cut-for-attention``: such a product with a scale for each output channel; with one scale it is int8."""
    if target == "ort":
        return
    for layer in net.layers:
        if layer.node.op_type not in ("MatMul", "Gemm") or layer.data is None or layer.weight is None:
            continue
        if layer.weight.per_channel and _is_cut(net, layer.node):
            yield Finding(
                "cut-for-attention", layer.node.name, "float",
                like_rtx(target, f"{layer.node.op_type} is cut into queries, keys and values, which run in float"),
                "one weight scale for the layer, or a layer for each of the three",
            )  # fmt: skip


def _is_cut(net: Network, product: onnx.NodeProto) -> bool:
    """Whether parts of what a product gives meet in a product of two computed tensors; see granularity.py."""
    waiting, seen = [(product.output[0], False)], set()
    while waiting:
        tensor, cut = waiting.pop()
        for reader in net.readers(tensor):
            stored = any(net.is_constant(name) or net.dequantizer(name) for name in reader.input if name != tensor)
            if cut and reader.op_type in ("MatMul", "Einsum") and not stored:
                return True
            codes = any(is_quantizer(reader, op) for op in ("QuantizeLinear", "DequantizeLinear"))
            moves = reader.op_type in MOVING_OPS and reader.input[0] == tensor
            if (codes or moves or (reader.op_type in SCALED and stored)) and (reader.name, cut) not in seen:
                seen.add((reader.name, cut))
                waiting += [(output, cut or reader.op_type in CUTTING) for output in reader.output]
    return False
