"""Random networks of everything that the passes look for, tensors and weights shared at random: the whole pipeline.

``rewrite`` compares its result with the original by itself, and raises where they differ; here it also must be final.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from relu_deploy.graph import check_model, count_ops
from relu_deploy.passes.run import rewrite

SHAPE = (2, 4, 6, 6)


class Net:
    """A network that grows; every tensor in ``live`` is float32 of ``SHAPE``."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}
        self.live = ["x"]

    def pick(self) -> str:
        """A tensor to read: mostly the newest, sometimes an older one, which then has several readers."""
        return self.live[-1] if self.random.random() < 0.75 else str(self.random.choice(self.live))

    def constant(self, values: np.ndarray) -> str:
        """A new initializer, or one that is there already and is equal or of the same shape."""
        alike = [
            name for name, other in self.tensors.items() if (other.shape, other.dtype) == (values.shape, values.dtype)
        ]
        if alike and values.dtype == np.float32 and self.random.random() < 0.3:
            return str(self.random.choice(alike))
        name = f"c{len(self.tensors)}"
        self.tensors[name] = (
            self.tensors[alike[0]].copy()
            if alike and self.random.random() < 0.2 and values.dtype == np.float32
            else values
        )
        return name

    def floats(self, *shape: int) -> str:
        sign = self.random.choice([-1, 1])
        return self.constant(np.asarray(sign * self.random.uniform(0.3, 0.8, shape), np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def add(self, op: str, inputs: list[str], **attributes) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], f"{op}.{len(self.nodes)}", **attributes))
        return name

    def step(self) -> None:
        kinds = [name for name in dir(self) if name.startswith("make_")]
        self.live.append(getattr(self, str(self.random.choice(kinds)))(self.pick()))

    def make_conv(self, x):
        bias = [self.floats(4)] if self.random.random() < 0.5 else []
        return self.add("Conv", [x, self.floats(4, 4, 3, 3), *bias], pads=[1] * 4)

    def make_padded_conv(self, x):
        padded = self.add("Pad", [x, self.ints(0, 0, 1, 0, 0, 0, 1, 2)])
        return self.add("Conv", [padded, self.floats(4, 2, 3, 3)], group=2)

    def make_padded_pool(self, x):
        padded = self.add("Pad", [x, self.ints(0, 0, 1, 1, 0, 0, 1, 1)])
        op = str(self.random.choice(["MaxPool", "AveragePool"]))
        return self.add(op, [self.add("Relu", [padded]) if self.random.random() < 0.3 else padded], kernel_shape=[3, 3])

    def make_transposed(self, x):
        return self.add("ConvTranspose", [x, self.floats(4, 4, 3, 3)], pads=[1] * 4)

    def make_norm(self, x):
        positive = self.constant(self.random.uniform(0.5, 2, 4).astype(np.float32))
        self.tensors[positive] = np.abs(self.tensors[positive])
        return self.add("BatchNormalization", [x, self.floats(4), self.floats(4), self.floats(4), positive])

    def make_affine(self, x):
        shape = [(), (1,), (4, 1, 1), (1, 4, 1, 1), (6,), (6, 1)][self.random.integers(6)]
        operands = [x, self.floats(*shape)]
        op = str(self.random.choice(["Add", "Sub", "Mul"]))
        return self.add(op, operands if self.random.random() < 0.7 else operands[::-1])

    def make_neutral(self, x):
        op, value = [("Mul", 1.0), ("Div", 1.0), ("Add", 0.0), ("Sub", 0.0), ("Add", -0.0)][self.random.integers(5)]
        return self.add(op, [x, self.constant(np.full((1,) * self.random.integers(5), value, np.float32))])

    def make_product(self, x):
        product = self.add("MatMul", [x, self.floats(6, 6)])
        return self.add("Add", [product, self.floats(6)]) if self.random.random() < 0.7 else product

    def make_rows(self, x):
        rows = self.add("Reshape", [x, self.ints(-1, 6)])
        product = self.add("Add", [self.floats(1, 6), self.add("MatMul", [rows, self.floats(6, 6)])])
        return self.add("Reshape", [product, self.ints(*SHAPE)])

    def make_focus(self, x):
        ends, axes, steps = self.ints(2**31, 2**31), self.ints(2, 3), self.ints(2, 2)
        order = self.random.permutation(4)
        parts = [self.add("Slice", [x, self.ints(int(p) // 2, int(p) % 2), ends, axes, steps]) for p in order]
        small = self.add("Conv", [self.add("Concat", parts, axis=1), self.floats(4, 16, 1, 1)])
        return self.add("ConvTranspose", [small, self.floats(4, 4, 2, 2)], strides=[2, 2])

    def make_reshuffled(self, x):
        split = self.add("Reshape", [x, self.ints(2, 4, 3, 2, 3, 2)])
        moved = self.add("Transpose", [split], perm=[0, 5, 1, 3, 2, 4])
        small = self.add(
            "Conv", [self.add("Reshape", [moved, self.ints(2, 16, 3, 3)]), self.floats(4, 16, 3, 3)], pads=[1] * 4
        )
        return self.add("ConvTranspose", [small, self.floats(4, 4, 2, 2)], strides=[2, 2])

    def make_chain(self, x):
        first = self.random.permutation(4)
        there = self.add("Transpose", [x], perm=first.tolist())
        if self.random.random() < 0.3:
            there = self.add("Cast", [self.add("Cast", [there], to=11)], to=1)
        return self.add("Transpose", [there], perm=np.argsort(first).tolist())

    def make_reshapes(self, x):
        flat = self.add("Flatten", [x])
        return self.add("Reshape", [self.add("Unsqueeze", [flat, self.ints(1)]), self.ints(0, 4, 6, -1)])

    def make_relu(self, x):
        return self.add("Relu", [x])

    def make_tanh(self, x):
        return self.add("Tanh", [x])

    def make_twin(self, x):
        return self.add("Add", [self.add("Sigmoid", [x]), self.add("Sigmoid", [x])])

    def make_sum(self, x):
        return self.add("Add", [x, self.pick()])

    def make_identity(self, x):
        return self.add(str(self.random.choice(["Identity", "Dropout"])), [x])

    def make_unused(self, x):
        self.add("Neg", [x])
        return x

    def model(self) -> onnx.ModelProto:
        """The network; its last tensor and some in between are outputs."""
        kept = {self.live[-1], *(t for t in self.live if self.random.random() < 0.1)} - {"x"}
        graph = helper.make_graph(
            self.nodes, "g", [helper.make_tensor_value_info("x", 1, SHAPE)],
            [helper.make_tensor_value_info(name, 1, SHAPE) for name in sorted(kept)],
            [numpy_helper.from_array(values, name) for name, values in self.tensors.items()],
        )  # fmt: skip
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network(seed: int, steps: int = 12) -> onnx.ModelProto:
    net = Net(seed)
    for _ in range(steps):
        net.step()
    if net.live[-1] == "x":
        net.live.append(net.add("Relu", ["x"]))
    return net.model()


@pytest.mark.parametrize("seed", range(60))
def test_the_pipeline_keeps_what_a_network_computes(seed):
    model = network(seed)
    check_model(model, "the model of the test")
    before = model.SerializeToString()
    after, report = rewrite(model, seed=seed)
    assert model.SerializeToString() == before
    if after is model:
        return
    assert report.verification is not None
    assert report.verification.samples == 3
    assert [value.name for value in after.graph.output] == [value.name for value in model.graph.output]
    assert rewrite(after, verify=False)[0] is after, "a second rewrite changes something"


def test_the_networks_hold_what_they_should():
    kinds, passes = Counter(), Counter()
    for seed in range(60):
        model = network(seed)
        kinds.update(count_ops(model).keys())
        passes.update(entry.name for entry in rewrite(model, verify=False)[1].passes if entry.changed)
    assert len(kinds) >= 20
    expected = {
        "fold_batchnorm",
        "fold_affine",
        "matmul_add_to_gemm",
        "fold_focus",
        "fold_pad",
        "merge_duplicates",
        "remove_identities",
    }
    assert {name for name, count in passes.items() if count >= 5} >= expected
