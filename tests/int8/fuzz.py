"""Random networks of many operators, quantised for both kinds of target; what is wrong with each is printed.

    python tests/int8/fuzz.py [--first 0] [--seconds 1200]

For each network: it is quantised with channel fusion, or refused with a reason; checker and ONNX Runtime take it; the
integer kernels give what the Q/DQ say; the file of integer operators gives the same codes and is left alone a second
time; the numpy emulator gives the same codes or explains why not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import onnx

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.errors import ToolkitError
from relu_deploy.int8.multipliers_table import build_table
from relu_deploy.int8.qoperator import to_qoperator
from relu_deploy.int8.run import quantize


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"fuzz_{name}", Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


random_graph, integers = _module("random_graph"), _module("test_qoperator")
# How large the data is that calibrates: ordinary, faint, huge, dead.
SIZES = (1, 1, 1, 1e-3, 1e3, 1e-6, 0)


class WiderGraph(random_graph.RandomGraph):
    """More operators, more attributes, and weights that are dead, faint or huge in a channel."""

    def add_any_conv(self, x, shape):
        group, made = int(self.choose([1, 2, 4])), int(self.choose([1, 2, 3]))
        if len(shape) != 4 or shape[2] < 5 or shape[1] % group:
            return
        kernel, stride, dilation, pad = (int(self.choose(c)) for c in ([1, 2, 3], [1, 2], [1, 2], [0, 1]))
        size = [(n + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1 for n in shape[2:]]
        if min(size) < 1:
            return
        out, inner = group * made, shape[1] // group
        weight = self.rng.normal(0, (1.5 / inner) ** 0.5 / kernel, (out, inner, kernel, kernel))
        weight[0] *= self.choose([1, 1, 0, 1e-8, 1e4])
        bias = self.rng.normal(0, 0.3, out) * self.choose([1, 1, 1, 1e5])
        inputs = [x, self.constant(np.float32(weight))]
        if self.rng.random() < 0.7:
            inputs.append(self.constant(np.float32(bias)))
        self.emit(
            "Conv", inputs, (shape[0], out, *size), pads=[pad] * 4, strides=[stride] * 2, dilations=[dilation] * 2,
            group=group,
        )  # fmt: skip

    def add_shared_weights(self, x, shape):
        if len(shape) == 4:
            weight = self.normal(shape[1], shape[1], 1, 1, scale=shape[1] ** -0.5)
            self.emit("Conv", [self.emit("Conv", [x, weight], shape), weight], shape)

    def add_smooth(self, x, shape):
        ops = ["Tanh", "Erf", "Softsign", "Softplus", "Elu", "HardSigmoid", "Abs", "Neg", "Identity", "Dropout"]
        self.emit(self.choose(ops), [x], shape)

    def add_silu(self, x, shape):
        self.emit("Mul", [x, self.emit("Sigmoid", [x], shape)], shape)

    def add_prelu(self, x, shape):
        if len(shape) == 4:
            self.emit("PRelu", [x, self.normal(*self.choose([(shape[1], 1, 1), (1,), (1, 1, 1)]), scale=0.3)], shape)

    def add_batch_norm(self, x, shape):
        variance = self.constant(np.float32(np.abs(self.rng.normal(1, 0.3, shape[1])) + 0.1))
        self.emit("BatchNormalization", [x, *(self.normal(shape[1]) for _ in range(3)), variance], shape)

    def add_scalar(self, x, shape):
        number = self.constant(np.float32(self.choose([0.5, 2, -3])))
        self.emit(self.choose(["Div", "Sub", "Max", "Min"]), [x, number], shape)

    def add_per_channel(self, x, shape):
        if len(shape) == 4:
            self.emit(self.choose(["Add", "Mul"]), [x, self.normal(1, shape[1], 1, 1)], shape)

    def add_gate(self, x, shape):
        if len(shape) != 4:
            return
        one = (*shape[:2], 1, 1)
        mean = self.emit("GlobalAveragePool", [x], one)
        inner = (shape[0], 4, 1, 1)
        squeezed = self.emit("Conv", [mean, self.normal(4, shape[1], 1, 1, scale=0.5), self.normal(4)], inner)
        squeezed = self.emit("Relu", [squeezed], inner)
        gate = self.emit("Conv", [squeezed, self.normal(shape[1], 4, 1, 1, scale=0.5)], one)
        gate = self.emit(self.choose(["Sigmoid", "HardSigmoid"]), [gate], one)
        self.emit("Mul", self.choose([[x, gate], [gate, x]]), shape)

    def add_attention(self, x, shape):
        if len(shape) == 3:
            square = (shape[0], shape[1], shape[1])
            across = self.emit("Transpose", [x], (shape[0], shape[2], shape[1]), perm=[0, 2, 1])
            score = self.emit("MatMul", [x, across], square)
            self.emit("MatMul", [self.emit("Softmax", [score], square, axis=int(self.choose([-1, 1]))), x], shape)

    def add_depth(self, x, shape):
        if len(shape) == 4 and shape[1] % 4 == 0 and shape[2] <= 8:
            made = (shape[0], shape[1] // 4, shape[2] * 2, shape[3] * 2)
            self.emit("DepthToSpace", [x], made, blocksize=2)

    def add_overlapping_pool(self, x, shape):
        if len(shape) == 4 and shape[2] >= 5 and shape[3] >= 5 and shape[2] % 2 and shape[3] % 2:
            made = (*shape[:2], (shape[2] + 1) // 2, (shape[3] + 1) // 2)
            attributes = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
            op = self.choose(["MaxPool", "AveragePool"])
            if op == "AveragePool":
                attributes |= {"count_include_pad": int(self.choose([0, 1])), "ceil_mode": int(self.choose([0, 1]))}
            self.emit(op, [x], made, **attributes)

    def add_crop(self, x, shape):
        """Odd sizes, for the pools."""
        if len(shape) == 4 and shape[2] == shape[3] and shape[2] >= 6 and shape[2] % 2 == 0:
            ends = [self.constant(np.int64(v)) for v in ([0, 0], [shape[2] - 1] * 2, [2, 3])]
            self.emit("Slice", [x, *ends], (*shape[:2], shape[2] - 1, shape[3] - 1))

    def add_choice(self, x, shape):
        number = len(self.nodes)
        condition = f"b{number}"
        limit = self.constant(np.float32(0.1))
        self.nodes.append(onnx.helper.make_node("Greater", [x, limit], [condition], f"Greater_{number}"))
        self.emit("Where", [condition, x, self.partner(shape)], shape)


def complaints(seed: int) -> list[str]:
    """What is wrong with one network; a refusal with a reason is not."""
    rng = np.random.default_rng(seed + 10**6)
    model = WiderGraph(seed, size=int(rng.integers(4, 26))).model()
    data = np.float32(rng.normal(size=(6, *random_graph.SHAPE[1:])) * rng.choice(SIZES))
    feeds = {"x": data[:2]}
    try:
        ranges = calibrate(model, open_source(data, model_inputs(model)))
    except ToolkitError:  # some value is not finite
        return []
    found: list[str] = []
    for target in ("ort", "tensorrt-rtx"):
        try:
            quantized, _ = quantize(
                model, ranges, target=target, weight_bits=7 if target == "ort" else 8,
                channel_fusion=("pow2", "free")[seed % 2],
            )  # fmt: skip
        except ToolkitError as error:
            if "no linear layer" not in str(error) and "none of the" not in str(error):
                found.append(f"{target}: {error}")
            continue
        found += [f"{target}: {text}" for text in _outputs(model, quantized, feeds, kernels=target == "ort")]
        if target == "ort":
            _integers(quantized, feeds)
    return found


def _outputs(model: onnx.ModelProto, quantized: onnx.ModelProto, feeds: dict, *, kernels: bool) -> list[str]:
    """Names, shapes, finite values; for ``ort`` that integer kernels give what is written."""
    names = [value.name for value in model.graph.output]
    assert [value.name for value in quantized.graph.output] == names
    reference, fused_reference, exact, fused = (
        open_session(each, optimise=optimise, threads=1).run(None, feeds)
        for each, optimise in ((model, False), (model, True), (quantized, False), (quantized, kernels))
    )
    found = []
    for name, wanted, other, ours, fast in zip(names, reference, fused_reference, exact, fused, strict=True):
        assert wanted.shape == ours.shape == fast.shape, name
        if np.isfinite(wanted).all() and not (np.isfinite(ours).all() and np.isfinite(fast).all()):
            found.append(f"{name} is not finite")
        size = float(np.abs(ours).max(initial=0.0))
        # Pad in front of MaxPool: onnxruntime 1.31 computes the float network itself in two ways.
        unsure = not np.allclose(wanted, other, rtol=1e-3, atol=1e-3 * float(np.abs(wanted).max(initial=0.0)))
        # A code that lies on the border falls to either side, and what follows amplifies it.
        if not unsure and np.abs(ours - fast).mean() > 0.01 * size + 1e-6:
            found.append(f"{name} differs by {np.abs(ours - fast).mean()} of {size} in integer kernels")
    return found


def _integers(quantized: onnx.ModelProto, feeds: dict) -> None:
    """The integer forms; raises AssertionError."""
    integer, _ = to_qoperator(quantized)
    table, _ = build_table(quantized)
    integers.assert_same_codes(quantized, integer, feeds, as_written=False, merge=not integers.in_a_row(table))
    integers.assert_idempotent(integer)
    integers.emulated(integer, integers.as_json(table), feeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1200)
    arguments = parser.parse_args()
    end, seed, kinds = time.monotonic() + arguments.seconds, arguments.first, Counter()
    while time.monotonic() < end:
        try:
            found = complaints(seed)
        except Exception as error:  # noqa: BLE001 - the next network is tried, and this one printed
            where = traceback.extract_tb(error.__traceback__)[-1]
            found = [f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"]
        for text in found:
            print(seed, text[:300], flush=True)
        kinds["wrong" if found else "right"] += 1
        seed += 1
    print(f"networks {arguments.first} to {seed - 1}: {kinds['right']} right, {kinds['wrong']} wrong")


if __name__ == "__main__":
    main()
