# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Collapse to a tolerance: what is replaced with which bound, what stays and why, and how it is checked."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import onnx
import pytest

from calib.errors import RangesError, ToolkitError
from calib.fingerprint import model_fingerprint
from calib.ranges import Ranges, TensorRange
from calib.session import open_session
from relu_deploy.errors import CheckFailedError
from relu_deploy.graph import count_ops
from relu_deploy.passes import approximate
from relu_deploy.passes.certificate import Certificate
from relu_deploy.passes.run import RewriteReport, rewrite
from relu_deploy.report import PassReport, to_json

SILU = "s = Sigmoid(x) a = Mul(x, s)"
GELU = "d = Div(x, t) e = Erf(d) f = Add(e, o) k = Mul(x, f) a = Mul(k, h)"
TANH = "c = Mul(x, x) c3 = Mul(c, x) u = Mul(c3, q4) v = Add(x, u) w = Mul(v, q8) e = Tanh(w) f = Add(e, o) k = Mul(x, f) a = Mul(k, h)"
INIT = ("float z = {0}, float o = {1}, float t = {1.41421353816986083984375}, float h = {0.5}, float g = {0.01}, float g1 = {0.99}, "
        "float a98 = {0.98}, float a02 = {0.02}, float q4 = {0.044715}, float q8 = {0.79788458347320556640625}, float n = {-1}, float w2 = {2}")  # fmt: skip


