"""A Q/DQ network of any tool, indexed for rules: its quantisers read out, and who makes and reads each tensor.

Works on the protobuf and not on graphsurgeon's view, because what is looked for includes types and shapes that the
latter does not take.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from relu_deploy.graph import all_nodes, opset
from relu_deploy.int8.placement import LINEAR_OPS
from relu_deploy.targets import Target

# ONNX's own domain, by both its names, and ONNX Runtime's: its Q/DQ are those of ONNX with more types.
OWN_DOMAINS, CONTRIB = ("", "ai.onnx"), "com.microsoft"
# Operators on codes that do the work of a linear layer.
INTEGER_LAYERS = ("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "QLinearConvTranspose")
# Through these TensorRT-RTX 1.7 carries codes, so that a layer behind them is int8 although Q/DQ stand in front.
# A Resize is not among them, nor an average.
_CARRY = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
    "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
# Through these ONNX Runtime does, with one reader.
_CARRY_ORT = tuple(op for op in _CARRY if op not in ("DepthToSpace", "SpaceToDepth"))
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)


@dataclasses.dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear.

    Attributes:
        node: The node.
        scale: Its scales, any shape; None where they are computed at run time.
        zero_point: None where it has none, or where it is computed.
        codes: ``TensorProto`` type of the codes; 0 where it is not known.
        axis: As written, or its default of 1.
        block: ``block_size``; 0: not in blocks.
    """

    node: onnx.NodeProto
    scale: npt.NDArray[Any] | None
    zero_point: npt.NDArray[Any] | None
    codes: int
    axis: int
    block: int

    @property
    def source(self) -> str:
        """Tensor that it reads."""
        return str(self.node.input[0])

    @property
    def output(self) -> str:
        """Tensor that it writes."""
        return str(self.node.output[0])

    @property
    def shifted(self) -> bool:
        """Whether a zero point is known to differ from 0."""
        return self.zero_point is not None and bool(np.any(self.zero_point.astype(np.float64) != 0))

    @property
    def per_channel(self) -> bool:
        """Whether it has more than one scale, all along one axis."""
        return self.scale is not None and self.scale.ndim == 1 and self.scale.size > 1


@dataclasses.dataclass(frozen=True, eq=False)
class LinearLayer:
    """A Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        node: The node.
        data: What dequantises its first operand, directly in front of it.
        weight: What dequantises its second.
        bias: What dequantises its third.
    """

    node: onnx.NodeProto
    data: Quantizer | None
    weight: Quantizer | None
    bias: Quantizer | None


