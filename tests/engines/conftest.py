from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper


class Network:
    """A small network, written layer by layer, with or without Q/DQ."""

    def __init__(self, *, half: bool = False, integer_bias: bool = False, dtype: str = "int8") -> None:
        self.float = np.float16 if half else np.float32
        self.integer_bias, self.codes = integer_bias, np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, op: str, name: str, *inputs: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def qdq(self, tensor: str, name: str, *, channels: int = 0) -> str:
        """Quantise an activation; ``channels`` > 0: with a scale for each channel."""
        scale = self.constant(f"{name}_scale", np.full(channels or (), 0.05, self.float))
        zero = self.constant(f"{name}_zero", np.zeros(channels or (), self.codes))
        axis = {"axis": 1} if channels else {}
        codes = self.node("QuantizeLinear", f"{name}_q", tensor, scale, zero, **axis)
        return self.node("DequantizeLinear", f"{name}_dq", codes, scale, zero, **axis)

    def weight(self, name: str, shape: tuple[int, ...], *, quantized: bool = True, axis: int | None = None) -> str:
        if not quantized:
            return self.constant(name, (self.random.standard_normal(shape) * 0.1).astype(self.float))
        size = shape[axis] if axis is not None else ()
        codes = self.constant(name, self.random.integers(-127, 128, shape).astype(np.int8))
        scale = self.constant(f"{name}_scale", np.full(size, 0.002, self.float))
        zero = self.constant(f"{name}_zero", np.zeros(size, np.int8))
        return self.node(
            "DequantizeLinear", f"{name}_dq", codes, scale, zero, **({} if axis is None else {"axis": axis})
        )

    def bias(self, name: str, size: int, *, quantized: bool = True) -> str:
        if not (self.integer_bias and quantized):
            return self.constant(name, np.ones(size, self.float))
        codes, scale = self.constant(name, np.ones(size, np.int32)), self.constant(f"{name}_scale", np.float32(1e-4))
        return self.node("DequantizeLinear", f"{name}_dq", codes, scale)

    def model(self, output: str, *shape: int | str, opset: int = 19) -> onnx.ModelProto:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(self.float))
        graph = helper.make_graph(
            self.nodes,
            "network",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info(output, kind, None)],
            self.stored,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        return onnx.shape_inference.infer_shapes(model)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A stack of three 3x3 convolutions: what is quantised and what follows each of them."""

    activation: str = "Relu"
    quantized: tuple[bool, bool, bool] = (True, True, True)
    per_channel_weights: bool = False
    per_channel_activations: bool = False
    groups: int = 1
    half: bool = False
    target: str = "tensorrt-rtx"
    batch: int | str = 1
    last_quantizer: bool = False


def convolutions(recipe: Recipe) -> onnx.ModelProto:
    on_cpu = recipe.target == "ort"
    net = Network(half=recipe.half, integer_bias=on_cpu, dtype="uint8" if on_cpu else "int8")
    tensor, inside = "x", 8
    for index, quantized in enumerate(recipe.quantized):
        groups = recipe.groups if index else 1
        if quantized:
            tensor = net.qdq(tensor, f"a{index}", channels=inside if recipe.per_channel_activations else 0)
        axis = 0 if recipe.per_channel_weights else None
        weight = net.weight(f"w{index}", (16, inside // groups, 3, 3), quantized=quantized, axis=axis)
        bias = net.bias(f"b{index}", 16, quantized=quantized)
        tensor = net.node("Conv", f"conv{index}", tensor, weight, bias, pads=[1] * 4, group=groups)
        if recipe.activation == "SiLU":
            tensor = net.node("Mul", f"act{index}", tensor, net.node("Sigmoid", f"gate{index}", tensor))
        else:
            tensor = net.node(recipe.activation, f"act{index}", tensor)
        inside = 16
    tensor = net.qdq(tensor, "out") if recipe.last_quantizer else tensor
    return net.model(tensor, recipe.batch, 8, 16, 16, opset=20)


@pytest.fixture(scope="session")
def stack() -> Callable[..., onnx.ModelProto]:
    """A function from the fields of ``Recipe`` to a model."""
    return lambda **fields: convolutions(Recipe(**fields))


@pytest.fixture(scope="session")
def network() -> type[Network]:
    return Network
