"""What an ONNX network promises a compiler: which layers are to run in int8, and why one of them cannot."""

from __future__ import annotations

import math

import onnx

from relu_deploy.graph import all_nodes

# Operator -> kind; the contrib operators are what ONNX Runtime's optimiser writes.
ACTIVATIONS = {
    "Relu": "relu", "Clip": "clip", "LeakyRelu": "leaky_relu", "PRelu": "prelu", "ThresholdedRelu": "thresholded_relu",
    "Elu": "elu", "Selu": "selu", "Celu": "celu", "Gelu": "gelu", "Sigmoid": "sigmoid", "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish", "Swish": "silu", "Mish": "mish", "Softplus": "softplus", "Softsign": "softsign",
    "Tanh": "tanh", "Erf": "erf", "FastGelu": "gelu", "BiasGelu": "gelu", "QuickGelu": "silu",
    "QLinearSigmoid": "sigmoid", "QLinearLeakyRelu": "leaky_relu",
}  # fmt: skip
LINEAR = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def linear_nodes(model: onnx.ModelProto) -> dict[str, str]:
    """Name -> operator of every linear layer, also inside If, Loop and Scan."""
    return {node.name: node.op_type for node in all_nodes(model.graph) if node.op_type in LINEAR}


def promised_int8(model: onnx.ModelProto) -> dict[str, str]:
    """Name -> operator of every linear layer whose operands both come from a DequantizeLinear."""
    made_by = _producers(model)
    return {
        node.name: node.op_type
        for node in all_nodes(model.graph)
        if node.op_type in LINEAR and all(_dequantized(made_by, node, operand) for operand in (0, 1))
    }


def why_float(model: onnx.ModelProto, name: str) -> str | None:
    """Why a linear layer cannot run in int8, as far as the network itself shows; None when it shows no reason."""
    made_by = _producers(model)
    node = next((node for node in all_nodes(model.graph) if node.name == name and node.op_type in LINEAR), None)
    if node is None:
        return None
    quantized = [_dequantized(made_by, node, operand) for operand in (0, 1)]
    if not any(quantized):
        return "neither its input nor its weight is quantised"
    if not all(quantized):
        return "its input is not quantised" if quantized[1] else "its weight is not quantised"
    if _scale_size(model, made_by[node.input[0]]) > 1:
        return "its input has a scale for each channel, for which no int8 kernel exists"
    if node.op_type == "ConvTranspose":
        return "the compiler has no int8 kernel for this ConvTranspose"
    return None


def _producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Tensor name -> node that makes it."""
    return {output: node for node in all_nodes(model.graph) for output in node.output if output}


def _dequantized(made_by: dict[str, onnx.NodeProto], node: onnx.NodeProto, operand: int) -> bool:
    """Whether an operand comes straight from a DequantizeLinear."""
    source = made_by.get(node.input[operand]) if len(node.input) > operand else None
    return source is not None and source.op_type == "DequantizeLinear"


def _scale_size(model: onnx.ModelProto, dequantize: onnx.NodeProto) -> int:
    """Number of scales of a DequantizeLinear; 1 when they are not an initializer."""
    scale = next((tensor for tensor in model.graph.initializer if tensor.name == dequantize.input[1]), None)
    return 1 if scale is None else math.prod(scale.dims)
