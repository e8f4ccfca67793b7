"""Small edits of a model in place: constants, insertions, bypasses, and what nobody reads any more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from relu_deploy.graph import all_nodes


def add_constant(graph: onnx.GraphProto, base: str, values: npt.NDArray[Any]) -> str:
    """Store an array under a name of its own, which is returned: what others share is never changed."""
    taken = {tensor.name for tensor in graph.initializer}
    taken |= {name for node in all_nodes(graph) for name in (*node.input, *node.output)}
    name, number = base, 1
    while name in taken:
        name, number = f"{base}_{number}", number + 1
    graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), name))
    return name


def insert_before(graph: onnx.GraphProto, node: onnx.NodeProto, made: Iterable[onnx.NodeProto]) -> None:
    """Put nodes in front of one of the graph."""
    index = next(i for i, other in enumerate(graph.node) if other is node or other.name == node.name)
    for offset, new in enumerate(made):
        graph.node.insert(index + offset, new)


def replace_input(node: onnx.NodeProto, old: str, new: str) -> None:
    """Let a node read another tensor."""
    node.input[:] = [new if name == old else name for name in node.input]


def replace_readers(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Let every reader of a tensor read another; outputs of the graph keep their name."""
    for node in all_nodes(graph):
        if old in node.input:
            replace_input(node, old, new)


def set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    """Set, or with None remove, an attribute."""
    kept = [entry for entry in node.attribute if entry.name != name]
    del node.attribute[:]
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def drop_unread(model: onnx.ModelProto) -> None:
    """Remove nodes, constants and remarks on types that nothing reads, until there are none."""
    graph = model.graph
    while True:
        read = {name for node in all_nodes(graph) for name in node.input} | {value.name for value in graph.output}
        kept = [node for node in graph.node if any(name in read for name in node.output)]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    stored = [tensor for tensor in graph.initializer if tensor.name in read]
    if len(stored) < len(graph.initializer):
        kept_tensors = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in stored]
        del graph.initializer[:]
        graph.initializer.extend(kept_tensors)
    made = {name for node in all_nodes(graph) for name in node.output}
    remarks = [value for value in graph.value_info if value.name in made]
    del graph.value_info[:]
    graph.value_info.extend(remarks)


def forget_type(graph: onnx.GraphProto, tensor: str) -> None:
    """Drop the remark on a tensor's type, which is about to change."""
    remarks = [value for value in graph.value_info if value.name != tensor]
    del graph.value_info[:]
    graph.value_info.extend(remarks)


def pair(name: str, source: str, scale: str, zero_point: str, output: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """Q and DQ of one tensor."""
    return (
        helper.make_node("QuantizeLinear", [source, scale, zero_point], [f"{name}/codes"], f"{name}/QuantizeLinear"),
        helper.make_node(
            "DequantizeLinear", [f"{name}/codes", scale, zero_point], [output], f"{name}/DequantizeLinear"
        ),
    )


def dtype_of(codes: int) -> np.dtype[Any]:
    """The numpy type of integer codes of 8 or 16 bits."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(codes))
