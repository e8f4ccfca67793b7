"""Does the RTX compiler do what each rule of ``lint`` says of it, and does it take what ``--fix`` writes?"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from calib.inputs import model_inputs
from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.engines.plan import read_plan
from relu_deploy.errors import EngineError
from relu_deploy.int8.lint import lint
from relu_deploy.int8.lint.fix import fix

pytestmark = pytest.mark.engine

RANDOM = np.random.default_rng(0)
ONE, MANY = np.float32(0.05), np.full(16, 0.003, np.float32)
Z, ZS = np.int8(0), np.zeros(16, np.int8)
Weights = Mapping[str, "np.ndarray | onnx.TensorProto"]
STORED: Weights = {
    "s": ONE, "z": Z, "w": RANDOM.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "ws": MANY, "wz": ZS,
    "wf": RANDOM.normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32), "b": np.ones(16, np.float32),
    "sh": np.float16(0.05), "wsh": MANY.astype(np.float16),
    "s2": np.float32(0.07), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "lo": np.float32(0), "hi": np.float32(6),
    "i0": np.array([0]), "i8": np.array([8]), "i16": np.array([16]), "i1": np.array([1]),
    "up": np.array([1, 1, 2, 2], np.float32), "k": np.float32(1 / 127),
}  # fmt: skip
IO = "(float[1,16,16,16] x) => (float[1,16,16,16] y)"
ROWS = "(float[4,64] x) => (float[4,32] y)"
FC: Weights = {
    **STORED, "w": RANDOM.integers(-127, 128, (64, 32)).astype(np.int8), "ws": np.full(32, 0.003, np.float32),
    "wz": np.zeros(32, np.int8), "wsh": np.full(32, 0.003, np.float16),
}  # fmt: skip
WD, CONV = "[WD] wd = DequantizeLinear<axis=0>(w, ws, wz) ", "[conv] c = Conv<pads=[1,1,1,1]>(a, wd) "
TAIL = WD + CONV + "[relu] y = Relu(c) "


def qdq(source: str, name: str, scale: str = "s") -> str:
    return (
        f"[Q{name}] {name}_q = QuantizeLinear({source}, {scale}, z) "
        f"[D{name}] {name} = DequantizeLinear({name}_q, {scale}, z) "
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A faulty network: the rule and severity that name it, and what the compiler does."""

    rule: str
    severity: str
    body: str
    stored: Weights = dataclasses.field(default_factory=dict)
    done: Literal["rejected", "float", "int8"] = "rejected"
    match: str = ""
    io: str = IO
    base: Weights = dataclasses.field(default_factory=lambda: STORED)
    opset: int = 19
    layers: tuple[str, ...] = ("conv",)
    mended: bool = True

    def model(self) -> onnx.ModelProto:
        return parse(f"{self.io} {{ {self.body} }}", {**self.base, **self.stored}, self.opset)


def parse(text: str, stored: Weights, opset: int = 19) -> onnx.ModelProto:
    domains = ', "com.microsoft": 1' if "com.microsoft" in text else ""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}{domains}]> g {text}')
    read = {name for node in model.graph.node for name in node.input}
    for name, value in stored.items():
        if name in read:
            tensor = value if isinstance(value, onnx.TensorProto) else numpy_helper.from_array(np.asarray(value), name)
            model.graph.initializer.append(tensor)
    return model


def build(model: onnx.ModelProto, folder: Path) -> Audit:
    return get_backend("tensorrt-rtx").build(model, folder / "e.plan", BuildConfig(target="tensorrt-rtx")).audit