class Network:
    """A model indexed by tensor and node. Built once: a network may have thousands of nodes.

    Attributes:
        model: As given; not changed.
        opset: Of the default domain.
        nodes: Every node, also of the graphs inside If, Loop and Scan.
        quantizers: Every Q.
        dequantizers: Every DQ.
        layers: Every linear layer.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.opset = model, opset(model)
        self.nodes = list(all_nodes(model.graph))
        self._made_by = {output: node for node in self.nodes for output in node.output if output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._values: dict[str, npt.NDArray[Any] | None] = {}
        self._inputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
        self._dims = _dims(model)
        self.outputs = frozenset(value.name for value in model.graph.output)
        self.quantizers = [self._read(node) for node in self.nodes if is_quantizer(node, "QuantizeLinear")]
        self._by_output = {q.output: q for q in self.quantizers}
        self.dequantizers = [self._read(node) for node in self.nodes if is_quantizer(node, "DequantizeLinear")]
        self._by_output |= {dq.output: dq for dq in self.dequantizers}
        self.layers = [self._layer(n) for n in self.nodes if n.op_type in LINEAR_OPS and n.domain in OWN_DOMAINS]

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that writes a tensor."""
        return self._made_by.get(tensor)

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read a tensor, each once."""
        return self._readers.get(tensor, [])

    def quantizer(self, tensor: str) -> Quantizer | None:
        """The Q that writes a tensor."""
        found = self._by_output.get(tensor)
        return found if found is not None and found.node.op_type == "QuantizeLinear" else None

    def dequantizer(self, tensor: str) -> Quantizer | None:
        """The DQ that writes a tensor."""
        found = self._by_output.get(tensor)
        return found if found is not None and found.node.op_type == "DequantizeLinear" else None

    def codes_reach(self, tensor: str, carried: tuple[str, ...], *, rtx: bool) -> bool:
        """Whether a tensor is dequantised codes that at most operators of ``carried`` have moved since.

        TensorRT-RTX also carries them through a concatenation of one scale, a padding that is not a constant other
        than 0, a negation, a factor and a cast from float32 to float16; the cast the other way gives floats.
        """
        return self._carried_scale(tensor, carried, rtx=rtx) is not None

    def _carried_scale(self, tensor: str, carried: tuple[str, ...], *, rtx: bool) -> float | None:
        """The scale of the codes that reach a tensor; None where none do."""
        while (dq := self.dequantizer(tensor)) is None:
            maker = self.maker(tensor)
            if maker is None:
                return None
            if rtx and maker.op_type == "Concat":
                scales = {self._carried_scale(name, carried, rtx=rtx) for name in maker.input}
                return scales.pop() if len(scales) == 1 else None
            kept = rtx and (maker.op_type == "Neg" or self._scales_by_constant(maker) or to_half(maker))
            if not kept and maker.op_type not in carried and not self._pads_zeros(maker):
                return None
            tensor = maker.input[0]
        return float(dq.scale.reshape(-1)[0]) if dq.scale is not None and dq.scale.size else None

    def dequantizer_behind(self, tensor: str) -> tuple[Quantizer | None, tuple[str, ...]]:
        """The DQ whose values reach a tensor moved or cast to float16 at most, and the operators in between."""
        between: list[str] = []
        while (dq := self.dequantizer(tensor)) is None:
            maker = self.maker(tensor)
            if maker is None or not (maker.op_type in _CARRY or to_half(maker)):
                return None, ()
            between.append(maker.op_type)
            tensor = maker.input[0]
        return dq, tuple(between)

    def _scales_by_constant(self, node: onnx.NodeProto) -> bool:
        value = self.constant(node.input[1]) if node.op_type == "Mul" else None
        return value is not None and value.size == 1

    def _pads_zeros(self, node: onnx.NodeProto) -> bool:
        if node.op_type != "Pad":
            return False
        if attribute(node, "mode", b"constant") != b"constant":
            return True
        value = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros(1)
        return value is not None and not value.any()

    def real_maker(self, tensor: str) -> onnx.NodeProto | None:
        """The node that computes a tensor, Q/DQ aside."""
        while (maker := self.maker(tensor)) is not None and maker.op_type in ("QuantizeLinear", "DequantizeLinear"):
            tensor = maker.input[0]
        return maker

    def fused_layer(self, node: onnx.NodeProto) -> tuple[int, LinearLayer] | None:
        """The int8 convolution that a sum is fused into, and its operand: the last that only the sum reads."""
        if len(set(node.input)) < len(node.input):
            return None
        order = {layer.node.output[0]: number for number, layer in enumerate(self.layers)}
        found = [
            (order[name], index)
            for index, name in enumerate(node.input)
            if name in order and len(self.readers(name)) == 1 and name not in self.outputs
        ]
        layers = [(index, self.layers[number]) for number, index in sorted(found)]
        fusing = [
            (index, layer)
            for index, layer in layers
            if layer.data is not None and layer.weight is not None and layer.node.op_type in ("Conv", "ConvTranspose")
        ]
        return fusing[-1] if fusing else None

    def starts_at_zero(self, tensor: str) -> bool:
        """Whether a tensor is made by a Q or DQ whose lowest code is 0.0."""
        found = self._by_output.get(tensor)
        if found is None or found.scale is None or found.scale.ndim or not found.codes:
            return False
        bottom = {TensorProto.UINT8: 0, TensorProto.UINT16: 0, TensorProto.INT8: -128, TensorProto.INT16: -32768}
        zero = 0 if found.zero_point is None else int(found.zero_point.reshape(-1)[0])
        return any(found.codes == kind and zero == low for kind, low in bottom.items())

    def is_constant(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file."""
        maker = self.maker(tensor)
        return tensor in self._stored or (maker is not None and maker.op_type == "Constant")

    def constant(self, tensor: str) -> npt.NDArray[Any] | None:
        """The value of a stored tensor; None for others."""
        if tensor not in self._values:
            self._values[tensor] = self._value(tensor)
        return self._values[tensor]

    def dims(self, tensor: str) -> tuple[int, ...] | None:
        """Extents of a tensor, -1 where one is open; None where nothing is known."""
        return self._dims.get(tensor)

    def code_type(self, tensor: str) -> int:
        """``TensorProto`` type of a tensor of codes; 0 where it is not known."""
        if tensor in self._stored:
            return self._stored[tensor].data_type
        maker = self.maker(tensor)
        if maker is None:
            return self._inputs.get(tensor, 0)
        if maker.op_type == "QuantizeLinear":
            return self._codes_of_quantizer(maker)
        return int(maker.attribute[0].t.data_type) if maker.op_type == "Constant" and maker.attribute else 0

    def _codes_of_quantizer(self, node: onnx.NodeProto) -> int:
        if len(node.input) > 2 and node.input[2]:
            return self.code_type(node.input[2])
        return int(attribute(node, "output_dtype", 0)) or TensorProto.UINT8  # what ONNX says of one without

    def _read(self, node: onnx.NodeProto) -> Quantizer:
        scale = self.constant(node.input[1])
        zero = self.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if node.op_type == "QuantizeLinear":
            codes = self._codes_of_quantizer(node)
        else:
            codes = self.code_type(node.input[0]) or (self.code_type(node.input[2]) if len(node.input) > 2 else 0)
        return Quantizer(
            node, scale, zero, codes, int(attribute(node, "axis", 1)), int(attribute(node, "block_size", 0))
        )

    def _layer(self, node: onnx.NodeProto) -> LinearLayer:
        data, weight, bias = (self.dequantizer(node.input[i]) if len(node.input) > i else None for i in range(3))
        return LinearLayer(node, data, weight, bias)

    def _value(self, tensor: str) -> npt.NDArray[Any] | None:
        if tensor in self._stored:
            return numpy_helper.to_array(self._stored[tensor])
        maker = self.maker(tensor)
        if maker is not None and maker.op_type == "Identity":  # exporters share equal constants so
            return self.constant(maker.input[0])
        if maker is None or maker.op_type != "Constant":
            return None
        for entry in maker.attribute:
            if entry.name == "value":
                return numpy_helper.to_array(entry.t)
            if entry.name in ("value_float", "value_int", "value_floats", "value_ints"):
                value = onnx.helper.get_attribute_value(entry)
                return np.asarray(value, np.float32 if "float" in entry.name else np.int64)
        return None


