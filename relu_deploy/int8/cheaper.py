"""Layers that move fewer bytes in float16 than in INT8 on TensorRT-RTX, and are therefore left in float16.

No INT8 layer of TensorRT-RTX 1.7 writes codes: between two of them a kernel reads float16 and writes codes, which the
second reads. With N numbers between them and W weights in the second, that is 2 N + 2 N + N + N + W bytes, against
2 N + 2 N + 2 W in float16. INT8 saves bytes where W > 2 N: on small maps of many channels and in matrix products.
docs/placement.md has what was measured.
"""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.place import LINEAR_OPS
from relu_deploy.int8.siblings import sibling_groups

DEPTHWISE = "depthwise: in float16 it moves about half of the bytes, in fewer kernels"
_FIRST = "among the first layers, which move fewer bytes in float16"
# At most so many layers of a network are left in float16 only because they are the first.
_SHARE = 10


def cheaper_in_half(graph: gs.Graph, number: NumberFormat, *, keep: frozenset[str] = frozenset()) -> dict[str, str]:
    """Layers to leave in float16, with the reason.

    Depthwise convolutions are, wherever they stand. Of the others those at the beginning, one behind the other as long
    as each moves less that way, up to a tenth of all layers: more of them would save more bytes still, and would no
    longer be an INT8 network.

    Args:
        graph: Sorted, shapes inferred.
        number: The target's format; empty unless it is ``tensorrt-rtx`` with a float16 float part.
        keep: Layers that stay float for other reasons.
    """
    if number.target != "tensorrt-rtx" or not number.half:
        return {}
    layers = [node for node in graph.nodes if node.op in LINEAR_OPS and len(node.inputs) > 1]
    left = {node.name: DEPTHWISE for node in layers if _is_depthwise(node)}
    first: list[str] = []
    for node in (node for node in layers if node.name not in left and node.name not in keep):
        if not _moves_less(node):
            break
        first.append(node.name)
    while first and len(first) * _SHARE > _after_merging(graph, layers, {*left, *keep, *first}):
        first.pop()
    return left | dict.fromkeys(first, _FIRST)


def _after_merging(graph: gs.Graph, layers: list[gs.Node], skip: set[str]) -> int:
    """Number of layers once siblings are merged."""
    return len(layers) - sum(len(group) - 1 for group in sibling_groups(graph, skip))


def _is_depthwise(node: gs.Node) -> bool:
    """Whether a convolution takes each output channel from one input channel; of constant weights."""
    groups = node.attrs.get("group", 1)
    return node.op == "Conv" and groups > 1 and isinstance(node.inputs[1], gs.Constant) and (
        node.inputs[1].values.shape[1] == 1
    )  # fmt: skip


def _moves_less(node: gs.Node) -> bool:
    """Whether a convolution with stored weights moves fewer bytes in float16 than in INT8, one sample at a time."""
    shape = node.inputs[0].shape
    if node.op != "Conv" or not isinstance(node.inputs[1], gs.Constant) or not shape:
        return False
    extents = [extent if isinstance(extent, int) else None for extent in shape[1:]]
    if any(extent is None for extent in extents):
        return False
    numbers = math.prod(extent for extent in extents if extent is not None)
    return bool(2 * numbers > node.inputs[1].values.size)