INT32: Weights = {"bq": np.ones(16, np.int32), "bs": MANY * ONE, "bz": np.zeros(16, np.int32)}
BIASED = "[BD] bd = DequantizeLinear<axis=0>(bq, bs, bz) " + WD + CONV.replace("wd)", "wd, bd)") + "[relu] y = Relu(c)"
INT4 = helper.make_tensor("w", TensorProto.INT4, (16, 16, 3, 3), RANDOM.integers(-7, 8, 16 * 16 * 9))
MATMUL = "[WD] wd = DequantizeLinear<axis=%d>(w, ws, wz) [mm] y = MatMul(a, wd)"
HALF_MATMUL = (
    "[down] a = Cast<to=10>(a0) [WD] wd = DequantizeLinear<axis=1>(w, wsh, wz) [mm] m = MatMul(a, wd) "
    "[up] y = Cast<to=1>(m)"
)
FUSED = (
    "[WD] wd = DequantizeLinear<axis=1>(w, ws, wz) [mm] m = MatMul(a, wd) q0, k0, v0 = Split<axis=2>(m, parts) "
    "q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1) k1 = Reshape(k0, heads) "
    "kt = Transpose<perm=[0,2,3,1]>(k1) v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1) "
    "[scores] t = MatMul(q, kt) r = Softmax<axis=-1>(t) [mix] y = MatMul(r, v)"
)
GEMM = "[WD] wd = DequantizeLinear<axis=%d>(w, ws, wz) [fc] y = Gemm<transB=%d>(a, wd)"
SHORT = qdq("x", "a") + WD + CONV + "[sum] t = Add(c, %s) [relu] r = Relu(t) " + qdq("r", "a2")
SHORT += "[WD2] wd2 = DequantizeLinear<axis=0>(w, ws, wz) [conv2] y = Conv<pads=[1,1,1,1]>(a2, wd2)"