def to_half(node: onnx.NodeProto) -> bool:
    """Whether a node casts to float16."""
    return node.op_type == "Cast" and attribute(node, "to", 0) == TensorProto.FLOAT16


def carried(target: Target) -> tuple[str, ...]:
    """Operators through which a target carries codes."""
    return _CARRY_ORT if target == "ort" else _CARRY


def is_quantizer(node: onnx.NodeProto, op: str) -> bool:
    """Whether a node is ONNX's Q or DQ, or ONNX Runtime's with the same name."""
    return node.op_type == op and node.domain in (*OWN_DOMAINS, CONTRIB) and len(node.input) > 1


def attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    """Value of an attribute; ``default`` where it is absent."""
    return next((onnx.helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def channel_axis(layer: LinearLayer, rank: int) -> int:
    """Output-channel axis of a layer's weights of ``rank`` axes."""
    if layer.node.op_type == "ConvTranspose":
        return 1
    if layer.node.op_type == "Gemm":
        return 0 if attribute(layer.node, "transB", 0) else 1
    return rank - 1 if layer.node.op_type == "MatMul" else 0


def _dims(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Extents of every tensor that the file declares."""
    found: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.HasField("shape"):
            found.setdefault(
                value.name,
                tuple(d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim),
            )
    return found
