"""How labels pass each operator: the table of what is homogeneous, ``f(s x) = s f(x)`` for s > 0, and in which operand.

A rule is given a node and returns the labels of its outputs. It ties what is added, refuses what is not homogeneous
(its operands are then pinned, with the reason), and notes which constants have to be scaled for the network to stay the
same function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8 import fuse_moves as moves
from relu_deploy.int8.fuse_groups import Channels, Labels, compress, labelled_axes, lift
from relu_deploy.int8.place import clip_bounds
from relu_deploy.passes.edit import RefusedError, dims, float_values, given, int_values, is_standard

_FLOATS = (np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64))
_UNARY = ("Relu", "LeakyRelu", "Identity", "Dropout", "Neg", "Abs", "Cast")
_SUMS = ("Add", "Sub", "Sum", "Max", "Min", "Where")
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
_NORMS = ("LayerNormalization", "InstanceNormalization", "RMSNormalization")
# Their results hold no values of the operand.
_SIZES = ("Shape", "Size")


@dataclasses.dataclass(frozen=True)
class Edit:
    """A constant operand that keeps the function the same: multiplied by the factors of ``up``, divided by ``down``'s.

    Attributes:
        node: Whose operand.
        position: Which operand.
        up: Labels that broadcast against the constant; None for factor 1.
        down: The same for the divisor.
    """

    node: gs.Node
    position: int
    up: Labels | None = None
    down: Labels | None = None


@dataclasses.dataclass(frozen=True)
class LinearUse:
    """A linear layer as the noise model sees it.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul; Mul by a constant counts as a depthwise layer.
        weight: Its values as ``(O, J, T)``: output channel, input channel of its group, position in the kernel.
        inputs: Labels ``(1, J)`` or, with groups, ``(O, J)``.
        outputs: Labels ``(O,)``.
    """

    node: gs.Node
    weight: np.ndarray
    inputs: Labels
    outputs: Labels


class Labelling:
    """Labels of all tensors of a graph, and what scaling its channels would have to change.

    Attributes:
        channels: Which channels are tied or pinned.
        labels: By ``id`` of the tensor.
        edits: Constants to scale.
        layers: Linear layers, in the order of the graph.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.channels = Channels()
        self.labels: dict[int, Labels] = {}
        self.edits: list[Edit] = []
        self.layers: list[LinearUse] = []
        for tensor in graph.inputs:
            self.labels[id(tensor)] = self.channels.pinned("it is an input of the network")
        for node in graph.nodes:
            self._visit(node)
        for tensor in graph.outputs:
            self.channels.pin(self.of(tensor), "it is an output of the network")
        captured = {
            t.name for inner in graph.subgraphs(recursive=True) for n in inner.nodes for t in (*n.inputs, *n.outputs)
        } | {t.name for inner in graph.subgraphs(recursive=True) for t in inner.outputs}
        for name, tensor in graph.tensors().items():
            if name in captured and isinstance(tensor, gs.Variable):
                self.channels.pin(self.of(tensor), "a graph inside If, Loop or Scan reads it")

    def of(self, tensor: gs.Tensor) -> Labels:
        """Labels of a tensor that no rule has spoken of are pinned."""
        if id(tensor) not in self.labels:
            self.labels[id(tensor)] = self.channels.pinned("no layer makes it")
        return self.labels[id(tensor)]

    def pin(self, tensor: gs.Tensor, reason: str) -> None:
        """Hold a tensor's channels at factor 1."""
        self.channels.pin(self.of(tensor), reason)

    def columns(self, tensor: gs.Tensor, axis: int, size: int) -> Labels:
        """Labels ``(size,)`` of a tensor along one axis, which its channels are made to depend on alone."""
        labels = self.of(tensor)
        if not labels.ndim:
            return np.broadcast_to(labels, (size,))
        axis %= labels.ndim
        labels = self.channels.tie_along(labels, [other for other in range(labels.ndim) if other != axis])
        return np.broadcast_to(labels.reshape(-1), (size,))

    def _visit(self, node: gs.Node) -> None:
        if node.op in _SIZES or not any(is_live(t) for t in node.inputs):
            return
        try:
            outputs = (_RULES.get(node.op, _refuse) if is_standard(node, node.op) else _refuse)(self, node)
        except RefusedError as refused:
            reason = str(refused)
            for tensor in filter(is_live, node.inputs):
                self.pin(tensor, reason)
            outputs = [self.channels.pinned(reason)] * len(node.outputs)
        for tensor, labels in zip(node.outputs, outputs, strict=False):
            self.labels[id(tensor)] = labels