CASES = {
    "int32 bias": Case("int32-bias", "rejected", qdq("x", "a") + BIASED, INT32, match="input has type Int32"),
    "int8 bias": Case("bias", "less accurate", qdq("x", "a") + BIASED,
                      {"bq": np.ones(16, np.int8), "bs": MANY, "bz": ZS}, "int8"),
    "zero point": Case("zero-point", "rejected", qdq("x", "a") + TAIL, {"z": np.int8(3)}, match="Non-zero zero point"),
    "zero point of uint8": Case("zero-point", "rejected", qdq("x", "a") + TAIL, {"z": np.uint8(128)},
                                match="Non-zero zero point"),
    "zero point of a weight": Case("zero-point", "rejected", qdq("x", "a") + TAIL, {"wz": ZS + np.int8(1)},
                                   match="Non-zero zero point"),
    "uint8 weights": Case("zero-point", "rejected", qdq("x", "a") + TAIL,
                          {"w": RANDOM.integers(0, 256, (16, 16, 3, 3)).astype(np.uint8),
                           "wz": np.full(16, 128, np.uint8)}, match="UINT8"),
    "uint8 weights, zero point 0": Case("unsigned", "rejected", qdq("x", "a") + TAIL,
                                        {"w": np.ones((16, 16, 3, 3), np.uint8), "wz": np.zeros(16, np.uint8)},
                                        match="UINT8"),
    "int16": Case("code-type", "rejected", qdq("x", "a") + TAIL, {"z": np.int16(0)}, opset=21,
                  match="Failed to import initializer"),
    "uint16": Case("code-type", "rejected", qdq("x", "a") + TAIL, {"z": np.uint16(32768)}, opset=21,
                   match="Failed to import initializer"),
    "int4 convolution": Case("code-type", "rejected", qdq("x", "a") + TAIL.replace(", wz", ""), {"w": INT4}, opset=21,
                             match="dtype == W.type", mended=False),
    "zero scale": Case("scale", "rejected", qdq("x", "a") + TAIL, {"s": np.float32(0)}, match="must all be positive"),
    "negative scale": Case("scale", "rejected", qdq("x", "a") + TAIL, {"s": -ONE}, match="must all be positive"),
    "NaN": Case("scale", "rejected", qdq("x", "a") + TAIL, {"s": np.float32(np.nan)}, match="must all be positive",
                mended=False),
    "infinite scale": Case("scale", "wrong", qdq("x", "a") + TAIL, {"s": np.float32(np.inf)}, "int8", mended=False),
    "dead channel": Case("scale", "rejected", qdq("x", "a") + TAIL, {"ws": MANY * (np.arange(16) != 5)},
                         match="must all be positive"),
    "negative weight scale": Case("scale", "rejected", qdq("x", "a") + TAIL,
                                  {"ws": np.where(np.arange(16) == 5, -MANY, MANY)}, match="must all be positive"),
    "subnormal scale": Case("tiny-scale", "less accurate", qdq("x", "a") + TAIL,
                            {"ws": np.where(np.arange(16) == 5, np.float32(1e-40), MANY)}, "int8", mended=False),
    "a scale for each channel": Case(
        "channel-activation", "float", qdq("x", "a").replace("Linear(", "Linear<axis=1>(") + TAIL,
        {"s": np.full(16, 0.05, np.float32), "z": ZS}, "float"),
    "a list of one scale": Case("channel-activation", "float", qdq("x", "a") + TAIL,
                                {"s": np.full(1, 0.05, np.float32), "z": np.zeros(1, np.int8)}, "float"),
    "axis 1 of a Conv": Case("weight-axis", "float", qdq("x", "a") + TAIL.replace("axis=0", "axis=1"), {}, "float"),
    "no axis of a Conv": Case("weight-axis", "float", qdq("x", "a") + TAIL.replace("<axis=0>", ""), {}, "float"),
    "axis 0 of a MatMul": Case("weight-axis", "float", qdq("x", "a") + MATMUL % 0,
                               {"ws": np.full(64, 0.003, np.float32), "wz": np.zeros(64, np.int8)}, "float",
                               io=ROWS, base=FC, layers=("mm",)),
    "axis 0 of a Gemm": Case("weight-axis", "float", qdq("x", "a") + GEMM % (0, 0),
                             {"ws": np.full(64, 0.003, np.float32), "wz": np.zeros(64, np.int8)}, "float",
                             io=ROWS, base=FC, layers=("fc",)),
    "axis 1 of a Gemm with transB": Case(
        "weight-axis", "float", qdq("x", "a") + GEMM % (1, 1),
        {"w": FC["w"].T.copy(), "ws": np.full(64, 0.003, np.float32), "wz": np.zeros(64, np.int8)},  # type: ignore[union-attr]
        "float", io=ROWS, base=FC, layers=("fc",)),
    "axis out of range": Case("axis-range", "rejected", qdq("x", "a") + TAIL.replace("axis=0", "axis=7"),
                              match="Axis must be in the range"),
    "too few scales": Case("scale-length", "rejected", qdq("x", "a") + TAIL, {"ws": MANY[:8], "wz": ZS[:8]},
                           match="number of scales is not equal", mended=False),
    "scales in two axes": Case("scale-length", "rejected", qdq("x", "a") + TAIL, {"ws": MANY[:, None]},
                               match="Invalid rank", mended=False),
    "no scale at all": Case("scale-length", "rejected", qdq("x", "a") + TAIL,
                            {"s": np.zeros(0, np.float32), "z": np.zeros(0, np.int8)}, match="no coefficients",
                            mended=False),
    "a zero point where codes are read": Case(
        "zero-point", "rejected", qdq("x", "a").replace("(a_q, s, z)", "(a_q, s, z3)") + TAIL, {"z3": np.int8(3)},
        match="Non-zero zero point", mended=False),
    "a zero point that is an input": Case(
        "computed-scale", "rejected", qdq("x", "a").replace(", z)", ", zi)") + TAIL, match="IQuantizeLayer",
        io="(float[1,16,16,16] x, int8 zi) => (float[1,16,16,16] y)", mended=False),
    "one zero point for many scales": Case("scale-length", "rejected", qdq("x", "a") + TAIL, {"wz": Z},
                                           match="same volume"),
    "blocks in a convolution": Case(
        "blocked", "rejected", qdq("x", "a") + TAIL.replace("axis=0", "axis=1, block_size=8").replace(", wz", ""),
        {"ws": np.full((16, 2, 3, 3), 0.003, np.float32)}, match="blocking dimension", opset=21, mended=False),
    "one number in codes": Case("scalar-constant", "rejected",
                                "[KD] kd = DequantizeLinear(kq, s, z) [scaled] m = Mul(x, kd) " + qdq("m", "a") + TAIL,
                                {"kq": np.int8(5)}, match="only allowed before DQ"),
    "dynamic scale": Case("computed-scale", "rejected",
                          "[top] t = ReduceMax<keepdims=0>(x) [sc] dyn = Mul(t, k) " + qdq("x", "a", "dyn") + TAIL,
                          match="signal 11", mended=False),
    "QLinearConv": Case("integer-operator", "rejected", "[Q] q = QuantizeLinear(x, s, z) [conv] r = "
                        "QLinearConv<pads=[1,1,1,1]>(q, s, z, w, ws, wz, s, z) [D] y = DequantizeLinear(r, s, z)",
                        match="QLinearConv"),
    "QLinearMatMul": Case("integer-operator", "rejected", "[Q] q = QuantizeLinear(x, s, z) [mm] r = "
                          "QLinearMatMul(q, s, z, w, ws, wz, s, z) [D] y = DequantizeLinear(r, s, z)", io=ROWS, base=FC,
                          layers=("mm",), match="QLinearMatMul"),
    "QLinearAdd": Case("integer-operator", "rejected", qdq("x", "a") + WD + CONV +
                       "[Qc] cq = QuantizeLinear(c, s, z) [sum] t = com.microsoft.QLinearAdd(cq, s, z, a_q, s, z, s, z)"
                       " [D] y = DequantizeLinear(t, s, z)", match="Plugin not found"),
    "MatMulInteger": Case("integer-operator", "rejected", "[mm] y = MatMulInteger(x, w)",
                          io="(int8[4,64] x) => (int32[4,32] y)", base=FC, match="MatMulInteger", mended=False),
    "DynamicQuantizeLinear": Case(
        "integer-operator", "rejected",
        "[dyn] q, sd, zd = DynamicQuantizeLinear(x) [D] a = DequantizeLinear(q, sd, zd) " + TAIL,
        match="DynamicQuantizeLinear", mended=False),
    "FusedMatMul": Case("foreign-operator", "rejected", "[mm] y = com.microsoft.FusedMatMul(x, wf)",
                        {"wf": np.ones((64, 32), np.float32)}, io=ROWS, base=FC, match="Plugin not found",
                        mended=False),
    "weights in float": Case("half-quantized", "float", qdq("x", "a") + CONV.replace("wd", "wf") + "[relu] y = Relu(c)",
                             {}, "float", mended=False),
    "input in float": Case("half-quantized", "float", TAIL.replace("(a,", "(x,"), {}, "float", mended=False),
    "a cast to float32 behind Q/DQ": Case(
        "half-quantized", "float", "[down] h = Cast<to=10>(x) [Q] q = QuantizeLinear(h, sh, z) "
        "[D] a0 = DequantizeLinear(q, sh, z) [up] a = Cast<to=1>(a0) " + TAIL, {}, "float", mended=False),
    "scales of two types": Case("scale-types", "rejected", qdq("x", "a0") + HALF_MATMUL, match="lhs_scale->type",
                                io="(float[2,4,64] x) => (float[2,4,32] y)", base=FC, mended=False),
    "scales of two types, two axes and a Reshape": Case(
        "scale-types", "rejected", qdq("x", "r") + "[op] a0 = Reshape(r, rows) "
        + HALF_MATMUL, {"rows": np.array([8, 64])}, match="lhs_scale->type", io="(float[2,4,64] x) => (float[8,32] y)",
        base=FC, mended=False),
    "a ReLU behind Q/DQ": Case("half-quantized", "float", qdq("x", "a0") + "[op] a = Relu(a0) " + TAIL, {}, "float"),
    "a Sigmoid behind Q/DQ": Case("half-quantized", "float", qdq("x", "a0") + "[op] a = Sigmoid(a0) " + TAIL, {},
                                  "float"),
    "an average behind Q/DQ": Case(
        "half-quantized", "float",
        qdq("x", "a0") + "[op] a = AveragePool<kernel_shape=[3,3],pads=[1,1,1,1]>(a0) " + TAIL, {}, "float"),
    "a Resize behind Q/DQ": Case("half-quantized", "float", qdq("x", "a0") + "[op] a = Resize(a0, , up) " + TAIL, {},
                                 "float", io="(float[1,16,16,16] x) => (float[1,16,32,32] y)"),
    "a Concat of two scales": Case(
        "half-quantized", "float", qdq("x", "a0") + qdq("x", "a1", "s2") + "[op] a = Concat<axis=1>(a0, a1) " + TAIL,
        {"w": RANDOM.integers(-127, 128, (16, 32, 3, 3)).astype(np.int8)}, "float"),
    "padding with ones": Case("half-quantized", "float", qdq("x", "a0") + "[op] a = Pad(a0, p, hi) " + TAIL, {},
                              "float", io="(float[1,16,16,16] x) => (float[1,16,18,18] y)", mended=False),
    "ConvTranspose": Case("conv-transpose", "float", qdq("x", "a") + TAIL.replace("Conv<", "ConvTranspose<"), {},
                          "float", layers=()),
    "a Softmax behind Q/DQ": Case(
        "softmax", "less accurate", qdq("x", "a") + "[WD] wd = DequantizeLinear<axis=1>(w, ws, wz) "
        "[mm] m = MatMul(a, wd) " + qdq("m", "m2") + "[soft] y = Softmax(m2)", {}, "int8", io=ROWS, base=FC,
        layers=("mm",)),
    "queries, keys and values in one": Case("cut-for-attention", "float", qdq("x", "a") + FUSED, {
        "w": RANDOM.integers(-127, 128, (64, 192)).astype(np.int8), "ws": np.full(192, 0.003, np.float32),
        "wz": np.zeros(192, np.int8), "parts": np.array([64, 64, 64]), "heads": np.array([0, 0, 4, 16]),
        }, "float", io="(float[1,16,64] x) => (float[1,4,16,16] y)", layers=("mm", "scores", "mix"), mended=False),
    "two errors for one": Case("twice", "less accurate", qdq("x", "a0") + qdq("a0", "a", "s2") + TAIL, {}, "int8"),
    "weights quantised in the graph": Case(
        "stored-float", "note", "[WQ] wq = QuantizeLinear<axis=0>(wf, ws, wz) " + qdq("x", "a") +
        TAIL.replace("(w,", "(wq,"), {}, "int8"),
    "scales that differ": Case(
        "scales-differ", "note", qdq("x", "a").replace("DequantizeLinear(a_q, s", "DequantizeLinear(a_q, s2") + TAIL,
        {}, "int8", mended=False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_compiler_does_what_the_rule_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    assert (case.rule, case.severity) in {(f.rule, f.severity) for f in lint(model, "tensorrt-rtx").findings}
    if case.done == "rejected":
        with pytest.raises(EngineError, match=case.match):
            build(model, tmp_path)
        return
    found = {layer.name: layer.precision for layer in build(model, tmp_path).linear}
    wanted = "int8" if case.done == "int8" else "fp32"
    assert found == dict.fromkeys(case.layers or ("conv",), wanted)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.mended])
