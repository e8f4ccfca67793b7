"""What ONNX Runtime's optimiser made of a network, read from the graph that it wrote."""

from __future__ import annotations

from collections.abc import Container, Iterable

import onnx

from relu_deploy.engines.audit import UNKNOWN, Activation, Audit, LinearLayer, joined, part_of
from relu_deploy.engines.promise import ACTIVATIONS, Promises
from relu_deploy.graph import all_nodes, name_nodes

FLOAT_LINEAR = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv", "GemmFloat8",
    "TransposeMatMul", "FusedMatMulActivation", "Attention", "MultiHeadAttention", "LSTM", "GRU", "RNN",
})  # fmt: skip
INT8_LINEAR = frozenset({
    "QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "QAttention", "QLinearConvTranspose",
})  # fmt: skip
# Their output is float although they multiply integers.
FLOAT_OUTPUT = frozenset({"MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention"})
# Moves data or makes shapes, computes nothing: not an island by itself.
_FREE = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Shape", "Constant", "Slice", "Gather",
    "Cast", "Concat", "Split", "Expand", "Size", "ConstantOfShape", "Range",
})  # fmt: skip
_FLOATS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "fp32", onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.DOUBLE: "fp64",
    onnx.TensorProto.BFLOAT16: "bf16",
}  # fmt: skip


def audit_graph(optimised: onnx.ModelProto, source: onnx.ModelProto) -> Audit:
    """Audit an optimised graph.

    Args:
        optimised: What onnxruntime wrote; unnamed nodes are named, in place.
        source: What it was made from: its node names are those of the report, and its Q/DQ tell why a layer is float.
    """
    name_nodes(optimised.graph)
    nodes, types, promises = list(all_nodes(optimised.graph)), _types(optimised), Promises(source)
    names = set(promises.nodes)
    linear = tuple(_linear(node, types, promises) for node in nodes if node.op_type in FLOAT_LINEAR | INT8_LINEAR)
    return Audit(
        source="optimised graph",
        kernels=sum(node.op_type != "Constant" for node in nodes),
        linear=linear,
        activations=joined(found for node in nodes for found in _activations(node, names)),
        islands=_islands(list(optimised.graph.node), _whole_numbers(optimised)),
    )


def _linear(node: onnx.NodeProto, types: dict[str, str], promises: Promises) -> LinearLayer:
    """One linear layer of the optimised graph."""
    name, integer = _original(node.name, promises.nodes), node.op_type in INT8_LINEAR
    # Every operator here keeps the float type of its operands, so one typed tensor tells that of all.
    written = next((types[tensor] for tensor in (*node.output, *node.input) if tensor in types), UNKNOWN)
    precision = "int8" if integer else written
    if integer and node.op_type not in FLOAT_OUTPUT:
        written = "int32" if node.op_type in ("ConvInteger", "MatMulInteger") else "int8"
    activation = _attribute(node, "activation")
    return LinearLayer(
        name=name,
        precision=precision,
        output=written,
        kernel=f"{node.op_type} {node.name}",
        relu=activation == "Relu",
        bias=_has_bias(node),
        reason=None if integer else promises.why_float(name) or _why_not_fused(promises, name),
    )


def _why_not_fused(promises: Promises, name: str) -> str | None:
    """Why a layer with quantised operands stayed float: what lies between it and the next quantiser does not fuse."""
    node = promises.nodes.get(name)
    if node is None:
        return None
    readers = promises.readers(node)
    if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        node = readers[0]
        readers = promises.readers(node)
    kinds = sorted({reader.op_type for reader in readers})
    if not promises.outputs.isdisjoint(node.output):
        return "its output leaves the network without being quantised"
    if kinds == ["QuantizeLinear"]:
        return "onnxruntime fuses no int8 kernel here; it wants uint8 activations and a bias in int32"
    if len(kinds) == 1:
        return f"its output goes to {kinds[0]} in float, before any quantiser"
    return f"its output is read by several nodes ({', '.join(kinds)}), not by one quantiser alone" if kinds else None


