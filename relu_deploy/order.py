"""Nodes in an order in which they can be computed, as ONNX asks for and some converters do not keep to."""

from __future__ import annotations

import heapq

import onnx

from calib.graph import uses


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put each node behind those whose results it reads, in place; the graphs inside it too.

    Runtimes sort by themselves, so that files out of order go about (onnxruntime's own float16 converter writes them).
    Nodes that need not move keep their order. Where results depend on themselves nothing is changed: the checker says
    so.
    """
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs:
                sort_nodes(inner)
    makers = {name: at for at, node in enumerate(graph.node) for name in node.output if name}
    needs = [{makers[name] for name in uses(node) if name in makers} for node in graph.node]
    if all(max(need, default=-1) < at for at, need in enumerate(needs)):
        return
    readers: dict[int, list[int]] = {}
    for at, need in enumerate(needs):
        for maker in need:
            readers.setdefault(maker, []).append(at)
    missing = [len(need) for need in needs]
    ready = [at for at, count in enumerate(missing) if not count]
    order: list[int] = []
    while ready:
        order.append(heapq.heappop(ready))
        for reader in readers.get(order[-1], ()):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, reader)
    if len(order) == len(needs):
        sorted_nodes = [onnx.NodeProto.FromString(graph.node[at].SerializeToString()) for at in order]
        del graph.node[:]
        graph.node.extend(sorted_nodes)