def test_the_compiler_takes_what_is_mended(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    before = case.model()
    finding = next(f for f in lint(before, "tensorrt-rtx").findings if f.rule == case.rule)
    assert finding.automatic
    mended, done = fix(before, "tensorrt-rtx")
    assert case.rule not in done.after.counts()
    assert done.after.faults == ()
    assert {layer.name: layer.precision for layer in build(mended, tmp_path).linear} == (
        dict.fromkeys(case.layers, "int8") or {"conv": "fp32"}
    )
    again, _ = fix(mended, "tensorrt-rtx")
    assert again == mended


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.mended])
def test_what_cannot_be_mended_is_not_said_to_be(name: str) -> None:
    model = CASES[name].model()
    assert not any(f.automatic for f in lint(model, "tensorrt-rtx").findings if f.rule == CASES[name].rule)
    _, done = fix(model, "tensorrt-rtx")
    assert CASES[name].rule in done.after.counts()


# What other tools write, or what is said to be a fault, and this compiler takes as int8: lint says nothing of it.
RELU = "[relu] y = Relu(c)"
SOUND = {
    "a cast to float16": qdq("x", "a0") + "[down] a = Cast<to=10>(a0) [WD] wd = DequantizeLinear<axis=0>(w, wsh, wz) "
    "[conv] c = Conv<pads=[1,1,1,1]>(a, wd) [relu] r = Relu(c) [up] y = Cast<to=1>(r)",
    "plain": qdq("x", "a") + TAIL,
    "no zero point where codes are read": qdq("x", "a").replace("(a_q, s, z)", "(a_q, s)") + TAIL.replace(", wz", ""),
    "Q/DQ in front of a Pad": qdq("x", "a0") + "[pad] a = Pad(a0, p) " + WD + "[conv] c = Conv(a, wd) " + RELU,
    "Q/DQ behind a Pad": "[pad] p1 = Pad(x, p) " + qdq("p1", "a") + WD + "[conv] c = Conv(a, wd) " + RELU,
    "a MaxPool": qdq("x", "a0") + "[op] a = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(a0) " + TAIL,
    "a MaxPool of codes": "[Q] q = QuantizeLinear(x, s, z) [op] m = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(q) "
    "[D] a = DequantizeLinear(m, s, z) " + TAIL,
    "a Concat of codes of one scale, some of them pooled": qdq("x", "a0")
    + "[top] l = Slice(a0, i0, i8, i1) [low] h = Slice(a0, i8, i16, i1) "
    + "[op] m = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(h) [join] a = Concat<axis=1>(l, m) "
    + TAIL,
    "a Transpose": qdq("x", "a0") + "[op] a = Transpose<perm=[0,1,3,2]>(a0) " + TAIL,
    "a factor": qdq("x", "a0") + "[op] a = Mul(a0, hi) " + TAIL,
    "a Neg": qdq("x", "a0") + "[op] a = Neg(a0) " + TAIL,
    "two DequantizeLinear of one": "[Q] q = QuantizeLinear(x, s, z) [D1] a = DequantizeLinear(q, s, z) "
    "[D2] d = DequantizeLinear(q, s, z) " + WD + CONV + "[sum] y = Add(c, d)",
    "Q/DQ of ONNX Runtime's domain": qdq("x", "a")
    .replace("= Q", "= com.microsoft.Q")
    .replace("= D", "= com.microsoft.D")
    + TAIL,
    "a scale behind an Identity": "[I] sc = Identity(s) " + qdq("x", "a", "sc") + TAIL,
    "weights that are moved": qdq("x", "a") + "[WD] w0 = DequantizeLinear<axis=1>(w, ws, wz) "
    "[move] wd = Transpose<perm=[1,0,2,3]>(w0) " + CONV + RELU,
    "a scale that a Constant holds": "[S] sc = Constant<value_float=0.05>() " + qdq("x", "a", "sc") + TAIL,
}


