"""ONNX Runtime's integer kernels where they do not do what the Q/DQ around them says."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.int8.run import quantize


@pytest.mark.parametrize(("bins", "integer"), [(16, True), (1, False)])
def test_softmax_does_not_wrap_around(bins, integer):
    """A detector's box head, softmax over bins and a convolution, on data that it is surer of than in calibration."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, {bins}, 4, 4] x) => (float[1, 1, 4, 4] y) '
        "{ c = Conv(x, w) s = Softmax<axis=1>(c) y = Conv(s, v) }"
    )
    weights = {"w": np.eye(bins).reshape(bins, bins, 1, 1), "v": np.arange(1, bins + 1).reshape(1, bins, 1, 1)}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    data = rng.normal(size=(8, bins, 4, 4)).astype(np.float32)
    data[0, :, 0, 0] = 4  # all bins alike: reaches the range, not the sureness, of what follows
    quantized, report = quantize(model, calibrate(model, open_source(data, model_inputs(model))), weight_bits=7)
    assert ("s" in report.activations) is integer
    sure = np.full((1, bins, 4, 4), -4, np.float32)
    sure[:, bins // 2] = 4
    exact = open_session(model).run(None, {"x": sure})[0]
    fused = open_session(quantized, optimise=True).run(None, {"x": sure})[0]
    # A step of the probabilities, 1/254, and of the input's grid, 8/255, moves the expected bin by far less than this.
    assert np.abs(exact - fused).max() < 0.5
