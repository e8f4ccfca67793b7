"""Operands that are easily forgotten: scalars, biases behind dead tensors."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.int8.run import quantize

RNG = np.random.default_rng(5)
KERNEL = RNG.normal(0, 0.3, (4, 4, 3, 3)).astype(np.float32)


def network(body: str, **weights):
    """A float network x -> y, both (1, 4, 8, 8)."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {' + body + "}"
    )
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model, feeds):
    """Outputs as ONNX defines them: no fusion."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("operand", ["Add(c, k)", "Mul(k, c)"])
@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1)])
def test_constant_operands_of_any_shape(measure, operand, shape):
    model = network(f"c = Conv<pads=[1,1,1,1]>(x, w) s = {operand} y = Conv<pads=[1,1,1,1]>(s, w)", w=KERNEL,
                    k=np.full(shape, 0.75))  # fmt: skip
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=8)
    assert "s" in report.activations
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    exact, coded = run(model, {"x": x})[0], run(quantized, {"x": x})[0]
    # Two layers of 8 bits keep about 40 dB; a wrong operand would leave less than 10.
    assert np.sum(exact**2) > 1000 * np.sum((exact - coded) ** 2)


def test_bias_behind_a_tensor_that_is_always_zero(measure):
    """A dead input has no scale of its own, and must not be given one that rounds the bias to whole weight steps."""
    bias = np.asarray([0.011, -0.02, 0.3, 0.004])
    model = network("z = Sub(x, x) y = Conv<pads=[1,1,1,1]>(z, w, b)", w=KERNEL, b=bias)
    quantized, report = quantize(model, measure(model), target="ort")
    assert any("zero in every sample" in warning for warning in report.warnings)
    coded = run(quantized, {"x": RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)})[0]
    step = report.activations["y"].scale
    # Half a step of the output, and a step of the bias, which is far below it.
    assert np.abs(coded - bias.reshape(1, 4, 1, 1)).max() <= 0.51 * step


CAPTURES = {
    "a clipped tensor": "z = MatMul(r, v) y = If(p) <then_branch = a () => (float[4, 3] t) { t = MatMul(r, v) }, "
    "else_branch = b () => (float[4, 3] e) { e = Identity(z) }>",
    "what is clipped": "z = MatMul(r, v) y = If(p) <then_branch = a () => (float[4, 5] t) { t = Neg(s) }, "
    "else_branch = b () => (float[4, 5] e) { e = Identity(s) }>",
    "a product before its bias": "z = MatMul(r, v) y = If(p) <then_branch = a () => (float[4, 5] t) { t = Neg(h) }, "
    "else_branch = b () => (float[4, 5] e) { e = Identity(h) }>",
}


@pytest.mark.parametrize("body", CAPTURES.values(), ids=CAPTURES)
@pytest.mark.parametrize("branch", [True, False])
def test_tensors_that_a_branch_captures(body, branch):
    columns = 3 if "float[4, 3] t" in body else 5
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[4, 6] x) => (float[4, {columns}] y, float[4, 3] z) "
        f"{{ h = MatMul(x, w) s = Add(h, b0) r = Relu(s) {body} }}"
    )
    weights = {"w": RNG.normal(0, 0.5, (6, 5)), "v": RNG.normal(0, 0.5, (5, 3)), "b0": RNG.normal(size=5)}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(branch), "p"))
    data = RNG.normal(size=(32, 6)).astype(np.float32)
    quantized, _ = quantize(
        model, calibrate(model, open_source(data, model_inputs(model))), target="ort", weight_bits=8
    )
    for exact, coded in zip(run(model, {"x": data[:4]}), run(quantized, {"x": data[:4]}), strict=True):
        # Two layers of 8 bits: within 5 % of the largest value; a lost ReLU or bias is off by the values themselves.
        assert np.abs(exact - coded).max() < 0.05 * np.abs(exact).max()


def test_values_too_small_for_any_scale_are_warned_of(measure):
    """Random weights of a deep network make activations of 1e-25: their codes are all 0, and so is the output."""
    model = network("c = Conv<pads=[1,1,1,1]>(x, w) y = Conv<pads=[1,1,1,1]>(c, w)", w=KERNEL * 1e-20)
    report = quantize(model, measure(model), target="ort")[1]
    (warning,) = (text for text in report.warnings if "too small" in text)
    assert "c, y" in warning


@pytest.mark.parametrize("shape", [(5, 5), (5, 1), (4, 5)])
def test_an_addend_that_differs_from_row_to_row_is_no_bias(shape):
    rows = shape[0]
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        f"g (float[{rows}, 6] x) => (float[{rows}, 3] y) {{ h = Gemm(x, w, m) y = MatMul(h, v) }}"
    )
    weights = {"w": RNG.normal(0, 0.5, (6, 5)), "v": RNG.normal(0, 0.5, (5, 3)), "m": RNG.normal(size=shape)}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    data = RNG.normal(size=(4 * rows, 6)).astype(np.float32)
    quantized, report = quantize(model, calibrate(model, open_source(data, model_inputs(model))), target="ort")
    assert [(layer.op, layer.int8) for layer in report.layers] == [("Gemm", False), ("MatMul", True)]
    assert "from row to row" in report.layers[0].reason
    exact, coded = run(model, {"x": data[:rows]})[0], run(quantized, {"x": data[:rows]})[0]
    assert np.abs(exact - coded).max() < 0.05 * np.abs(exact).max()  # one layer of 8 bits


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_a_product_with_the_constant_on_the_left_stays_float_and_says_so(measure, target):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 6] x) => (float[1, 5, 3] y) '
        "{ [left] h = MatMul(w, x) [right] y = MatMul(h, v) }"
    )
    for name, shape in {"w": (5, 4), "v": (6, 3)}.items():
        model.graph.initializer.append(numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name))
    _, report = quantize(model, measure(model), target=target)
    assert [(layer.int8, layer.reason) for layer in report.layers] == [
        (False, "its left operand is the constant one"), (True, "")
    ]  # fmt: skip
