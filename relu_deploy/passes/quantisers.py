"""Look through Q/DQ: for knowing what a network computes, a quantiser and its way back are the identity."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.region import constant_values

# Constants up to this many numbers are worth their floats: slopes and scales, not weights.
_SMALL = 1 << 16


def see_through_quantisers(graph: gs.Graph) -> int:
    """Connect readers of DequantizeLinear(QuantizeLinear(x)) to ``x``, and turn small quantised constants into floats.

    Rounding is lost, so this is for looking at a network only. Nodes that nobody reads any more stay.

    Args:
        graph: Edited in place.

    Returns:
        How many were looked through.
    """
    count = 0
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        if node.op != "DequantizeLinear" or not node.outputs or id(node.outputs[0]) in outputs:
            continue
        source = real_source(node.outputs[0])
        if source is node.outputs[0]:
            values = _floats(node)
            if values is None:
                continue
            source = gs.Constant(f"{node.outputs[0].name}/float", values)
        _hand_over(node.outputs[0], source)
        count += 1
    return count


def real_source(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor before a chain of quantisers and their ways back; the tensor itself where there is none."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op == "DequantizeLinear":
        codes = tensor.inputs[0].inputs[0]
        if len(codes.inputs) != 1 or codes.inputs[0].op != "QuantizeLinear":
            return tensor
        tensor = codes.inputs[0].inputs[0]
    return tensor


def _hand_over(old: gs.Tensor, new: gs.Tensor) -> None:
    for reader in list(old.outputs):
        for index, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[index] = new


def _floats(node: gs.Node) -> np.ndarray | None:
    """``(codes - zero point) * scale`` of a small constant; None where it is live, large or in blocks."""
    parts = [constant_values(tensor) for tensor in node.inputs if not tensor.is_empty()]
    codes, scale = parts[0], parts[1]
    if codes is None or scale is None or any(part is None for part in parts) or codes.size > _SMALL or scale.ndim > 1:
        return None
    zero = np.zeros_like(scale) if len(parts) < 3 else np.asarray(parts[2], dtype=np.float64)
    if scale.size > 1:
        axis = int(node.attrs.get("axis", 1)) % codes.ndim
        shape = [-1 if i == axis else 1 for i in range(codes.ndim)]
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    return np.asarray((np.asarray(codes, dtype=np.float64) - zero) * scale, dtype=scale.dtype)
