"""Which activations the runtime keeps in blocks of channels, and so computes quicker than in the order of the file.

With graph optimisations on, onnxruntime lays activations of convolutions out as ``(N, C/16, H, W, 16)`` (8 without
AVX-512), and carries them so through what it knows in that layout, see ``nchwc_transformer.cc`` there. What is said
here decides only how a tensor is measured, never what it holds: a wrong guess costs time, not a range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import numpy_helper

from calib.model import STANDARD_DOMAINS, is_constant

# Of floats, with AVX-512; other processors have blocks of 8 or none, and what fills blocks of 16 fills those.
BLOCK = 16
_KEEPS_BLOCKS = ("Relu", "Sigmoid", "Tanh")
_SAME_SHAPES = ("Add", "Sum", "Mul")
_POOLS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")


def in_blocks(model: onnx.ModelProto, channels: Mapping[str, int], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Name the tensors whose channels fill whole blocks, in the network's order.

    Args:
        model: The network.
        channels: Of float32 tensors (N, C, H, W) that always have as many.
        shapes: Of these tensors on some batch.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    weights |= {node.output[0]: node.attribute[0].t for node in model.graph.node if is_constant(node)}
    for value in model.graph.input:  # a default value of an input is no constant
        weights.pop(value.name, None)
    found: dict[str, None] = {}
    for node in model.graph.node:
        if node.domain in STANDARD_DOMAINS and len(node.output) == 1 and channels.get(node.output[0], 1) % BLOCK == 0:
            inputs = [name for name in node.input if name]
            if (
                _convolves_in_blocks(node, weights)
                or (inputs and _carries_blocks(node, inputs, found, shapes))
                or _repeats_blocks(node, weights, found)
            ):
                found[node.output[0]] = None
    return list(found)


def _convolves_in_blocks(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node is a convolution over planes that the runtime has a kernel in blocks for."""
    if node.op_type != "Conv" or any(name not in weights for name in node.input[1:] if name):
        return False
    weight = weights[node.input[1]]
    if weight.data_type != onnx.TensorProto.FLOAT or len(weight.dims) != 4:
        return False
    outputs, inputs, groups = weight.dims[0], weight.dims[1], _attribute(node, "group", 1)
    if groups == 1:  # few channels are read as they are
        return inputs < BLOCK or inputs % BLOCK == 0
    return (inputs == 1 and outputs == groups) or (inputs % BLOCK == 0 and outputs // groups % BLOCK == 0)


def _carries_blocks(
    node: onnx.NodeProto, inputs: list[str], found: Mapping[str, None], shapes: Mapping[str, tuple[int, ...]]
) -> bool:
    """Whether a node gives blocks where it is given blocks."""
    if node.op_type == "BatchNormalization":
        return inputs[0] in found
    if any(name not in found for name in inputs):
        return False
    if node.op_type in _SAME_SHAPES:
        return len({shapes[name] for name in inputs}) == 1
    return node.op_type in _KEEPS_BLOCKS + _POOLS or (node.op_type == "Concat" and _attribute(node, "axis", 0) == 1)


def _repeats_blocks(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto], found: Mapping[str, None]) -> bool:
    """Whether a node gives each value of blocks a whole number of times, side by side."""
    if node.op_type != "Resize" or len(node.input) != 3 or node.input[0] not in found or node.input[2] not in weights:
        return False
    given = {attribute.name: attribute.s for attribute in node.attribute}
    how = given.get("mode"), given.get("coordinate_transformation_mode"), given.get("nearest_mode")
    scales = numpy_helper.to_array(weights[node.input[2]]).tolist()
    whole = len(scales) == 4 and scales[:2] == [1, 1] and all(scale.is_integer() and scale > 0 for scale in scales[2:])
    return how == (b"nearest", b"asymmetric", b"floor") and whole


def _attribute(node: onnx.NodeProto, name: str, default: int) -> Any:
    """A whole number among a node's attributes."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)