@pytest.mark.parametrize("name", SOUND)
def test_what_the_compiler_takes_is_no_fault(name: str, tmp_path: Path) -> None:
    model = parse(f"{IO} {{ {SOUND[name]} }}", STORED)
    report = lint(model, "tensorrt-rtx")
    assert (report.findings, report.quantized_layers) == ((), 1)
    assert {layer.name: layer.precision for layer in build(model, tmp_path).linear} == {"conv": "int8"}
    mended, done = fix(model, "tensorrt-rtx")
    assert [report.name for report in done.passes if report.changed] == []
    assert len(mended.graph.node) == len(model.graph.node)


def test_queries_keys_and_values_with_one_scale_are_int8(tmp_path: Path) -> None:
    case = CASES["queries, keys and values in one"]
    model = dataclasses.replace(case, stored={**case.stored, "ws": np.float32(0.003), "wz": np.int8(0)}).model()
    assert "cut-for-attention" not in lint(model, "tensorrt-rtx").counts()
    assert {layer.name: layer.precision for layer in build(model, tmp_path).linear}["mm"] == "int8"


def test_with_two_axes_scales_of_two_types_are_taken(tmp_path: Path) -> None:
    model = parse(f"{ROWS} {{ {qdq('x', 'a0') + HALF_MATMUL} }}", FC)
    assert lint(model, "tensorrt-rtx").findings == ()
    assert build(model, tmp_path).int8 == 1


