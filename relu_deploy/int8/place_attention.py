"""Attention in INT8 on TensorRT-RTX: the four operands of its two products, or none of them.

With queries, keys, probabilities and values quantised, TensorRT-RTX 1.7 makes one kernel of attention that reads and
writes codes; with some of them, or with heads or rows of other sizes than below, it takes attention to pieces, which
moves more bytes in more kernels than leaving it in float16 (docs/placement.md, tests/engines/test_even_engines.py).

The probabilities are the part that INT8 may not bear: of a row of N equal ones each is 1 / N, and N / 127 of a step of
the largest one seen. They are quantised where even such a row keeps 20 dB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_shapes import sharp_shapes
from relu_deploy.int8.placement import Placement
from relu_deploy.passes.edit import dims, producer_of

# Widths of a head for which the kernel exists, and the longest row of probabilities.
HEADS = (16, 32, 64)
MOST_TOKENS = 512
# Noise over signal of a row of equal probabilities: N^2 s^2 / 12 for the step s.
_MOST_NOISE = 1e-2
# What may stand between the scores and the Softmax: a scale and a mask.
_BETWEEN = ("Mul", "Div", "Add", "Where", "Identity")
_FAR = 6


@dataclasses.dataclass(frozen=True)
class Attention:
    """One attention: ``softmax(q k) v`` with what stands between.

    Attributes:
        scores: The first product.
        mix: The second.
    """

    scores: gs.Node
    mix: gs.Node

    @property
    def operands(self) -> tuple[tuple[gs.Tensor, gs.Node], ...]:
        """Queries, keys, probabilities and values, each with its reader."""
        return tuple((tensor, node) for node in (self.scores, self.mix) for tensor in node.inputs)


def find_attention(graph: gs.Graph) -> Iterator[Attention]:
    """Every attention of a graph, none of whose inner tensors anything else reads."""
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if node.op != "MatMul" or not _live(node):
            continue
        softmax = producer_of(node.inputs[0])
        if softmax is None or softmax.op != "Softmax" or not _along_the_last_axis(softmax):
            continue
        inner, maker = [node.inputs[0], softmax.inputs[0]], producer_of(softmax.inputs[0])
        for _ in range(_FAR):
            if maker is None or maker.op not in _BETWEEN:
                break
            data = _scores_of(maker)
            inner.append(data)
            maker = producer_of(data)
        alone = all(len(tensor.outputs) == 1 and id(tensor) not in outputs for tensor in inner)
        if alone and maker is not None and maker.op == "MatMul" and _live(maker):
            yield Attention(maker, node)


def with_attention(
    graph: gs.Graph, placement: Placement, bounds: Mapping[str, tuple[float, float]], number: NumberFormat, *,
    skip: Collection[str] = (),
) -> Placement:  # fmt: skip
    """Also quantise the operands of attention where the compiler has a kernel for it and the probabilities bear it.

    Args:
        graph: What ``placement`` was made from.
        placement: For a TensorRT target.
        bounds: Tensor name -> range.
        number: The target's format; nothing is done for others than ``tensorrt-rtx``.
        skip: Names of products to leave in float.
    """
    if number.target != "tensorrt-rtx":
        return placement
    uses, int8 = dict(placement.uses), set[str]()
    with sharp_shapes(graph):
        for attention in find_attention(graph):
            names = {attention.scores.name, attention.mix.name}
            if names.isdisjoint(skip) and _has_kernel(attention) and _bears_it(attention, bounds):
                int8 |= names
                for tensor, reader in attention.operands:
                    uses[tensor.name] = (uses.get(tensor.name) or frozenset()) | {reader.name}
    layers = tuple(
        dataclasses.replace(layer, int8=True, reason="", live=True) if layer.name in int8 else layer
        for layer in placement.layers
    )
    return dataclasses.replace(placement, uses=uses, layers=layers)


def _has_kernel(attention: Attention) -> bool:
    """Whether heads are of a width that there is a kernel for, and rows short enough."""
    shapes = [dims(tensor) for tensor, _ in attention.operands]
    if any(not shape for shape in shapes):
        return False
    query, _, row, value = (0 if not shape or shape[-1] is None else shape[-1] for shape in shapes)
    return query in HEADS and value in HEADS and 0 < row <= MOST_TOKENS


def _bears_it(attention: Attention, bounds: Mapping[str, tuple[float, float]]) -> bool:
    """Whether all ranges are known, and a row of equal probabilities keeps its signal."""
    if any(tensor.name not in bounds for tensor, _ in attention.operands):
        return False
    probabilities = attention.mix.inputs[0]
    row = (dims(probabilities) or (0,))[-1] or 0
    return bool((row * bounds[probabilities.name][1] / 127) ** 2 / 12 <= _MOST_NOISE)


def _scores_of(node: gs.Node) -> gs.Tensor:
    """The operand that comes from the scores: not a scale, a mask or a condition."""
    operands = node.inputs[1:] if node.op == "Where" else node.inputs
    live = [tensor for tensor in operands if isinstance(tensor, gs.Variable) and producer_of(tensor) is not None]
    far = [
        tensor for tensor in live if (maker := producer_of(tensor)) is not None and maker.op in (*_BETWEEN, "MatMul")
    ]
    return (far or live or list(operands))[0]


def _along_the_last_axis(softmax: gs.Node) -> bool:
    shape = dims(softmax.inputs[0])
    return shape is not None and int(softmax.attrs.get("axis", -1)) % max(len(shape), 1) == len(shape) - 1


def _live(node: gs.Node) -> bool:
    return not any(isinstance(tensor, gs.Constant) for tensor in node.inputs)
