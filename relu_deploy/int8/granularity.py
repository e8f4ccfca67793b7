"""One weight scale for a layer, or one for each output channel: where the first pays, and loses little.

On TensorRT-RTX 1.7 a convolution in a float16 network with one weight scale has bias and ReLU fused and writes float16;
with a scale for each channel it writes float32, and a second kernel adds the bias (docs/placement.md). Products of
matrices write float16 with either, and depthwise convolutions are better left in float16. But a product that gives the
queries, keys and values of attention in one is computed in float, Q/DQ notwithstanding, unless it has one scale: the
compiler cuts it into three (tests/engines/test_quantizer_engines.py).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat, quantize_symmetric, weight_scales
from relu_deploy.int8.placement import MOVING_OPS

# Noise over signal of a channel, averaged over channels: 30 dB, that of 8-bit activations whose largest is 14 times
# their root mean square.
MOST_NOISE = 1e-3
# What takes parts of a tensor, and what may stand between a product and attention besides operators that move values.
CUTTING = ("Split", "Slice", "Gather")
SCALED = ("Add", "Mul", "Div")
_CODED = ("QuantizeLinear", "DequantizeLinear")


def may_share(node: gs.Node, number: NumberFormat) -> bool:
    """Whether a layer's weights get one scale if they lose little by it; before they are looked at."""
    if number.weight_granularity != "auto":
        return number.weight_granularity == "tensor"
    fuses = number.half and node.op == "Conv" and node.attrs.get("group", 1) == 1
    return bool(fuses) or is_cut_for_attention(node)


def shares_scale(node: gs.Node, number: NumberFormat) -> bool:
    """Whether a layer with constant weights gets one scale for all its output channels."""
    if number.weight_granularity != "auto" or not may_share(node, number):
        return may_share(node, number)
    weight = node.inputs[1].values
    rows = weight if node.op == "Conv" or node.attrs.get("transB", 0) else np.moveaxis(weight, -1, 0)
    return bool(shared_noise(rows, number.weight_max) <= MOST_NOISE)


def is_cut_for_attention(node: gs.Node) -> bool:
    """Whether what a product gives is cut up, and one part multiplied with what another is computed of."""
    if node.op not in ("MatMul", "Gemm"):
        return False
    waiting, seen = [(node.outputs[0], False)], set()
    while waiting:
        tensor, cut = waiting.pop()
        for reader in tensor.outputs:
            if cut and reader.op in ("MatMul", "Einsum") and not any(isinstance(t, gs.Constant) for t in reader.inputs):
                return True
            passes = reader.op in (*MOVING_OPS, *_CODED) and reader.inputs[0] is tensor
            constant = reader.op in SCALED and any(isinstance(t, gs.Constant) for t in reader.inputs)
            if (passes or constant) and (id(reader), cut) not in seen:
                seen.add((id(reader), cut))
                waiting += [(output, cut or reader.op in CUTTING) for output in reader.outputs]
    return False


def shared_noise(weight: npt.NDArray[np.floating], limit: int) -> float:
    """Noise over signal, in power, that one scale for all gives the weights of a channel; the mean over channels.

    Args:
        weight: Output channels first.
        limit: Largest code.

    >>> round(10 * np.log10(1 / shared_noise(np.array([[1.0, 0.3], [0.01, 0.003]]), 127)))
    12
    """
    rows = weight.reshape(weight.shape[0], -1).astype(np.float64)
    scale = weight_scales(rows, None, limit)
    error = rows - quantize_symmetric(rows, scale, None, limit) * float(scale)
    power = (rows**2).sum(axis=1)
    alive = power > 0
    return float(((error**2).sum(axis=1)[alive] / power[alive]).mean()) if alive.any() else 0.0