@pytest.mark.parametrize(("opset", "ir"), [(13, 4), (17, 8), (21, 10), (25, 13), (26, 14)])
def test_no_version_is_too_new(opset: int, ir: int, tmp_path: Path) -> None:
    model = parse(f"{IO} {{ {SOUND['plain']} }}", STORED, opset)
    model.ir_version = ir
    assert "version" not in lint(model, "tensorrt-rtx").counts()
    assert build(model, tmp_path).int8 == 1


def moved(plan: bytes) -> list[list[tuple[str, tuple[int | str, ...]]]]:
    """Types and extents of what each kernel reads and writes."""
    kernels = [kernel for program in read_plan(plan) for kernel in program.kernels]
    return [[(tensor.dtype, tensor.dims) for tensor in (*kernel.reads, *kernel.writes)] for kernel in kernels]


@pytest.mark.parametrize("zero", ["none", "uint8"])
def test_unsigned_codes_are_taken_for_signed_ones(zero: str, tmp_path: Path) -> None:
    """The plans are equal, and an int8 plan has no codes above 127."""
    signed = parse(f"{IO} {{ {SOUND['plain']} }}", STORED)
    text = SOUND["plain"].replace("(x, s, z)", "(x, s)").replace("(a_q, s, z)", "(a_q, s)") if zero == "none" else None
    stored = STORED if text else {**STORED, "z": np.uint8(0)}
    unsigned = parse(f"{IO} {{ {text or SOUND['plain']} }}", stored)
    found = lint(unsigned, "tensorrt-rtx").findings
    assert [(f.rule, f.severity, f.node) for f in found] == [("unsigned", "wrong", "Qa")]
    plans = []
    for model in (signed, unsigned):
        build(model, tmp_path)
        plans.append((tmp_path / "e.plan").read_bytes())
    if zero == "uint8":
        assert plans[0] == plans[1]
    # The names of constants differ where there is one less.
    assert moved(plans[0]) == moved(plans[1])
    assert "uint8" not in str(moved(plans[1]))