def parse(body: str, *, init: str = INIT, opset: int = 20, shape: str = "N,4") -> onnx.ModelProto:
    return onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[{shape}] x) => (float[{shape}] y) <{init}> {{ {body} }}""")


def collapse_report(report: RewriteReport) -> PassReport:
    return next(entry for entry in report.passes if entry.name == "collapse_relu")


# Spelling, and the largest distance of the act from ReLU times its share.
SILU_GAP, GELU_GAP, TANH_GAP, MISH_GAP = 0.278465, 0.169971, 0.170041, 0.308843
BLENDS = {
    "sat of silu": (f"{SILU} r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01 * SILU_GAP),
    "sat of silu, 1 - gamma in the graph": (f"{SILU} r = Relu(x) m = Sub(o, g) p = Mul(g, a) b = Mul(m, r) y = Add(b, p)", 0.01 * SILU_GAP),
    "sat of silu by lerp": (f"{SILU} r = Relu(x) d2 = Sub(a, r) p = Mul(d2, g) y = Add(r, p)", 0.01 * SILU_GAP),
    "sat of silu by max": (f"{SILU} r = Max(x, z) p = Mul(a, g) b = Mul(r, g1) y = Sum(p, b)", 0.01 * SILU_GAP),
    "sat of silu by where": (f"{SILU} i = Greater(x, z) r = Where(i, x, z) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01 * SILU_GAP),
    "sat of a fused silu": ("a = Swish(x) r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01 * SILU_GAP),
    "half folded, gamma in the gate": ("s = Sigmoid(x) sg = Mul(s, g) a = Mul(x, sg) r = Relu(x) b = Mul(r, g1) y = Add(a, b)", 0.01 * SILU_GAP),
    "half folded, x in both": ("s = Sigmoid(x) sg = Mul(s, g) i = Greater(x, z) j = Cast <to = 1> (i) jg = Mul(j, g1) l = Add(sg, jg) y = Mul(x, l)", 0.01 * SILU_GAP),
    "half folded, scaled twice": (f"{SILU} p = Mul(a, g) l = LeakyRelu <alpha = 0.0> (x) b = Mul(l, g1) y = Add(p, b)", 0.01 * SILU_GAP),
    "pea of gelu": (f"{GELU} r = Relu(x) p = Mul(a, a02) b = Mul(r, a98) y = Add(b, p)", 0.02 * GELU_GAP),
    "pea of a fused gelu": ("a = Gelu(x) r = Relu(x) p = Mul(a, a02) b = Mul(r, a98) y = Add(b, p)", 0.02 * GELU_GAP),
    "pea of gelu, the half behind": (f"{GELU.replace('a = Mul(k, h)', '')} k2 = Mul(k, a02) r = Relu(x) r2 = Mul(r, a98) r3 = Mul(r2, w2) p = Add(k2, r3) y = Mul(p, h)", 0.02 * GELU_GAP),
    "pea of gelu by tanh": (f"{TANH} r = Relu(x) p = Mul(a, a02) b = Mul(r, a98) y = Add(b, p)", 0.02 * TANH_GAP),
    "pea of gelu by tanh, fused": ("a = Gelu <approximate = \"tanh\"> (x) r = Relu(x) p = Mul(a, a02) b = Mul(r, a98) y = Add(b, p)", 0.02 * TANH_GAP),
    "sat of mish": ("a = Mish(x) r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01 * MISH_GAP),
    "sat of elu": ("a = Elu(x) r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01),
    "sat of hardswish": ("a = HardSwish(x) r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b)", 0.01 * 0.375),
}  # fmt: skip


def opset_of(body: str) -> int:
    return 24 if "Swish(" in body and "HardSwish" not in body else 20


@pytest.mark.parametrize("ends", [None, (-8.0, 8.0)], ids=["everywhere", "on a range"])
@pytest.mark.parametrize("name", BLENDS)
def test_a_blend_collapses_with_its_bound_where_that_is_allowed(name, ends):
    body, gap = BLENDS[name]
    model = parse(body, opset=opset_of(body))
    after, report = rewrite(model, collapse_tolerance=gap * 1.1, domain=ends)
    assert count_ops(after) == {"Relu": 1}
    assert report.approximation is not None
    (row,) = report.approximation.collapses
    assert gap * 0.999 <= row.eps <= gap * 1.01
    assert row.measured is not None
    assert row.measured <= row.eps + 1e-6
    assert row.domain == ("type" if ends is None else "given")
    (note,) = collapse_report(report).notes.values()
    assert "within" in note
    assert not report.exact
    assert rewrite(after, collapse_tolerance=gap * 1.1, domain=ends)[0] is after


@pytest.mark.parametrize("name", BLENDS)
def test_what_a_runtime_computes_is_within_the_certificate(name):
    """At every magnitude, with rounding as it is stated: the bounds are about real arithmetic, and runtimes round."""
    body, gap = BLENDS[name]
    model = parse(body, opset=opset_of(body))
    _, report = rewrite(model, collapse_tolerance=gap * 1.1, verify=False)
    assert report.approximation is not None
    (row,) = report.approximation.collapses
    (note,) = collapse_report(report).notes.values()
    rounding = float(note.split("at most ")[1].split()[0])
    random = np.random.default_rng(0)
    sizes = np.concatenate([np.exp(random.uniform(-60, np.log(row.high) * 0.999, 20000)), random.uniform(0, 12, 20000)])
    x = np.concatenate([sizes, -sizes, [0.0] * 4]).astype(np.float32)
    session = open_session(model)
    y = session.run(None, {"x": x.reshape(-1, 4)})[0].reshape(-1).astype(np.float64)
    off = np.abs(y - np.maximum(x, 0)) - row.eps - row.slope * np.maximum(x, 0)
    assert (off <= rounding * np.maximum(np.abs(x), 1)).all()


@pytest.mark.parametrize("name", BLENDS)
def test_a_blend_stays_with_its_bound_where_that_is_too_much(name):
    body, gap = BLENDS[name]
    model = parse(body, opset=opset_of(body))
    for ends in (None, (-8.0, 8.0)):
        after, report = rewrite(model, collapse_tolerance=gap * 0.9, domain=ends)
        assert "Relu" in count_ops(after) or len(after.graph.node) > 3
        assert len(after.graph.node) > 1
        reasons = [skip.reason for skip in collapse_report(report).skipped]
        assert any(f"tolerance {gap * 0.9:g}" in reason for reason in reasons), reasons
    same, report = rewrite(model)
    assert report.approximation is None
    assert len(same.graph.node) > 1  # exact is the default


def per_channel(gammas: list[float], body: str, column: str = "4,1,1") -> onnx.ModelProto:
    model = parse(
        body, shape="N,4,H,W", init=f"{INIT}, float[{column}] gc = {{0, 0, 0, 0}}, float[{column}] rc = {{0, 0, 0, 0}}"
    )
    shape = [int(d) for d in column.split(",")]
    share = np.array(gammas, np.float32)
    for name, values in (("gc", share), ("rc", 1 - share)):
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.reshape(shape), name))
    return model


PER_CHANNEL = {
    "two products": f"{SILU} r = Relu(x) p = Mul(a, gc) b = Mul(r, rc) y = Add(p, b)",
    "lerp": f"{SILU} r = Relu(x) d2 = Sub(a, r) p = Mul(d2, gc) y = Add(r, p)",
    "prelu with small slopes, on a range": "y = PRelu(x, gc)",
}


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_the_worst_channel_decides(name):
    gammas = [0.0, 0.01, 0.002, 0.005]
    model = per_channel(gammas, PER_CHANNEL[name])
    ends = (-8.0, 8.0) if "prelu" in name else None
    gap = 0.08 if "prelu" in name else 0.01 * SILU_GAP
    after, report = rewrite(model, collapse_tolerance=gap * 1.01, domain=ends)
    assert count_ops(after) == {"Relu": 1}
    assert report.approximation is not None
    assert report.approximation.collapses[0].eps == pytest.approx(gap, rel=0.005)
    same, report = rewrite(model, collapse_tolerance=gap * 0.99, domain=ends)
    assert same is model
    assert any("more than the tolerance" in skip.reason for skip in collapse_report(report).skipped)


def measured(model: onnx.ModelProto, tensors: dict[str, TensorRange], skipped: dict[str, str] | None = None) -> Ranges:
    return Ranges(tensors, model_fingerprint(model), "b" * 64, "max", 8, skipped or {})


def test_ranges_count_channel_by_channel():
    model = per_channel([0.5, 0.01, 0.5, 0.5], PER_CHANNEL["lerp"])
    low = np.array([0.0, -9.0, 1e-3, 0.0], np.float32)
    high = np.array([1e-3, 9.0, 2e-3, 0.0], np.float32)
    mine = TensorRange(-9.0, 9.0, "float32", 8, 1, low, high)
    after, report = rewrite(model, collapse_tolerance=0.003, domain=measured(model, {"x": mine}))
    assert count_ops(after) == {"Relu": 1}
    (note,) = collapse_report(report).notes.values()
    assert "(calibrated)" in note
    assert report.approximation is not None
    assert report.approximation.collapses[0].outside is not None
    assert report.approximation.collapses[0].outside > 0.5  # random inputs know nothing of the channels' ranges
    whole = TensorRange(-9.0, 9.0, "float32", 8)
    assert rewrite(model, collapse_tolerance=0.003, domain=measured(model, {"x": whole}))[0] is model
    last = TensorRange(-9.0, 9.0, "float32", 8, 3, low, high)  # channels along another axis are other channels
    assert rewrite(model, collapse_tolerance=0.003, domain=measured(model, {"x": last}))[0] is model


def test_a_region_without_a_range_stays_and_says_so():
    model = parse(BLENDS["sat of silu"][0])
    for skipped, words in (({}, "no range of its input x"), ({"x": "it was empty for every sample"}, "it was empty")):
        same, report = rewrite(model, collapse_tolerance=1.0, domain=measured(model, {}, skipped))
        assert same is model
        assert any(words in skip.reason for skip in collapse_report(report).skipped)


def test_ranges_of_another_network_are_refused():
    model, other = parse(BLENDS["sat of silu"][0]), parse(BLENDS["pea of gelu"][0])
    with pytest.raises(RangesError, match="another network"):
        rewrite(model, collapse_tolerance=1.0, domain=measured(other, {}))


@pytest.mark.parametrize(("tolerance", "ends", "words"), [
    (-1.0, None, "makes no sense"), (math.nan, None, "makes no sense"), (math.inf, None, "makes no sense"),
    (0.1, (3.0, -3.0), "no range"), (0.1, (0.0, math.inf), "no range"), (None, (-1.0, 1.0), "without a tolerance"),
])  # fmt: skip
def test_senseless_wishes_are_refused_with_a_hint(tolerance, ends, words):
    with pytest.raises(ToolkitError, match=words) as caught:
        rewrite(parse("y = Relu(x)"), collapse_tolerance=tolerance, domain=ends)
    assert caught.value.hint
    assert caught.value.exit_code == 2


def test_a_tolerance_of_zero_collapses_what_is_relu_on_the_range():
    model = parse("y = Clip(x, z, six)", init="float z = {0}, float six = {6}")
    after, report = rewrite(model, collapse_tolerance=0.0, domain=(-3.0, 6.0))
    assert count_ops(after) == {"Relu": 1}
    assert not report.exact  # beyond 6 it is another function
    (note,) = collapse_report(report).notes.values()
    assert note == "equals ReLU for -3 <= x <= 6 (given)"
    assert rewrite(model, collapse_tolerance=0.0, domain=(-3.0, 6.5))[0] is model
    assert rewrite(model, collapse_tolerance=0.0)[0] is model


def test_lines_are_not_activations():
    """On positive inputs a line through the origin is ReLU too, and a scale is no activation all the same."""
    model = parse("y = Mul(x, w2)")
    assert rewrite(model, collapse_tolerance=1e9, domain=(0.0, 1.0))[0] is model
    model = parse("k = Mul(x, near) r = Relu(k) y = Neg(r)", init="float near = {1.001}")
    assert count_ops(rewrite(model, collapse_tolerance=1.0, domain=(-1.0, 1.0))[0])["Mul"] == 1


def test_a_scale_behind_a_relu_is_no_activation_and_is_not_listed():
    model = parse("c = MatMul(x, m) r = Relu(c) k = Mul(r, near) y = Add(k, h)", init=f"{INIT}, float near = {{1.001}}, "
                  f"float[4,4] m = {{{', '.join('1' for _ in range(16))}}}")  # fmt: skip
    _, report = rewrite(model, collapse_tolerance=0.5, domain=(-6.0, 6.0))
    assert report.approximation is not None
    assert not report.approximation.collapses
    assert not collapse_report(report).skipped


def test_a_constant_of_one_entry_does_not_change_a_shape_that_is_not_known():
    """Shape inference gives up at a Reshape to a computed shape; what follows has an axis all the same."""
    body = "k = Reshape(x, dims) c = Add(k, b) e = Mul(c, one) s = Sigmoid(e) a = Mul(c, s) r = Relu(c) p = Mul(a, g) q = Mul(r, g1) v = Add(p, q) y = ReduceSum <keepdims = 0> (v)"
    for bias, kept in (("float[2] b = {1, 2}", False), ("float b = {1}", True)):
        model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 20]>
        g (float[N,4] x, int64[R] dims) => (float y) <{INIT}, {bias}, float[1] one = {{1}}> {{ {body} }}""")
        after, report = rewrite(model, collapse_tolerance=0.01, verify=False)
        assert ("Sigmoid" in count_ops(after)) == kept
        assert any("shape may change" in skip.reason for skip in collapse_report(report).skipped) == kept


