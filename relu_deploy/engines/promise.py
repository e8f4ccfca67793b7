"""What an ONNX network promises a compiler: which layers are to run in int8, and why one of them cannot."""

from __future__ import annotations

import math

import onnx

from relu_deploy.engines.audit import Audit, part_of
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
RECURRENT = frozenset({"LSTM", "GRU", "RNN"})


class Promises:
    """A network indexed by what its Q/DQ promise. Reads the model once: a network may have thousands of nodes.

    Attributes:
        nodes: Name -> node, also of nodes inside If, Loop and Scan.
        linear: Name -> operator of every linear layer.
        int8: The linear layers whose operands both come from a DequantizeLinear.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = {node.name: node for node in all_nodes(model.graph)}
        self._made_by = {output: node for node in self.nodes.values() for output in node.output if output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes.values():
            for tensor in dict.fromkeys(node.input):
                self._readers.setdefault(tensor, []).append(node)
        self._sizes = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
        self.outputs = frozenset(output.name for output in model.graph.output)
        self.linear = {name: node.op_type for name, node in self.nodes.items() if node.op_type in LINEAR}
        self.int8 = {
            name: op
            for name, op in self.linear.items()
            if all(self._dequantize(self.nodes[name], operand) is not None for operand in (0, 1))
        }

    def why_float(self, name: str) -> str | None:
        """Why a linear layer cannot run in int8, as far as the network itself shows; None when it shows no reason."""
        node = self.nodes.get(name)
        if node is not None and node.op_type in RECURRENT:
            return "a recurrent layer computes in float"
        if node is None or name not in self.linear:
            return None
        data, weight = self._dequantize(node, 0), self._dequantize(node, 1)
        if data is None:
            return "its input is not quantised" if weight else "neither its input nor its weight is quantised"
        if weight is None:
            return "its weight is not quantised"
        if self._sizes.get(data.input[1], 1) > 1:
            return "its input has a scale for each channel, for which no int8 kernel exists"
        return None

    def readers(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that read what a node writes."""
        return [reader for output in node.output for reader in self._readers.get(output, [])]

    def _dequantize(self, node: onnx.NodeProto, operand: int) -> onnx.NodeProto | None:
        """The DequantizeLinear that an operand comes straight from."""
        source = self._made_by.get(node.input[operand]) if len(node.input) > operand else None
        return source if source is not None and source.op_type == "DequantizeLinear" else None


def disagreements(model: onnx.ModelProto, audit: Audit, *, student: bool = False) -> tuple[str, ...]:
    """Compare what a Q/DQ network promised with what the compiler did.

    Args:
        model: What was compiled. Every Conv, ConvTranspose, Gemm and MatMul whose operands both come from a
            DequantizeLinear promises to run in int8.
        audit: What the compiler did with it.
        student: The network is a ReLU student, so that no activation but ReLU may be left at all. Otherwise only
            kinds of activation that the network does not hold are reported.

    Returns:
        One sentence for each disagreement; empty when all is as promised.
    """
    promises = Promises(model)
    found, by_name = list(audit.conflicts), {layer.name: layer for layer in audit.linear}
    for name, op in promises.int8.items():
        layer = by_name.get(name)
        if layer is None:
            found.append(f"{op} {name!r} has quantised operands, but the engine holds no kernel that names it")
        elif layer.precision != "int8":
            reason = layer.reason or promises.why_float(name) or "the reason is not known"
            found.append(f"{op} {name!r} has quantised operands, but runs in {layer.precision}: {reason}")
    own = {ACTIVATIONS[node.op_type] for node in promises.nodes.values() if node.op_type in ACTIVATIONS}
    own |= {part[1] for name in promises.nodes if (part := part_of(name)) is not None}
    # Compilers respell: x * sigmoid(x) becomes a SiLU, and a GELU is computed from erf or tanh.
    own |= {"silu", "hardsigmoid"} if own & {"sigmoid", "silu", "hardswish", "hardsigmoid"} else set()
    own |= {"gelu", "erf", "tanh"} if own & {"gelu", "erf", "tanh", "mish"} else set()
    # The gates of a recurrent layer are part of what it is.
    own |= {"sigmoid", "tanh"} if any(node.op_type in RECURRENT for node in promises.nodes.values()) else set()
    for activation in audit.left:
        if student:
            found.append(f"{activation.kind} {activation.name!r} is still computed in a ReLU student")
        elif activation.kind not in own:
            found.append(f"{activation.kind} {activation.name!r} is computed, but the network holds none")
    return tuple(found)
