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
from relu_deploy.passes.linear import Layer, response


def settle(
    graph: gs.Graph, placement: Placement, centres: Mapping[str, Array], chosen: Mapping[str, Stored],
    number: NumberFormat,
) -> dict[str, Stored]:  # fmt: skip
    """What is to be stored of the layers with centred inputs, and of those for which it was chosen on data.

    Args:
        graph: Right before its weights become codes; a product of matrices becomes a Gemm where it needs a bias.
        placement: Which layers become INT8.
        centres: Layer -> ``c``, ``(C,)``.
        chosen: Layer -> what was chosen on data, biases settled.
        number: The target's format.
    """
    found = dict(chosen)
    for node in graph.nodes:
        if node.name in centres and node.name in placement.chosen and node.name not in chosen:
            stored = store(node, number, 1.0)
            found[node.name] = settled(node, stored, centres[node.name])
            if stored.bias is None and node.op == "MatMul" and found[node.name].bias is not None:
                node.op = "Gemm"  # even_inputs centres no other product without a bias than one of matrices
    return found


def settled(node: gs.Node, stored: Stored, centre: Array | None) -> Stored:
    """A layer with its bias made for its codes; the same where what it reads is not centred.

    Args:
        node: Float, its bias made for its float weights.
        stored: The bias as well, and codes.
        centre: ``c``, ``(C,)``.
    """
    if centre is None:
        return stored
    off = offset_error(node, stored.weight, centre)
    if stored.bias is None:  # what the offset adds to the output was 0, until the weights were codes
        return dataclasses.replace(stored, bias=off.astype(node.inputs[1].values.dtype)) if off.any() else stored
    return dataclasses.replace(stored, bias=(stored.bias + off).astype(stored.bias.dtype))


def offset_error(node: gs.Node, weight: np.ndarray, centre: Array) -> Array:
    """``(Q - W) c`` of a layer, ``(O,)``, for weights ``Q`` that alpha is in."""
    exact = layer_operands(node)[0].astype(np.float64)
    return response(Layer(node, None, weight.astype(np.float64) - exact, np.zeros(0)), centre)


def steady(node: gs.Node, weight: np.ndarray, centre: Array | None) -> np.ndarray:
    """Rounded weights moved as little as they can be so that the bias for the float weights fits them.

    What is learned of a network with these weights holds for codes with a settled bias.

    Args:
        node: Float.
        weight: ``Q``, that alpha is in.
        centre: ``c``, ``(C,)``; None: what the layer reads is not centred.
    """
    if centre is None or not centre.any():
        return weight
    off = offset_error(node, weight, centre)
    if node.op in ("Gemm", "MatMul"):
        across = node.op == "Gemm" and bool(node.attrs.get("transB", 0))
        moved = np.outer(off, centre) if across else np.outer(centre, off)
        return np.asarray(weight - moved / (centre @ centre), dtype=weight.dtype)
    groups = int(node.attrs.get("group", 1))
    each = centre.reshape(groups, -1).repeat(weight.shape[0] // groups, axis=0)  # (O, inputs of its group)
    power = (each**2).sum(axis=1) * np.prod(weight.shape[2:])
    share = np.divide(off, power, out=np.zeros_like(off), where=power > 0)
    moved = (share[:, None] * each).reshape(*each.shape, *(1,) * (weight.ndim - 2))
    return np.asarray(weight - moved, dtype=weight.dtype)
