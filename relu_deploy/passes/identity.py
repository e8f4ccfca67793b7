"""Remove nodes that hand their input on: Identity, Dropout at inference, Cast to the type that is already there."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.region import constant_values, onnx_type
from relu_deploy.report import PassReport, Skip


def remove_identities(graph: gs.Graph) -> PassReport:
    """Connect the readers of such a node to its input.

    Args:
        graph: Types known where they can be. Edited in place; the nodes are left for ``cleanup``.

    Returns:
        Changed: the nodes that were bypassed. Skipped: those that have to stay.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    outputs = {id(tensor) for tensor in graph.outputs}
    inner_outputs = {id(tensor) for inner in graph.subgraphs(recursive=True) for tensor in inner.outputs}
    for node in graph.nodes:
        if node.op not in ("Identity", "Dropout", "Cast") or node.domain not in (None, "", "ai.onnx"):
            continue
        reason = _not_an_identity(node)
        source, target = node.inputs[0], node.outputs[0]
        if reason is None and (id(target) in inner_outputs or id(source) in inner_outputs):
            reason = "a subgraph hands its tensor on as an output"
        elif reason is None and id(target) in outputs and not _can_take_over(source, outputs):
            reason = "it gives an output of the network the name it must have"
        if reason:
            skipped.extend([Skip(node.name, reason)] if reason != _CASTS else [])
            continue
        _bypass(node, source, target, is_output=id(target) in outputs)
        changed.append(node.name)
    drop_detached(graph)
    return PassReport("remove_identities", tuple(changed), tuple(skipped))


_CASTS = "it changes the type"


def _not_an_identity(node: gs.Node) -> str | None:
    """Why a node is no identity; None where it is one."""
    if node.op == "Cast":
        to = node.attrs.get("to", 0)
        target = to if isinstance(to, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(to))
        return None if onnx_type(node.inputs[0]) == target else _CASTS
    if node.op == "Dropout":
        if any(tensor.outputs for tensor in node.outputs[1:]):
            return "its mask is used"
        if len(node.inputs) > 2 and not node.inputs[2].is_empty():
            training = constant_values(node.inputs[2])
            if training is None or training.any():
                return "Dropout is, or may be, in training mode"
    return None


def _can_take_over(source: gs.Tensor, outputs: set[int]) -> bool:
    """Whether the producer of ``source`` may make an output of the network directly."""
    return len(source.inputs) == 1 and source.inputs[0].op != "Constant" and id(source) not in outputs


def _bypass(node: gs.Node, source: gs.Tensor, target: gs.Tensor, *, is_output: bool) -> None:
    """Send readers past the node; a network output keeps its name by being made by the producer of ``source``."""
    node.inputs.clear()
    node.outputs.clear()
    old, new = (source, target) if is_output else (target, source)
    if is_output:
        producer = source.inputs[0]
        producer.outputs[next(i for i, tensor in enumerate(producer.outputs) if tensor is source)] = target
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new
