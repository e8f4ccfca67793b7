"""Merge convolutions of one tensor into one: their input is read once, and there are fewer kernels.

``relu(conv(x, w1)), relu(conv(x, w2))`` is ``split(relu(conv(x, [w1; w2])))``: each output channel is computed as
before. The branches of a cross-stage partial block and the heads of a detector are such siblings. TensorRT-RTX 1.7
does not merge INT8 ones by itself; docs/placement.md has what it saves.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.granularity import MOST_NOISE, shared_noise, shares_scale
from relu_deploy.report import PassReport, Skip

# What stands behind the last layers of a detector; the compiler makes one kernel of all of it.
_PLAIN = ("Concat", "Sigmoid", "Reshape", "Transpose", "Flatten")


def merge_siblings(
    graph: gs.Graph,
    bounds: MutableMapping[str, tuple[float, float]],
    *,
    skip: Iterable[str] = (),
    number: NumberFormat | None = None,
) -> PassReport:
    """Merge convolutions that read the same tensor in the same way, and their ReLU where each has one.

    Args:
        graph: Edited in place. The tensors that they and their ReLU wrote keep their names.
        bounds: Tensor name -> smallest and largest value measured; what is new is added.
        skip: Names of convolutions to leave alone.
        number: The target's format: siblings that would share a weight scale stay apart where that costs accuracy.

    Returns:
        ``changed``: the new nodes that cut up what a merged convolution gives.
    """
    left = set(skip)
    changed: list[str] = []
    skipped: list[Skip] = []
    for group in sibling_groups(graph, left):
        reason = _why_not(group, bounds, number)
        if reason:
            skipped += [Skip(node.name, reason) for node in group]
        else:
            changed.append(_merge(graph, bounds, group))
    return PassReport("merge_siblings", tuple(changed), tuple(skipped))


def sibling_groups(graph: gs.Graph, skip: Iterable[str]) -> list[list[gs.Node]]:
    """Convolutions of one input that differ in weights and number of output channels only; groups of two and more."""
    left = set(skip)
    groups: dict[object, list[gs.Node]] = {}
    for node in graph.nodes:
        if node.op == "Conv" and node.name not in left and node.attrs.get("group", 1) == 1 and _constant(node):
            key = (id(node.inputs[0]), node.inputs[1].values.shape[1:], str(node.inputs[1].dtype), _attributes(node))
            groups.setdefault(key, []).append(node)
    return [group for group in groups.values() if len(group) > 1 and _alike(group, graph)]


def _alike(group: list[gs.Node], graph: gs.Graph) -> bool:
    """Whether what follows can be merged as well: a ReLU behind each, or no activation behind any.

    With another activation behind, each would read its part of a float tensor by a kernel of its own: more bytes.
    """
    if all(_relu(node, graph) is not None for node in group):
        return True
    return all(len(n.outputs[0].outputs) == 1 and n.outputs[0].outputs[0].op in _PLAIN for n in group)


def _constant(node: gs.Node) -> bool:
    """Whether weights and bias are stored."""
    return all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:])


def _attributes(node: gs.Node) -> str:
    return str(sorted((name, str(value)) for name, value in node.attrs.items()))


def _why_not(
    group: list[gs.Node], bounds: MutableMapping[str, tuple[float, float]], number: NumberFormat | None
) -> str:
    """Why a group is left as it is; empty where it can be merged."""
    if any(node.outputs[0].name not in bounds for node in group):
        return "the range of a sibling's output is not known"
    if number is not None and number.weight_granularity == "auto" and all(shares_scale(n, number) for n in group):
        together = np.concatenate([node.inputs[1].values for node in group])
        if shared_noise(together, number.weight_max) > MOST_NOISE:
            return "one weight scale for all siblings would be too coarse for some of them"
    return ""


def _relu(node: gs.Node, graph: gs.Graph) -> gs.Node | None:
    """The ReLU that alone reads what a convolution writes."""
    output = node.outputs[0]
    if len(output.outputs) != 1 or output.outputs[0].op != "Relu" or any(output is out for out in graph.outputs):
        return None
    return output.outputs[0]


def _merge(graph: gs.Graph, bounds: MutableMapping[str, tuple[float, float]], group: list[gs.Node]) -> str:
    """Replace a group by one convolution, one ReLU and a Split, whose name is returned."""
    name = "+".join(node.name for node in group)
    first = group[0]
    relus = [_relu(node, graph) for node in group]
    together = all(relu is not None and relu.outputs[0].name in bounds for relu in relus)
    ends = [relu.outputs[0] for relu in relus if relu is not None] if together else [n.outputs[0] for n in group]
    sizes = [int(node.inputs[1].values.shape[0]) for node in group]
    inputs = [first.inputs[0], gs.Constant(f"{name}/weight", np.concatenate([n.inputs[1].values for n in group]))]
    if any(len(node.inputs) > 2 for node in group):
        inputs.append(gs.Constant(f"{name}/bias", np.concatenate([_bias(node) for node in group])))
    whole = _new(f"{name}/output", ends[0], sum(sizes))
    bounds[whole.name] = _union(bounds, [node.outputs[0] for node in group])
    graph.nodes.append(gs.Node("Conv", name, dict(first.attrs), inputs, [whole]))
    if together:
        positive = _new(f"{name}/relu", ends[0], sum(sizes))
        bounds[positive.name] = _union(bounds, ends)
        graph.nodes.append(gs.Node("Relu", f"{name}/Relu", {}, [whole], [positive]))
        whole = positive
    for node in (*group, *(relu for relu in relus if relu is not None and together)):
        node.inputs, node.outputs = [], []
    parts = gs.Constant(f"{name}/sizes", np.array(sizes, np.int64))
    graph.nodes.append(gs.Node("Split", f"{name}/Split", {"axis": 1}, [whole, parts], ends))
    return f"{name}/Split"


def _bias(node: gs.Node) -> Any:
    weight = node.inputs[1].values
    return node.inputs[2].values if len(node.inputs) > 2 else np.zeros(weight.shape[0], weight.dtype)


def _new(name: str, like: gs.Variable, channels: int) -> gs.Variable:
    """A tensor of as many channels, else like another."""
    shape = None if like.shape is None else [like.shape[0], channels, *like.shape[2:]]
    return gs.Variable(name, like.dtype, shape)


def _union(bounds: MutableMapping[str, tuple[float, float]], tensors: list[gs.Variable]) -> tuple[float, float]:
    found = [bounds[tensor.name] for tensor in tensors]
    return min(low for low, _ in found), max(high for _, high in found)
