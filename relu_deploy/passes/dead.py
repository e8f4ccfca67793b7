"""Remove nodes whose results nobody reads."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from relu_deploy.report import PassReport


def remove_dead_nodes(graph: gs.Graph) -> PassReport:
    """Drop nodes that lead to no output of the network; its inputs and outputs stay.

    Args:
        graph: Edited in place.

    Returns:
        Changed: the nodes that were dropped.
    """
    before = [(id(node), node.name) for node in graph.nodes]
    graph.cleanup(remove_unused_graph_inputs=False)
    left = {id(node) for node in graph.nodes}
    return PassReport("remove_dead_nodes", tuple(name for key, name in before if key not in left))


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
