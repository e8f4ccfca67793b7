"""Random networks for channel fusion: more operators that channels pass, and channels of very different sizes."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np

_SPEC = importlib.util.spec_from_file_location("random_graph", Path(__file__).with_name("random_graph.py"))
random_graph = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(random_graph)
SHAPE = random_graph.SHAPE


class FusibleGraph(random_graph.RandomGraph):
    """As its base; rows and columns of weights differ by powers of two up to some 2^6."""

    def model(self):
        """With a layer behind every end: an output is never scaled, and nothing that is tied to it."""
        read = {name for node in self.nodes for name in node.input}
        for name, shape in [t for t in self.tensors[1:] if t[0] not in read]:
            if len(shape) == 4:
                inputs = [name, self.normal(3, shape[1], 1, 1, scale=0.3)]
                self.emit("Conv", inputs, (shape[0], 3, *shape[2:]))
            else:
                self.emit("MatMul", [name, self.normal(shape[-1], 3, scale=0.3)], (*shape[:-1], 3))
        return super().model()

    def normal(self, *shape: int, scale: float = 1.0) -> str:
        values = self.rng.normal(0, scale, shape)
        if len(shape) > 1:
            values = values * 2.0 ** self.rng.normal(0, 2, (shape[0], *(1,) * (len(shape) - 1)))
            values = values * 2.0 ** self.rng.normal(0, 1, (1, shape[1], *(1,) * (len(shape) - 2)))
        return self.constant(np.asarray(values, np.float32))

    def add_grouped(self, x, shape):
        if len(shape) == 4 and shape[1] % 2 == 0:
            made = (shape[0], 8, *shape[2:])
            weight = self.normal(8, shape[1] // 2, 3, 3, scale=0.2)
            y = self.emit("Conv", [x, weight, self.normal(8)], made, pads=[1] * 4, group=2)
            self.emit("Relu", [y], made)

    def add_transposed_groups(self, x, shape):
        if len(shape) == 4 and shape[1] % 2 == 0 and shape[2] <= 8:
            inputs = [x, self.normal(shape[1], 3, 2, 2, scale=0.3), self.normal(6)]
            made = (shape[0], 6, 2 * shape[2], 2 * shape[3])
            self.emit("ConvTranspose", inputs, made, strides=[2, 2], group=2)

    def add_prelu(self, x, shape):
        slopes = self.normal(*self.choose([(shape[1], *(1,) * (len(shape) - 2)), (1,)]))
        self.emit("PRelu", [x, slopes], shape)

    def add_maximum(self, x, shape):
        bound = self.normal(*self.choose([(), (1,) * len(shape), (1, shape[1], *(1,) * (len(shape) - 2))]))
        self.emit(self.choose(["Max", "Min"]), [x, self.choose([bound, self.partner(shape)])], shape)

    def add_leaky_maximum(self, x, shape):
        y = self.emit("Mul", [x, self.constant(np.float32(0.25))], shape)
        self.emit("Max", [x, y], shape)

    def add_gate(self, x, shape):
        if len(shape) == 4:
            squeezed = (shape[0], shape[1], 1, 1)
            y = self.emit("ReduceMean", [x], squeezed, axes=[2, 3])
            y = self.emit(
                "Conv", [y, self.normal(shape[1], shape[1], 1, 1, scale=0.5), self.normal(shape[1])], squeezed
            )
            y = self.emit(self.choose(["Sigmoid", "Relu"]), [y], squeezed)
            self.emit("Mul", self.choose([[x, y], [y, x]]), shape)

    def add_shuffle(self, x, shape):
        if len(shape) == 4 and shape[1] % 2 == 0:
            n, c, h, w = shape
            apart, mixed = (n, 2, c // 2, h, w), (n, c // 2, 2, h, w)
            y = self.emit("Reshape", [x, self.constant(np.int64(apart))], apart)
            y = self.emit("Transpose", [y], mixed, perm=[0, 2, 1, 3, 4])
            self.emit("Reshape", [y, self.constant(np.int64([n, c, h, w]))], shape)

    def add_depth_to_space(self, x, shape):
        if len(shape) == 4 and shape[1] % 4 == 0 and shape[2] <= 8:
            made = (shape[0], shape[1] // 4, 2 * shape[2], 2 * shape[3])
            self.emit("DepthToSpace", [x], made, blocksize=2, mode=self.choose(["DCR", "CRD"]))

    def add_space_to_depth(self, x, shape):
        if len(shape) == 4 and shape[1] <= 4 and shape[2] % 2 == 0:
            made = (shape[0], 4 * shape[1], shape[2] // 2, shape[3] // 2)
            self.emit("SpaceToDepth", [x], made, blocksize=2)

    def add_flatten(self, x, shape):
        if len(shape) == 4 and shape[1] * shape[2] * shape[3] <= 256:
            made = (shape[0], shape[1] * shape[2] * shape[3])
            y = self.emit("Flatten", [x], made, axis=1)
            weight = self.normal(made[1], 6, scale=made[1] ** -0.5)
            self.emit("Gemm", [y, weight, self.normal(6)], (shape[0], 6))

    def add_tokens(self, x, shape):
        if len(shape) == 4 and shape[2] <= 8:
            flat = (shape[0], shape[1], shape[2] * shape[3])
            y = self.emit("Reshape", [x, self.constant(np.int64([0, 0, -1]))], flat)
            self.emit("Transpose", [y], (flat[0], flat[2], flat[1]), perm=[0, 2, 1])

    def add_norm(self, x, shape):
        scale, offset = self.normal(shape[-1]), self.normal(shape[-1])
        y = self.emit("LayerNormalization", [x, scale, offset], shape)
        if len(shape) == 3:
            self.emit("MatMul", [y, self.normal(shape[-1], 6, scale=shape[-1] ** -0.5)], (*shape[:-1], 6))

    def add_feed_forward(self, x, shape):
        if len(shape) == 3:
            wide = (*shape[:-1], 12)
            y = self.emit("MatMul", [x, self.normal(shape[-1], 12, scale=shape[-1] ** -0.5)], wide)
            y = self.emit("Add", self.choose([[y, b] for b in [self.normal(12)]]), wide)
            y = self.emit("Relu", [y], wide)
            y = self.emit("MatMul", [y, self.normal(12, shape[-1], scale=0.3)], shape)
            self.emit("Add", [y, x], shape)

    def add_attention(self, x, shape):
        if len(shape) == 3 and shape[1] <= 64 and shape[2] % 2 == 0:
            n, t, c = shape
            heads = [self.emit("MatMul", [x, self.normal(c, c, scale=c**-0.5)], shape) for _ in range(3)]
            parts = (n, t, 2, c // 2)
            split = [self.emit("Reshape", [y, self.constant(np.int64(parts))], parts) for y in heads]
            q = self.emit("Transpose", [split[0]], (n, 2, t, c // 2), perm=[0, 2, 1, 3])
            k = self.emit("Transpose", [split[1]], (n, 2, c // 2, t), perm=[0, 2, 3, 1])
            v = self.emit("Transpose", [split[2]], (n, 2, t, c // 2), perm=[0, 2, 1, 3])
            scores = self.emit("Softmax", [self.emit("MatMul", [q, k], (n, 2, t, t))], (n, 2, t, t))
            mixed = self.emit("MatMul", [scores, v], (n, 2, t, c // 2))
            y = self.emit("Transpose", [mixed], (n, t, 2, c // 2), perm=[0, 2, 1, 3])
            y = self.emit("Reshape", [y, self.constant(np.int64(shape))], shape)
            self.emit("MatMul", [y, self.normal(c, c, scale=c**-0.5)], shape)

    def add_batchnorm(self, x, shape):
        if len(shape) == 4:
            variance = self.constant(np.float32(self.rng.uniform(0.1, 3, shape[1])))
            inputs = [x, self.normal(shape[1]), self.normal(shape[1]), self.normal(shape[1]), variance]
            self.emit("BatchNormalization", inputs, shape)

    def add_division(self, x, shape):
        divisor = self.normal(*self.choose([(), (shape[-1],)]))
        self.emit("Div", [x, divisor], shape)

    def add_choice(self, x, shape):
        condition = self.constant(self.rng.random(shape[-1]) < 0.5)
        other = self.choose([self.partner(shape), self.constant(np.float32(0))])
        self.emit("Where", self.choose([[condition, x, other], [condition, other, x]]), shape)

    def add_channel_pad(self, x, shape):
        if len(shape) == 4 and shape[1] <= 6:
            pads = [x, self.constant(np.int64([0, 1, 0, 0, 0, 1, 0, 0]))]
            self.emit("Pad", pads, (shape[0], shape[1] + 2, *shape[2:]))

    def add_cubic(self, x, shape):
        if len(shape) == 4 and 1 < shape[2] <= 8:
            made = (*shape[:2], 2 * shape[2], 2 * shape[3])
            self.emit("Resize", [x, "", "", self.constant(np.int64(made))], made, mode="cubic")

    def add_mixed_concat(self, x, shape):
        if len(shape) == 4:
            inputs = [x, self.normal(4, shape[1], 1, 1, scale=0.5), self.normal(4)]
            other = self.emit("Conv", inputs, (shape[0], 4, *shape[2:]))
            made = (shape[0], shape[1] + 4, *shape[2:])
            y = self.emit("Concat", [x, other], made, axis=1)
            self.emit("Conv", [y, self.normal(8, made[1], 1, 1, scale=0.3)], (shape[0], 8, *shape[2:]))

    def add_mirror(self, x, shape):
        self.emit("Neg", [self.emit("Abs", [x], shape)], shape)
