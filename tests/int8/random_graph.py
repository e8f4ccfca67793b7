"""Small random networks of the operators that quantising treats in some way of its own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

SHAPE = (2, 8, 8, 8)


class RandomGraph:
    """Grows node by node; each step takes a recent tensor and adds an operator that fits its shape.

    Args:
        seed: Decides everything.
        size: Number of nodes at least.
    """

    def __init__(self, seed: int, *, size: int = 12) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.tensors: list[tuple[str, tuple[int, ...]]] = [("x", SHAPE)]
        steps = [getattr(self, name) for name in sorted(dir(self)) if name.startswith("add_")]
        self.add_conv(*self.tensors[0])
        while len(self.nodes) < size:
            back = min(int(self.rng.exponential(2)), len(self.tensors) - 1)
            self.choose(steps)(*self.tensors[-1 - back])

    def model(self) -> onnx.ModelProto:
        """The network, its ends outputs and, now and then, tensors in between."""
        read = {name for node in self.nodes for name in node.input}
        ends = [t for t in self.tensors[1:] if t[0] not in read or self.rng.random() < 0.15]
        graph = helper.make_graph(
            self.nodes, "random", [helper.make_tensor_value_info("x", 1, SHAPE)],
            [helper.make_tensor_value_info(name, 1, shape) for name, shape in ends], self.weights,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model, full_check=True)
        return model

    def choose(self, options):
        return options[self.rng.integers(len(options))]

    def constant(self, values) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values), f"k{len(self.weights)}"))
        return self.weights[-1].name

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        return self.constant(np.asarray(self.rng.normal(0, scale, shape), np.float32))

    def emit(self, op: str, inputs: list[str], *shapes: tuple[int, ...], **attributes: object) -> str:
        number = len(self.nodes)
        outputs = [f"t{number}_{index}" for index in range(len(shapes))]
        self.nodes.append(helper.make_node(op, inputs, outputs, f"{op}_{number}", **attributes))
        self.tensors.extend(zip(outputs, shapes, strict=True))
        return outputs[0]

    def partner(self, shape):
        """Another tensor of the same shape, or the same one; either may come first."""
        return self.choose([name for name, other in self.tensors if other == shape])

    def add_conv(self, x, shape):
        if len(shape) != 4:
            return
        out, size = int(self.choose([4, 8])), int(self.choose([1, 3]))
        weight = self.normal(out, shape[1], size, size, scale=(1.5 / shape[1] / size**2) ** 0.5)
        made = (shape[0], out, *shape[2:])
        y = self.emit("Conv", [x, weight, self.normal(out, scale=0.3)], made, pads=[size // 2] * 4)
        if self.rng.random() < 0.5:
            self.emit("Relu", [y], made)

    def add_depthwise(self, x, shape):
        if len(shape) == 4:
            weight = self.normal(shape[1], 1, 3, 3, scale=0.4)
            self.emit("Conv", [x, weight], shape, pads=[1] * 4, group=shape[1])

    def add_transposed(self, x, shape):
        if len(shape) == 4 and shape[2] <= 8:
            inputs = [x, self.normal(shape[1], 6, 2, 2, scale=0.3), self.normal(6)]
            self.emit("ConvTranspose", inputs, (shape[0], 6, 2 * shape[2], 2 * shape[3]), strides=[2, 2])

    def add_product(self, x, shape):
        if 2 <= len(shape) <= 3:
            made = (*shape[:-1], 6)
            y = self.emit("MatMul", [x, self.normal(shape[-1], 6, scale=shape[-1] ** -0.5)], made)
            if self.rng.random() < 0.7:
                bias = self.normal(*self.choose([(6,), (1, 6), (1,), (), made]))
                self.emit("Add", self.choose([[y, bias], [bias, y]]), made)

    def add_gemm(self, x, shape):
        if len(shape) == 2:
            across = int(self.rng.integers(2))
            weight = self.normal(*((6, shape[1]) if across else (shape[1], 6)), scale=shape[1] ** -0.5)
            bias = self.normal(*self.choose([(6,), (1, 6), (1,), ()]))
            factors = {"alpha": float(self.choose([1, 0.5, -2])), "beta": float(self.choose([1, 0.5]))}
            self.emit("Gemm", [x, weight, bias], (shape[0], 6), transB=across, **factors)

    def add_activation(self, x, shape):
        self.emit(self.choose(["Relu", "Relu", "Relu", "LeakyRelu", "Sigmoid", "Softmax", "HardSwish"]), [x], shape)

    def add_clip(self, x, shape):
        low, high = self.choose([(0, 6), (0, 0.5), (-0.5, 9), (-1, 1)])
        self.emit("Clip", [x, self.constant(np.float32(low)), self.constant(np.float32(high))], shape)

    def add_arithmetic(self, x, shape):
        self.emit(self.choose(["Add", "Add", "Mul", "Sub"]), [x, self.partner(shape)], shape)

    def add_constant_operand(self, x, shape):
        operand = self.normal(*self.choose([(), (1,), (1,) * len(shape), shape, shape[-1:]]))
        self.emit(self.choose(["Add", "Mul"]), self.choose([[x, operand], [operand, x]]), shape)

    def add_pool(self, x, shape):
        if len(shape) == 4 and shape[2] >= 2:
            made = (*shape[:2], shape[2] // 2, shape[3] // 2)
            self.emit(self.choose(["MaxPool", "AveragePool"]), [x], made, kernel_shape=[2, 2], strides=[2, 2])

    def add_mean(self, x, shape):
        if len(shape) == 4:
            self.emit("GlobalAveragePool", [x], (*shape[:2], 1, 1))

    def add_concat(self, x, shape):
        other = self.choose([self.partner(shape), self.normal(*shape)])
        made = (shape[0], 2 * shape[1], *shape[2:])
        self.emit("Concat", self.choose([[x, other], [other, x]]), made, axis=self.choose([1, 1 - len(shape)]))

    def add_slice(self, x, shape):
        if shape[1] >= 4:
            ends = [self.constant(np.int64([value])) for value in (1, shape[1] - 1, 1)]
            self.emit("Slice", [x, *ends], (shape[0], shape[1] - 2, *shape[2:]))

    def add_split(self, x, shape):
        if shape[1] % 2 == 0:
            half = (shape[0], shape[1] // 2, *shape[2:])
            self.emit("Split", [x, self.constant(np.int64([half[1]] * 2))], half, half, axis=1)

    def add_gather(self, x, shape):
        if shape[1] >= 4:
            self.emit("Gather", [x, self.constant(np.int64([3, 0, 1, 1]))], (shape[0], 4, *shape[2:]), axis=1)

    def add_resize(self, x, shape):
        if len(shape) == 4 and 1 < shape[2] <= 8:
            scales = self.constant(np.float32([1, 1, 2, 2]))
            self.emit(
                "Resize",
                [x, "", scales],
                (*shape[:2], 2 * shape[2], 2 * shape[3]),
                mode=self.choose(["nearest", "linear"]),
            )

    def add_pad(self, x, shape):
        if len(shape) == 4 and 1 < shape[2] <= 16:
            pads = [
                x,
                self.constant(np.int64([0, 0, 1, 1, 0, 0, 1, 1])),
                self.constant(np.float32(self.choose([0, 1.5]))),
            ]
            self.emit("Pad", pads, (*shape[:2], shape[2] + 2, shape[3] + 2))

    def add_layout(self, x, shape):
        if len(shape) == 4:
            flat = (shape[0], shape[1], shape[2] * shape[3])
            self.emit("Reshape", [x, self.constant(np.int64(flat))], flat)
        elif len(shape) == 3:
            self.emit("Transpose", [x], (shape[0], shape[2], shape[1]), perm=[0, 2, 1])
            self.emit("Flatten", [x], (shape[0], shape[1] * shape[2]))
