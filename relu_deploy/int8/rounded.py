"""A draft computed as its INT8 file will be, in float: what a quantiser stands on is rounded, and weights are codes.

Weights and biases are initializers of known names, so that a caller can change them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from relu_deploy import graph as files
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.formats import QParams
from relu_deploy.int8.settle import settled
from relu_deploy.int8.store import Stored, bias_place, store
from relu_deploy.int8.write import activation_grids
from relu_deploy.passes.edit import set_input


def rounded_model(draft: Draft, source: gs.Graph, weights: Mapping[str, Stored]) -> onnx.ModelProto:
    """The network with every rounding in it.

    Args:
        draft: Not changed.
        source: The graph of the draft, or one that computes more or less of it. Not changed.
        weights: Of every INT8 layer.
    """
    graph = source.copy()
    nodes = {node.name: node for node in graph.nodes}
    for tensor, grid, ends in rounded_tensors(draft, graph):
        rounded = round_tensor(graph, tensor, grid)
        for node in ends:
            node.inputs = [rounded if operand is tensor else operand for operand in node.inputs]
    for name, stored in weights.items():
        if name not in nodes:
            continue
        node = nodes[name]
        dtype = node.inputs[1].values.dtype
        set_input(node, 1, gs.Constant(weight_name(name), stored.weight.astype(dtype)))
        if stored.bias is not None and (place := bias_place(node)) is not None:
            set_input(*place, gs.Constant(bias_name(name), np.ascontiguousarray(stored.bias.astype(dtype))))
            node.attrs.pop("beta", None)
        node.attrs.pop("alpha", None)
    graph.toposort()
    return files.export_graph(graph, draft.source)


def rounded_tensors(draft: Draft, graph: gs.Graph) -> Iterator[tuple[gs.Variable, QParams, list[gs.Node]]]:
    """Every tensor of a graph that a quantiser will stand on, its grid, and the nodes that read what is rounded.

    Args:
        draft: Says which.
        graph: Its graph, or a copy that computes more or less of it.
    """
    tensors = graph.tensors()
    for name, grid in activation_grids(draft.placement, draft.bounds, draft.number).items():
        if name in tensors:
            tensor, readers = tensors[name], draft.placement.uses[name]
            yield tensor, grid, [node for node in tensor.outputs if readers is None or node.name in readers]


def round_tensor(graph: gs.Graph, tensor: gs.Variable, grid: QParams) -> gs.Variable:
    """Append Q/DQ of a tensor to a graph; returns the rounded one."""
    name = tensor.name
    scale = gs.Constant(f"{name}/s", np.asarray(grid.scale, tensor.dtype or np.float32))
    zero = gs.Constant(f"{name}/z", np.asarray(grid.zero_point, grid.dtype))
    codes = gs.Variable(f"{name}/q", dtype=np.dtype(grid.dtype))
    rounded = gs.Variable(f"{name}/d", dtype=tensor.dtype)
    graph.nodes.append(gs.Node("QuantizeLinear", f"{name}/Q", inputs=[tensor, scale, zero], outputs=[codes]))
    graph.nodes.append(gs.Node("DequantizeLinear", f"{name}/D", inputs=[codes, scale, zero], outputs=[rounded]))
    return rounded


def nearest(draft: Draft) -> dict[str, Stored]:
    """Weights of every INT8 layer, each code the nearest."""
    grids = activation_grids(draft.placement, draft.bounds, draft.number)
    nodes = {node.name: node for node in draft.graph.nodes}
    found = {}
    for name in sorted(draft.placement.chosen):
        grid = grids.get(nodes[name].inputs[0].name)
        stored = store(nodes[name], draft.number, 1.0 if grid is None else grid.scale)
        found[name] = settled(nodes[name], stored, draft.centres.get(name))
    return found


def weight_name(layer: str) -> str:
    """Initializer that holds the weights of a layer."""
    return f"{layer}/weight/rounded"


def bias_name(layer: str) -> str:
    """Initializer that holds its bias."""
    return f"{layer}/bias/rounded"