def is_live(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a float activation; one of unknown type counts as such."""
    if tensor.is_empty() or not isinstance(tensor, gs.Variable):
        return False
    return tensor.dtype is None or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype) in _FLOATS


def rank_of(tensor: gs.Tensor) -> int:
    """Number of axes. Raises: RefusedError where it is not known."""
    shape = dims(tensor)
    if shape is None:
        raise RefusedError(f"the shape of {tensor.name} is not known")
    return len(shape)


def _refuse(_: Labelling, node: gs.Node) -> list[Labels]:
    raise RefusedError(f"{node.op} {node.name} is not homogeneous")


def _same(state: Labelling, node: gs.Node) -> list[Labels]:
    if node.op == "Cast" and not is_live(node.outputs[0]):
        raise RefusedError(f"Cast {node.name} rounds to whole numbers")
    return [state.of(node.inputs[0])]


def _prelu(state: Labelling, node: gs.Node) -> list[Labels]:
    if is_live(node.inputs[1]):
        state.pin(node.inputs[1], f"it is a slope of PRelu {node.name}")
    return [state.of(node.inputs[0])]


def _clip(state: Labelling, node: gs.Node) -> list[Labels]:
    low, high = clip_bounds(node)
    if low not in (0, -np.inf) or high not in (0, np.inf):
        raise RefusedError(f"Clip {node.name} has a bound that does not scale: {low} to {high}")
    return [state.of(node.inputs[0])]


def _sum(state: Labelling, node: gs.Node) -> list[Labels]:
    """Operands that meet in one element share a factor; a constant operand takes it."""
    operands = list(enumerate(node.inputs))[1 if node.op == "Where" else 0 :]
    live = [tensor for _, tensor in operands if is_live(tensor)]
    for _, tensor in operands:
        if not is_live(tensor) and float_values(tensor) is None:
            raise RefusedError(f"{node.op} {node.name} has an operand that is no float constant")
    rank = max((state.of(tensor).ndim for tensor in live), default=0)
    shapes = [state.of(tensor) for tensor in live]
    joined = lift(np.broadcast_to(shapes[0], np.broadcast_shapes(*(s.shape for s in shapes))), rank)
    for labels in shapes:
        state.channels.tie(joined, labels)
    if joined.ndim:
        joined = lift(joined, rank_of(node.outputs[0]))
        for _, tensor in operands:
            if not is_live(tensor) and np.any(float_values(tensor)):
                joined = state.channels.tie_along(joined, _narrow_axes(joined, tensor.shape))
    state.edits += [Edit(node, at, up=joined) for at, tensor in operands if not is_live(tensor)]
    return [joined]


def _narrow_axes(labels: Labels, shape: Sequence[int]) -> list[int]:
    """Labelled axes along which a constant has one value for all.

    It keeps one: given one for each channel, ONNX Runtime would fold the addition into the convolution before it, and
    round elsewhere.
    """
    wide = (1,) * (labels.ndim - len(shape)) + tuple(shape)
    return [axis for axis in labelled_axes(labels) if wide[axis] == 1]


def _mul(state: Labelling, node: gs.Node) -> list[Labels]:
    left, right = node.inputs
    if is_live(left) and is_live(right):
        # x * g is homogeneous in x and in g, but one factor for the product serves only one of them.
        first = state.channels.are_pinned(state.of(left)) or state.of(left).ndim < state.of(right).ndim
        gate, data = (left, right) if first else (right, left)
        state.pin(gate, f"it multiplies another tensor in Mul {node.name}")
        return [lift(state.of(data), rank_of(node.outputs[0]))]
    at = 1 if is_live(left) else 0
    values, data = float_values(node.inputs[at]), node.inputs[1 - at]
    if values is None:
        raise RefusedError(f"Mul {node.name} has a factor that is no float constant")
    labels = state.of(data)
    if values.size == 1 or not state.channels.are_pinned(labels):
        return [lift(labels, rank_of(node.outputs[0]))] if labels.ndim else [labels]
    # Of a tensor that is what it is (normalised, say) a constant factor can still make channels of any size.
    rank = rank_of(node.outputs[0])
    made = compress(state.channels.fresh((1,) * (rank - values.ndim) + values.shape))
    state.edits.append(Edit(node, at, up=made))
    if made.ndim and len(labelled_axes(made)) == 1:
        outputs = made.reshape(-1)
        inputs = np.broadcast_to(np.unique(labels)[:1], (outputs.size, 1))
        state.layers.append(LinearUse(node, values.reshape(-1, 1, 1), inputs, outputs))
    return [made]


def _div(state: Labelling, node: gs.Node) -> list[Labels]:
    if not is_live(node.inputs[0]):
        raise RefusedError(f"Div {node.name} divides by it")
    if is_live(node.inputs[1]):
        state.pin(node.inputs[1], f"Div {node.name} divides by it")
    labels = state.of(node.inputs[0])
    return [lift(labels, rank_of(node.outputs[0]))] if labels.ndim else [labels]


def _pool(state: Labelling, node: gs.Node) -> list[Labels]:
    labels = state.of(node.inputs[0])
    return [state.channels.tie_along(labels, range(2, labels.ndim))]


def _reduce(state: Labelling, node: gs.Node) -> list[Labels]:
    labels = state.of(node.inputs[0])
    if not labels.ndim:
        return [labels]
    axes = int_values(node, "axes", 1)
    if axes is None:
        raise RefusedError(f"{node.op} {node.name} reduces channels")
    reduced = [axis % labels.ndim for axis in axes]
    if any(labels.shape[axis] > 1 for axis in reduced):
        raise RefusedError(f"{node.op} {node.name} reduces channels")
    return [labels if node.attrs.get("keepdims", 1) else labels.squeeze(tuple(reduced))]


def _conv(state: Labelling, node: gs.Node) -> list[Labels]:
    weight, groups = _weight(node), int(node.attrs.get("group", 1))
    across = node.op == "ConvTranspose"
    channels_in = weight.shape[0] if across else weight.shape[1] * groups
    channels_out = weight.shape[1] * groups if across else weight.shape[0]
    inputs = state.columns(node.inputs[0], 1, channels_in).reshape(groups, -1)
    outputs = state.channels.fresh((channels_out,))
    each = inputs.repeat(channels_out // groups, axis=0) if groups > 1 else inputs
    spatial = (1,) * (weight.ndim - 2)
    if across:
        up = outputs.reshape(groups, 1, -1).repeat(channels_in // groups, axis=1).reshape(channels_in, -1, *spatial)
        down = inputs.reshape(-1, 1, *spatial)
        kernels = weight.reshape(groups, channels_in // groups, channels_out // groups, -1)
        kernels = kernels.transpose(0, 2, 1, 3).reshape(channels_out, channels_in // groups, -1)
    else:
        up, down = outputs.reshape(-1, 1, *spatial), each.reshape(*each.shape, *spatial)
        kernels = weight.reshape(*weight.shape[:2], -1)
    state.edits.append(Edit(node, 1, up, down))
    state.layers.append(LinearUse(node, kernels, each, outputs))
    _bias(state, node, outputs)
    return [outputs.reshape(1, -1, *spatial)]


def _gemm(state: Labelling, node: gs.Node) -> list[Labels]:
    if is_live(node.inputs[1]):
        raise RefusedError(f"the weights of {node.op} {node.name} are computed at run time")
    weight, across = _weight(node), bool(node.attrs.get("transB", 0))
    if node.attrs.get("transA", 0):
        state.pin(node.inputs[0], f"Gemm {node.name} transposes it")
    rows, columns = weight.shape[::-1] if across else weight.shape
    inputs = state.columns(node.inputs[0], -1, rows)
    outputs = state.channels.fresh((columns,))
    up, down = outputs[None, :], inputs[:, None]
    state.edits.append(Edit(node, 1, up.T, down.T) if across else Edit(node, 1, up, down))
    state.layers.append(LinearUse(node, (weight if across else weight.T)[:, :, None], inputs[None, :], outputs))
    _bias(state, node, outputs)
    return [outputs.reshape((1,) * (rank_of(node.outputs[0]) - 1) + (-1,))]


def _matmul(state: Labelling, node: gs.Node) -> list[Labels]:
    left, right = node.inputs
    if is_live(left) and not is_live(right):
        return _gemm(state, node)
    if is_live(left):
        state.pin(left, f"it multiplies another tensor in MatMul {node.name}")
    labels = state.of(right)
    if not labels.ndim:
        return [labels]
    if labels.ndim < 2 or labels.shape[-2] > 1:  # sums over what the factor depends on
        raise RefusedError(f"MatMul {node.name} sums over its channels, and the other side is computed at run time")
    return [lift(labels, rank_of(node.outputs[0]))]


def _bias(state: Labelling, node: gs.Node, outputs: Labels) -> None:
    """The third operand of a layer: one number for each output channel, or for each element of a Gemm's result."""
    bias = given(node, 2)
    if bias is None:
        return
    if is_live(bias):
        labels = state.of(bias)
        state.channels.tie(outputs if labels.ndim < 2 else outputs[None, :], labels)
    elif float_values(bias) is None:
        raise RefusedError(f"the bias of {node.op} {node.name} is no float constant")
    else:
        state.edits.append(Edit(node, 2, up=outputs))


def _batchnorm(state: Labelling, node: gs.Node) -> list[Labels]:
    scale = float_values(node.inputs[1])
    if len(node.outputs) > 1 or any(float_values(tensor) is None for tensor in node.inputs[1:5]) or scale is None:
        raise RefusedError(f"BatchNormalization {node.name} has no constant statistics")
    inputs = state.columns(node.inputs[0], 1, scale.size)
    outputs = state.channels.fresh((scale.size,))
    state.edits += [Edit(node, 1, outputs, inputs), Edit(node, 2, outputs), Edit(node, 3, inputs)]
    return [outputs.reshape(1, -1, *(1,) * (rank_of(node.outputs[0]) - 2))]


def _norm(state: Labelling, node: gs.Node) -> list[Labels]:
    """What is normalised is pinned; scale and offset give it channels of any size."""
    state.pin(node.inputs[0], f"{node.op} {node.name} normalises it")
    scale, rank = given(node, 1), rank_of(node.outputs[0])
    values = None if scale is None else float_values(scale)
    offset = given(node, 2)
    if values is None or (offset is not None and float_values(offset) is None) or len(node.outputs) > 1:
        raise RefusedError(f"{node.op} {node.name} has no constant scale")
    across = node.op == "InstanceNormalization"
    made = state.channels.fresh((1, values.size, *(1,) * (rank - 2)) if across else values.shape)
    state.edits += [Edit(node, 1, up=made.reshape(-1) if across else made)]
    state.edits += [] if offset is None else [Edit(node, 2, up=made.reshape(-1) if across else made)]
    return [lift(made, rank)]


def _weight(node: gs.Node) -> np.ndarray:
    values = float_values(node.inputs[1])
    if values is None:
        raise RefusedError(f"the weights of {node.op} {node.name} are computed at run time")
    if node.op in ("Gemm", "MatMul") and values.ndim != 2:
        raise RefusedError(f"the weights of {node.op} {node.name} have {values.ndim} axes")
    return values


def _moved(rule: Callable[[Channels, gs.Node, Labels], list[Labels]]) -> Callable[[Labelling, gs.Node], list[Labels]]:
    """A rule for what moves values of its first operand, which has to be a live one."""

    def apply(state: Labelling, node: gs.Node) -> list[Labels]:
        if not is_live(node.inputs[0]):
            raise RefusedError(f"{node.op} {node.name} takes values from a constant")
        labels = state.of(node.inputs[0])
        if not labels.ndim and node.op != "Pad":
            return [labels] * len(node.outputs)
        return rule(state.channels, node, labels)

    return apply


def _concat(state: Labelling, node: gs.Node) -> list[Labels]:
    rank = rank_of(node.outputs[0])
    axis = int(node.attrs["axis"]) % rank
    for tensor in node.inputs:
        if not is_live(tensor) and float_values(tensor) is None:
            raise RefusedError(f"Concat {node.name} has an operand that is no float constant")
    live = [lift(state.of(tensor), rank) for tensor in node.inputs if is_live(tensor)]
    if all(not labels.ndim or labels.shape[axis] == 1 for labels in live):
        joined = np.broadcast_to(live[0], np.broadcast_shapes(*(labels.shape for labels in live)))
        for labels in live:
            state.channels.tie(joined, labels)
        state.edits += [Edit(node, at, up=joined) for at, t in enumerate(node.inputs) if not is_live(t)]
        return [joined]
    parts = []
    for at, tensor in enumerate(node.inputs):
        if is_live(tensor):
            parts.append(state.of(tensor))
        else:
            parts.append(state.channels.fresh((*(1,) * axis, tensor.shape[axis], *(1,) * (rank - axis - 1))))
            state.edits.append(Edit(node, at, up=parts[-1]))
    return [moves.join(node, parts, axis, rank)]


_RULES: dict[str, Callable[[Labelling, gs.Node], list[Labels]]] = {
    **dict.fromkeys(_UNARY, _same),
    **dict.fromkeys(_SUMS, _sum),
    **dict.fromkeys(_POOLS, _pool),
    **dict.fromkeys(_REDUCTIONS, _reduce),
    **dict.fromkeys(_NORMS, _norm),
    "PRelu": _prelu,
    "Clip": _clip,
    "Mul": _mul,
    "Div": _div,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batchnorm,
    "Concat": _concat,
    "Transpose": _moved(moves.transpose),
    "Reshape": _moved(moves.reshape),
    "Flatten": _moved(moves.reshape),
    "Squeeze": _moved(moves.reshape),
    "Unsqueeze": _moved(moves.reshape),
    "Slice": _moved(moves.slice_),
    "Split": _moved(moves.split),
    "Gather": _moved(moves.gather),
    "Expand": _moved(moves.expand),
    "Tile": _moved(moves.tile),
    "DepthToSpace": _moved(moves.depth_to_space),
    "SpaceToDepth": _moved(moves.space_to_depth),
    "Pad": _moved(moves.pad),
    "Resize": _moved(moves.resize),
    "Upsample": _moved(moves.resize),
}
