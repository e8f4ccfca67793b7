"""Which linear layers of a quantised file take int8: one way of counting for the files of every tool.

Two counts. By Q/DQ: a layer whose data and weights both come out of a DequantizeLinear, which is what a TensorRT
compiler goes by. By kernels: integer layers in the graph that ONNX Runtime optimised for this CPU, which is what was
computed here. A layer is a Conv, ConvTranspose, Gemm or MatMul with constant weights; products of two activations are
no layers.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import onnx
import onnxruntime as ort

FLOAT = {"Conv", "ConvTranspose", "Gemm", "MatMul", "FusedConv", "FusedGemm", "FusedMatMul"}
# Operator, computed in integers -> which of its inputs are the weights.
INTEGER = {
    "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "ConvInteger": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1,
    "DynamicQuantizeMatMul": 1,
}  # fmt: skip
MOVES = {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"}  # values stay what they are
_FROM_CONSTANTS = MOVES | {"QuantizeLinear", "DequantizeLinear", "Cast", "Mul", "Concat", "Slice"}


@dataclasses.dataclass(frozen=True)
class Count:
    """Linear layers of a file.

    Attributes:
        int8: Those that take int8.
        all: All that have constant weights.
    """

    int8: int
    all: int


def by_nodes(model: onnx.ModelProto) -> Count:
    """Count in a graph as it is: Q/DQ around layers, or integer operators."""
    return _count(model, counts_qdq=True)


def by_kernels(file: Path) -> Count:
    """Count what ONNX Runtime made of a file for this CPU: only its integer operators, whatever Q/DQ it left."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(optimised)
        options.log_severity_level = 4  # it warns that the file is for this CPU only, as is meant
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        return _count(onnx.load(optimised), counts_qdq=False)


def _count(model: onnx.ModelProto, *, counts_qdq: bool) -> Count:
    graph, nodes = _Graph(model), model.graph.node
    integer = sum(n.op_type in INTEGER and graph.constant(n.input[INTEGER[n.op_type]]) for n in nodes)
    layers = [n for n in nodes if n.op_type in FLOAT and any(map(graph.constant, n.input[:2]))]
    quantised = sum(counts_qdq and all(map(graph.dequantised, n.input[:2])) for n in layers)
    return Count(integer + quantised, integer + len(layers))


class _Graph:
    """Who makes a tensor."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._makers = {name: node for node in model.graph.node for name in node.output}
        self._weights = {tensor.name for tensor in model.graph.initializer}

    def constant(self, name: str) -> bool:
        """Whether a tensor is made of constants alone, as weights are that were transposed or quantised."""
        if name in self._weights or not name:
            return True
        node = self._makers.get(name)
        if node is None:
            return False
        return node.op_type == "Constant" or (
            node.op_type in _FROM_CONSTANTS and all(self.constant(x) for x in node.input)
        )

    def dequantised(self, name: str) -> bool:
        """Whether a tensor is what a DequantizeLinear gave, maybe moved about."""
        node = self._makers.get(name)
        while node is not None and node.op_type in MOVES:
            node = self._makers.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"
