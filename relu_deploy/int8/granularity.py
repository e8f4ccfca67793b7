"""One weight scale for a layer, or one for each output channel: where the first pays, and loses little.

On TensorRT-RTX 1.7 a convolution in a float16 network with one weight scale has bias and ReLU fused and writes float16;
with a scale for each channel it writes float32, and a second kernel adds the bias (docs/placement.md). Products of
matrices write float16 with either, and depthwise convolutions are better left in float16.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat, quantize_symmetric, weight_scales

# Noise over signal of a channel, averaged over channels: 30 dB, that of 8-bit activations whose largest is 14 times
# their root mean square.
MOST_NOISE = 1e-3


def may_share(node: gs.Node, number: NumberFormat) -> bool:
    """Whether a layer's weights get one scale if they lose little by it; before they are looked at."""
    if number.weight_granularity != "auto":
        return number.weight_granularity == "tensor"
    return bool(node.op == "Conv" and node.attrs.get("group", 1) == 1)


def shares_scale(node: gs.Node, number: NumberFormat) -> bool:
    """Whether a layer with constant weights gets one scale for all its output channels."""
    if number.weight_granularity != "auto" or not may_share(node, number):
        return may_share(node, number)
    return bool(shared_noise(node.inputs[1].values, number.weight_max) <= MOST_NOISE)


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
