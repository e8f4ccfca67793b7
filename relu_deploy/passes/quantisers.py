"""Look through integers: for what a network computes, a quantiser is the identity and an integer sum a sum."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.region import constant_values

# Constants up to this many numbers are worth their floats: slopes and scales, not weights.
_SMALL = 1 << 16
_BOUNDARIES = ("QuantizeLinear", "DequantizeLinear")
# ONNX Runtime's integer operators, their elementwise standard ones, and where their operands are; a scale and a zero
# point follow each.
_LIFTED = {
    "QLinearSigmoid": ("Sigmoid", (0,)), "QLinearLeakyRelu": ("LeakyRelu", (0,)), "QLinearAdd": ("Add", (0, 3)),
    "QLinearMul": ("Mul", (0, 3)),
}  # fmt: skip


def see_through_quantisers(graph: gs.Graph) -> None:
    """Take every quantiser and its way back for the identity, and elementwise integer arithmetic for that of reals.

    Rounding is lost, so this is for looking at a network only. Nodes that nobody reads any more stay.

    Args:
        graph: Edited in place.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if node.op in _LIFTED:
            _lift(node)
        elif node.op in _BOUNDARIES and node.outputs and id(node.outputs[0]) not in outputs:
            source = node.inputs[0]
            if constant_values(source) is not None:
                values = _floats(node.inputs, node.attrs)
                if values is None:
                    continue
                source = gs.Constant(f"{node.outputs[0].name}/float", values)
            elif node.op == "DequantizeLinear":
                source.dtype = node.outputs[0].dtype or np.float32
            _hand_over(node.outputs[0], source)


def real_source(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before a chain of quantisers and their ways back; the tensor itself where there is none."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in _BOUNDARIES:
        before = tensor.inputs[0].inputs[0]
        if constant_values(before) is not None:
            break
        tensor = before
    return tensor


def _lift(node: gs.Node) -> None:
    """Turn an integer operator into the one that it approximates."""
    op, places = _LIFTED[node.op]
    operands = []
    for place in places:
        operand, parts = node.inputs[place], node.inputs[place : place + 3]
        values = _floats(parts, {}) if constant_values(operand) is not None else None
        if values is not None:
            operand = gs.Constant(f"{operand.name}/float", values)
        elif isinstance(operand, gs.Variable):
            operand.dtype = np.float32
        operands.append(operand)
    node.op, node.domain = op, None
    node.inputs = operands
    node.outputs[0].dtype = np.float32


def _hand_over(old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def _floats(inputs: list[gs.Tensor], attrs: dict[str, object]) -> np.ndarray | None:
    """``(codes - zero point) * scale`` of a small constant; None where it is live, large or in blocks."""
    parts = [constant_values(tensor) for tensor in inputs if not tensor.is_empty()]
    if len(parts) < 2 or parts[0] is None or parts[1] is None or any(part is None for part in parts):
        return None
    codes, scale = parts[0], parts[1]
    if codes.size > _SMALL or scale.ndim > 1 or scale.dtype.kind != "f":
        return None
    zero = np.zeros_like(scale) if len(parts) < 3 else np.asarray(parts[2], dtype=np.float64)
    if scale.size > 1:
        axis = int(str(attrs.get("axis", 1))) % codes.ndim
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return np.asarray((np.asarray(codes, dtype=np.float64) - zero) * scale, dtype=scale.dtype)
