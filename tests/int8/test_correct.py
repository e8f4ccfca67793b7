"""Weights and biases corrected on samples: the outputs gain on other samples, and nothing else changes."""

import dataclasses

import numpy as np
import onnx
import pytest

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.run import quantize

TARGETS = ("ort", "tensorrt-rtx")


def network(last: str = "[head] y = Gemm(f, w4, b4)") -> onnx.ModelProto:
    """A convolution, a depthwise one, a pointwise one, a mean over positions, and a product of matrices."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 12, 12] x) => (float[N, 6] y) {'
        "[one] a = Conv<pads = [1, 1, 1, 1]>(x, w1) r = Relu(a) "
        "[two] b = Conv<pads = [1, 1, 1, 1], group = 16>(r, w2, b2) s = Relu(b) "
        "[three] c = Conv(s, w3, b3) t = Relu(c) m = GlobalAveragePool(t) f = Flatten(m) " + last + "}"
    )
    shapes = {
        "w1": (16, 3, 3, 3),
        "w2": (16, 1, 3, 3),
        "w3": (32, 16, 1, 1),
        "w4": (32, 6),
        "b2": 16,
        "b3": 32,
        "b4": 6,
    }
    for name, shape in shapes.items():
        size = np.prod(shape[1:]) if isinstance(shape, tuple) and len(shape) == 4 else 32
        values = (rng.normal(size=shape) / np.sqrt(size)).astype(np.float32)
        if f"{name})" in last or name in onnx.printer.to_text(model.graph):
            model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return onnx.shape_inference.infer_shapes(model)


def images(seed: int, count: int) -> np.ndarray:
    """Smooth pictures: neighbours and channels are alike, as in photographs."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=(count, 1, 4, 4)) + 0.3 * rng.normal(size=(count, 3, 4, 4)) + 0.5
    return np.kron(coarse, np.ones((1, 1, 3, 3))).astype(np.float32)


def quality(model, quantized, data) -> float:
    wanted, found = (open_session(m).run(None, {"x": data})[0].astype(np.float64) for m in (model, quantized))
    return sqnr_db(float((wanted**2).sum()), float(((wanted - found) ** 2).sum()))


def corrected(model, target, **options):
    source = open_source(images(1, 48), model_inputs(model))
    ranges = calibrate(model, source)
    options = {"weight_bits": 7, **options} if target == "ort" else options
    return tuple(
        quantize(model, ranges, target=target, evidence=Evidence(source, correct=on), **options) for on in (False, True)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_outputs_gain_on_samples_that_were_not_seen(target):
    model = network()
    (plain, _), (better, report) = corrected(model, target)
    done = report.correction
    assert done.used
    assert done.after_db > done.before_db
    assert quality(model, better, images(7, 64)) > quality(model, plain, images(7, 64)) + 1
    assert [layer.layer for layer in done.layers] == [layer.name for layer in report.layers if layer.int8]
    assert sum(layer.rounded + layer.shifted for layer in done.layers) > 0
    assert (done.learned, done.judged, done.compared) == (16, 8, 32)


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_codes_and_biases_changes(target):
    (plain, _), (better, _) = corrected(network(), target)
    stored = [{t.name: onnx.numpy_helper.to_array(t) for t in m.graph.initializer} for m in (plain, better)]
    new = stored[1].keys() - stored[0].keys()
    assert {name.split("/")[0] for name in new} <= {"one"}, "the only layer without a bias may get one"
    for name in stored[0].keys() & stored[1].keys():
        if not np.array_equal(stored[0][name], stored[1][name]):
            assert "weight/quantized" in name or "bias" in name, name
            assert stored[0][name].shape == stored[1][name].shape
    ops = [[node.op_type for node in m.graph.node if "bias" not in node.name] for m in (plain, better)]
    assert ops[0] == ops[1]


def test_a_product_of_matrices_with_an_add_behind_is_corrected_there():
    model = network("[head] p = MatMul(f, w4) y = Add(p, b4)")
    (plain, _), (better, report) = corrected(model, "tensorrt-rtx")
    assert report.correction.used
    assert quality(model, better, images(7, 64)) > quality(model, plain, images(7, 64))


@pytest.mark.parametrize("first", ["z = Identity(x)", "z = Squeeze(x)"], ids=["open axes", "axes not known"])
@pytest.mark.parametrize("target", TARGETS)
def test_products_over_two_open_axes_get_their_biases_in_the_adds_behind(target, first):
    # No Gemm can take them: ``(batch, positions, 24)`` with both open, as transformers are exported. Where not even
    # the number of axes is known, ONNX Runtime gets a quantiser between the product and the Add.
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, T, 24] x) => (float[N, T, 6] y) {'
        f"{first} [one] p = MatMul(z, w1) a = Add(p, b1) r = Relu(a) [two] q = MatMul(r, w2) y = Add(b2, q) }}"
    )
    for name, shape in {"w1": (24, 40), "b1": 40, "w2": (40, 6), "b2": 6}.items():
        values = rng.normal(size=shape).astype(np.float32) * np.float32(0.2)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model = onnx.shape_inference.infer_shapes(model)
    data, others = (np.random.default_rng(seed).uniform(1, 2, size=(40, 5, 24)).astype(np.float32) for seed in (1, 2))
    source = open_source(data, model_inputs(model))
    ranges = calibrate(model, source)
    bits = {"weight_bits": 7} if target == "ort" else {}
    (plain, _), (better, report) = (
        quantize(model, ranges, target=target, evidence=Evidence(source, correct=on), **bits) for on in (False, True)
    )
    assert report.correction.used
    assert sum(layer.shifted for layer in report.correction.layers) > 0
    assert quality(model, better, others) > quality(model, plain, others)
    biases = [
        next(t for t in better.graph.initializer if t.name.startswith(f"{layer}/bias")) for layer in ("one", "two")
    ]
    assert [tuple(bias.dims) for bias in biases] == [(40,), (6,)]
    kind = onnx.TensorProto.FLOAT if target == "ort" else onnx.TensorProto.FLOAT16
    assert all(bias.data_type == kind for bias in biases)