def both(body: str, base: Weights, folder: Path, rule: str) -> tuple[Audit, Audit]:
    """Audits of a network with a fault that costs kernels or bytes, and of the mended one."""
    model = parse(f"{IO} {{ {body} }}", base)
    assert rule in lint(model, "tensorrt-rtx").counts()
    mended, done = fix(model, "tensorrt-rtx")
    assert rule not in done.after.counts()
    return build(model, folder), build(mended, folder)


BEFORE_RELU = qdq("x", "a") + WD + CONV + qdq("c", "m") + "[relu] r = Relu(m) " + qdq("r", "y")


def test_with_one_weight_scale_qdq_before_a_relu_keep_it_out_of_the_layer(tmp_path: Path) -> None:
    one: Weights = {**STORED, "ws": np.float32(0.003), "wz": Z}
    faulty, mended = both(BEFORE_RELU.replace("<axis=0>", ""), one, tmp_path, "before-relu")
    assert [layer.relu for layer in faulty.linear] == [False]
    assert [layer.relu for layer in mended.linear] == [True]


def test_with_a_scale_for_each_channel_they_cost_nothing_but_accuracy(tmp_path: Path) -> None:
    faulty, mended = both(BEFORE_RELU, STORED, tmp_path, "before-relu")
    (finding,) = lint(parse(f"{IO} {{ {BEFORE_RELU} }}", STORED), "tensorrt-rtx").findings
    assert finding.severity == "less accurate"
    assert (faulty.kernels, faulty.bytes_moved) == (mended.kernels, mended.bytes_moved)


def test_a_float_shortcut_costs_bytes(tmp_path: Path) -> None:
    faulty, mended = both(SHORT % "x", STORED, tmp_path, "residual")
    assert faulty.kernels == mended.kernels
    assert (faulty.bytes_moved or 0) > (mended.bytes_moved or 0) > 0


def test_with_one_weight_scale_the_sum_wants_both_operands(tmp_path: Path) -> None:
    one: Weights = {**STORED, "ws": np.float32(0.003), "wz": Z}
    text = (SHORT % "a").replace("<axis=0>", "")
    faulty = parse(f"{IO} {{ {text} }}", one)
    better = parse(f"{IO} {{ {text.replace('Add(c,', 'Add(cd,').replace('[sum]', qdq('c', 'cd') + '[sum]')} }}", one)
    assert lint(faulty, "tensorrt-rtx").counts() == {"residual": 1}
    assert lint(better, "tensorrt-rtx").findings == ()
    assert (build(faulty, tmp_path).bytes_moved or 0) > (build(better, tmp_path).bytes_moved or 0) > 0


