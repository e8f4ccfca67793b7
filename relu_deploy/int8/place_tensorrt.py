"""Where Q/DQ go for TensorRT and TensorRT-RTX: in front of every quantised layer, and on shortcuts.

The compiler moves and fuses by itself and wants no Q/DQ between a convolution and its ReLU, and on a residual Add the
shortcut quantised (TensorRT#1992). docs/placement.md has what other places would cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.int8.placement import MOVING_OPS, Layer, Placement

_POOLS = ("GlobalAveragePool", "ReduceMean")


def place_tensorrt(
    graph: gs.Graph, known: set[str], chosen: set[str], layers: tuple[Layer, ...], number: NumberFormat
) -> Placement:
    """The placement for the TensorRT compilers.

    Args:
        graph: Sorted topologically, constants folded.
        known: Names of the tensors that have a range.
        chosen: Names of the layers that become INT8.
        layers: All layers, for the placement.
        number: The target's format.
    """
    uses: dict[str, set[str]] = {}
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.name in chosen:
            uses.setdefault(node.inputs[0].name, set()).add(node.name)
    for node in graph.nodes:
        for tensor in _residual_operands(node, chosen, order, number):
            if tensor.name in known:
                uses.setdefault(tensor.name, set()).add(node.name)
    return Placement({name: frozenset(nodes) for name, nodes in uses.items()}, (), layers)


def with_pooled(graph: gs.Graph, placement: Placement, outputs: Iterable[str], measured: Iterable[str]) -> Placement:
    """Also quantise what a pool over all positions reads of a learned activation.

    TensorRT-RTX 1.7 makes one kernel of such an activation, Q/DQ and the mean. Without Q/DQ, behind a layer with a
    scale for each output channel, it cuts the activation in two and writes floats in between (benchmarks/pwlu.py).

    Args:
        graph: What ``placement`` was made from.
        placement: For a TensorRT target.
        outputs: Names of the tensors that learned activations make.
        measured: Names of the tensors that have a range.
    """
    uses, made = dict(placement.uses), set(outputs) & set(measured)
    for node in graph.nodes:
        name = node.inputs[0].name if node.inputs else ""
        if node.op in _POOLS and name in made:
            uses[name] = (uses.get(name) or frozenset()) | {node.name}
    return dataclasses.replace(placement, uses=uses)


def quantised_behind(tensor: gs.Variable, placement: Placement) -> bool:
    """Whether a tensor is quantised, or all that reads it only moves or selects values that are then quantised."""
    if tensor.name in placement.uses:
        return True
    readers = list(tensor.outputs)
    return bool(readers) and all(
        node.op in MOVING_OPS and node.inputs[0] is tensor and quantised_behind(node.outputs[0], placement)
        for node in readers
    )


def before_splits(graph: gs.Graph, placement: Placement, splits: set[str], known: set[str]) -> Placement:
    """Quantise what siblings give as a whole, before it is cut up, where all parts are wanted as codes.

    One kernel then quantises and cuts; behind the cut it would be one for each part, all of which read the whole.

    Args:
        graph: What ``placement`` was made from.
        placement: For a TensorRT target.
        splits: Names of the nodes that cut.
        known: Names of the tensors that have a range.
    """
    uses = dict(placement.uses)
    for node in graph.nodes:
        whole = node.inputs[0].name if node.name in splits else ""
        if whole in known and all(_wanted_as_codes(part, uses) for part in node.outputs):
            uses[whole] = (uses.get(whole) or frozenset()) | {node.name}
            for part in node.outputs:
                uses.pop(part.name, None)
    return dataclasses.replace(placement, uses=uses)


def _wanted_as_codes(part: gs.Variable, uses: Mapping[str, frozenset[str] | None]) -> bool:
    """Whether a layer reads a tensor as codes, at once or as a part of a concatenation."""
    return part.name in uses or any(r.op == "Concat" and r.outputs[0].name in uses for r in part.outputs)


def _residual_operands(
    node: gs.Node, chosen: set[str], order: dict[int, int], number: NumberFormat
) -> list[gs.Variable]:
    """Operands of a residual Add that are read as INT8: the shortcut.

    With a single weight scale a layer it is both, because TensorRT-RTX would then fuse the sum into the convolution and
    dequantise the shortcut in a kernel of its own; docs/placement.md has the bytes.
    """
    if node.op != "Add" or (shortcut := _shortcut(node, chosen, order)) is None:
        return []
    main = next(t for t in node.inputs if t is not shortcut)
    layer = _layer_behind(main)
    return list(node.inputs) if layer is not None and shares_scale(layer, number) else [shortcut]


def _shortcut(node: gs.Node, chosen: set[str], order: dict[int, int]) -> gs.Variable | None:
    """The operand of a residual Add that does not come straight from the layer that the Add is fused into."""
    if len(node.inputs) != 2 or not all(isinstance(t, gs.Variable) for t in node.inputs):
        return None
    layers = [(_layer_behind(tensor), index) for index, tensor in enumerate(node.inputs) if len(tensor.outputs) == 1]
    fused = [
        (order[id(layer)], index)
        for layer, index in layers
        if layer is not None and layer.name in chosen and layer.op in ("Conv", "ConvTranspose")
    ]
    if not fused:
        return None
    shortcut: gs.Variable = node.inputs[1 - max(fused)[1]]
    return shortcut


def _layer_behind(tensor: gs.Variable) -> gs.Node | None:
    """The node that makes a tensor, or what a factor for each channel is multiplied to (see even_rows)."""
    maker: gs.Node | None = tensor.inputs[0] if tensor.inputs else None
    if maker is None or maker.op != "Mul":
        return maker
    live = [operand for operand in maker.inputs if not isinstance(operand, gs.Constant)]
    before = live[0] if len(live) == 1 and len(live[0].outputs) == 1 else None
    return before.inputs[0] if before is not None and before.inputs else maker
