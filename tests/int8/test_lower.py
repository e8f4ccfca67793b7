"""What is lowered runs in integers in ONNX Runtime, and computes what it computed before."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.int8.run import quantize

LEVELS = ort.GraphOptimizationLevel
RNG = np.random.default_rng(7)
W, V, B = RNG.normal(0, 0.5, (6, 5)), RNG.normal(0, 0.5, (5, 3)), RNG.normal(size=5)


def parse(text, **weights):
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def quantized(model, data):
    return quantize(model, calibrate(model, open_source(data, model_inputs(model))), target="ort", weight_bits=7)


def optimised(model, feeds, tmp_path, level=LEVELS.ORT_ENABLE_EXTENDED):
    """Operators of the graph that ONNX Runtime makes, and its outputs."""
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node), session.run(None, feeds)


def sqnr(reference, value):
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - value) ** 2))


@pytest.mark.parametrize("shape", ["4, 7, 6", "N, 7, 6", "4, T, 6", "2, 2, 7, 6", "4, 6"])
@pytest.mark.parametrize("activation", ["Relu", "Gelu"])
def test_products_with_a_bias_are_integer_whatever_is_known_of_the_shape(tmp_path, shape, activation):
    """ONNX Runtime fuses MatMul and Add of fixed shapes to a Gemm, and runs it in float unless its bias is int32."""
    last = shape.rpartition(",")[0] + ", 3"
    gelu = "e = Div(s, two) f = Erf(e) g = Add(f, one) a = Mul(s, g)" if activation == "Gelu" else "a = Relu(s)"
    model = parse(
        f"(float[{shape}] x) => (float[{last}] y) {{ h = MatMul(x, w) s = Add(b, h) {gelu} y = MatMul(a, v) }}",
        w=W, v=V, b=B, two=np.sqrt(2), one=1,
    )  # fmt: skip
    sizes = [int(size) if size.strip().isdigit() else {"N": 4, "T": 7}[size.strip()] for size in shape.split(",")]
    data = RNG.normal(size=sizes).astype(np.float32)
    result, report = quantized(model, data)
    assert report.int8_layers == 2
    after, (y,) = optimised(result, {"x": data}, tmp_path)
    assert after["MatMul"] == after["Gemm"] == after["FusedMatMul"] == 0
    assert after["QGemm"] + after["QLinearMatMul"] + after["MatMulIntegerToFloat"] == 2
    assert after["Relu"] == 0
    if activation == "Relu":
        assert len(report.dropped_activations) == 1
        (gemm,) = (node for node in result.graph.node if node.op_type == "Gemm")
        (reader,) = (node for node in result.graph.node if gemm.output[0] in node.input)
        assert reader.op_type == "QuantizeLinear", "the quantiser behind the Gemm clips, nothing is quantised twice"
    reference = optimised(model, {"x": data}, tmp_path, LEVELS.ORT_DISABLE_ALL)[1][0]
    assert sqnr(reference, y) > 25  # two layers of 7-bit weights; a wrong reshape or bias leaves less than 5


def test_two_unknown_axes_stay_a_product(tmp_path):
    model = parse("(float[N, T, 6] x) => (float[N, T, 5] y) { h = MatMul(x, w) y = Add(h, b) }", w=W, b=B)
    data = RNG.normal(size=(4, 7, 6)).astype(np.float32)
    after, _ = optimised(quantized(model, data)[0], {"x": data}, tmp_path)
    assert after["MatMulIntegerToFloat"] == 1
    assert after["Gemm"] == after["MatMul"] == 0


@pytest.mark.parametrize("addend", ["z", "m"])
def test_sums_with_live_tensors_or_matrices_do_not_make_the_product_float(tmp_path, addend):
    model = parse(
        f"(float[4, 6] x) => (float[4, 5] y) {{ z = MatMul(x, u) h = MatMul(x, w) y = Add(h, {addend}) }}",
        w=W, u=RNG.normal(size=(6, 5)), m=RNG.normal(size=(4, 5)),
    )  # fmt: skip
    data = RNG.normal(size=(4, 6)).astype(np.float32)
    result, report = quantized(model, data)
    after, (y,) = optimised(result, {"x": data}, tmp_path)
    assert after["Gemm"] == after["MatMul"] == 0
    assert after["QLinearMatMul"] + after["MatMulIntegerToFloat"] == report.int8_layers
    assert sqnr(optimised(model, {"x": data}, tmp_path, LEVELS.ORT_DISABLE_ALL)[1][0], y) > 25


@pytest.mark.parametrize(
    ("shape", "kernel", "axes"), [("8", (3, 6, 3), "2"), ("4, 4, 4", (3, 6, 1, 1, 1), "-3, -2, -1")]
)
def test_spatial_means_of_one_and_three_axes(tmp_path, shape, kernel, axes):
    text = (
        f"(float[1, 6, {shape}] x) => (float[1, 3] y) {{ c = Conv(x, k) y = ReduceMean<axes=[{axes}], keepdims=0>(c) }}"
    )
    model = parse(text, k=RNG.normal(size=kernel))
    data = RNG.normal(size=(8, 6, *map(int, shape.split(",")))).astype(np.float32)
    after, (y,) = optimised(quantized(model, data)[0], {"x": data[:1]}, tmp_path)
    assert after["QLinearGlobalAveragePool"] == 1
    assert after["ReduceMean"] == 0
    reference = optimised(model, {"x": data[:1]}, tmp_path, LEVELS.ORT_DISABLE_ALL)[1][0]
    assert np.abs(reference - y).max() < 0.1  # a step or two of what the convolution gives, whose values reach 10


def test_layers_inside_branches_are_counted_as_float():
    model = parse(
        "(float[4, 6] x, bool p) => (float[4, 3] y) { h = MatMul(x, w) r = Relu(h) "
        "y = If(p) <then_branch = a () => (float[4, 3] t) { t = MatMul(r, v) }, "
        "else_branch = b () => (float[4, 3] e) { e = MatMul(r, v) }> }",
        w=W, v=V,
    )  # fmt: skip
    inputs = {"x": RNG.normal(size=(1, 4, 6)).astype(np.float32), "p": np.array([True])}
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    fixed.graph.initializer.append(numpy_helper.from_array(inputs["p"].reshape(()), "p"))
    del fixed.graph.input[1]
    _, report = quantized(fixed, inputs["x"][0])
    assert [layer.int8 for layer in report.layers] == [True, False, False]
    assert all("inside If" in layer.reason for layer in report.layers[1:])
    assert "2 of 3 linear layers stay float" in report.warnings[-1]


def test_recurrent_layers_are_counted_as_float():
    model = parse(
        "(float[5, 1, 6] x) => (float[5, 1, 1, 2] y) { h = MatMul(x, s) y, a, c = LSTM<hidden_size=2>(h, w, r) }",
        s=RNG.normal(size=(6, 6)), w=RNG.normal(size=(1, 8, 6)), r=RNG.normal(size=(1, 8, 2)),
    )  # fmt: skip
    _, report = quantized(model, RNG.normal(size=(5, 1, 6)).astype(np.float32))
    assert [(layer.op, layer.int8) for layer in report.layers] == [("MatMul", True), ("LSTM", False)]


@pytest.mark.parametrize(
    ("slopes", "shape", "kernel"),
    [
        ([0.2], (1,), "QLinearLeakyRelu"),
        ([0.2] * 4, (4, 1, 1), "QLinearLeakyRelu"),
        ([0.1, 0.2, 0.3, 0.4], (4, 1, 1), ""),
    ],
)
def test_a_prelu_of_one_slope_has_a_kernel(slopes, shape, kernel, tmp_path):
    text = "(float[2, 3, 6, 6] x) => (float[2, 2, 6, 6] y) { c = Conv(x, w) a = PRelu(c, s) y = Conv(a, v) }"
    rng = np.random.default_rng(3)
    model = parse(
        text, w=rng.normal(size=(4, 3, 1, 1)), v=rng.normal(size=(2, 4, 1, 1)), s=np.reshape(slopes, shape)
    )  # fmt: skip
    x = rng.normal(size=(2, 3, 6, 6)).astype(np.float32)
    result, _ = quantized(model, {"x": x})
    counts, (got,) = optimised(result, {"x": x}, tmp_path)
    assert counts["QLinearLeakyRelu"] == (kernel != "")
    assert counts["PRelu"] == 0
    assert counts["Max"] == (kernel == "")
    want = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    # 7-bit weights and 8-bit activations of two layers: 30 dB.
    assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)
