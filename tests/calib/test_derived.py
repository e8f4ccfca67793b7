from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import calib.meter
from calib.derived import Derived, derivable, derive
from calib.histogram import CHANNEL_BITS, histogram_of
from calib.inputs import model_inputs
from calib.meter import MASK
from calib.observers import Tensor
from calib.ranges import EMPTY, TensorRange
from calib.run import calibrate
from calib.sources import open_source

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=FLOATS | st.just(-0.0))


def parse(text, opset=17):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')


def measured(values):
    """As an observer measures it; channels on axis 0 here."""
    low, high = values.min(1) + np.float32(0), values.max(1) + np.float32(0)
    channels = tuple(histogram_of(row, bits=CHANNEL_BITS) for row in values)
    ends = float(low.min()), float(high.max())
    return TensorRange(*ends, "float32", 3, 1, low, high, histogram_of(values), channels)


def same_bits(a, b):
    assert a == b
    assert np.array_equal(np.signbit([a.min, a.max]), np.signbit([b.min, b.max]))
    assert np.array_equal(np.signbit(a.channel_min), np.signbit(b.channel_min))
    assert np.array_equal(np.signbit(a.channel_max), np.signbit(b.channel_max))


@given(VALUES, FLOATS, FLOATS)
def test_clipped_values_have_the_range_that_is_derived(values, one, other):
    for bounds in ((min(one, other), max(one, other)), (0.0, np.inf), (-np.inf, one), (-np.inf, np.inf)):
        found = derive(Derived(("x",), bounds), [measured(values)])
        same_bits(found, measured(np.clip(values, *bounds).astype(np.float32)))


@given(st.lists(VALUES, min_size=1, max_size=4))
def test_values_side_by_side_have_the_range_that_is_derived(parts):
    names = tuple(map(str, range(len(parts))))
    apart = derive(Derived(names, along_channels=True), [measured(part) for part in parts])
    length = min(part.shape[1] for part in parts)
    same_bits(
        derive(Derived(names, along_channels=True), [measured(part[:, :length]) for part in parts]),
        measured(np.concatenate([part[:, :length] for part in parts])),
    )
    assert apart.histogram == histogram_of(np.concatenate([part.reshape(-1) for part in parts]))
    rows = min(len(part) for part in parts)
    same_bits(
        derive(Derived(names), [measured(part[:rows]) for part in parts]),
        measured(np.concatenate([part[:rows] for part in parts], axis=1)),
    )


MODEL = """g (float[N, 3, 4, 4] x) => (float[N, 6, 4, 4] y, float[N, 3, 8, 4] z)
<float low = {-0.5}, float high = {0.75}>
{ s = Sin(x) a = Relu(s) b = Clip(s, low, high) c = Clip(s, , high) j = Concat<axis = 1>(a, b)
  k = Concat<axis = -3>(j, s) r = Relu(k) z = Concat<axis = 2>(a, c) m = MaxPool<kernel_shape = [2, 2]>(j)
  y = Clip(j, low) }"""


@pytest.mark.parametrize("options", [{}, {"method": "mse", "channels": True}])
@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_a_network_measures_alike_with_and_without(options, batch, monkeypatch):
    model = parse(MODEL.replace("N,", f"{batch},"))
    data = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    source = open_source(data, model_inputs(model))
    looked_at, real = [], calib.meter.Observer
    monkeypatch.setattr(
        calib.meter, "Observer", lambda tensor, wanted: looked_at.append(tensor.name) or real(tensor, wanted)
    )
    short = calibrate(model, source, batch_size=4, **options)
    assert looked_at == ["x", "s", "m"]
    monkeypatch.setattr("calib.discover.derivable", lambda *_: {})
    assert calibrate(model, source, batch_size=2, **options) == short
    assert list(short.tensors) == ["x", "s", "a", "b", "c", "j", "k", "r", "z", "m", "y"]


def tensors(names, axis=1, **more):
    return {name: Tensor(name, "float32", 2, axis, **more) for name in names}


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Clip(x, low, high)",  # the bounds are inputs
        "k = Neg(w) y = Clip(x, k)",  # ... or computed
        "y = Clip(x, three, w)",  # the lower above the higher
        "y = Concat<axis = 1>(x, w)",  # a constant is not measured
        "y = mine.Relu(x)",
        "y = PRelu(x, w)",
        "y = LeakyRelu(x)",
    ],
)
def test_what_does_not_follow_is_measured(nodes):
    ends = "(float[N, 1] x, float low, float high) => (float[N, M] y)"
    model = parse(f"g {ends} <float w = {{2}}, float three = {{3}}> {{ {nodes} }}")
    assert derivable(model, tensors("xy"), {"x", "y"}) == {}


