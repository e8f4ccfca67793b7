"""Activations as tables of codes: every entry, every layout, and what is left in float."""

import dataclasses

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import ops
from relu_deploy.graph import count_ops
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.run import quantize

NAMES = ("left", "right", "values", "slope_left", "slope_right")


def unit(channels, intervals=16, seed=0):
    """A PWLU whose parameters float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    left, right = -2 + draw(channels) / 4, 2 + draw(channels) / 4
    return ops.PwluFunction(left, right, draw(channels, intervals + 1), draw(channels), draw(channels))


def constant(name, values, dtype=np.float32):
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def network(text, shape, out, weights, opset=18):
    """A network in ONNX's own text, between the tensors x and y."""
    sizes = [", ".join(map(str, dims)) for dims in (shape, out)]
    head = f'<ir_version: 9, opset_import: ["": {opset}, "relu_deploy": 1]>'
    model = onnx.parser.parse_model(f"{head} g (float[{sizes[0]}] x) => (float[{sizes[1]}] y) {{ {text} }}")
    model.graph.initializer.extend(constant(name, values) for name, values in weights.items())
    ops.define_operators(model, opset)
    return model


LAYOUTS = {
    "images": ("c = Conv(x, w, b) {act} y = Conv(a, v)", (2, 3, 8, 8), (2, 4, 8, 8), (6, 3, 1, 1), (4, 6, 1, 1), 1),
    "images, batch of any size": (
        "c = Conv(x, w, b) {act} y = Conv(a, v)", ("N", 3, 8, 8), ("N", 4, 8, 8), (6, 3, 1, 1), (4, 6, 1, 1), 1,
    ),
    "images, every size": (
        "c = Conv(x, w, b) {act} y = Conv(a, v)", ("N", 3, "H", "W"), ("N", 4, "H", "W"), (6, 3, 1, 1), (4, 6, 1, 1), 1,
    ),
    "signals": ("c = Conv(x, w, b) {act} y = Conv(a, v)", (2, 3, 9), (2, 4, 9), (6, 3, 1), (4, 6, 1), 1),
    "volumes": (
        "c = Conv(x, w, b) {act} y = Conv(a, v)", (2, 3, 4, 4, 4), (2, 4, 4, 4, 4), (6, 3, 1, 1, 1), (4, 6, 1, 1, 1), 1,
    ),
    "rows": ("c = Gemm <transB = 1> (x, w, b) {act} y = Gemm <transB = 1> (a, v)", (5, 3), (5, 4), (6, 3), (4, 6), -1),
    "tokens": ("m = MatMul(x, w) c = Add(m, b) {act} y = MatMul(a, v)", (2, 7, 3), (2, 7, 4), (3, 6), (6, 4), -1),
    "channels in the middle": (
        ("m = MatMul(x, w) s = Add(m, b) c = Transpose <perm: ints = [0, 2, 1]> (s) {act} "
         "t = Transpose <perm: ints = [0, 2, 1]> (a) y = MatMul(t, v)"),
        (2, 7, 3), (2, 7, 4), (3, 6), (6, 4), 1,
    ),
}  # fmt: skip


def build(layout, channels=6, act=None):
    """A layer, an activation, a layer; its channels are 6."""
    text, shape, out, w, v, axis = LAYOUTS[layout]
    rng = np.random.default_rng(1)
    weights = {"w": rng.normal(size=w), "v": rng.normal(size=v), "b": rng.normal(size=6)}
    f = unit(channels)
    if act is None:
        act = f"a = relu_deploy.PWLU <channel_axis: int = {axis}> (c, {', '.join(NAMES)})"
        weights |= {name: getattr(f, name) for name in NAMES}
    return network(text.format(act=act), shape, out, weights), f, axis


