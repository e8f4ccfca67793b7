"""Multiplication by a constant for each channel: as a node, or inside the arithmetic that an island ends with."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.fuse_noise import Array
from relu_deploy.passes.edit import Names, dims, float_values, given, is_standard, producer_of, set_input
from relu_deploy.passes.linear import Layer


def times(name: str, source: gs.Variable, factors: Array, layer: Layer, result: gs.Variable, names: Names) -> gs.Node:
    """``result = source * factors``, channels where ``layer`` has them."""
    values = shaped(factors, layer).astype(layer.weight.dtype)
    stored = names.constant(f"{name}/factors", values)
    return gs.Node("Mul", names.new(name), inputs=[source, stored], outputs=[result])


def absorb(tensor: gs.Variable, factors: Array, layer: Layer, names: Names) -> bool:
    """Multiply a tensor by factors inside the nodes that make it, which nothing else may read.

    ``a h + b`` is scaled in ``a`` and ``b``, a LayerNormalization in its scale and offset.

    Args:
        tensor: Only readers that know of the factors.
        factors: ``(C,)``.
        layer: One that reads it, for where the channels are.
        names: Of the graph.

    Returns:
        False where it does not end with such arithmetic; nothing is changed then.
    """
    edits: list[tuple[gs.Node, int, np.ndarray]] = []
    rank = None if dims(tensor) is None else len(dims(tensor) or ())
    while (node := producer_of(tensor)) is not None and rank is not None:
        if is_standard(node, "LayerNormalization") and layer.node.op != "Conv" and len(node.outputs) == 1:
            scale, offset = (None if t is None else float_values(t) for t in (given(node, 1), given(node, 2)))
            if scale is None or scale.shape != factors.shape or (given(node, 2) is not None and offset is None):
                return False
            edits += [(node, at, v) for at, v in ((1, scale), (2, offset)) if v is not None]
            return _apply(edits, factors, names)
        if not is_standard(node, "Add", "Mul") or len(node.inputs) != 2:
            return False
        stored = [float_values(operand) for operand in node.inputs]
        at = 0 if stored[0] is not None else 1
        values, live = stored[at], dims(node.inputs[1 - at])
        if values is None or values.ndim > rank or live is None or len(live) != rank:
            return False
        edits.append((node, at, values))
        if node.op == "Mul":
            return _apply(edits, shaped(factors, layer), names)
        tensor = node.inputs[1 - at]
        if len(tensor.outputs) != 1:
            return False
    return False


def _apply(edits: list[tuple[gs.Node, int, np.ndarray]], factors: Array, names: Names) -> bool:
    for node, at, values in edits:
        scaled = (values.astype(np.float64) * factors).astype(values.dtype)
        set_input(node, at, names.constant(f"{node.inputs[at].name}/even", scaled))
    return True


def shaped(factors: Array, layer: Layer) -> Array:
    """One number for each channel so that they broadcast against a tensor that the layer reads or makes."""
    if layer.node.op != "Conv":
        return factors
    # All axes, or ONNX Runtime would not carry its change to channels-last across the multiplication.
    return factors.reshape(1, -1, *(1,) * (layer.weight.ndim - 2))