def test_a_second_scale_costs_a_kernel(tmp_path: Path) -> None:
    two = qdq("x", "a") + qdq("x", "a2", "s2") + WD + CONV + "[WD2] wd2 = DequantizeLinear<axis=0>(w, ws, wz) "
    two += "[conv2] c2 = Conv<pads=[1,1,1,1]>(a2, wd2) [sum] y = Add(c, c2)"
    faulty = parse(f"{IO} {{ {two} }}", STORED)
    better = parse(f"{IO} {{ {two} }}", {**STORED, "s2": ONE})
    assert lint(faulty, "tensorrt-rtx").counts()["two-scales"] == 1
    assert "two-scales" not in lint(better, "tensorrt-rtx").counts()
    assert (build(faulty, tmp_path).kernels or 0) == (build(better, tmp_path).kernels or 0) + 1


def test_qdq_on_a_transposed_convolution_cost_a_kernel(tmp_path: Path) -> None:
    faulty, mended = both(CASES["ConvTranspose"].body, STORED, tmp_path, "conv-transpose")
    assert (faulty.kernels or 0) == (mended.kernels or 0) + 1


def test_a_float_layer_among_others(tmp_path: Path) -> None:
    body = qdq("x", "a") + WD + CONV + "[relu] r = Relu(c) [head] y = Conv<pads=[1,1,1,1]>(r, wf)"
    model = parse(f"{IO} {{ {body} }}", STORED)
    (finding,) = lint(model, "tensorrt-rtx").findings
    assert (finding.rule, finding.node, finding.severity) == ("float-layer", "head", "slower")
    assert {layer.name: layer.precision for layer in build(model, tmp_path).linear} == {"conv": "int8", "head": "fp32"}


_SPEC = importlib.util.spec_from_file_location("quantizer", Path(__file__).with_name("test_quantizer_engines.py"))
quantizer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(quantizer)
NETWORKS = {
    "separable": (quantizer.SEPARABLE, quantizer.SEPARABLE_WEIGHTS),
    "unet": (quantizer.UNET, quantizer.UNET_WEIGHTS),
    "encoder": (quantizer.ENCODER % (2, 2, "f2 = Relu(f1)"), quantizer.ENCODER_WEIGHTS),
}
# How onnxruntime.quantization.quantize_static is called.
SETTINGS: Mapping[str, dict[str, Any]] = {
    "default": {},
    "QOperator": {"quant_format": QuantFormat.QOperator, "per_channel": True},
    "uint8 weights": {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QUInt8},
    "16-bit activations": {"activation_type": QuantType.QUInt16},
    "dedicated pairs, 7 bits": {"reduce_range": True, "extra_options": {"DedicatedQDQPair": True}},
    "weights in float": {"extra_options": {"AddQDQPairToWeight": True}},
}


class Samples(CalibrationDataReader):
    def __init__(self, model: onnx.ModelProto) -> None:
        (spec,) = model_inputs(model)
        random = np.random.default_rng(1)
        self.feeds = iter([{spec.name: random.normal(size=spec.shape).astype(np.float32)} for _ in range(4)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("network", NETWORKS)
def test_files_of_onnxruntime_build_once_they_are_mended(network: str, setting: str, tmp_path: Path) -> None:
    model = quantizer.parse(*NETWORKS[network])
    onnx.save(model, tmp_path / "float.onnx")
    logging.disable(logging.WARNING)
    quantize_static(tmp_path / "float.onnx", tmp_path / "theirs.onnx", Samples(model), **SETTINGS[setting])
    logging.disable(logging.NOTSET)
    theirs = onnx.load(tmp_path / "theirs.onnx")
    rejected = {f.rule for f in lint(theirs, "tensorrt-rtx").findings if f.severity == "rejected"}
    assert rejected
    with pytest.raises(EngineError):
        build(theirs, tmp_path)
    mended, done = fix(theirs, "tensorrt-rtx")
    assert done.after.findings == ()
    audit = build(mended, tmp_path)
    assert {layer.name for layer in audit.fallbacks} == ({"up"} if network == "unet" else set())
    # Symmetric codes have a bit less where a range was one-sided, and these weights are random.
    assert all((db or 99) > 20 for db in done.sqnr_db.values())
    assert fix(mended, "tensorrt-rtx")[0] == mended
