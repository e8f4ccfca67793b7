"""One scale for the operands of a Concat, where they are read by nothing else."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.int8.lint import lint
from relu_deploy.int8.qoperator import to_qoperator
from relu_deploy.int8.run import quantize


def two_branches(*, read_again):
    """A wide branch and a narrow one, concatenated; the narrow one may be read by a layer of its own as well."""
    more = "z = Conv(narrow, v)" if read_again else "z = Conv(wide, v)"
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> '
        "g (float[n, 4, 6, 6] x) => (float[n, 3, 6, 6] y, float[n, 3, 6, 6] z) "
        f"{{ a = Conv(x, w1) wide = Relu(a) b = Conv(x, w2) narrow = Relu(b) "
        f"c = Concat<axis=1>(wide, narrow) y = Conv(c, u) {more} }}"
    )
    rng = np.random.default_rng(0)
    shapes = {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "u": (3, 8, 1, 1), "v": (3, 4, 1, 1)}
    for name, shape in shapes.items():
        values = rng.normal(size=shape) * (0.1 if name == "w2" else 1)
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    return model


@pytest.mark.parametrize("read_again", [False, True])
def test_what_only_a_concat_reads_has_its_scale(read_again, tmp_path):
    model = two_branches(read_again=read_again)
    data = np.random.default_rng(1).normal(size=(32, 4, 6, 6)).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(model, ranges, weight_bits=7, channel_fusion="off")
    scale = {name: found.scale for name, found in report.activations.items()}
    assert (scale["narrow"] == scale["c"]) is not read_again
    assert scale["wide"] == scale["c"], "the wider one decides"
    reference, exact, fused = (
        open_session(each, optimise=optimise, threads=1).run(None, {"x": data[:4]})[0]
        for each, optimise in ((model, False), (quantized, False), (quantized, True))
    )
    # Half a step of 1/255 of the range on 8 channels and 7-bit weights leave some 1 %; the kernels round as Q/DQ say.
    assert np.abs(exact - reference).max() < 0.04 * np.abs(reference).max()
    assert np.abs(fused - exact).max() < 0.01 * np.abs(reference).max()


BRANCHES = {
    "ReLU": "Relu(%s)",
    "leaky": "LeakyRelu<alpha=0.1>(%s)",
    "linear": "Identity(%s)",
    "sigmoid": "Sigmoid(%s)",
    "ReLU6": "Clip(%s, lo, six)",
    "ReLU3": "Clip(%s, lo, three)",
    "pooled": "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(%s)",
}


@pytest.mark.parametrize("others", ["ReLU", "leaky", "linear", "sigmoid", "ReLU6", "ReLU3", "pooled"])
@pytest.mark.parametrize("one", ["ReLU", "ReLU6"])
def test_a_convolution_is_integer_whatever_its_relu_is_concatenated_with(one, others):
    """With the scale of something signed, or wider than its bound, the ReLU or Clip would keep it in float."""
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[n, 4, 6, 6] x) => (float[n, 3, 6, 6] y) '
        "<float lo = {0}, float three = {3}, float six = {6}> { "
        f"[one] a = Conv(x, w1) r = {BRANCHES[one] % 'a'} [two] b = Conv(x, w2) s = {BRANCHES[others] % 'b'} "
        "c = Concat<axis=1>(r, s) [last] y = Conv(c, u) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in {"w1": (4, 4, 1, 1), "w2": (4, 4, 1, 1), "u": (3, 8, 1, 1)}.items():
        model.graph.initializer.append(numpy_helper.from_array(4 * rng.normal(size=shape).astype(np.float32), name))
    data = np.random.default_rng(1).normal(size=(8, 4, 6, 6)).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(model, ranges, weight_bits=7, channel_fusion="off")
    assert report.int8_layers == 3
    assert lint(quantized, "ort").findings == ()
    _, integer = to_qoperator(quantized)
    assert not [skip for skip in integer.skipped if skip.name in ("one", "two", "last")]
    reference, exact = (open_session(each, threads=1).run(None, {"x": data})[0] for each in (model, quantized))
    assert np.abs(exact - reference).max() < 0.04 * np.abs(reference).max()