def test_a_network_that_would_lose_is_left_as_it_is(monkeypatch):
    from relu_deploy.int8 import correct as module

    honest = module.best_choice

    def harmful(weight, scale, options, learned, judges, room):
        best = honest(weight, scale, options, learned, judges, room)
        return dataclasses.replace(best, codes=-best.codes)

    monkeypatch.setattr(module, "best_choice", harmful)
    (plain, _), (same, report) = corrected(network(), "ort")
    assert not report.correction.used
    assert same.SerializeToString() == plain.SerializeToString()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_samples_learn_and_judge(count):
    model = network()
    source = open_source(images(1, count), model_inputs(model))
    _, report = quantize(model, calibrate(model, source), weight_bits=8, evidence=Evidence(source))
    done = report.correction
    assert (done.learned, done.judged, done.compared) == (count, count, count)


def test_float_layers_are_left_alone():
    model = network()
    source = open_source(images(1, 24), model_inputs(model))
    quantized, report = quantize(
        model,
        calibrate(model, source),
        weight_bits=8,
        keep_float=["two"],
        channel_fusion="off",
        evidence=Evidence(source),
    )
    assert [layer.layer for layer in report.correction.layers] == ["one", "three", "head"]
    kept = {t.name: onnx.numpy_helper.to_array(t) for t in quantized.graph.initializer}
    given = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert any(np.array_equal(values, given["w2"]) for values in kept.values())


def test_progress_is_told():
    told = []
    model = network()
    source = open_source(images(1, 8), model_inputs(model))
    evidence = Evidence(source, progress=lambda *step: told.append(step))
    quantize(model, calibrate(model, source), weight_bits=8, evidence=evidence)
    steps = [step for step in told if step[0] == "correct weights"]
    assert [done for _, done, _ in steps] == [1, 2, 3, 4]
    assert {total for *_, total in steps} == {4}


def test_a_network_that_does_not_run_in_pieces_is_written_as_it_is(monkeypatch):
    from relu_deploy.errors import QuantizationError
    from relu_deploy.int8.walk import Walk

    def refuse(self, name):
        raise QuantizationError(f"{name} is not a tensor")

    monkeypatch.setattr(Walk, "fetch", refuse)
    (plain, _), (same, report) = corrected(network(), "ort")
    assert same.SerializeToString() == plain.SerializeToString()
    assert report.correction is None
    assert "weights were not corrected on the samples: x is not a tensor" in report.warnings


def test_no_more_samples_are_on_their_way_than_memory_bears(monkeypatch):
    from relu_deploy.int8 import correct as module

    model = network()
    source = open_source(images(1, 24), model_inputs(model))
    ranges = calibrate(model, source)
    # The most that is held at once is an activation of 16 channels and 12 x 12 floats.
    monkeypatch.setattr(module, "_HELD", 5 * 7 * 16 * 12 * 12 * 4)
    _, report = quantize(model, ranges, weight_bits=8, evidence=Evidence(source))
    assert report.correction.learned + report.correction.judged == 7
    assert report.correction.compared == 19, "they are run one by one"


def test_float16_networks_are_corrected_too():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 19]> g (float16[N, 3, 12, 12] x) => (float16[N, 5, 12, 12] y) {'
        "[one] a = Conv<pads = [1, 1, 1, 1]>(x, w1) r = Relu(a) [two] y = Conv(r, w2, b2) }"
    )
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (16, 3, 3, 3)), ("w2", (5, 16, 1, 1)), ("b2", (5,))):
        values = (0.5 * rng.normal(size=shape)).astype(np.float16)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    source = open_source(images(1, 24).astype(np.float16), model_inputs(model))
    quantized, report = quantize(model, calibrate(model, source), target="tensorrt-rtx", evidence=Evidence(source))
    assert not [warning for warning in report.warnings if "not corrected" in warning]
    assert report.correction.layers
    assert report.drift[0].sqnr_db > 20
    assert {t.data_type for t in quantized.graph.initializer if "bias" in t.name} <= {onnx.TensorProto.FLOAT16}
