"""A float16 network in float32: ONNX Runtime's integer kernels give float32, and its processors compute no float16.

Every number is the one that it was; only sums are rounded less. Inputs and outputs keep their types.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from calib.model import all_nodes
from calib.ranges import Ranges

_HALF, _FLOAT = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
# Attributes that name the type of a result.
_TYPES = ("to", "dtype")


def widen(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, str]]:
    """Compute in float32 what is computed in float16.

    Args:
        model: Without local functions. Not changed.

    Returns:
        The network, with a Cast behind every float16 input and before every float16 output; and new tensor -> the one
        that has its values in ``model``.
    """
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    graph = wide.graph
    names = {name for node in all_nodes(graph) for name in (*node.input, *node.output)}
    names |= {tensor.name for tensor in graph.initializer}
    defaults = {tensor.name for tensor in graph.initializer}
    ends = [value for value in (*graph.input, *graph.output) if _is_half(value) and value.name not in defaults]
    _widen_graph(graph, keep={value.name for value in ends})
    inside = {name: _new(f"{name}/float32", names) for name in dict.fromkeys(value.name for value in ends)}
    _rename(graph, inside)
    inputs = [value.name for value in graph.input if value.name in inside]
    outputs = [value.name for value in graph.output if value.name in inside]
    before = [_cast(name, inside[name], _FLOAT) for name in inputs]
    after = [_cast(inside[name], name, _HALF) for name in outputs if name not in inputs]
    nodes = [*before, *graph.node, *after]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    return wide, {new: old for old, new in inside.items()}


def with_names(ranges: Ranges, names: Mapping[str, str]) -> Ranges:
    """Ranges in which new tensors have those of others; ``names`` is new -> old."""
    tensors = dict(ranges.tensors)
    tensors |= {new: ranges.tensors[old] for new, old in names.items() if old in ranges.tensors}
    return dataclasses.replace(ranges, tensors=tensors)


def _widen_graph(graph: onnx.GraphProto, *, keep: Iterable[str] = ()) -> None:
    """Types of everything in a graph and in those inside it, but for the inputs and outputs to keep."""
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for sparse in graph.sparse_initializer:
        _widen_tensor(sparse.values)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if _is_half(value) and value.name not in keep:
            value.type.tensor_type.elem_type = _FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i == _HALF and attribute.type == onnx.AttributeProto.INT:
                attribute.i = _FLOAT
            if attribute.type == onnx.AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                _widen_graph(inner)


def _widen_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type == _HALF:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Let nodes read and make other tensors, those in inner graphs too."""
    for node in all_nodes(graph):
        for part in (node.input, node.output):
            for at, name in enumerate(part):
                part[at] = names.get(name, name)
    for node in all_nodes(graph):
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                for value in inner.output:  # a branch may hand an outer tensor straight through
                    value.name = names.get(value.name, value.name)


def _is_half(value: onnx.ValueInfoProto) -> bool:
    return value.type.HasField("tensor_type") and value.type.tensor_type.elem_type == _HALF


def _cast(source: str, result: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [source], [result], name=f"{result}/Cast", to=to)


def _new(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
