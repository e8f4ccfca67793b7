"""Keep ONNX Runtime from quantising what was left in float, and from leaving in float what was quantised.

Its optimiser (``WeightBiasQuantization``, seen in onnxruntime 1.31) quantises the float weights of any Conv,
ConvTranspose or Gemm that stands between a DequantizeLinear and a QuantizeLinear, to int8 with one scale for the whole
tensor. A layer that was kept in float because INT8 hurts it would come back as INT8 of the coarsest kind; a
ConvTranspose, which has no integer kernel, would lose its precision for nothing. It passes over layers whose input has
a scale for each channel. So such a layer gets a DequantizeLinear of its own with as many equal scales as there are
channels: the numbers are the same. The converse is in :mod:`relu_deploy.int8.spare`.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.report import PassReport, Skip

_TOUCHED = ("Conv", "ConvTranspose", "Gemm")


def shield_float_layers(graph: gs.Graph) -> PassReport:
    """Give layers with float weights behind a DequantizeLinear one with equal scales for all channels.

    Args:
        graph: Quantised for ``ort``. Edited in place.

    Returns:
        Changed: the layers. Skipped: those whose input has no axis of two and more entries that is known.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    for node in list(graph.nodes):
        before = _dequantizer(node)
        if before is None:
            continue
        axis, size = _long_axis(node)
        if size < 2:
            skipped.append(Skip(node.name, "its input has a single channel, and no other axis of known size"))
            continue
        _dequantize_by_channel(graph, node, before, axis, size)
        changed.append(node.name)
    return PassReport("shield_float_layers", tuple(changed), tuple(skipped))


def _dequantizer(node: gs.Node) -> gs.Node | None:
    """What makes the input of a layer with float weights out of codes with one scale; None for any other node."""
    if node.op not in _TOUCHED or not isinstance(node.inputs[1], gs.Constant):
        return None
    before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    if before is None or before.op != "DequantizeLinear" or not isinstance(before.inputs[1], gs.Constant):
        return None
    return before if before.inputs[1].values.size == 1 else None


def _long_axis(node: gs.Node) -> tuple[int, int]:
    """An axis of a layer's input and its size: that of the channels, or another where there is but one channel."""
    weight, attrs = node.inputs[1].values.shape, node.attrs
    if node.op == "Gemm":
        return (0 if attrs.get("transA", 0) else 1), weight[1 if attrs.get("transB", 0) else 0]
    channels = weight[1] * attrs.get("group", 1) if node.op == "Conv" else weight[0]
    if channels > 1:
        return 1, channels
    shape = node.inputs[0].shape or ()
    return next(((i, n) for i, n in enumerate(shape) if isinstance(n, int) and n > 1), (1, 1))


def _dequantize_by_channel(graph: gs.Graph, node: gs.Node, before: gs.Node, axis: int, size: int) -> None:
    codes, scale = before.inputs[:2]
    zero = before.inputs[2].values if len(before.inputs) > 2 else np.zeros((), codes.dtype)
    name = f"{node.name}/input"
    output = gs.Variable(f"{name}/dequantized", dtype=node.inputs[0].dtype, shape=node.inputs[0].shape)
    constants = [
        gs.Constant(f"{name}/{part}", np.full(size, values.reshape(-1)[0], values.dtype))
        for part, values in (("scale", scale.values), ("zero_point", zero))
    ]
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}/DequantizeLinear", {"axis": axis}, [codes, *constants], [output])
    )
    node.inputs[0] = output
