"""Find what is a function of one tensor: a forest in which ancestors are the tensors that one depends on alone.

Every elementwise node's output hangs below the lowest tensor that all its live inputs depend on; where there is none
(a gate with two live inputs) it starts a tree of its own. The ancestors of a tensor are thus its cut tensors, so that
in ``2 x + 1 -> blend -> 3 *`` the blend is found between two cuts. Jump pointers keep the common ancestor
logarithmic, and the whole linear in the size of the graph up to that logarithm.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from relu_deploy.passes.lower import LOWERINGS, Call, UnsupportedError
from relu_deploy.passes.program import Builder, Program

# An activation has under twenty nodes, a learned one spelled out some hundred.
MAX_NODES = 256


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


def constant_values(tensor: gs.Tensor) -> np.ndarray | None:
    """Values of a constant tensor, whether an initializer or the output of a Constant node; None for a live one."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    value = tensor.inputs[0].attrs.get("value") if _is_constant(tensor) else None
    return np.asarray(value.values) if isinstance(value, gs.Constant) else None


def onnx_type(tensor: gs.Tensor) -> int:
    """ONNX type number of a tensor; 0 where it is not known."""
    dtype = tensor.dtype
    if dtype is None or isinstance(dtype, int):
        return dtype or 0
    return int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def find_regions(graph: gs.Graph) -> Forest:
    """Build the forest of a topologically sorted graph; its subgraphs are not entered.

    Args:
        graph: Sorted; not changed.

    Returns:
        The forest. Roots appear only where an elementwise node reads them.
    """
    cuts: dict[int, Cut] = {}
    for node in graph.nodes:
        if not _is_elementwise(node):
            continue
        live = [_cut_of(tensor, cuts) for tensor in _live_inputs(node)]
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
    build = Builder()
    steps = {id(top.tensor): build.step("x")}
    axes: dict[int, int] = {}
    for node in nodes_between(top, bottom):
        build.node = node.name
        if same_shape:
            for tensor in node.inputs:
                _check_broadcast(tensor, top.tensor)
        args = [_argument(tensor, steps, build, top.tensor, axes) for tensor in node.inputs]
        integers = any(_is_integer_constant(tensor) for tensor in node.inputs)
        call = Call(build, args, node.attrs, [onnx_type(t) for t in node.inputs], onnx_type(top.tensor), integers)
        steps[id(node.outputs[0])] = LOWERINGS[node.op](call)
    return build.finish(steps[id(bottom.tensor)])


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
        stack.extend((other, False) for other in _live_inputs(tensor.inputs[0]))
    return order


def _argument(
    tensor: gs.Tensor, steps: dict[int, int], build: Builder, root: gs.Tensor, axes: dict[int, int]
) -> int | None:
    """Step of one input of a node: live, constant, or left out."""
    if tensor.is_empty():
        return None
    if id(tensor) in steps:
        return steps[id(tensor)]
    values = constant_values(tensor)
    if values is None:
        raise UnsupportedError(f"{tensor.name} is neither constant nor a function of {root.name}")
    if values.dtype.kind not in "fiub" and str(values.dtype) != "bfloat16":
        raise UnsupportedError(f"constant {tensor.name} is not of a numeric type")
    wide = [axis - values.ndim for axis, size in enumerate(values.shape) if size != 1]
    if wide and axes.setdefault(values.shape[wide[0]], wide[0]) != wide[0]:
        raise UnsupportedError("side constants vary along two different axes")
    if len(axes) > 1:
        raise UnsupportedError("side constants of different lengths")
    numbers = np.asarray(values, dtype=np.float64)
    if np.isnan(numbers).any():
        raise UnsupportedError(f"constant {tensor.name} holds NaN")
    return build.const(numbers)


def _check_broadcast(tensor: gs.Tensor, root: gs.Tensor) -> None:
    """Refuse a constant that may give the result another shape than ``root``."""
    values = None if tensor.is_empty() else constant_values(tensor)
    if values is None:
        return
    shape, rank = root.shape, len(root.shape) if root.shape is not None else 0
    if values.ndim > rank:
        what = f"has rank {rank}" if shape is not None else "is of unknown rank"
        raise UnsupportedError(
            f"constant {tensor.name} has rank {values.ndim} and {root.name} {what}: the shape may change"
        )
    for axis, size in enumerate(values.shape, start=-values.ndim):
        if size != 1 and shape[axis] != size:
            raise UnsupportedError(
                f"constant {tensor.name} has {size} entries along an axis where {root.name} has {shape[axis]}: "
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
    return id(cut.tensor) in outputs or any(id(node) not in inside for node in readers)


def _live_inputs(node: gs.Node) -> Iterator[gs.Tensor]:
    """Inputs that are known only at run time."""
    return (t for t in node.inputs if not t.is_empty() and not isinstance(t, gs.Constant) and not _is_constant(t))


def _is_constant(tensor: gs.Tensor) -> bool:
    return len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant"


def _is_integer_constant(tensor: gs.Tensor) -> bool:
    values = tensor if isinstance(tensor, gs.Constant) else None
    return values is not None and onnx_type(values) in (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8)


def _is_elementwise(node: gs.Node) -> bool:
    """A standard elementwise node with one used output and side inputs that vary along one axis at most."""
    if node.op not in LOWERINGS or node.domain not in (None, "", "ai.onnx") or not node.outputs:
        return False
    if any(not t.is_empty() and t.outputs for t in node.outputs[1:]) or not any(True for _ in _live_inputs(node)):
        return False
    constants = (t if isinstance(t, gs.Constant) else t.inputs[0].attrs.get("value")
                 for t in node.inputs if isinstance(t, gs.Constant) or _is_constant(t))  # fmt: skip
    return all(isinstance(c, gs.Constant) and _one_axis(tuple(c.shape)) for c in constants)


def _one_axis(shape: tuple[int, ...]) -> bool:
    return math.prod(shape) > 0 and sum(size != 1 for size in shape) <= 1
