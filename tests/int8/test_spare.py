"""INT8 products whose ReLU or Clip is read by floats are computed in integers, and give the same numbers."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.graph import export_graph, import_graph
from relu_deploy.int8.lint import lint
from relu_deploy.int8.run import quantize
from relu_deploy.int8.spare import spare_products

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[4,16] x) => (float[4,16] y) '
BOUNDS = "<float low = {0}, float high = {0.7}, float negative = {-0.3}>"
CLIPS = {
    "Relu": "Relu(h)", "Clip": "Clip(h, low, high)", "Clip to above": "Clip(h, low)",
    "Clip to below": "Clip(h, , high)", "Clip of both signs": "Clip(h, negative, high)", "Clip to nothing": "Clip(h)",
}  # fmt: skip
# What reads the ReLU: an operator without an integer kernel, or several.
BEHIND = {"one": "y = Softplus(r)", "two": "s = Softplus(r) t = Neg(r) y = Add(s, t)", "the caller": "y = Identity(r)"}
LAYERS = {
    "MatMul": "[fc] h = MatMul(x, w)", "Gemm": "[fc] h = Gemm(x, w, b)",
    "with a bias": "m = MatMul(x, w) [fc] h = Add(m, b)",
}  # fmt: skip
RNG = np.random.default_rng(0)
STORED = {"w": RNG.normal(size=(16, 16)) / 4, "b": RNG.normal(size=16) / 4}


def network(layer, clip, behind):
    model = onnx.parser.parse_model(f"{HEAD}{BOUNDS} {{ {layer} r = {clip} {behind} }}")
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(v.astype(np.float32), k) for k, v in STORED.items() if k in read
    )
    return model


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND)
@pytest.mark.parametrize("clip", CLIPS.values(), ids=CLIPS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_the_product_is_integer(layer, clip, behind, tmp_path):
    model = network(layer, clip, behind)
    data = np.random.default_rng(1).normal(size=(8, 4, 16)).astype(np.float32)
    ranges = calibrate(model, open_source(iter(data), model_inputs(model)))
    quantized, report = quantize(model, ranges, weight_bits=7)
    assert report.int8_layers == 1
    assert lint(quantized, "ort").findings == ()
    built = get_backend("ort").build(quantized, tmp_path / "e.onnx", BuildConfig(target="ort"))
    assert built.audit.int8 == 1
    exact, fused, wanted = (
        open_session(m, optimise=o, threads=1).run(None, {"x": data[0]})[0]
        for m, o in ((quantized, False), (quantized, True), (model, False))
    )
    np.testing.assert_allclose(fused, exact, rtol=1e-5, atol=1e-5)  # sums of 16 products in another order
    assert np.abs(exact - wanted).max() < 0.05 * np.abs(wanted).max()  # a few steps of 7-bit weights


INNER = """<float s = {0.05}, uint8 z = {100}, int8 n = {0}> {
  q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) k = DequantizeLinear(w, s, n) h = MatMul(d, k) """


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        ("[act] r = Relu(h) y = Neg(r) }", ("act",)),
        ("[act] y = Relu(h) }", ()),
        ("[act] r = Relu(h) a = Neg(r) b = Abs(r) y = Add(a, b) }", ()),
        ("[act] r = Relu(h) a = Neg(h) y = Add(a, r) }", ()),
        ("g = Neg(h) [act] r = Relu(g) y = Neg(r) }", ()),
        ("e = MatMul(x, v) [act] r = Relu(e) y = Add(h, r) }", ()),
    ],
)
def test_only_what_hides_a_product_and_only_once(body, changed):
    model = onnx.parser.parse_model(HEAD + INNER + body)
    stored = {"w": RNG.integers(-9, 9, (16, 16)).astype(np.int8), "v": np.eye(16, dtype=np.float32)}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in stored.items() if k in read)
    graph = import_graph(onnx.shape_inference.infer_shapes(model))
    assert spare_products(graph).changed == changed
    assert spare_products(graph).changed == ()
    x = {"x": np.random.default_rng(2).normal(size=(4, 16)).astype(np.float32)}
    before, after = (open_session(m, threads=1).run(None, x)[0] for m in (model, export_graph(graph, model)))
    np.testing.assert_array_equal(before, after)