def sample(model, seed=2):
    sizes = {"N": 3, "H": 5, "W": 6}
    dims = [d.dim_value or sizes[d.dim_param] for d in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(seed).normal(size=dims).astype(np.float32)


def ranges(model, x):
    """Calibrated on one sample."""
    return calibrate(model, open_source({"x": x}, model_inputs(model)), batch_size=len(x))


def run(model, x, extra=(), *, optimise):
    """Outputs, and the codes of some tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in extra)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(copy.SerializeToString(), options).run(None, {"x": x})


def expected_table(function, source, result):
    """``quantise(f(dequantise(q)))`` as QuantizeLinear and DequantizeLinear are defined; uint8 (C, 256)."""
    x = (np.arange(256, dtype=np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
    y = np.stack([function(np.repeat(x[:, None], function.channels, 1))]).squeeze(0).astype(np.float32)
    return np.clip(np.rint(y / np.float32(result.scale)) + result.zero_point, 0, 255).astype(np.uint8).T


@pytest.mark.parametrize("channels", [6, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_of_every_channel(layout, channels):
    model, f, axis = build(layout, channels)
    x = sample(model)
    quantized, report = quantize(model, ranges(model, x), target="ort", weight_bits=7)
    assert count_ops(quantized)["GatherElements"] == 1
    assert "PWLU" not in count_ops(quantized)
    assert not quantized.functions
    source, result = report.activations["c"], report.activations["a"]
    table = expected_table(f, source, result)
    stored = next(t for t in quantized.graph.initializer if t.name.endswith("/table"))
    np.testing.assert_array_equal(np.atleast_2d(numpy_helper.to_array(stored).T).reshape(channels, 256), table)
    # And the graph really looks the codes up in the row of their channel.
    _, before, after = run(quantized, x * 2, ("c/quantized", "a/quantized"), optimise=False)
    before, after = (np.moveaxis(codes, axis, 0).reshape(6, -1) for codes in (before, after))
    rows = np.broadcast_to(table, (6, 256))
    np.testing.assert_array_equal(after, np.take_along_axis(rows, before.astype(np.int64), 1))


@pytest.mark.parametrize("layout", ["images, batch of any size", "tokens", "rows"])
def test_integer_kernels_surround_it(layout):
    model, _, _ = build(layout)
    x = sample(model)
    quantized, report = quantize(model, ranges(model, x), target="ort", weight_bits=7)
    assert report.int8_layers == 2
    plain, fast = run(quantized, x, optimise=False)[0], run(quantized, x, optimise=True)[0]
    reference = run(model, x, optimise=True)[0]
    # One code of the table's input may round otherwise in the integer kernel; slopes reach 15 here, of 255 codes.
    assert np.abs(plain - fast).max() <= 0.1 * np.abs(reference).max()
    noise = np.mean((reference - fast) ** 2) / np.mean(reference**2)
    assert noise < 1e-2, "20 dB: 7-bit weights, 8-bit codes, and a function that jumps up and down"


_SLOPES = "k = Constant <value: tensor = float[6, 1, 1] {0.1, -0.2, 0.3, 0.4, 1.5, 0.0}> ()"
SLOW = {
    "Mish": "a = Mish(c)",
    "ELU": "a = Elu(c)",
    "scaled before": f"{_SLOPES} t = Mul(c, k) a = Softplus(t)",
    "scaled equally": "k = Constant <value: tensor = float[6, 1, 1] {0.1, 0.1, 0.1, 0.1, 0.1, 0.1}> () t = Mul(c, k) "
    "a = Mish(t)",
    "spelled out": "s = Softplus(c) t = Tanh(s) a = Mul(c, t)",
}
QUICK = {
    "GELU": "h = Constant <value: tensor = float {0.5}> () s = Constant <value: tensor = float {0.70710677}> () "
    "o = Constant <value: tensor = float {1.0}> () p = Mul(c, s) q = Erf(p) r = Add(q, o) t = Mul(c, r) a = Mul(t, h)",
    "HardSwish": "a = HardSwish(c)",
    "SiLU": "s = Sigmoid(c) a = Mul(c, s)",
    "PReLU": "k = Constant <value: tensor = float[6, 1, 1] {0.1, -0.2, 0.3, 0.4, 1.0, 0.0}> () a = PRelu(c, k)",
    "PReLU that rises faster on the left": f"{_SLOPES} a = PRelu(c, k)",
}


@pytest.mark.parametrize("name", QUICK)
def test_what_a_few_quick_operators_compute_stays(name):
    model, _, _ = build("images", act=QUICK[name])
    x = sample(model)
    quantized, report = quantize(model, ranges(model, x), target="ort", weight_bits=7)
    assert "GatherElements" not in count_ops(quantized)
    assert "PRelu" not in count_ops(quantized), "ONNX Runtime's is slower than a table"
    assert report.int8_layers == 2
    got, want = run(quantized, x, optimise=True)[0], run(model, x, optimise=True)[0]
    assert np.mean((got - want) ** 2) < 1e-3 * np.mean(want**2)


@pytest.mark.parametrize("name", SLOW)
def test_any_activation_without_a_kernel(name):
    model, _, _ = build("images", act=SLOW[name])
    x = sample(model)
    quantized, report = quantize(model, ranges(model, x), target="ort", weight_bits=7)
    assert count_ops(quantized)["GatherElements"] == 1
    given = "t" if name.startswith("scaled") else "c"  # a scale behind a layer becomes the layer's
    source, result = report.activations[given], report.activations["a"]
    before, after = run(quantized, x, (f"{given}/quantized", "a/quantized"), optimise=False)[1:]
    real = (before.astype(np.float32) - np.float32(source.zero_point)) * np.float32(source.scale)
    body = onnx.ModelProto()
    body.CopyFrom(model)
    nodes = [node for node in model.graph.node if node.op_type != "Conv" and node.output[0] != given]
    del body.graph.node[:], body.graph.input[:], body.graph.output[:]
    body.graph.node.extend(nodes)
    body.graph.input.append(helper.make_tensor_value_info(given, 1, list(real.shape)))
    body.graph.output.append(helper.make_tensor_value_info("a", 1, list(real.shape)))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    value = ort.InferenceSession(body.SerializeToString(), options).run(None, {given: real})[0]
    codes = np.clip(np.rint(value / np.float32(result.scale)) + result.zero_point, 0, 255)
    # The kernels of exp and erf give other last bits at another place of a vector: a tie may round the other way.
    assert np.abs(codes - after.astype(np.float32)).max() <= 1
    assert (codes != after).mean() < 1e-3


def test_what_ends_in_float_is_spelled_in_float():
    _, f, _ = build("images")
    last = network(
        f"c = Conv(x, w) a = relu_deploy.PWLU <channel_axis: int = 1> (c, {', '.join(NAMES)}) y = Identity(a)",
        (2, 3, 8, 8), (2, 6, 8, 8),
        {"w": np.random.default_rng(1).normal(size=(6, 3, 1, 1)), **{name: getattr(f, name) for name in NAMES}},
    )  # fmt: skip
    x = sample(last)
    quantized, report = quantize(last, ranges(last, x), target="ort", weight_bits=7)
    assert not quantized.functions
    assert "slopes and intercepts" in next(iter(report.folded.values()))
    got, reference = run(quantized, x, optimise=True)[0], run(last, x, optimise=True)[0]
    assert np.mean((got - reference) ** 2) < 1e-2 * np.mean(reference**2)


def test_a_unit_whose_output_is_the_network_s_too():
    model, _, _ = build("images")
    for name in ("a", "c"):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, (2, 6, 8, 8)))
    x = sample(model)
    quantized, report = quantize(model, ranges(model, x), target="ort", weight_bits=7)
    assert next(iter(report.folded.values())) == "a table of 256 codes for 6 functions"
    for got, reference in zip(run(quantized, x, optimise=True), run(model, x, optimise=True), strict=True):
        assert np.mean((got - reference) ** 2) < 1e-2 * np.mean(reference**2)


def test_a_unit_that_is_relu_within_half_a_step_costs_nothing():
    text, shape, out, w, v, _ = LAYOUTS["images"]
    rng = np.random.default_rng(1)
    points = np.tile(np.linspace(-2, 2, 17), (6, 1))
    weights = {
        "w": rng.normal(size=w), "v": rng.normal(size=v), "b": rng.normal(size=6), "left": np.full(6, -2.0),
        "right": np.full(6, 2.0), "values": np.maximum(points, 0) + rng.uniform(-1e-3, 1e-3, points.shape),
        "slope_left": np.zeros(6), "slope_right": np.ones(6),
    }  # fmt: skip
    act = f"a = relu_deploy.PWLU <channel_axis: int = 1> (c, {', '.join(NAMES)})"
    model = network(text.format(act=act), shape, out, weights)
    quantized, report = quantize(model, ranges(model, sample(model)), target="ort", weight_bits=7)
    assert "GatherElements" not in count_ops(quantized)
    assert report.dropped_activations
    assert next(iter(report.folded.values())).startswith("ReLU, within 0.00")


def test_two_functions_of_one_tensor_that_share_an_operator():
    """SiLU, and sigmoid less softplus: the second becomes a table, the first keeps the sigmoid that they share."""
    text = "s = Sigmoid(x) m = Mul(x, s) p = Softplus(x) d = Sub(s, p) c = Conv(m, w) e = Conv(d, w) y = Add(c, e)"
    weights = {"w": np.random.default_rng(0).normal(size=(3, 3, 1, 1))}
    model = network(text, (1, 3, 4, 4), (1, 3, 4, 4), weights)
    data = np.random.default_rng(1).normal(size=(8, 3, 4, 4)).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    for dropped in ((), ("d",), ("m",), ("x",)):  # without a range what stood in is taken back
        kept = {name: span for name, span in ranges.tensors.items() if name not in dropped}
        quantized, _ = quantize(model, dataclasses.replace(ranges, tensors=kept), target="ort", weight_bits=7)
        expected, found = (
            ort.InferenceSession(each.SerializeToString(), providers=["CPUExecutionProvider"]).run(
                None, {"x": data[:1]}
            )
            for each in (model, quantized)
        )
        # 7-bit weights and 8-bit activations; a lost or doubled operator is off by the values themselves.
        assert np.abs(expected[0] - found[0]).mean() < 0.03 * np.abs(expected[0]).max(), dropped


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_around_tables_are_ranked_and_corrected(layout):
    """The float activation stands for its table there; the file has the table all the same."""
    model, _, _ = build(layout)
    source = open_source({"x": np.concatenate([sample(model, seed) for seed in range(4)])}, model_inputs(model))
    measured = calibrate(model, source)
    plain, _ = quantize(model, measured, weight_bits=8)
    told, report = quantize(model, measured, weight_bits=8, evidence=Evidence(source, rank=True))
    before, after = count_ops(plain), count_ops(told)
    before.pop("DequantizeLinear"), after.pop("DequantizeLinear")  # a layer without a bias may get one
    assert after == before
    assert "GatherElements" in after
    assert len(report.sensitivity.layers) == 2
    assert [layer.layer for layer in report.correction.layers] == [layer.name for layer in report.layers]
    assert report.drift[0].sqnr_db > 20, "two layers and a table of 8 bits keep far more than a collapse would"
