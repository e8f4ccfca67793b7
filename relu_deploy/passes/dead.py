"""Remove nodes whose results nobody reads, and optional outputs of the others."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import is_standard, pinned_names
from relu_deploy.report import PassReport


def remove_dead_nodes(graph: gs.Graph) -> PassReport:
    """Drop nodes that lead to no output of the network; its inputs and outputs stay.

    Of the nodes that stay, optional outputs that nobody reads go, from the last on: the indices of a MaxPool, which
    TensorRT does not compute, the mask of a Dropout, the last state of an LSTM.

    Args:
        graph: Edited in place.

    Returns:
        Changed: the nodes that were dropped, or lost an output.
    """
    before = [(id(node), node.name) for node in graph.nodes]
    graph.cleanup(remove_unused_graph_inputs=False)
    left = {id(node) for node in graph.nodes}
    gone = tuple(name for key, name in before if key not in left)
    pinned = pinned_names(graph)
    shorter = tuple(node.name for node in graph.nodes if _drop_outputs(node, graph.opset, pinned))
    return PassReport("remove_dead_nodes", gone + shorter)


def _drop_outputs(node: gs.Node, opset: int, pinned: set[str]) -> bool:
    """Take unread optional outputs off the end of a node; whether there were any."""
    count = len(node.outputs)
    # Whether a BatchNormalization trains is told, in older opsets, by the outputs that it has.
    if count < 2 or not is_standard(node, node.op) or node.op == "BatchNormalization":
        return False
    try:
        outputs = onnx.defs.get_schema(node.op, opset).outputs
    except onnx.defs.SchemaError:
        return False
    while len(node.outputs) > 1 and _is_unread_option(node, outputs, pinned):
        node.outputs.pop()
    return len(node.outputs) < count


def _is_unread_option(node: gs.Node, outputs: Sequence[onnx.defs.OpSchema.FormalParameter], pinned: set[str]) -> bool:
    place, tensor = len(node.outputs) - 1, node.outputs[-1]
    if place >= len(outputs) or outputs[place].option != onnx.defs.OpSchema.FormalParameterOption.Optional:
        return False
    return tensor.is_empty() or not (tensor.outputs or tensor.name in pinned)


def drop_detached(graph: gs.Graph) -> None:
    """Take out nodes that a pass has cut off from everything, so that the passes after it do not meet them.

    Their constants forget them all at once: one by one is quadratic for a constant that thousands of nodes share.
    """
    gone = {id(node): node for node in graph.nodes if not node.outputs}
    if not gone:
        return
    touched = {id(tensor): tensor for node in gone.values() for tensor in node.inputs}
    for tensor in touched.values():
        left = [reader for reader in tensor.outputs if id(reader) not in gone]
        list.__setitem__(tensor.outputs, slice(None), left)  # of list: graphsurgeon's own looks for each reader anew
    for node in gone.values():
        list.clear(node.inputs)
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
