"""Remove nodes whose result exists already, alone or because they undo the node before them.

Which those are, :mod:`relu_deploy.passes.noops` knows; here also Dropout at inference, ``x + 0.0`` where nobody can see
the sign of a zero, and two Reshapes or Transposes in a row, of which one does.
"""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import (
    RefusedError,
    array_values,
    detach,
    given,
    int_values,
    is_standard,
    pinned_names,
    producer_of,
    redirect,
    set_input,
)
from relu_deploy.passes.noops import RESHAPES, RULES, adds_positive_zero, cast_target, permutation
from relu_deploy.report import PassReport, Skip

# They tell -0.0 from 0.0: one over it is another infinity, and so may be a power; text shows the sign.
_SEES_SIGN = ("Reciprocal", "If", "Loop", "Scan", "SequenceMap", "BitCast")


def remove_identities(graph: gs.Graph) -> PassReport:
    """Connect the readers of such a node to the tensor that is equal to its result.

    Args:
        graph: Sorted topologically; types and shapes known where they can be. Edited in place.

    Returns:
        Changed: the nodes that were bypassed or joined with the one before. Skipped: those that have to stay.
    """
    signs = _Signs(graph)
    changed: dict[str, None] = {}
    pinned, outputs = pinned_names(graph), {tensor.name for tensor in graph.outputs}
    while True:  # a node that is gone may leave the one before it a single reader
        found, skipped = _once(graph, signs, pinned, outputs)
        changed |= dict.fromkeys(found)
        drop_detached(graph)
        if not found:
            return PassReport("remove_identities", tuple(changed), tuple(skipped))


def _once(graph: gs.Graph, signs: _Signs, pinned: set[str], outputs: set[str]) -> tuple[list[str], list[Skip]]:
    changed: list[str] = []
    skipped: list[Skip] = []
    for node in graph.nodes:
        if not node.outputs or not is_standard(node, node.op):
            continue
        joined = False
        while _join(node, pinned):
            joined = True
        try:
            source = _source(node, signs)
            if source is not None:
                _bypass(node, source, pinned, outputs)
        except RefusedError as error:
            skipped.append(Skip(node.name, str(error)))
            source = None
        changed.extend([node.name] if joined or source is not None else [])
    return changed, skipped


def _source(node: gs.Node, signs: _Signs) -> gs.Tensor | None:
    """The tensor that a node hands on; None where it makes something new."""
    if node.op == "Dropout":
        return _dropout(node)
    rule = RULES.get(node.op)
    source = rule(node) if rule is not None else None
    if source is not None or node.op not in ("Add", "Sub"):
        return source
    source = adds_positive_zero(node)
    if source is not None and signs.seen(node.outputs[0]):
        raise RefusedError("it turns -0.0 into 0.0, which a division or a foreign operator behind it may tell apart")
    return source


def _dropout(node: gs.Node) -> gs.Tensor | None:
    if any(tensor.outputs for tensor in node.outputs[1:]):
        raise RefusedError("its mask is used")
    if (training := given(node, 2)) is not None:
        values = array_values(training)
        if values is None or values.any():
            raise RefusedError("Dropout is, or may be, in training mode")
    return node.inputs[0]


def _join(node: gs.Node, pinned: set[str]) -> bool:
    """Let a Reshape or Transpose do what the one before it does too, which nobody else needs; whether it was done."""
    before = producer_of(node.inputs[0]) if is_standard(node, "Reshape", "Transpose") else None
    if before is None or len(node.inputs[0].outputs) != 1 or node.inputs[0].name in pinned:
        return False
    if node.op == "Transpose":
        order, first = permutation(node), permutation(before) if is_standard(before, "Transpose") else None
        if order is None or first is None or len(order) != len(first):
            return False
        order = [first[axis] for axis in order]
        is_identity = order == sorted(order)  # of an output of the network; any other was bypassed
        node.op, node.attrs = ("Identity", {}) if is_identity else ("Transpose", {"perm": order})
    else:
        target = int_values(node, "shape", 1)
        copies = target is None or (0 in target and not node.attrs.get("allowzero", 0))  # of the shape in between
        if copies or not is_standard(before, *RESHAPES):
            return False
    set_input(node, 0, before.inputs[0])
    detach(before)
    return True


def _bypass(node: gs.Node, source: gs.Tensor, pinned: set[str], outputs: set[str]) -> None:
    """Send readers past a node; a network output keeps its name by being made by the producer of ``source``."""
    target = node.outputs[0]
    if any(tensor.outputs or tensor.name in pinned for tensor in node.outputs[1:] if not tensor.is_empty()):
        raise RefusedError("another of its outputs is used")
    inner = pinned - outputs
    if target.name in inner or source.name in inner:
        raise RefusedError("a subgraph hands its tensor on as an output")
    if target.name not in outputs:
        detach(node)
        redirect(target, source)
        return
    producer = producer_of(source)
    if producer is None or producer.op == "Constant" or source.name in outputs:
        raise RefusedError("it gives an output of the network the name it must have")
    detach(node)
    place = next(i for i, tensor in enumerate(producer.outputs) if tensor is source)
    producer.outputs[place] = target
    redirect(source, target)


class _Signs:
    """Which nodes lead, through whatever others, to one that tells the two zeros apart. Looked for when first asked."""

    def __init__(self, graph: gs.Graph) -> None:
        self._graph = graph
        self._blind: set[int] | None = None

    def seen(self, tensor: gs.Tensor) -> bool:
        """Whether the sign of a zero can be seen, but for the sign of zeros in outputs of the network."""
        if self._blind is None:
            self._blind = set()
            for node in reversed([node for node in self._graph.nodes if node.outputs]):  # others are cut off already
                if not _sees_sign(node) and not any(self._reaches(output) for output in node.outputs):
                    self._blind.add(id(node))
        return self._reaches(tensor)

    def _reaches(self, tensor: gs.Tensor) -> bool:
        """Nodes inside subgraphs were not looked at: they may see it."""
        return any(id(reader) not in (self._blind or ()) for reader in tensor.outputs)


def _sees_sign(node: gs.Node) -> bool:
    if not is_standard(node, node.op) or node.op in _SEES_SIGN:
        return True
    if node.op == "Cast":
        return cast_target(node) == onnx.TensorProto.STRING
    if node.op in ("Div", "Pow"):
        right = array_values(node.inputs[1])
        return right is None or (node.op == "Pow" and bool((right < 0).any()))
    return False
