"""Operands that are easily forgotten: scalars, biases behind dead tensors."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

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