IMPOSTORS = {
    "a narrow spike": ("k = Sub(x, c) a = Abs(k) m = Sub(w, a) s = Max(m, z) p = Mul(s, big) r = Relu(x) y = Add(r, p)",
                       "float c = {3.14159}, float w = {1e-7}, float z = {0}, float big = {1e6}", (-8.0, 8.0)),
    "a smooth spike": ("k = Sub(x, c) m = Mul(k, big) e = Tanh(m) q = Mul(e, e) s = Sub(o, q) p = Mul(s, d) r = Relu(x) y = Add(r, p)",
                       "float c = {3.14159}, float big = {1e5}, float o = {1}, float d = {0.1}", (-8.0, 8.0)),
    "a kink far out": ("r = Relu(x) y = Min(r, c)", "float c = {1e37}", None),
    "a kink just outside": ("r = Relu(x) y = Min(r, c)", "float c = {7.5}", (-8.0, 8.0)),
    "a wave": ("m = Mul(x, p) s = Sin(m) k = Mul(s, d) r = Relu(x) y = Add(r, k)", "float p = {201.061929829746767261}, float d = {0.06}", (-8.0, 8.0)),
    "an overflow": ("e = Exp(x) k = Mul(e, d) r = Relu(x) y = Add(r, k)", "float d = {1e-37}", None),
    "an overflow on the range": ("e = Exp(x) k = Mul(e, d) r = Relu(x) y = Add(r, k)", "float d = {1e-38}", (-8.0, 89.5)),
    "a jump": ("c = Equal(x, t) k = Where(c, o, z) r = Relu(x) y = Add(r, k)", "float t = {2}, float o = {1}, float z = {0}", (-8.0, 8.0)),
    "a slope": ("y = LeakyRelu <alpha = 1e-3> (x)", "", None),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_stay(name):
    body, init, ends = IMPOSTORS[name]
    model = parse(body, init=init, shape="N,3")
    same, report = rewrite(model, collapse_tolerance=0.05, domain=ends)
    assert same is model
    assert any("0.05" in skip.reason or "not finite" in skip.reason for skip in collapse_report(report).skipped), report


def test_the_report_is_json_without_infinities():
    report = rewrite(parse(BLENDS["sat of silu"][0]), collapse_tolerance=0.01)[1]
    value = json.loads(json.dumps(to_json(report), allow_nan=False))
    (row,) = value["approximation"]["collapses"]
    assert (row["node"], row["input"], row["domain"]) == ("Add_5", "x", "type")
    assert value["approximation"]["outputs"][0]["name"] == "y"
    assert 0 < value["approximation"]["outputs"][0]["error"] < 0.1


def test_values_outside_the_range_are_counted():
    report = rewrite(parse(BLENDS["sat of silu"][0]), collapse_tolerance=0.01, domain=(-1.0, 1.0))[1]
    assert report.approximation is not None
    (row,) = report.approximation.collapses
    assert row.outside is not None
    assert 0.1 < row.outside < 0.9


def test_a_certificate_that_does_not_hold_is_noticed(monkeypatch):
    """The check on values that flow through the network is no formality: a wrong bound ends the run."""
    lie = Certificate(1e-6, 0.0, -1e30, 1e30, "float32", "type", False, 0.0)
    real = approximate._check
    monkeypatch.setattr(
        approximate, "_check", lambda row, item, seen: real(row, dataclasses.replace(item, certificate=lie), seen)
    )
    with pytest.raises(CheckFailedError, match="its certificate allows 1e-06"):
        rewrite(parse(BLENDS["sat of silu"][0]), collapse_tolerance=0.01)


def test_without_verification_bounds_are_still_told():
    report = rewrite(parse(BLENDS["sat of silu"][0]), collapse_tolerance=0.01, verify=False)[1]
    assert report.approximation is not None
    (row,) = report.approximation.collapses
    assert (row.measured, report.approximation.samples) == (None, 0)


def test_given_samples_are_what_it_is_measured_on():
    samples = [{"x": np.full((1, 4), -1.278464, np.float32)}]  # where SiLU is furthest from ReLU
    report = rewrite(parse(BLENDS["sat of silu"][0]), collapse_tolerance=0.01, samples=samples)[1]
    assert report.approximation is not None
    assert report.approximation.samples == 1
    assert report.approximation.collapses[0].measured == pytest.approx(0.01 * SILU_GAP, rel=1e-3)


def test_a_network_of_blends_and_others():
    body = f"""{SILU} r = Relu(x) p = Mul(a, g) b = Mul(r, g1) l1 = Add(p, b) c1 = MatMul(l1, m)
    r2 = LeakyRelu <alpha = 0.5> (c1) c2 = MatMul(r2, m) k = Gelu(c2) v = Mul(k, a02) r3 = Relu(c2) q = Mul(r3, a98) y = Add(v, q)"""
    eye = ", ".join("0.5" if i % 5 == 0 else "-0.25" for i in range(16))
    model = parse(body, init=f"{INIT}, float[4,4] m = {{{eye}}}")
    after, report = rewrite(model, collapse_tolerance=0.005)
    ops = count_ops(after)
    assert ops["Relu"] == 2
    assert ops["LeakyRelu"] == 1
    assert report.approximation is not None
    assert [row.input for row in report.approximation.collapses] == ["x", "c2"]
    assert any("LeakyReLU" in skip.reason for skip in collapse_report(report).skipped)
    assert rewrite(after, collapse_tolerance=0.005)[0] is after


@pytest.mark.parametrize("kind", ["float16", "double"])
def test_other_float_types(kind):
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 20]>
    g ({kind}[N,4] x) => ({kind}[N,4] y) {{ {SILU} r = Relu(x) p = Mul(a, g) b = Mul(r, g1) y = Add(p, b) }}""")
    dtype = np.float16 if kind == "float16" else np.float64
    for name, share in (("g", 2.0**-7), ("g1", 1 - 2.0**-7)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(share, dtype), name))
    after, report = rewrite(model, collapse_tolerance=0.01)
    assert count_ops(after) == {"Relu": 1}, [entry.skipped for entry in report.passes]
