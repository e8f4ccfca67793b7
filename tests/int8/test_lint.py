"""``lint`` finds nothing in files of this package; what ``--fix`` does to numbers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper

from calib.session import open_session
from relu_deploy.int8.lint import RULES, lint
from relu_deploy.int8.lint.fix import fix
from relu_deploy.int8.lint.fix_weights import store_codes, symmetric_weights
from relu_deploy.int8.run import quantize

_SPEC = importlib.util.spec_from_file_location("random_graph", Path(__file__).with_name("random_graph.py"))
random_graph = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(random_graph)
TARGETS = ("ort", "tensorrt-rtx", "tensorrt")


def parse(text: str, **stored: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 19]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in stored.items())
    return model


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("activation", ["Relu", "Silu"])
def test_our_own_files_have_no_faults(residual_model, measure, target, granularity, activation):
    model = residual_model(activation=activation)
    quantized, report = quantize(model, measure(model), target=target, weight_granularity=granularity, weight_bits=8)
    found = lint(quantized, target)
    assert found.findings == ()
    assert found.quantized_layers == report.int8_layers > 0
    mended, done = fix(quantized, target)
    assert [step.name for step in done.passes if step.changed] == []
    assert len(mended.graph.node) == len(quantized.graph.node)
    assert set(done.sqnr_db.values()) == {None}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(12))
def test_random_networks_of_ours_have_no_faults(measure, target, seed):
    model = random_graph.RandomGraph(seed).model()
    quantized, _ = quantize(model, measure(model), target=target, weight_bits=8)
    assert lint(quantized, target).findings == ()


def test_a_float_network_has_no_faults(residual_model):
    for target in TARGETS:
        report = lint(residual_model(), target)
        assert (report.findings, report.quantizers, report.quantized_layers) == ((), 0, 0)


def test_the_other_tensorrt_is_said_not_to_be_tried():
    model = parse(ONE, **{**STORED, "z": np.uint8(7)})
    rtx, other = lint(model, "tensorrt-rtx").findings, lint(model, "tensorrt").findings
    assert [f.rule for f in rtx] == [f.rule for f in other] == ["zero-point"]
    assert "not tried" in other[0].consequence
    assert "not tried" not in rtx[0].consequence


def test_findings_are_in_order_of_severity():
    model = parse(ONE.replace("y = Relu(c)", "r = Relu(c) [head] y = Conv(r, f)"),
                  **{**STORED, "z": np.int8(7), "f": np.ones((2, 2, 1, 1), np.float32)})  # fmt: skip
    assert [f.severity for f in lint(model, "tensorrt-rtx").findings] == ["rejected", "slower"]


ONE = """(float[1,2,4,4] x) => (float[1,2,4,4] y) {
  [Q] xq = QuantizeLinear(x, s, z) [D] xd = DequantizeLinear(xq, s, z)
  [WD] wd = DequantizeLinear<axis=0>(w, ws, wz) [conv] c = Conv(xd, wd) y = Relu(c) }"""
STORED = {
    "s": np.float32(0.1), "z": np.int8(0), "w": np.array([[[[100]], [[-7]]], [[[3]], [[-90]]]], np.int8),
    "ws": np.array([0.01, 0.02], np.float32), "wz": np.zeros(2, np.int8),
}  # fmt: skip


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(model, threads=1).run(None, {"x": x})[0])


def constant(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(t for t in model.graph.initializer if t.name == name))


@pytest.mark.parametrize(("zero", "dtype"), [(0, np.uint8), (-128, np.int8)])
def test_the_relu_that_a_zero_point_was_is_put_back(zero, dtype):
    """Quantisers drop a ReLU in front of an unsigned grid; a symmetric grid does not clip."""
    text = """(float[1,4] x) => (float[1,4] y) {
      [Q] xq = QuantizeLinear(x, s, z) [D] y = DequantizeLinear(xq, s, z) }"""
    model = parse(text, s=np.float32(0.1), z=dtype(zero))
    x = np.array([[-30.0, -1.0, 1.0, 30.0]], np.float32)
    mended, done = fix(model, "tensorrt-rtx")
    assert [node.op_type for node in mended.graph.node] == ["Relu", "QuantizeLinear", "DequantizeLinear"]
    assert done.after.findings == ()
    before, after = run(model, x), run(mended, x)
    # The step is 25.5 / 127, and the top of the range the same 25.5.
    np.testing.assert_allclose(after, before, atol=25.5 / 127 / 2 + 1e-6)
    assert after.min() == 0
    assert after.max() == pytest.approx(25.5)


def test_no_relu_is_put_behind_a_relu():
    text = """(float[1,1,4,4] x) => (float[1,1,2,2] y) { r = Relu(x) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
      [Q] q = QuantizeLinear(m, s, z) [D] y = DequantizeLinear(q, s, z) }"""
    mended, _ = fix(parse(text, s=np.float32(0.1), z=np.uint8(0)), "tensorrt-rtx")
    assert [node.op_type for node in mended.graph.node].count("Relu") == 1


def test_no_relu_is_put_behind_a_grid_that_starts_at_zero():
    text = """(float[1,1,4,4] x) => (float[1,1,1,1] y) {
      [Q] q = QuantizeLinear(x, s, z) [D] d = DequantizeLinear(q, s, z)
      m = GlobalAveragePool(d) [Q2] q2 = QuantizeLinear(m, s, z) [D2] y = DequantizeLinear(q2, s, z) }"""
    mended, _ = fix(parse(text, s=np.float32(0.1), z=np.uint8(0)), "tensorrt-rtx")
    assert [node.op_type for node in mended.graph.node].count("Relu") == 1


def test_codes_that_are_moved_keep_one_grid():
    text = """(float[1,2,4,4] x) => (float[1,4,4,4] y) { [Q] q = QuantizeLinear(x, s, z)
      m = MaxPool<kernel_shape=[1,1]>(q) t = Transpose<perm=[0,2,3,1]>(m) c = Concat<axis=3>(t, t)
      [D] y = DequantizeLinear(c, s, z) }"""
    model = parse(text, s=np.float32(0.1), z=np.uint8(100))
    mended, done = fix(model, "tensorrt-rtx")
    assert done.after.findings == ()
    grids = {tuple(node.input[1:]) for node in mended.graph.node if node.op_type.endswith("eLinear")}
    assert len(grids) == 1
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(mended, x), run(model, x), atol=0.05 + 15.5 / 127 / 2 + 1e-6)


def test_codes_that_are_computed_with_are_left_alone():
    text = """(float[1,4] x) => (float[1,4] y) { [Q] q = QuantizeLinear(x, s, z) i = Cast<to=6>(q) j = Mul(i, two)
      k = Cast<to=2>(j) [D] y = DequantizeLinear(k, s, z) }"""
    model = parse(text, s=np.float32(0.1), z=np.uint8(3), two=np.int32(1))
    mended, done = fix(model, "tensorrt-rtx")
    x = np.array([[-0.2, 0.5, 1.0, 3.0]], np.float32)
    np.testing.assert_array_equal(run(mended, x), run(model, x))
    assert any("computes with them" in skip.reason for step in done.passes for skip in step.skipped)
    assert "zero-point" in done.after.counts()


def test_codes_at_the_edge_of_the_network_are_left_alone():
    text = "(uint8[1,4] x) => (float[1,4] y) { [D] y = DequantizeLinear(x, s, z) }"
    _, done = fix(parse(text, s=np.float32(0.1), z=np.uint8(3)), "tensorrt-rtx")
    assert any("enter or leave" in skip.reason for step in done.passes for skip in step.skipped)


def test_shared_constants_are_not_changed_for_others():
    """Scale and zero point of a faulty pair also belong to a sound integer output."""
    text = """(float[1,4] x) => (float[1,4] y, uint8[1,4] codes) {
      [Q] q = QuantizeLinear(x, s, z) [D] y = DequantizeLinear(q, s, z) [Q2] codes = QuantizeLinear(x, s, z) }"""
    model = parse(text, s=np.float32(0.1), z=np.uint8(9))
    mended, _ = fix(model, "tensorrt-rtx")
    assert (float(constant(mended, "s")), int(constant(mended, "z"))) == (np.float32(0.1), 9)
    assert constant(model, "s") == np.float32(0.1)


def test_a_dead_channel_gets_a_positive_scale_and_stays_dead():
    model = parse(ONE, **{**STORED, "ws": np.array([0.0, 0.02], np.float32)})
    mended, done = fix(model, "tensorrt-rtx")
    assert done.after.findings == ()
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    # ONNX Runtime divides by nothing here: the weight's codes are only multiplied by their scale of 0.
    np.testing.assert_array_equal(run(mended, x), run(model, x))
    assert (run(mended, x)[:, 0] == 0).all()


def test_a_channel_scale_of_an_activation_becomes_the_largest():
    text = """(float[1,2,1,2] x) => (float[1,2,1,2] y) {
      [Q] xq = QuantizeLinear<axis=1>(x, s, z) [D] y = DequantizeLinear<axis=1>(xq, s, z) }"""
    model = parse(text, s=np.array([0.1, 0.5], np.float32), z=np.zeros(2, np.int8))
    for target in TARGETS:
        mended, done = fix(model, target)
        assert done.after.findings == ()
        (scale,) = [t for t in mended.graph.initializer if t.name.endswith("scale")]
        assert numpy_helper.to_array(scale) == np.float32(0.5)


def test_an_infinite_scale_is_said_not_to_be_mendable():
    model = parse(ONE, **{**STORED, "s": np.float32(np.inf)})
    mended, done = fix(model, "tensorrt-rtx")
    assert [(f.rule, f.automatic) for f in done.after.findings] == [("scale", False)]
    assert any("calibrate again" in skip.reason for step in done.passes for skip in step.skipped)
    assert [n.input for n in mended.graph.node] == [n.input for n in model.graph.node]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_weights_quantised_in_the_graph_are_stored_as_the_runtime_computes_them(dtype):
    text = "(float x) => (int8[64,64] q) { [Q] q = QuantizeLinear(w, s, z) }"
    random = np.random.default_rng(0)
    weight = random.normal(0, 0.1, (64, 64)).astype(dtype)
    weight[:32] = (
        (np.arange(32 * 64).reshape(32, 64) % 255 - 127) * dtype(0.5) * dtype(0.01)
    )  # on ties, and off by a bit
    model = parse(text, w=weight, s=dtype(0.01), z=np.int8(0))
    wanted = open_session(model, threads=1).run(None, {"x": np.zeros((), np.float32)})[0]
    graph = model.graph
    graph.node.extend([onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "D")])
    graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("d", graph.initializer[0].data_type, [64, 64]))
    assert store_codes(model).changed == ("Q",)
    (node,) = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    np.testing.assert_array_equal(constant(model, node.input[0]), wanted)


@given(
    arrays(np.uint8, (3, 2, 1, 1)),
    arrays(np.uint8, (3,)),
    arrays(np.float32, (3,), elements=st.floats(2**-30, 2**10, width=32)),
)
def test_symmetric_weights_are_within_half_a_step(codes, zeros, scales):
    model = parse(ONE, **{**STORED, "w": codes, "wz": zeros, "ws": scales})
    meant = (codes.astype(np.float64) - zeros.reshape(3, 1, 1, 1)) * scales.astype(np.float64).reshape(3, 1, 1, 1)
    symmetric_weights(model)
    node = next(node for node in model.graph.node if node.name == "WD")
    new, scale, zero = (constant(model, name) for name in node.input)
    assert (new.dtype, zero.dtype, int(np.abs(zero).max())) == (np.int8, np.int8, 0)
    assert (scale > 0).all()
    error = np.abs(new.astype(np.float64) * scale.astype(np.float64).reshape(3, 1, 1, 1) - meant)
    fits = np.abs(codes.astype(int) - zeros.reshape(3, 1, 1, 1)).max() <= 127
    # Rounded to half a step of the new scale; nothing is lost where all codes fit as they are.
    assert (error <= (0 if fits else 0.5 * (1 + 1e-5)) * scale.reshape(3, 1, 1, 1)).all()
    assert symmetric_weights(model).changed == ()


@pytest.mark.parametrize("target", TARGETS)
def test_a_wrong_axis_is_requantised_to_the_right_one(target):
    model = parse(ONE.replace("axis=0", "axis=1"), **STORED)
    mended, done = fix(model, target)
    assert "weight-axis" not in done.after.counts()
    x = np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)
    wanted, got = run(model, x), run(mended, x)
    assert np.abs(wanted - got).max() < 0.02 * np.abs(wanted).max()


def test_every_rule_is_in_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "lint.md").read_text(encoding="utf-8")
    for rule in RULES:
        name = (rule.__doc__ or "").split("``")[1]
        assert f"| `{name}` |" in page, name
