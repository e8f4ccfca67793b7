"""Find what is a function of one tensor: a forest in which ancestors are the tensors that one depends on alone.

Every elementwise node's output hangs below the lowest tensor that all its live inputs depend on; where there is none
(a gate with two live inputs) it starts a tree of its own. The ancestors of a tensor are thus its cut tensors, so that
in ``2 x + 1 -> blend -> 3 *`` the blend is found between two cuts. Jump pointers keep the common ancestor
logarithmic, and the whole linear in the size of the graph up to that logarithm.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from relu_deploy.passes.lower import LOWERINGS, Call, UnsupportedError
from relu_deploy.passes.operands import (
    STANDARD,
    constant_values,
    draw,
    fill,
    is_constant,
    least_rank,
    one_axis,
    onnx_type,
    serves_tables,
    varies_along_one_axis,
    without_repeats,
)
from relu_deploy.passes.program import Builder, Program
from relu_deploy.passes.reads import live_inputs, read_inputs
from relu_deploy.passes.spread import Spread, spread_sum
from relu_deploy.passes.tables import lower_table, reads_table

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
    lowering = Lowering(top.tensor, same_shape=same_shape)
    for node in nodes_between(top, bottom):
        lowering.add(node)
    return lowering.finish(bottom.tensor)


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


class Lowering:
    """A program in the making.

    Attributes:
        build: Where its steps go.
    """

    def __init__(self, root: gs.Tensor, *, same_shape: bool) -> None:
        self.build = Builder()
        self._root = root
        self._same_shape = same_shape
        self._steps = {id(root): self.build.step("x")}
        self._axes: dict[int, int] = {}

    def add(self, node: gs.Node) -> None:
        """Lower one node, whose live inputs have been lowered."""
        self.build.node = node.name
        if reads_table(node):
            self._steps[id(node.outputs[0])] = lower_table(node, self)
            return
        spread = spread_sum(node)
        if spread is not None:
            self._steps[id(node.outputs[0])] = self._sum(spread)
            return
        args = [None if tensor.is_empty() else self.argument(tensor) for tensor in read_inputs(node)]
        self._steps[id(node.outputs[0])] = self._call(node, args)

    def _call(self, node: gs.Node, args: list[int | None]) -> int:
        types = [onnx_type(tensor) for tensor in node.inputs]
        integers = any(_is_integer_constant(tensor) for tensor in node.inputs)
        call = Call(self.build, args, node.attrs, types, onnx_type(self._root), integers, node.name)
        return LOWERINGS[node.op](call)

    def _sum(self, spread: Spread) -> int:
        """Each term with its own slice of the constants, one after another."""
        terms = []
        for place in range(spread.terms):
            steps = {id(spread.column): self.argument(spread.source)}
            for node in spread.nodes:
                args = [self._in_term(tensor, steps, place) for tensor in read_inputs(node)]
                steps[id(node.outputs[0])] = self._call(node, args)
            term = steps[id(spread.summand)]
            if spread.weights is not None:
                term = self.build.step("mul", term, self.build.const(float(spread.weights[place])))
            terms.append(term)
        return self.build.chain("add", terms)

    def _in_term(self, tensor: gs.Tensor, steps: dict[int, int], place: int) -> int | None:
        """A step of the term, or a constant at the term's place of the added axis."""
        if tensor.is_empty() or id(tensor) in steps:
            return steps.get(id(tensor))
        values = constant_values(tensor)
        if values is None:
            raise UnsupportedError(f"{tensor.name} is neither constant nor a function of {self._root.name}")
        part = values[..., min(place, values.shape[-1] - 1)] if values.ndim else values
        self._check_broadcast(tensor.name, part.shape)
        return self._constant(tensor.name, part)

    def finish(self, result: gs.Tensor) -> Program:
        """The program that ends in a tensor."""
        return self.build.finish(self._steps[id(result)], next(iter(self._axes.values()), None))

    def argument(self, tensor: gs.Tensor) -> int:
        """Step of one input of a node: live, constant, filled with one number, or drawn at random."""
        if id(tensor) in self._steps:
            return self._steps[id(tensor)]
        values, filled, drawn = constant_values(tensor), fill(tensor), draw(tensor)
        if values is not None:
            self._check_broadcast(tensor.name, values.shape)
        elif filled is not None:
            values, like = filled
            if self._same_shape and not self._has_shape_of_root(tensor, like):
                raise UnsupportedError(f"{tensor.name} is filled at run time: the shape may change")
        elif drawn is not None:
            self._check_broadcast(tensor.name, tuple(drawn.attrs.get("shape", ())))
            ends = (
                self.build.const(float(np.float32(drawn.attrs.get(end, i)))) for i, end in enumerate(("low", "high"))
            )
            return self.build.step("random", *ends, param=drawn.name)
        else:
            raise UnsupportedError(f"{tensor.name} is neither constant nor a function of {self._root.name}")
        return self._constant(tensor.name, values)

    def channels(self, values: npt.ArrayLike, axis: int) -> int:
        """Step of a constant with one entry a channel, or one for all, along ``axis`` counted from the last (-1)."""
        row = np.asarray(values, dtype=np.float64).reshape(-1)
        if row.size > 1:
            if self._axes.setdefault(row.size, axis) != axis:
                raise UnsupportedError("side constants vary along two different axes")
            if len(self._axes) > 1:
                raise UnsupportedError("side constants of different lengths")
        return self.build.const(row)

    def _constant(self, name: str, values: np.ndarray) -> int:
        if values.dtype.kind not in "fiub" and str(values.dtype) != "bfloat16":
            raise UnsupportedError(f"constant {name} is not of a numeric type")
        numbers = np.asarray(values, dtype=np.float64)
        if np.isnan(numbers).any():
            raise UnsupportedError(f"constant {name} holds NaN")
        numbers = numbers if one_axis(numbers.shape) else without_repeats(numbers)
        wide = [axis - values.ndim for axis, size in enumerate(numbers.shape) if size != 1]
        return self.channels(numbers, wide[0] if wide else -1)

    def _has_shape_of_root(self, tensor: gs.Tensor, like: gs.Tensor | None) -> bool:
        """Whether a fill is shaped as a tensor of the region, by its making or by what is known of it."""
        known = tensor.shape is not None and self._root.shape is not None
        return (like is not None and id(like) in self._steps) or (
            known and list(tensor.shape) == list(self._root.shape)
        )

    def _check_broadcast(self, name: str, given: tuple[int, ...]) -> None:
        """Refuse a constant that may give the result another shape than the root."""
        if not self._same_shape:
            return
        root = self._root
        shape, rank = root.shape, least_rank(root)
        if len(given) > rank:
            what = f"has rank {rank}" if shape is not None else "is of unknown rank"
            raise UnsupportedError(
                f"constant {name} has rank {len(given)} and {root.name} {what}: the shape may change"
            )
        for axis, size in enumerate(given, start=-len(given)):
            if size != 1 and (shape is None or shape[axis] != size):
                extent = "an unknown extent" if shape is None else shape[axis]
                raise UnsupportedError(
                    f"constant {name} has {size} entries along an axis where {root.name} has {extent}: "
                    "the shape may change"
                )


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


def _is_integer_constant(tensor: gs.Tensor) -> bool:
    integers = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8)
    return isinstance(tensor, gs.Constant) and onnx_type(tensor) in integers


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
