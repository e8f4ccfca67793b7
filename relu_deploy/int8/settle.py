"""Biases of layers with centred inputs, made for the weights as codes.

A layer of ``W x + b`` that reads ``y = x - c`` has the bias ``b + W c``. Its weights are rounded to ``Q``, and then
``Q y + b + W c`` is off by ``(W - Q) c``, whatever the data. With ``b + Q c`` it is not, and what is left of the
weights' rounding is ``(W - Q) x``, as without the offset.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.placement import Placement
from relu_deploy.int8.store import Stored, layer_operands, store
from relu_deploy.passes.edit import Names, pinned_names, set_input
from relu_deploy.passes.linear import Layer, bias_behind, read_layer, response


def settle(
    graph: gs.Graph, placement: Placement, centres: Mapping[str, Array], chosen: Mapping[str, Stored],
    number: NumberFormat,
) -> dict[str, Stored]:  # fmt: skip
    """What is to be stored of layers with centred inputs; a bias that is an Add behind is changed in place.

    Args:
        graph: Right before its weights become codes.
        placement: Which layers become INT8.
        centres: Layer -> ``c``, ``(C,)``.
        chosen: Layer -> what was chosen on data: its bias, where it has one of its own, was chosen as well.
        number: The target's format.

    Returns:
        ``chosen``, and the layers that were changed.
    """
    names, pinned, settled = Names(graph), pinned_names(graph), dict(chosen)
    for node in graph.nodes:
        if node.name not in centres or node.name not in placement.chosen:
            continue
        layer = read_layer(node, bias_behind(node, pinned))
        stored = chosen.get(node.name) or store(node, number, 1.0)
        off = offset_error(node, stored.weight, centres[node.name])
        if layer.bias_add is not None:
            _add_behind(layer, layer.bias_add, off, names)
        elif stored.bias is None and off.any():  # the offset added nothing to the output, until the weights were codes
            node.op = "Gemm" if node.op == "MatMul" else node.op
            settled[node.name] = dataclasses.replace(stored, bias=off.astype(layer.weight.dtype))
        elif stored.bias is not None and node.name not in chosen:
            settled[node.name] = dataclasses.replace(stored, bias=(stored.bias + off).astype(stored.bias.dtype))
    return settled


def offset_error(node: gs.Node, weight: np.ndarray, centre: Array) -> Array:
    """``(Q - W) c`` of a layer, ``(O,)``, for weights ``Q`` that alpha is in."""
    exact = layer_operands(node)[0].astype(np.float64)
    return response(Layer(node, None, weight.astype(np.float64) - exact, np.zeros(0)), centre)


def _add_behind(layer: Layer, add: gs.Node, off: Array, names: Names) -> None:
    """Change the constant of the Add behind a product."""
    at = next(i for i, tensor in enumerate(add.inputs) if tensor is not layer.node.outputs[0])
    old = add.inputs[at]
    values = (old.values.astype(np.float64) + off).astype(old.values.dtype)
    set_input(add, at, names.constant(f"{old.name}/settled", values))
