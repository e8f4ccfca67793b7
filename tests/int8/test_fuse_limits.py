"""Channel fusion at its limits: types that overflow, shared weights, methods that clip, networks quantised whole."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.int8.fuse_ranges import shifted
from relu_deploy.int8.run import quantize

_SPEC = importlib.util.spec_from_file_location("test_fuse", Path(__file__).with_name("test_fuse.py"))
fusing = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fusing)
any_factors = fusing.any_factors


def chain(weights, *, dtype="float"):
    """Conv, Relu, Conv, with weights ``w`` and ``v`` and the bias ``b`` of the first."""
    text = (
        f'<ir_version: 8, opset_import: ["": 17]> g ({dtype}[n, 4, 6, 6] x) => ({dtype}[n, 5, 6, 6] y) '
        "{ [first] c = Conv(x, w, b) [act] r = Relu(c) [second] y = Conv(r, v) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return model


def uneven(*, channels=8, dtype=np.float32):
    """Weights whose channels differ by 2^8, as BatchNorm leaves them."""
    rng = np.random.default_rng(0)
    size = 2.0 ** np.linspace(0, -8, channels)
    return {
        "w": (rng.normal(size=(channels, 4, 1, 1)) * size[:, None, None, None]).astype(dtype),
        "b": (0.1 * size).astype(dtype),
        "v": (rng.normal(size=(5, channels, 1, 1)) / size[None, :, None, None]).astype(dtype),
    }


def data(count=64, *, dtype=np.float32):
    return np.random.default_rng(1).normal(size=(count, 4, 6, 6)).astype(dtype)


def sqnr(model, quantized, x):
    reference, found = (open_session(each, threads=1).run(None, {"x": x})[0] for each in (model, quantized))
    return 10 * np.log10((reference.astype(float) ** 2).sum() / ((reference - found).astype(float) ** 2).sum())


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_uneven_channels_keep_their_precision(target, granularity):
    """A network of which one scale for a tensor loses most channels: 8 to 13 dB without, 36 to 38 with (measured)."""
    model, options = chain(uneven()), {"target": target, "weight_granularity": granularity, "weight_bits": 8}
    ranges = fusing.measured(model, data())
    plain, fused = (quantize(model, ranges, channel_fusion=mode, **options) for mode in ("off", "pow2"))
    assert (plain[1].fusion.channels, plain[1].fusion.mode) == (0, "off")
    assert fused[1].fusion.channels >= 6
    x = data(8)
    assert sqnr(model, fused[0], x) > sqnr(model, plain[0], x) + 20
    assert sqnr(model, fused[0], x) > 33


def test_free_factors_are_equal_up_to_rounding():
    model = chain(uneven())
    before, after, fusion = fusing.fuse(model, fusing.measured(model, data()), mode="free")
    assert fusion.report.channels >= 6
    x = data(8)
    reference, found = (fusing.outputs(each, {"x": x}, optimise=True)[0] for each in (before, after))
    # Two roundings of each weight, 2^-24 each, and sums of 4 and 8 products in another rounding.
    assert np.abs(reference - found).max() <= 2**-20 * np.abs(reference).max()
    again = fusing.measured(after, data())
    for name, found in again.tensors.items():
        assert fusion.ranges.tensors[name].max == pytest.approx(found.max, rel=1e-5), name


@pytest.mark.parametrize(
    ("part", "value"),
    # A bias at the upper end would make the network itself overflow.
    [("w", 2.0**-140), ("b", 2.0**-140), ("v", 2.0**-140), ("w", 2.0**-126), ("b", 2.0**-126), ("v", 2.0**-126),
     ("w", 2.0**127), ("v", 2.0**127)],
)  # fmt: skip
def test_weights_at_the_ends_of_float32(part, value, any_factors):
    """A weight that would lose bits or overflow holds its channels back, and no others."""
    weights = uneven()
    weights[part].reshape(-1)[:: weights[part].size // 3] = value
    model = chain(weights)
    x = data(4) * np.float32(2.0**-20)
    before, after, _ = fusing.fuse(model, fusing.measured(model, x))
    stored = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    for name, old in weights.items():
        new = stored.get(f"{name}/fused", old)
        assert np.isfinite(new).all()
        ratio = new.astype(np.float64) / np.where(old == 0, 1, old)
        assert (np.frexp(ratio[old != 0])[0] == 0.5).all(), f"{name} was scaled by powers of two, exactly"
    fusing.assert_same_bits(before, after, {"x": x})


def test_activations_of_float16_stay_far_from_its_end(any_factors):
    """Factors of 2^6 would take activations of 2000 past 65504."""
    weights = {name: value.astype(np.float16) for name, value in uneven().items()}
    weights["w"] = np.full_like(weights["w"], 500)
    weights["v"] = np.full_like(weights["v"], 0.25)
    model = chain(weights, dtype="float16")
    x = np.abs(data(4, dtype=np.float16))
    before, after, fusion = fusing.fuse(model, fusing.measured(model, x))
    assert max(r.absmax for r in fusion.ranges.tensors.values()) <= 65504 / 16 * 2
    fusing.assert_same_bits(before, after, {"x": x})


def test_weights_that_two_layers_share_are_copied(any_factors):
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4, 6, 6] x) => (float[2, 4, 6, 6] y, float[2, 4, 6, 6] z) '
        "{ a = Conv(x, w) r = Relu(a) y = Conv(r, w) z = Conv(x, w) }"
    )
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    x = data(2)
    before, after, fusion = fusing.fuse(model, fusing.measured(model, np.concatenate([x, x])))
    stored = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    assert fusion.report.channels == 4
    assert np.array_equal(stored["w"], weight), "z reads the old ones"
    assert len([name for name in stored if name.startswith("w/fused")]) == 2
    fusing.assert_same_bits(before, after, {"x": x})


def test_what_a_branch_captures_is_left_alone(any_factors):
    inner = onnx.parser.parse_graph("h () => (float[2, 8, 6, 6] o) { o = Neg(r) }")
    other = onnx.parser.parse_graph("k () => (float[2, 8, 6, 6] p) { p = Abs(r) }")
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4, 6, 6] x) => (float[2, 5, 6, 6] y, float[2, 8, 6, 6] q) '
        "{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) s = ReduceMax<keepdims=0>(x) t = Cast<to=9>(s) }"
    )
    model = onnx.parser.parse_model(text)
    model.graph.node.append(helper.make_node("If", ["t"], ["q"], "If", then_branch=inner, else_branch=other))
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in uneven().items())
    x = data(2)
    before, after, fusion = fusing.fuse(model, fusing.measured(model, np.concatenate([x, x])))
    assert fusion.report.channels == 0
    assert any("a graph inside If, Loop or Scan reads it" in skip.reason for skip in fusion.report.layers.skipped)
    fusing.assert_same_bits(before, after, {"x": x})


def test_dead_channels_keep_their_weights():
    weights = uneven()
    weights["w"][2:4], weights["b"][2:4] = 0, -1
    model = chain(weights)
    _, after, fusion = fusing.fuse(model, fusing.measured(model, data()))
    stored = {t.name: numpy_helper.to_array(t) for t in after.graph.initializer}
    assert fusion.report.channels > 0
    assert np.array_equal(stored["v/fused"][:, 2:4], weights["v"][:, 2:4])
    assert np.array_equal(stored["b/fused"][2:4], weights["b"][2:4])


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
@pytest.mark.parametrize("channels", [False, True])
def test_methods_that_clip(method, channels):
    """With histograms by channel the range is chosen anew from them, as a new calibration would; else channel by
    channel inside what was chosen before."""
    model = chain(uneven())
    source = open_source(data(), model_inputs(model))
    ranges = calibrate(model, source, method=method, channels=channels)
    _, after, fusion = fusing.fuse(model, ranges)
    assert fusion.report.channels > 0
    again = calibrate(after, open_source(data(), model_inputs(after)), method=method, channels=channels)
    for name in ("c", "r"):
        told, found = fusion.ranges.tensors[name], again.tensors[name]
        assert (told.min, told.max) == (found.min, found.max)
        if channels:
            assert told.channel_histograms == found.channel_histograms
        low, high = fusion.bounds[name]
        assert found.min <= low <= high <= found.max
    assert sqnr(model, quantize(model, ranges, weight_bits=8)[0], data(8)) > 20


@pytest.mark.parametrize("exponent", [-9, -1, 0, 3])
def test_histograms_move_with_their_values(exponent):
    from calib.histogram import histogram_of

    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    values[:10] = 0
    assert shifted(histogram_of(values), exponent) == histogram_of(values * np.float32(2.0**exponent))


def test_fusing_twice_changes_nothing_more(residual_model, measure):
    model = residual_model()
    ranges = measure(model, samples=64)
    for granularity in ("channel", "tensor"):
        _, after, fusion = fusing.fuse(model, ranges, granularity=granularity)
        assert fusion.report.channels > 0
        assert fusing.fuse(after, fusion.ranges, granularity=granularity)[2].report.channels == 0


def test_the_report_counts_and_explains(residual_model, measure):
    model = residual_model()
    _, _, fusion = fusing.fuse(model, measure(model, samples=64), granularity="tensor")
    layers = {node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")}
    told = fusion.report.layers
    assert set(told.changed) | {skip.name for skip in told.skipped} <= layers
    assert set(told.notes) == set(told.changed)
    assert sum(int(note.split()[0]) for note in told.notes.values()) == fusion.report.channels
    assert {skip.reason for skip in told.skipped} == {"it is an output of the network"}
    assert fusion.report.predicted_after > fusion.report.predicted_before