def _activations(node: onnx.NodeProto, names: set[str]) -> Iterable[Activation]:
    """The activation that a node is, or holds inside."""
    if (part := part_of(node.name)) is not None:
        yield Activation(node.name, part[1], f"{node.op_type} {node.name}")
        return
    fused = _attribute(node, "activation")
    kind = ACTIVATIONS.get(node.op_type) or (ACTIVATIONS.get(fused, fused.lower()) if fused else None)
    if kind:
        yield Activation(_original(node.name, names), kind, f"{node.op_type} {node.name}")


def _islands(nodes: list[onnx.NodeProto], whole: set[str]) -> tuple[str, ...]:
    """Groups of float nodes that lie between quantised ones: with integers somewhere before and after them.

    Args:
        nodes: Of the main graph, sorted.
        whole: Tensors known to hold no floats: a MaxPool over codes is no island, nor is the arithmetic of shapes.
    """
    before, after = _reached(nodes, forward=True), _reached(nodes[::-1], forward=False)
    inside = [
        node
        for node in nodes
        if node.name in before & after and not _is_integer(node) and not whole.issuperset(filter(None, node.output))
    ]
    made_by = {output: node.name for node in inside for output in node.output}
    leader = {node.name: node.name for node in inside}

    def find(name: str) -> str:
        while leader[name] != name:
            leader[name] = name = leader[leader[name]]
        return name

    for node in inside:
        for tensor in node.input:
            if tensor in made_by:
                leader[find(made_by[tensor])] = find(node.name)
    islands: dict[str, list[str]] = {}
    for node in inside:
        if node.op_type not in _FREE:
            islands.setdefault(find(node.name), []).append(f"{node.op_type} {node.name}")
    return tuple(", ".join(members) for members in islands.values())


def _is_integer(node: onnx.NodeProto) -> bool:
    """Whether a node computes on codes, or converts from or to them."""
    return node.op_type in INT8_LINEAR or node.op_type.startswith("QLinear") or node.op_type in (
        "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
    )  # fmt: skip


def _reached(nodes: list[onnx.NodeProto], *, forward: bool) -> set[str]:
    """Names of nodes that integers lead to (forward), or that lead to integers (backward, nodes in reverse order)."""
    marked: set[str] = set()
    names: set[str] = set()
    for node in nodes:
        near, far = (node.input, node.output) if forward else (node.output, node.input)
        if any(tensor in marked for tensor in near):
            names.add(node.name)
            marked.update(far)
        elif _is_integer(node) and not (forward and node.op_type == "DequantizeLinear"):
            # A DequantizeLinear that nothing computes into is a weight, and starts nothing.
            marked.update(far)
    return names


def _original(name: str, names: Container[str]) -> str:
    """The name a node had before onnxruntime fused something into it, where that can be told."""
    if name in names:
        return name
    stem = name
    while "/" in stem:
        stem = stem.rpartition("/")[0]
        if stem in names:
            return stem
    stem = name.partition("_token_")[0]
    return stem if stem in names else name


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Type of each float tensor, as far as the graph says it."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    found = {value.name: _FLOATS.get(value.type.tensor_type.elem_type) for value in values}
    found.update({tensor.name: _FLOATS.get(tensor.data_type) for tensor in model.graph.initializer})
    return {name: kind for name, kind in found.items() if kind}


def _whole_numbers(model: onnx.ModelProto) -> set[str]:
    """Tensors whose type the graph tells and which is no float: codes, indices, shapes, masks."""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    return {v.name for v in values if v.type.tensor_type.elem_type not in (onnx.TensorProto.UNDEFINED, *_FLOATS)}


def _attribute(node: onnx.NodeProto, name: str) -> str:
    """A string attribute; empty when it is absent."""
    return next((attribute.s.decode() for attribute in node.attribute if attribute.name == name), "")


def _has_bias(node: onnx.NodeProto) -> bool | None:
    """Whether a bias is fused in; None for operators of which we do not know where it would be."""
    place = {"Conv": 2, "FusedConv": 2, "ConvTranspose": 2, "Gemm": 2, "FusedGemm": 2, "QLinearConv": 8, "QGemm": 6}
    if node.op_type in ("MatMul", "FusedMatMul", "QLinearMatMul", "MatMulInteger", "ConvInteger"):
        return False
    at = place.get(node.op_type)
    return None if at is None else len(node.input) > at and bool(node.input[at])
