"""Find what is a function of one tensor: a forest in which ancestors are the tensors that one depends on alone.

Every elementwise node's output hangs below the lowest tensor that all its live inputs depend on; where there is none
(a gate with two live inputs) it starts a tree of its own. The ancestors of a tensor are thus its cut tensors, so that
in ``2 x + 1 -> blend -> 3 *`` the blend is found between two cuts. Jump pointers keep the common ancestor
logarithmic, and the whole linear in the size of the graph up to that logarithm.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from relu_deploy.passes.assemble import Assembly
from relu_deploy.passes.lower import LOWERINGS, UnsupportedError
from relu_deploy.passes.operands import (
    STANDARD,
    constant_values,
    is_constant,
    onnx_type,
    serves_tables,
    varies_along_one_axis,
)
from relu_deploy.passes.program import Program
from relu_deploy.passes.reads import live_inputs
from relu_deploy.passes.spread import spread_sum
from relu_deploy.passes.tables import reads_table

__all__ = [
    "MAX_NODES", "Cut", "Forest", "constant_values", "find_regions", "nodes_between", "onnx_type", "program_between",
]  # fmt: skip

# An activation has under twenty nodes, a learned one of N intervals spelled out 4 N.
MAX_NODES = 2048


@dataclasses.dataclass(eq=False)
class Cut:
    """A tensor in the forest.

    Attributes:
        tensor: The tensor.
        node: Its producer; None for the root of a tree that no elementwise node makes.
        parent: The lowest tensor it is a function of; None for a root.
        depth: Distance from the root.
        jump: An ancestor further up, for quick search.
        gate: Whether its node joins two live inputs that depend on no common tensor.
    """

    tensor: gs.Tensor
    node: gs.Node | None
    parent: Cut | None
    depth: int
    jump: Cut | None
    gate: bool = False


@dataclasses.dataclass
class Forest:
    """All cuts by ``id`` of their tensor, and those that a function is needed for, sinks first.

    Attributes:
        cuts: ``id(tensor)`` to its place.
        exits: Cuts whose tensor leaves its tree: read by another kind of node, or an output of the graph.
    """

    cuts: dict[int, Cut]
    exits: list[Cut]


def find_regions(graph: gs.Graph) -> Forest:
    """Build the forest of a topologically sorted graph; its subgraphs are not entered.

    Args:
        graph: Sorted; not changed.

    Returns:
        The forest. Roots appear only where an elementwise node reads them.
    """
    cuts: dict[int, Cut] = {}
    free: set[int] = set()  # tensors that elementwise nodes make of fills and draws alone
    for node in graph.nodes:
        if not _is_elementwise(node):
            continue
        live = [_cut_of(tensor, cuts) for tensor in live_inputs(node) if id(tensor) not in free]
        if not live:
            free.add(id(node.outputs[0]))
            continue
        parent: Cut | None = live[0]
        for other in live[1:]:
            parent = _common(parent, other) if parent else None
        tensor = node.outputs[0]
        depth = parent.depth + 1 if parent else 0
        cut = Cut(tensor, node, parent, depth, None, gate=parent is None)
        cut.jump = _jump_of(parent) if parent else None
        cuts[id(tensor)] = cut
    outputs = {id(tensor) for tensor in graph.outputs}
    inside = {id(cut.node): cut for cut in cuts.values() if cut.node is not None and not cut.gate}
    exits = [cut for cut in cuts.values() if cut.parent and _leaves(cut, outputs, inside)]
    return Forest(cuts, exits)


def program_between(top: Cut, bottom: Cut, *, same_shape: bool = True) -> Program:
    """The function that leads from ``top`` to its descendant ``bottom``.

    Args:
        top: Its input.
        bottom: Its output, a descendant.
        same_shape: Refuse where a side constant may give the output another shape than the input; without it the
            program says what is computed for each element, and nothing about shapes.

    Raises:
        UnsupportedError: an operator in between is used in a way that has no lowering, or it may change the shape.
    """
    assembly = Assembly(top.tensor, same_shape=same_shape)
    for node in nodes_between(top, bottom):
        assembly.add(node)
    return assembly.finish(bottom.tensor)


def nodes_between(top: Cut, bottom: Cut) -> list[gs.Node]:
    """Nodes from ``top`` (excluded) to ``bottom``, producers first."""
    order: list[gs.Node] = []
    seen = {id(top.tensor)}
    stack: list[tuple[gs.Tensor, bool]] = [(bottom.tensor, False)]
    while stack:
        tensor, done = stack.pop()
        if done:
            order.append(tensor.inputs[0])
            continue
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if len(seen) > MAX_NODES:
            raise UnsupportedError(f"more than {MAX_NODES} nodes")
        stack.append((tensor, True))
        stack.extend((other, False) for other in live_inputs(tensor.inputs[0]))
    return order


def _cut_of(tensor: gs.Tensor, cuts: dict[int, Cut]) -> Cut:
    return cuts.setdefault(id(tensor), Cut(tensor, None, None, 0, None))


def _jump_of(parent: Cut) -> Cut:
    """Skew-binary jump pointer (Myers 1983): twice the parent's jump where the two last jumps are of equal length."""
    far = parent.jump
    if far and far.jump and parent.depth - far.depth == far.depth - far.jump.depth:
        return far.jump
    return parent


def _common(a: Cut, b: Cut) -> Cut | None:
    """Lowest common ancestor; None in different trees."""
    while a.depth != b.depth:
        lower, upper = (a, b) if a.depth > b.depth else (b, a)
        far, near = lower.jump, lower.parent
        assert far is not None and near is not None  # noqa: S101, PT018 - deeper than another cut, so no root
        step: Cut = far if far.depth >= upper.depth else near
        a, b = step, upper
    while a is not b:
        left, right = (a.parent, b.parent) if a.jump is b.jump else (a.jump, b.jump)
        if left is None or right is None:
            return None
        a, b = left, right
    return a


def _leaves(cut: Cut, outputs: set[int], inside: dict[int, Cut]) -> bool:
    """Whether anything but the region itself reads a tensor."""
    readers = cut.tensor.outputs
    return id(cut.tensor) in outputs or any(id(node) not in inside and not serves_tables(node) for node in readers)


def _is_elementwise(node: gs.Node) -> bool:
    """An elementwise node with one used output and side inputs that vary along one axis at most."""
    if not node.outputs or any(not t.is_empty() and t.outputs for t in node.outputs[1:]):
        return False
    if reads_table(node) or spread_sum(node) is not None:
        return True
    if (
        node.op not in LOWERINGS
        or node.domain not in STANDARD
        or all(t.is_empty() or is_constant(t) for t in node.inputs)
    ):
        return False
    return all(varies_along_one_axis(tensor) for tensor in node.inputs if is_constant(tensor))
