"""Float islands whose constants vary along another axis than the channels."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.session import open_session
from relu_deploy.int8.run import quantize


@pytest.mark.parametrize("width", [4, 6])
def test_an_addend_along_the_width_is_not_one_for_each_channel(measure, width):
    """Also where there are as many columns as channels, so that only the axis tells the two apart."""
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 5, {width}] x) => (float[1, 4, 5, {width}] y)
    {{ h = Conv(x, w) a = Sub(h, c) s = HardSwish(a) y = Conv(s, w) }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    # HardSwish is 0 in the first column whatever the channel holds, and plain in the last.
    columns = np.linspace(-30, 30, width).astype(np.float32)
    for name, values in (("w", rng.normal(size=(4, 4, 1, 1)).astype(np.float32)), ("c", columns)):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    quantized, _ = quantize(model, measure(model), target="ort", weight_bits=7)
    feeds = {"x": rng.normal(size=(1, 4, 5, width)).astype(np.float32)}
    wanted, found = (open_session(each, optimise=True, threads=1).run(None, feeds)[0] for each in (model, quantized))
    assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - found) ** 2)) > 30