def test_clip_of_old_operator_sets():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Clip<min = -1.0, max = 6.0>(x) }", 10)
    assert derivable(model, tensors("xy"), set()) == {"y": Derived(("x",), (-1.0, 6.0))}


def test_clip_to_a_constant_node():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { k = Constant<value = float {2}>() y = Clip(x, , k) }")
    assert derivable(model, tensors("xy"), set()) == {"y": Derived(("x",), (-np.inf, 2.0))}


def test_concat_is_derived_only_where_it_is_sure():
    model = parse("g (float[N, 2] x, float[N, 2] z) => (float[N, 4] y) { y = Concat<axis = 1>(x, z) }")
    every = tensors("xyz")
    assert derivable(model, every, set("xyz")) == {"y": Derived(("x", "z"), along_channels=True)}
    assert derivable(model, every, set("xy")) == {}, "extents that vary may be 0"
    assert derivable(model, every | tensors("z", shared=True), set("xyz")) == {}
    assert derivable(model, every | tensors("z", axis=None), set("xyz")) == {}
    model.graph.node[0].attribute[0].i = 0
    assert derivable(model, every, set("xyz")) == {"y": Derived(("x", "z"))}


def test_what_follows_from_a_mask_or_from_nothing_has_no_range_either():
    model = parse("""g (float[N, 3] x, float low) => (float[N, 6] y, float[M, 3] r) <float zero = {0}, float nine = {9}>
    { c = Less(x, zero) m = Where(c, low, zero) j = Concat<axis = 1>(m, x) y = Softmax(j)
      g = Greater(x, nine) i = Compress<axis = 0>(x, k) r = Relu(i) }""")
    model.graph.input.pop()
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([False]), "k"))
    found = calibrate(model, open_source(np.float32([[1, -2, 3]]), model_inputs(model)), method="mse")
    assert found.skipped == {"m": MASK, "j": MASK, "i": EMPTY, "r": EMPTY}
    assert list(found.tensors) == ["x", "y"]


@pytest.mark.parametrize("limit", [2, 4, 5, 6])
def test_more_channels_than_are_kept(limit, monkeypatch):
    monkeypatch.setattr("calib.observers.MAX_CHANNELS", limit)
    monkeypatch.setattr("calib.derived.MAX_CHANNELS", limit)
    model = parse("""g (float[N, 3, 4] x, float[N, 2, 4] z) => (float[N, 5, 4] y, float[N, 2, 8] w)
    { y = Concat<axis = 1>(x, z) w = Concat<axis = 2>(z, z) c = MaxPool<kernel_shape = [2]>(y) }""")
    rng = np.random.default_rng(0)
    data = {"x": rng.standard_normal((3, 3, 4), np.float32), "z": rng.standard_normal((3, 2, 4), np.float32)}
    source = open_source(data, model_inputs(model))
    found = calibrate(model, source, method="mse", channels=True)
    monkeypatch.setattr("calib.discover.derivable", lambda *_: {})
    assert calibrate(model, source, method="mse", channels=True) == found


@pytest.mark.parametrize("data", [[[1, 2], [-3, 40]], [[1, 2], [3, 4]], [[10, 20], [30, 40]]])
def test_a_concat_of_what_may_be_empty_is_measured(data, monkeypatch):
    """Rows above 9, whose number depends on values, beside all rows: the range of all is not that of nothing."""
    model = parse("""g (float[N, 2] x) => (float[M, 2] y) <float nine = {9}>
    { m = ReduceMax<axes = [1], keepdims = 0>(x) k = Greater(m, nine) i = Compress<axis = 0>(x, k)
      r = Relu(i) j = Concat<axis = 0>(r, x) y = Neg(j) }""")
    source = open_source(np.float32(data), model_inputs(model))
    found = calibrate(model, source, method="mse")
    monkeypatch.setattr("calib.discover.derivable", lambda *_: {})
    assert calibrate(model, source, method="mse") == found
    assert found.tensors["j"].count == 2


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000))
def test_relu_alone_needs_no_run(seed):
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    data = np.random.default_rng(seed).standard_normal((3, 2)).astype(np.float32)
    found = calibrate(model, open_source(data, model_inputs(model)))
    assert np.array_equal(found.tensors["y"].channel_max, np.maximum(data.max(0), 0))
