"""What stands around an activation: the linear layer before it, whether one follows, and what its result multiplies.

Values are followed through a network, not indices, shapes and masks: a score that only picks boxes for a later layer
does not reach that layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.region import constant_values

LINEAR = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "DeformConv", "ConvInteger", "MatMulInteger", "QLinearConv",
    "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "FusedConv", "FusedGemm", "FusedMatMul", "NhwcConv",
    "NhwcFusedConv", "MatMulNBits", "LSTM", "GRU", "RNN", "DynamicQuantizeLSTM", "Attention", "MultiHeadAttention",
    "QAttention",
})  # fmt: skip
# Their results are places, sizes and truths.
_NO_VALUES = frozenset({
    "Shape", "Size", "NonZero", "ArgMax", "ArgMin", "NonMaxSuppression", "Greater", "GreaterOrEqual", "Less",
    "LessOrEqual", "Equal", "Not", "And", "Or", "Xor", "IsNaN", "IsInf", "OneHot", "Range", "ConstantOfShape",
    "EyeLike", "RandomNormalLike", "RandomUniformLike", "Bernoulli",
})  # fmt: skip
# Only their first input is a value; the others are places and sizes.
_FIRST_INPUT = frozenset({
    "Gather", "GatherElements", "GatherND", "Reshape", "Expand", "Slice", "Tile", "Pad", "Resize", "Upsample", "TopK",
    "Squeeze", "Unsqueeze", "Split", "RoiAlign", "GridSample", "ReduceMean", "ReduceSum", "ReduceMax", "Trilu",
    "CenterCropPad", "Clip", "QuantizeLinear", "DequantizeLinear",
})  # fmt: skip
# What gathers many positions into few.
POOLING = frozenset({
    "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "AveragePool", "ReduceMean", "ReduceMax", "ReduceSum",
    "ReduceL2", "QLinearGlobalAveragePool", "QLinearAveragePool", "QLinearReduceMean",
})  # fmt: skip
# Beyond these a value is no longer that of its place; a dynamic quantiser's scale is the largest magnitude of all.
_REDUCING = POOLING | {
    "ReduceMin", "ReduceL1", "ReduceSumSquare", "ReduceLogSumExp", "Softmax", "LogSoftmax", "CumSum",
    "DynamicQuantizeLinear",
}  # fmt: skip
# What a gate may pass on its way to the product.
_MOVING = frozenset({
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Tile", "Resize", "Upsample", "Cast",
    "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear", "Split", "Slice", "Gather",
})  # fmt: skip
# Of these, what takes a part: the whole is another tensor.
_TAKING = frozenset({"Split", "Slice", "Gather"})
# Operators whose results lie between two bounds.
_OPENING = frozenset({"Sigmoid", "HardSigmoid", "Tanh", "Softmax", "Clip", "Softsign", "Erf"})
_SHIFTING = frozenset({"Add", "Sub", "Mul", "Div", "Neg"})
# What stands between the scores of attention and their use: masks, scales, softmax.
_SCORING = _MOVING | {"Add", "Sub", "Mul", "Div", "Where", "Softmax", "QLinearSoftmax"}
# How far is looked: a squeeze-excite block has some twenty nodes.
_NEAR = 96


class Surroundings:
    """One graph, asked about the places of its activations.

    Attributes:
        has_layers: Whether the graph has any linear layer.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.has_layers = any(node.op in LINEAR for node in graph.nodes)
        self._outputs = {id(tensor) for tensor in graph.outputs}
        self._fixed: set[int] = set()
        for node in graph.nodes:
            if _is_fixed(node, self._fixed):
                self._fixed.update(id(tensor) for tensor in node.outputs)
        self._before_a_layer: set[int] = set()
        for node in reversed(graph.nodes):
            if node.op in LINEAR or any(id(tensor) in self._before_a_layer for tensor in node.outputs):
                self._before_a_layer.update(id(tensor) for tensor in values_into(node))

    def is_fixed(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is computed from constants alone, such as the table of a relative position."""
        return id(tensor) in self._fixed

    def is_unread(self, tensor: gs.Tensor) -> bool:
        """Whether whatever reads a tensor always gives the same: the first step of an unrolled cell gates zeros."""
        if id(tensor) in self._outputs:
            return False
        return all(node.outputs and all(id(t) in self._fixed for t in node.outputs) for node in tensor.outputs)

    def layer_follows(self, tensor: gs.Tensor) -> bool:
        """Whether the values of a tensor reach a linear layer."""
        return id(tensor) in self._before_a_layer

    def layer_before(self, tensor: gs.Tensor, *, direct: bool) -> gs.Node | None:
        """The nearest linear layer that a tensor's values come from.

        Args:
            tensor: Where to begin.
            direct: Do not look through sums and means over positions.

        Returns:
            Of several equally near the first one; None where there is none.
        """
        stop = LINEAR | _REDUCING if direct else LINEAR
        for _, node in _upstream(tensor, stop=lambda node: node.op in stop, limit=4096):
            if node.op in LINEAR:
                return node
        return None

    def products(self, tensor: gs.Tensor) -> list[tuple[gs.Node, gs.Tensor]]:
        """The products with other live tensors in which a tensor ends; none where any of it goes elsewhere.

        Returns:
            Product and the other factor.
        """
        found: list[tuple[gs.Node, gs.Tensor]] = []
        seen = {id(tensor)}
        queue = deque([tensor])
        while queue:
            here = queue.popleft()
            if id(here) in self._outputs or len(seen) > _NEAR:
                return []
            for node in here.outputs:
                others = [t for t in values_into(node) if id(t) not in seen]
                if node.op in _NO_VALUES:
                    continue
                if node.op == "Mul" and others:
                    found.append((node, others[0]))
                elif (node.op in _MOVING and any(here is t for t in values_into(node))) or (
                    node.op in _SHIFTING and not others
                ):
                    queue.extend(t for t in node.outputs if id(t) not in seen)
                    seen.update(id(t) for t in node.outputs)
                elif any(here is t for t in values_into(node)):
                    return []
        return found

    def attends(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor ends in matrix products with other live tensors, as scores and weights of attention do."""
        seen, queue, found = {id(tensor)}, deque([tensor]), False
        while queue and len(seen) < _NEAR:
            here = queue.popleft()
            for node in here.outputs:
                if node.op in ("MatMul", "Einsum", "FusedMatMul"):
                    if len(list(values_into(node))) < 2:
                        return False
                    found = True
                elif node.op in _SCORING:
                    queue.extend(t for t in node.outputs if id(t) not in seen)
                    seen.update(id(t) for t in node.outputs)
                elif node.op not in _NO_VALUES:
                    return False
        return found

    def opens_gates(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor is made, but for its shape, by an operator whose results lie between two bounds."""
        while tensor.inputs and tensor.inputs[0].op in _MOVING | _SHIFTING:
            before = list(values_into(tensor.inputs[0]))
            if len(before) != 1:
                return False
            tensor = before[0]
        return bool(tensor.inputs) and tensor.inputs[0].op in _OPENING

    def is_mask(self, factor: gs.Tensor, tensor: gs.Tensor) -> bool:
        """Whether a factor is a mask or a scale from outside: no layer made it, nor the input that made ``tensor``."""
        if self.layer_before(factor, direct=False) is not None:
            return False
        return not (_origins(factor) & _origins(tensor))


def _is_fixed(node: gs.Node, fixed: set[int]) -> bool:
    """Whether a node always gives the same."""
    if node.op.startswith("Random") or any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return False
    if node.op == "Mul" and any(_is_zero(tensor) for tensor in node.inputs):
        return True
    return all(t.is_empty() or id(t) in fixed or constant_values(t) is not None for t in node.inputs)


def _is_zero(tensor: gs.Tensor) -> bool:
    values = constant_values(tensor)
    return values is not None and values.dtype.kind == "f" and not values.any()


def values_into(node: gs.Node) -> Iterator[gs.Tensor]:
    """Live inputs of a node whose values go into its result."""
    if node.op in _NO_VALUES:
        return
    inputs = list(node.inputs)
    if node.op in _FIRST_INPUT or (node.op in LINEAR and node.op.startswith("QLinear")):
        inputs = inputs[:1]
    elif node.op == "Where":
        inputs = inputs[1:]
    for tensor in inputs:
        if not tensor.is_empty() and constant_values(tensor) is None:
            yield tensor


def path_between(tensor: gs.Tensor, ancestor: gs.Tensor) -> str | None:
    """How an earlier tensor is reached from a later one: ``direct``, only ``pooled``, or None: not near."""
    sources = _aliases(ancestor)
    for stop, answer in ((_pools, "direct"), (lambda _: False, "pooled")):
        for here, _ in _upstream(tensor, stop=stop, limit=_NEAR):
            if id(here) in sources:
                return answer
        if id(tensor) in sources:
            return answer
    return None


def pools_near(tensor: gs.Tensor) -> bool:
    """Whether a tensor comes from a pooling by at most two linear layers: the excitation of a squeeze-excite block."""
    layers = 0
    for _, node in _upstream(tensor, stop=_pools, limit=24):
        if _pools(node):
            return True
        layers += node.op in LINEAR
        if layers > 2:
            return False
    return False


def _aliases(tensor: gs.Tensor) -> set[int]:
    """A tensor, and those that it is only another shape of."""
    found = {id(tensor)}
    while tensor.inputs and tensor.inputs[0].op in _MOVING - _TAKING and len(found) < _NEAR:
        tensor = tensor.inputs[0].inputs[0]
        found.add(id(tensor))
    return found


def _pools(node: gs.Node) -> bool:
    """Whether a node gathers many positions into few; not over channels alone, as spatial attention does."""
    if not node.op.startswith("Reduce") or node.op not in POOLING:
        return node.op in POOLING
    given = constant_values(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    axes = [] if given is None else [int(axis) for axis in np.ravel(given)]
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    return not (axes == [1] and rank == 4)


def _upstream(tensor: gs.Tensor, *, stop: Callable[[gs.Node], bool], limit: int) -> Iterator[tuple[gs.Tensor, gs.Node]]:
    """Tensors and their producers from ``tensor`` upwards, nearest first; what is before a ``stop`` is not entered."""
    seen = {id(tensor)}
    queue = deque([tensor])
    while queue and len(seen) <= limit:
        here = queue.popleft()
        for node in here.inputs:
            yield here, node
            if stop(node):
                continue
            for before in values_into(node):
                if id(before) not in seen:
                    seen.add(id(before))
                    queue.append(before)


def _origins(tensor: gs.Tensor) -> set[int]:
    """Inputs of the network that a tensor's values come from, as far as some hundred nodes show."""
    seen, queue, found = {id(tensor)}, deque([tensor]), set[int]()
    while queue and len(seen) <= _NEAR * 8:
        here = queue.popleft()
        if not here.inputs:
            found.add(id(here))
        for node in here.inputs:
            for before in values_into(node):
                if id(before) not in seen:
                    seen.add(id(before))
                    queue.append(before)
    return found
