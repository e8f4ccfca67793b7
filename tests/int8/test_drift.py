import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.sources import open_source
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.drift import COLLAPSE_DB, SAMPLES, measure_drift
from relu_deploy.int8.run import quantize


def images(model, count=12):
    data = np.random.default_rng(7).normal(size=(count, 3, 16, 16)).astype(np.float32)
    return open_source(data, model_inputs(model))


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_a_good_quantisation_is_close(residual_model, measure, target):
    model = residual_model()
    quantized, _ = quantize(model, measure(model), target=target, weight_bits=7)
    (drift,) = measure_drift(model, quantized, images(model), integer_kernels=target == "ort")
    assert (drift.name, drift.samples) == ("y", SAMPLES)
    assert drift.sqnr_db > 25  # five layers of random weights: measured 38 dB
    assert not drift.collapsed


def test_equal_networks_have_no_noise(residual_model):
    model = residual_model()
    (drift,) = measure_drift(model, model, images(model), integer_kernels=False)
    assert (drift.sqnr_db, drift.max_abs_error, drift.collapsed) == (None, 0.0, False)


def test_a_collapse_is_seen(residual_model, measure):
    """Ranges a thousand times too narrow clip everything: what wrong calibration data does."""
    model = residual_model()
    ranges = measure(model)
    narrow = {name: type(r)(r.min / 1000, r.max / 1000, r.dtype, r.count) for name, r in ranges.tensors.items()}
    wrong = type(ranges)(narrow, ranges.model, ranges.data, ranges.method, ranges.samples)
    quantized, _ = quantize(model, wrong, target="ort", weight_bits=7)
    (drift,) = measure_drift(model, quantized, images(model), integer_kernels=True)
    assert drift.sqnr_db < COLLAPSE_DB
    assert drift.collapsed


def test_outputs_that_are_not_finite_are_a_collapse(residual_model):
    model, broken = residual_model(), residual_model()
    bias = next(t for t in broken.graph.initializer if t.name == "fc.bias")
    bias.CopyFrom(numpy_helper.from_array(np.full(10, np.nan, np.float32), "fc.bias"))
    (drift,) = measure_drift(model, broken, images(model), integer_kernels=False)
    assert (drift.sqnr_db, drift.max_abs_error, drift.collapsed) == (None, None, True)


def test_integer_outputs_are_left_out():
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4] x) => (float[1, 4] y, int64[1, 1] k)'
    model = onnx.parser.parse_model(text + "{ y = Relu(x) k = ArgMax<axis=1>(x) }")
    source = open_source(np.ones((2, 4), np.float32), model_inputs(model))
    assert [drift.name for drift in measure_drift(model, model, source, integer_kernels=False)] == ["y"]


def test_a_network_that_does_not_run_is_told(residual_model):
    model, broken = residual_model(), residual_model()
    broken.graph.node[0].op_type = "Nonsense"
    with pytest.raises(QuantizationError, match="does not run in ONNX Runtime"):
        measure_drift(model, broken, images(model), integer_kernels=False)
