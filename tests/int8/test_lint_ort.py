"""Does ONNX Runtime do what each rule of ``lint`` says of it? Asked of the graph that it optimises and its results."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.errors import EngineError
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.lint import codes, lint
from relu_deploy.int8.lint.fix import fix

RANDOM = np.random.default_rng(0)
SCALES = RANDOM.uniform(0.001, 0.01, 16).astype(np.float32)
Stored = Mapping[str, Any]
STORED: Stored = {
    "s": np.float32(0.05), "s2": np.float32(0.07), "u": np.uint8(128), "z": np.uint8(0), "i": np.int8(0),
    "w": RANDOM.integers(-127, 128, (16, 16, 3, 3)).astype(np.int8), "ws": SCALES, "wz": np.zeros(16, np.int8),
    "bq": np.arange(16, dtype=np.int32) * 100, "bs": SCALES * np.float32(0.05), "bz": np.zeros(16, np.int32),
    "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "bf": np.ones(32, np.float32),
}  # fmt: skip
ROWS: Stored = {
    **STORED, "w": RANDOM.integers(-127, 128, (64, 64)).astype(np.int8),
    "ws": RANDOM.uniform(0.001, 0.01, 64).astype(np.float32), "wz": np.zeros(64, np.int8),
    "bf": np.ones(64, np.float32),
}  # fmt: skip
IO, ROW_IO = "(float[1,16,16,16] x) => (float[1,16,16,16] y)", "(float[4,64] x) => (float[4,64] y)"
WD = "[WD] wd = DequantizeLinear<axis=0>(w, ws, wz) [BD] bd = DequantizeLinear<axis=0>(bq, bs, bz) "
CONV = "[conv] c = Conv<pads=[1,1,1,1]>(a, wd, bd) "


def qdq(source: str, name: str, zero: str = "u", scale: str = "s", read: str = "") -> str:
    return (
        f"[Q{name}] {name}_q = QuantizeLinear({source}, {scale}, {zero}) "
        f"[D{name}] {name} = DequantizeLinear({name}_q, {read or scale}, {zero}) "
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """A faulty network, the rule and severity that name it, and what ONNX Runtime does with the layer ``conv``."""

    rule: str
    severity: str
    body: str
    stored: Stored = dataclasses.field(default_factory=dict)
    integer: bool = False
    io: str = IO
    base: Stored = dataclasses.field(default_factory=lambda: STORED)
    opset: int = 19
    automatic: bool = False

    def model(self) -> onnx.ModelProto:
        return parse(f"{self.io} {{ {self.body} }}", {**self.base, **self.stored}, self.opset)


def parse(text: str, stored: Stored, opset: int = 19) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]> g {text}')
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items() if name in read
    )
    return model


MATMUL = "[WD] wd = DequantizeLinear<axis=%d>(w, ws, wz) [conv] c = MatMul(a, wd) "
CLIPPED = qdq("x", "a") + WD + CONV + "[clip] r = Clip(c, lo, hi) " + qdq("r", "y", "z")
CASES = {
    "scales that differ": Case("scales-differ", "float", qdq("x", "a", read="s2") + WD + CONV + qdq("c", "y", "z")),
    "an activation with many scales": Case(
        "channel-activation", "float", qdq("x", "a").replace("Linear(", "Linear<axis=1>(") + WD + CONV + qdq("c", "y",
        "z", "s2"), {"s": np.full(16, 0.05, np.float32), "u": np.full(16, 128, np.uint8)}, automatic=True),
    "zero scale": Case("scale", "float", qdq("x", "a", scale="s2") + WD + CONV + qdq("c", "y", "z"),
                       {"s2": np.float32(0)}, automatic=True),
    "NaN": Case("scale", "float", qdq("x", "a", scale="s2") + WD + CONV + qdq("c", "y", "z"),
                {"s2": np.float32(np.nan)}),
    "16 bits": Case("code-type", "float", qdq("x", "a") + WD + CONV + qdq("c", "y", "z"), {"u": np.uint16(32768)},
                    opset=21, automatic=True),
    "bias scale": Case("bias", "float", qdq("x", "a") + WD + CONV + qdq("c", "y", "z"),
                       {"bs": np.full(16, 0.1, np.float32)}, automatic=True),
    "bias of 8 bits": Case("bias", "float", qdq("x", "a") + WD + CONV + qdq("c", "y", "z"),
                           {"bq": np.ones(16, np.int8), "bz": np.zeros(16, np.int8)}, automatic=True),
    "float output": Case("unfused", "float", qdq("x", "a") + WD + CONV.replace("c =", "y =")),
    "two readers": Case("unfused", "float", qdq("x", "a") + WD + CONV + qdq("c", "d", "z") + "[sum] y = Add(c, d)"),
    "a zero point behind a ReLU": Case("unfused", "float", qdq("x", "a") + WD + CONV + "[relu] r = Relu(c) " +
                                       qdq("r", "y")),
    "int8 behind a ReLU": Case("unfused", "float", qdq("x", "a") + WD + CONV + "[relu] r = Relu(c) " +
                               qdq("r", "y", "i")),
    "a Clip below the highest code": Case("unfused", "float", CLIPPED, {"lo": np.float32(0), "hi": np.float32(6)}),
    "a Clip from above 0": Case("unfused", "float", CLIPPED, {"lo": np.float32(1), "hi": np.float32(99)}),
    "a Clip of computed bounds": Case("unfused", "float", "[top] hi = ReduceMax<keepdims=0>(x) " + CLIPPED,
                                      {"lo": np.float32(0)}),
    "a ReLU between a product and floats": Case("unfused", "float", qdq("x", "a") + MATMUL % 1 + "[relu] r = Relu(c) "
                                                "y = Neg(r)", io=ROW_IO, base=ROWS),
    "a ReLU between a product and codes below 0.0": Case(
        "unfused", "float", qdq("x", "a") + MATMUL % 1 + "[relu] r = Relu(c) " + qdq("r", "y"), io=ROW_IO, base=ROWS),
    "a Clip between a product and codes above it": Case(
        "unfused", "float", qdq("x", "a") + (MATMUL % 1).replace("MatMul", "Gemm") + "[clip] r = Clip(c, lo, hi) " +
        qdq("r", "y", "z"), {"lo": np.float32(0), "hi": np.float32(6)}, io=ROW_IO, base=ROWS),
    "an activation behind Q/DQ": Case("half-quantized", "float", qdq("x", "a0") + "[op] a = Sigmoid(a0) " + WD + CONV +
                                      qdq("c", "y", "z"), automatic=True),
    "weights only": Case("half-quantized", "float", WD + CONV.replace("(a,", "(x,") + qdq("c", "y", "z")),
    "a Gemm with a float bias": Case(
        "float-bias", "float",
        qdq("x", "a") + "[WD] wd = DequantizeLinear<axis=1>(w, ws, wz) [conv] y = Gemm(a, wd, bf)",
        io=ROW_IO, base=ROWS, automatic=True),
    "float16": Case("float16", "float", qdq("x", "a") + "[WD] wd = DequantizeLinear<axis=0>(w, ws, wz) "
                    "[conv] c = Conv<pads=[1,1,1,1]>(a, wd) " + qdq("c", "y", "z"),
                    {"s": np.float16(0.05), "ws": SCALES.astype(np.float16)},
                    io="(float16[1,16,16,16] x) => (float16[1,16,16,16] y)"),
}  # fmt: skip


def optimised(model: onnx.ModelProto, folder: Path) -> list[str]:
    get_backend("ort").build(model, folder / "e.onnx", BuildConfig(target="ort"))
    return [node.op_type for node in onnx.load(folder / "e.onnx").graph.node]


def is_integer(ops: list[str]) -> bool:
    """Whether the only linear layer became an integer kernel."""
    return bool(set(ops) & {"QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm"})


@pytest.mark.parametrize("name", CASES)
def test_the_optimiser_does_what_the_rule_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    found = [f for f in lint(model, "ort").findings if f.rule == case.rule]
    assert [(f.severity, f.automatic) for f in found][:1] == [(case.severity, case.automatic)]
    assert is_integer(optimised(model, tmp_path)) == case.integer


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.automatic])
def test_what_is_mended_is_integer(name: str, tmp_path: Path) -> None:
    mended, done = fix(CASES[name].model(), "ort")
    assert done.after.findings == ()
    assert is_integer(optimised(mended, tmp_path))
    assert fix(mended, "ort")[0] == mended


# What would be a fault elsewhere.
SOUND = {
    "as this package writes it": qdq("x", "a") + WD + CONV + qdq("c", "y", "z"),
    "a ReLU that the quantiser is": qdq("x", "a") + WD + CONV + "[relu] r = Relu(c) " + qdq("r", "y", "z"),
    "a float bias": qdq("x", "a") + WD + CONV.replace(", bd", "") + qdq("c", "y", "z"),
    "padding behind Q/DQ": qdq("x", "a0")
    + "[pad] a = Pad(a0, p) "
    + WD
    + "[conv] c = Conv(a, wd, bd) "
    + qdq("c", "y"),
    "padding before Q/DQ": "[pad] p1 = Pad(x, p) "
    + qdq("p1", "a")
    + WD
    + "[conv] c = Conv(a, wd, bd) "
    + qdq("c", "y"),
    "a MaxPool": qdq("x", "a0")
    + "[op] a = MaxPool<kernel_shape=[3,3],pads=[1,1,1,1]>(a0) "
    + WD
    + CONV
    + qdq("c", "y"),
    "int8 activations": qdq("x", "a", "i") + WD + CONV + qdq("c", "y", "i"),
}


@pytest.mark.parametrize("step", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("end", ["lo", "hi"])
def test_a_bound_that_rounds_to_the_last_code_clips_nothing(end: str, step: float, tmp_path: Path) -> None:
    scale = np.float32(0.05)
    bounds = {"lo": np.float32(0), "hi": np.float32(255 * scale)}
    bounds[end] = bounds[end] + scale * np.float32(step if end == "lo" else -step)
    model = parse(f"{IO} {{ {CLIPPED} }}", {**STORED, **bounds})
    assert is_integer(optimised(model, tmp_path)) == (step < 0.5)
    assert lint(model, "ort").counts() == ({} if step < 0.5 else {"unfused": 1})


def test_a_product_whose_relu_is_read_twice_is_no_fault(tmp_path: Path) -> None:
    model = parse(f"{ROW_IO} {{ {qdq('x', 'a') + MATMUL % 1} [relu] r = Relu(c) [sum] y = Add(r, r) }}", ROWS)
    assert lint(model, "ort").findings == ()
    assert is_integer(optimised(model, tmp_path))


@pytest.mark.parametrize("name", SOUND)
def test_what_it_fuses_is_no_fault(name: str, tmp_path: Path) -> None:
    model = parse(f"{IO} {{ {SOUND[name]} }}", STORED)
    assert lint(model, "ort").findings == ()
    assert is_integer(optimised(model, tmp_path))
    assert [report.name for report in fix(model, "ort")[1].passes if report.changed] == []


def moved(model: onnx.ModelProto) -> float:
    """SQNR of the optimised network against the same as ONNX defines it, in dB; raises where it does not run."""
    (spec,) = model.graph.input
    shape = [d.dim_value for d in spec.type.tensor_type.shape.dim]
    x = {"x": np.random.default_rng(5).normal(size=shape).astype(np.float32)}
    wanted, got = (open_session(model, optimise=fused).run(None, x)[0].astype(np.float64) for fused in (False, True))
    return sqnr_db(float(np.sum(wanted**2)), float(np.sum((wanted - got) ** 2))) or 300.0


@pytest.mark.parametrize(
    ("body", "base", "io"),
    [
        (
            qdq("x", "a") + WD.replace("axis=0>(w", "axis=1>(w") + CONV.replace(", bd", "") + qdq("c", "y", "z"),
            STORED,
            IO,
        ),
        (qdq("x", "a") + (MATMUL % 0).replace("c =", "y ="), ROWS, ROW_IO),
        (qdq("x", "a") + (MATMUL % 0) + qdq("c", "y"), ROWS, ROW_IO),
        (qdq("x", "a") + (MATMUL % 1).replace("c =", "y =").replace("MatMul", "Gemm<transB=1>"), ROWS, ROW_IO),
    ],
)
def test_scales_along_a_wrong_axis_give_wrong_numbers(body: str, base: Stored, io: str) -> None:
    model = parse(f"{io} {{ {body} }}", base)
    assert [(f.rule, f.severity) for f in lint(model, "ort").findings] == [("weight-axis", "wrong")]
    assert moved(model) < 10
    mended, done = fix(model, "ort")
    assert done.after.findings == ()
    assert moved(mended) > 60
    assert all(db is None or db > 30 for db in done.sqnr_db.values())


def test_scales_along_the_right_axis_do_not(tmp_path: Path) -> None:
    model = parse(f"{ROW_IO} {{ {qdq('x', 'a') + (MATMUL % 1).replace('c =', 'y =')} }}", ROWS)
    assert lint(model, "ort").findings == ()
    assert moved(model) > 60


@pytest.mark.parametrize(
    ("rule", "text", "stored"),
    [
        ("scale-length", WD, {"ws": SCALES[:8], "wz": np.zeros(8, np.int8)}),
        ("scale-length", WD, {"wz": np.int8(0)}),
        ("axis-range", WD.replace("axis=0>(w", "axis=7>(w"), {}),
        (
            "blocked",
            WD.replace("axis=0>(w, ws, wz", "axis=1, block_size=8>(w, ws"),
            {"ws": np.ones((16, 2, 3, 3), "f")},
        ),
    ],
)
def test_what_fails_when_it_runs(rule: str, text: str, stored: Stored) -> None:
    body = qdq("x", "a") + text + CONV.replace(", bd", "") + qdq("c", "y", "z")
    model = parse(f"{IO} {{ {body} }}", {**STORED, **stored}, 21)
    assert ("rejected", rule) in [(f.severity, f.rule) for f in lint(model, "ort").findings]
    with pytest.raises(RUNTIME_ERRORS):
        moved(model)


@pytest.mark.parametrize(("opset", "ir"), [(26, 14), (27, 10)])
def test_versions_that_are_too_new(opset: int, ir: int, tmp_path: Path) -> None:
    model = parse(f"{IO} {{ {SOUND['a float bias']} }}", STORED, opset)
    model.ir_version = ir
    assert "version" in lint(model, "ort").counts()
    with pytest.raises(EngineError):
        optimised(model, tmp_path)
    mended, done = fix(model, "ort")
    assert done.after.findings == ()
    assert is_integer(optimised(mended, tmp_path))


def test_per_channel_scales_before_opset_13_are_no_onnx(tmp_path: Path) -> None:
    model = parse(f"{IO} {{ {SOUND['a float bias']} }}", STORED, 12)
    assert "invalid" in lint(model, "ort").counts()
    with pytest.raises(EngineError, match="Unrecognized attribute"):
        optimised(model, tmp_path)


def test_padding_between_quantisers_is_float(tmp_path: Path) -> None:
    body = (
        qdq("x", "a0") + "[pad] p1 = Pad(a0, p) " + qdq("p1", "a") + WD + "[conv] c = Conv(a, wd, bd) " + qdq("c", "y")
    )
    model = parse(f"{IO} {{ {body} }}", STORED)
    assert [(f.rule, f.severity) for f in lint(model, "ort").findings] == [("pad", "slower")]
    ops = optimised(model, tmp_path)
    assert ops[ops.index("Pad") - 1] == "DequantizeLinear"


def test_qdq_before_a_relu_keep_it(tmp_path: Path) -> None:
    body = qdq("x", "a") + WD + CONV + qdq("c", "m") + "[relu] r = Relu(m) " + qdq("r", "y", "z")
    model = parse(f"{IO} {{ {body} }}", STORED)
    assert lint(model, "ort").counts() == {"before-relu": 1}
    mended, done = fix(model, "ort")
    assert done.after.findings == ()
    before, after = optimised(model, tmp_path), optimised(mended, tmp_path)
    assert after == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    assert len(before) > len(after)


def test_half_a_sum_is_float(tmp_path: Path) -> None:
    half, whole = (qdq("x", "a") + f"[sum] t = Add(a, {other}) " + qdq("t", "y") for other in ("x", "a"))
    models = [parse(f"{IO} {{ {body} }}", STORED) for body in (half, whole)]
    assert [lint(model, "ort").counts() for model in models] == [{"residual": 1}, {}]
    assert ["QLinearAdd" in optimised(model, tmp_path) for model in models] == [False, True]


def test_8_bit_weights_saturate_without_vnni(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arithmetic is in docs/int8.md. What such a CPU does is not seen on one that has VNNI."""
    model = parse(f"{IO} {{ {SOUND['as this package writes it']} }}", STORED)
    monkeypatch.setattr(codes, "lacks_vnni", lambda _: True)
    assert [(f.rule, f.node) for f in lint(model, "ort").findings] == [("saturating-weights", "conv")]
    seven = parse(f"{IO} {{ {SOUND['as this package writes it']} }}", {**STORED, "w": STORED["w"] // 2})
    assert lint(seven, "ort").findings == ()
    assert lint(model, "tensorrt-rtx").counts().get("saturating-weights") is None
