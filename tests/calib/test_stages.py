from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import calib.stages
from calib.errors import CalibrationError
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from calib.stages import Stages


def parse(text):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')


def measure(model, data, **options):
    return calibrate(model, open_source(data, model_inputs(model)), **options)


@settings(max_examples=6, deadline=None)
@given(limit=st.integers(0, 60_000))
def test_where_a_network_is_cut_changes_no_bit(residual_model, limit):
    model = residual_model(activation="Silu", batch="N")
    data = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    whole = measure(model, data, method="mse")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib.stages, "STAGE_BYTES", limit)
        assert measure(model, data, method="mse", batch_size=2) == whole


TEXT = """g (float[N, 4] x, float[N, 4] late) => (float[N, 4] y, int64[R] s) <float[4] w = {1, 2, 3, 4}>
{ k = Neg(w) a = Mul(x, k) s = Shape(a) b = Relu(a) two = Constant<value_float = 2.0>() kk = Mul(k, two)
  c = Add(b, kk) d = Reshape(c, s) e = Add(d, late) i = Cast<to = 6>(e) f = Cast<to = 1>(i) y = Add(f, a) }"""


def stages(model, limit, monkeypatch):
    monkeypatch.setattr(calib.stages, "STAGE_BYTES", limit)
    types = dict.fromkeys(["x", "late", *"abcdefy"], "tensor(float)") | {"s": "tensor(int64)", "i": "tensor(int32)"}
    wanted = list("abcdefy")
    return Stages(model, wanted, dict.fromkeys(wanted, 100), types, threads=1)


@pytest.mark.parametrize(("limit", "count"), [(1000, 1), (699, 2), (200, 4), (100, 7), (0, 7)])
def test_each_stage_has_what_it_needs(limit, count, monkeypatch):
    cut = stages(parse(TEXT), limit, monkeypatch)
    assert len(cut) == count
    x, late = np.float32([[1, -2, 3, -4]]), np.float32([[9, 9, 9, 9.5]])
    w = np.float32([1, 2, 3, 4])
    a = x * -w
    e = np.maximum(a, 0) - 2 * w + late
    found = dict(cut.run({"x": x, "late": late}, "test"))
    assert list(found) == list("abcdefy")
    assert np.array_equal(found["a"], a)
    assert np.array_equal(found["e"], e)
    assert np.array_equal(found["y"], np.trunc(e) + a)


def test_no_stage_holds_on_to_what_is_done_with(monkeypatch):
    cut = stages(parse(TEXT), 0, monkeypatch)
    kept = [set(stage.hands_on) - stage.done_with for stage in cut._stages]
    assert kept == [{"a", "s"}, {"b"}, {"c"}, {"d"}, {"i"}, {"f"}, set()]


def test_a_failure_names_its_node_in_any_stage(monkeypatch):
    model = parse("""g (float[N, 2] x) => (float[N, M] y) <int64[1] s = {7}>
    { a = Relu(x) b = Neg(a) [shape] y = Reshape(b, s) }""")
    monkeypatch.setattr(calib.stages, "STAGE_BYTES", 0)
    with pytest.raises(CalibrationError, match=r"fails on the data, at Reshape node 'shape': "):
        measure(model, np.ones((1, 2), np.float32))


def test_what_numpy_cannot_hold_is_not_cut_across(monkeypatch):
    """A sequence lives between its two operators, and bfloat16 is no type of numpy's."""
    model = parse("""g (float[N, 2] x) => (float[N, 2] y)
    { a = Relu(x) q = SequenceConstruct(a, x) z = Constant<value_int = 0>() b = SequenceAt(q, z)
      h = Cast<to = 16>(b) c = Cast<to = 1>(h) y = Neg(c) }""")
    monkeypatch.setattr(calib.stages, "STAGE_BYTES", 0)
    data = np.float32([[1, -2], [3.5, 4]])
    found = measure(model, data)
    assert (found.tensors["y"].min, found.tensors["y"].max) == (-4, 0)
    assert found.skipped == {"h": "its type is bfloat16"}


def test_branches_take_outer_tensors_along(monkeypatch):
    model = parse("""g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, -1}>
    { a = Relu(x) k = Neg(w) m = ReduceMax<keepdims = 0>(x) zero = Constant<value_float = 0.0>() c = Greater(m, zero)
      y = If<then_branch = t () => (float[N, 2] p) { p = Add(a, k) },
             else_branch = e () => (float[N, 2] q) { q = Neg(a) }>(c) }""")
    whole = measure(model, np.float32([[-3, -2], [-1, 5]]))
    monkeypatch.setattr(calib.stages, "STAGE_BYTES", 0)
    assert measure(model, np.float32([[-3, -2], [-1, 5]])) == whole
    assert (whole.tensors["y"].min, whole.tensors["y"].max) == (-1, 6)


def test_masks_and_nan_are_found_across_stages(monkeypatch):
    monkeypatch.setattr(calib.stages, "STAGE_BYTES", 0)
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { h = Mul(x, x) [root] r = Sqrt(x) z = Relu(r) y = Add(z, h) }")
    data = np.ones((9, 2), np.float32)
    data[5] = -1
    for batch_size in (1, 3, 9):
        with pytest.raises(CalibrationError, match=r"NaN in tensor 'r' .*'root'.* at sample 5 "):
            measure(model, data, batch_size=batch_size)
