# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Which functions of a network are activations, and which are gates, heads and arithmetic."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.passes.survey import Layer, Site, Survey, survey

_SPEC = importlib.util.spec_from_file_location("places", Path(__file__).with_name("places.py"))
places = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(places)
_SPEC = importlib.util.spec_from_file_location("spellings", Path(__file__).with_name("spellings.py"))
spellings = importlib.util.module_from_spec(_SPEC)
sys.modules["spellings"] = spellings  # dataclasses look their module up
_SPEC.loader.exec_module(spellings)
network, network_without_check, PLACES, STEM, LAST = (
    places.network, places.network_without_check, places.PLACES, places.STEM, places.LAST,
)  # fmt: skip


def reasons(found: Survey) -> dict[str, set[str]]:
    return {
        kind: {s.left_alone or "" for s in found.activations if s.kind == kind and s.left_alone}
        for kind in found.left_alone
    }


@pytest.mark.parametrize("types", [True, False], ids=["typed", "untyped"])
@pytest.mark.parametrize("name", PLACES)
def test_places(name, types):
    body, inputs, counts, left_alone = PLACES[name]
    opset = 13 if "ReduceMax <" in body or "ReduceMean <" in body else 17
    found = survey(network(body, inputs=inputs, opset=opset, types=types))
    assert found.counts == counts, found.activations
    assert set(found.left_alone) == set(left_alone), found.activations
    assert reasons(found) == {kind: {reason} for kind, reason in left_alone.items()}


def only(found: Survey) -> Site:
    (site,) = found.activations
    return site


def test_what_is_said_of_an_activation():
    body = f"{STEM} b = BatchNormalization(c, %[8], %[8], %[8], %[8]) t = Transpose <perm = [0, 2, 3, 1]> (b) s = Sigmoid(t) m = Mul(t, s) z = Transpose <perm = [0, 3, 1, 2]> (m) {LAST}"
    site = only(survey(network(body)))
    assert site == Site(
        name="Mul_4", kind="silu", detail="SiLU", spelling="Sigmoid-Mul", nodes=("Sigmoid_3", "Mul_4"), input="t",
        output="m", after=Layer("Conv_0", "Conv"), becomes="needs training", bound=site.bound, domain="every finite float32",
        left_alone=None, channels=1,
    )  # fmt: skip

    assert 0.27846 <= site.bound <= 0.28  # SiLU has its minimum, -0.278464, at x = -1.278464


@pytest.mark.parametrize(
    ("body", "becomes"),
    [
        (f"{STEM} z = Relu(c) {LAST}", "Relu"),
        (f"{STEM} z = Max(c, #0) {LAST}", "Relu"),
        (f"{STEM} z = PRelu(c, %[8,1,1]) {LAST}", "PRelu"),
        (f"{STEM} z = LeakyRelu(c) {LAST}", "PRelu"),
        (f"{STEM} z = Clip(c, #0, #6) {LAST}", "Clip"),
        (f"{STEM} z = Elu(c) {LAST}", "needs training"),
        (
            f"{STEM} s = Sigmoid(c) a = Mul(c, s) p = Mul(a, #0.01) r = Relu(c) q = Mul(r, #0.99) z = Add(p, q) {LAST}",
            "Relu with a tolerance",
        ),
        (f"{STEM} a = Relu(c) b = Add(c, #1) r = Relu(b) z = Sub(r, a) {LAST}", "table"),
        # In floats this is not ReLU: 0 times what overflows.
        (f"{STEM} e = Exp(c) m = Mul(e, #0) r = Relu(c) z = Add(m, r) {LAST}", "nothing"),
        (f"{STEM} y = Sigmoid(c)", "nothing"),
    ],
)
def test_what_it_becomes(body, becomes):
    assert only(survey(network(body))).becomes == becomes


@pytest.mark.parametrize(
    ("body", "bound", "domain"),
    [
        (f"{STEM} z = Relu(c) {LAST}", 0, "every finite float32"),
        (f"{STEM} z = Max(c, #0) {LAST}", 0, "every finite float32"),
        (f"{STEM} a = Abs(c) s = Add(c, a) z = Mul(s, #0.5) {LAST}", 0, "|x| <= 8.507e+37 (float32)"),
        (f"{STEM} z = Max(c, #0.25) {LAST}", 0.25, "every finite float32"),
        (f"{STEM} z = LeakyRelu(c) {LAST}", None, None),
        (f"{STEM} z = Clip(c, #0, #6) {LAST}", None, None),
        (f"{STEM} y = Sigmoid(c)", None, None),
    ],
)
def test_bounds(body, bound, domain):
    site = only(survey(network(body)))
    assert (site.bound, site.domain) == (bound, domain)


def test_the_layer_before_is_the_nearest():
    body = (
        "a = Conv(x, %[8,8,1,1]) b = Relu(a) c = Conv(b, %[8,8,1,1]) d = Add(c, x) z = Relu(d) y = Conv(z, %[8,8,1,1])"
    )
    found = survey(network(body))
    assert [site.after for site in found.activations] == [Layer("Conv_0", "Conv"), Layer("Conv_2", "Conv")]
    assert survey(network("y = Relu(x)")).activations[0].after is None


def test_channels_are_those_with_constants_of_their_own():
    found = survey(network(f"{STEM} a = PRelu(c, %[8,1,1]) b = Conv(a, %[8,8,1,1]) z = PRelu(b, #0.25) {LAST}"))
    assert [site.channels for site in found.activations] == [8, 1]


def test_quantisers_are_looked_through():
    found = survey(places.quantised_network())
    assert found.counts == {"prelu": 1, "silu": 1}
    assert found.left_alone == {}
    assert found.activations[0].input == "c"
    assert "looked through" in found.notes[0]


BODIES = {
    "If": "c = ReduceMax <keepdims = 0> (x) k = Greater(c, #0) y = If (k) <then_branch = t () => (float[N,8,16,16] a) { s = Sigmoid(x) a = Mul(x, s) }, else_branch = e () => (float[N,8,16,16] b) { b = Relu(x) }>",
    "Loop": "y = Loop (trips, go, x) <body = l (int64 i, bool k, float[N,8,16,16] v) => (bool j, float[N,8,16,16] w) { j = Identity(k) s = Sigmoid(v) w = Mul(v, s) }>",
}


def test_integer_operators_are_what_they_approximate():
    """SiLU and a squeeze-excite gate as ONNX Runtime's QOperator format has them."""
    q = "#0.05, zero"
    body = (
        f"c = QLinearConv(x, {q}, w, {q}, {q}) s = com.microsoft.QLinearSigmoid(c, {q}, {q}) "
        f"a = com.microsoft.QLinearMul(c, {q}, s, {q}, {q}) p = com.microsoft.QLinearGlobalAveragePool(a, {q}, {q}) "
        f"e = QLinearConv(p, {q}, w, {q}, {q}) d = DequantizeLinear(e, {q}) h = HardSigmoid(d) "
        f"g = QuantizeLinear(h, {q}) z = com.microsoft.QLinearMul(a, {q}, g, {q}, {q}) "
        f"o = QLinearConv(z, {q}, w, {q}, {q}) l = com.microsoft.QLinearLeakyRelu <alpha = 0.25> (o, {q}, {q}) "
        f"f = QLinearConv(l, {q}, w, {q}, {q}) y = DequantizeLinear(f, {q})"
    )
    model = network(body, inputs="int8[N,8,16,16] x", domain="com.microsoft")
    for name, values in (("zero", np.array(0, np.int8)), ("w", np.ones((8, 8, 1, 1), np.int8))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    found = survey(model)
    assert (found.counts, found.left_alone) == ({"leaky_relu": 1, "silu": 1}, {"hard_sigmoid": 1})
    assert reasons(found) == {"hard_sigmoid": {places.roles.SQUEEZE_EXCITE}}


def test_activations_inside_subgraphs_are_left_alone():
    found = survey(network_without_check(BODIES["If"]))
    assert found.counts == {}
    assert found.left_alone == {"silu": 1, "relu": 1}
    assert all("inside the body of If" in (site.left_alone or "") for site in found.activations)


def test_activations_inside_a_loop_are_left_alone():
    model = network_without_check(BODIES["Loop"])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(3), "trips"))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "go"))
    found = survey(model)
    assert (found.counts, found.left_alone) == ({}, {"silu": 1})


def test_a_part_of_an_activation_that_is_read_elsewhere_is_no_activation():
    found = survey(network(f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}", outputs="float y, float s"))
    assert (found.counts, found.left_alone) == ({"silu": 1}, {"sigmoid": 1})
    assert found.activations[0].left_alone == "part of the silu of Mul_2, and read elsewhere too"


def test_local_functions_are_unfolded():
    text = """<ir_version: 8, opset_import: ["": 17, "mine": 1]>
    g (float[N,8] x, float[8,8] w) => (float[N,8] y) { a = MatMul(x, w) b = mine.act(a) y = MatMul(b, w) }
    <domain: "mine", opset_import: ["": 17]> act (x) => (y) { s = Sigmoid(x) y = Mul(x, s) }"""
    assert survey(onnx.parser.parse_model(text)).counts == {"silu": 1}


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        ("com.microsoft.Gelu(c)", "gelu_erf"),
        ("com.microsoft.FastGelu(c)", "gelu_tanh"),
        ("com.microsoft.QuickGelu(c)", "gelu_sigmoid"),
        ("com.microsoft.QuickGelu <alpha = 1.0> (c)", "silu"),
    ],
)
def test_operators_of_onnx_runtimes_optimiser(call, kind):
    found = survey(network(f"{STEM} z = {call} {LAST}", domain="com.microsoft"))
    assert found.counts == {kind: 1}
    assert only(found).after == Layer("Conv_0", "Conv")


def test_an_activation_fused_into_a_layer():
    fused = 'z = com.microsoft.FusedConv <activation = "Relu"> (x, %[8,8,1,1])'
    found = survey(network(f"{fused} {LAST}", domain="com.microsoft"))
    assert found.counts == {"relu": 1}
    assert only(found).after == Layer("FusedConv_0", "FusedConv")


def test_no_activation_is_in_both_maps_and_none_is_lost():
    for body, inputs, _, _ in PLACES.values():
        found = survey(network(body, inputs=inputs, opset=13 if "axes = " in body else 17))
        for counts, left in ((found.counts, False), (found.left_alone, True)):
            listed = [site.kind for site in found.activations if (site.left_alone is not None) == left]
            assert counts == {
                kind: listed.count(kind) for kind in sorted(set(listed), key=lambda k: (-listed.count(k), k))
            }


def test_surveying_changes_nothing():
    model = network(f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}")
    before = model.SerializeToString(deterministic=True)
    survey(model)
    assert model.SerializeToString(deterministic=True) == before


@given(places.networks_of_anything(), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_what_it_is_called_is_what_onnx_runtime_computes(body, seed):
    model = network(body, inputs="float[1,8,4,4] x", outputs="float y, float z")
    sites = [site for site in survey(model).activations if site.kind in spellings.FORMULAS]
    names = {name for site in sites for name in (site.input, site.output)} - {"x", "y", "z"}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(names))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.random.default_rng(seed).normal(size=(1, 8, 4, 4)).astype(np.float32)
    values = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True), x=x)
    for site in sites:
        source = values[site.input].astype(np.float64)
        moderate = np.abs(source) < 20  # past this some of the formulas here overflow
        with np.errstate(all="ignore"):
            expected = spellings.FORMULAS[site.kind](source)
        np.testing.assert_allclose(values[site.output][moderate], expected[moderate], rtol=1e-3, atol=1e-3)


def test_a_large_network_takes_seconds():
    """5,000 nodes; a quadratic search would take minutes."""
    body = " ".join(
        f"c{i} = Conv(z{i}, w) s{i} = Sigmoid(c{i}) m{i} = Mul(c{i}, s{i}) z{i + 1} = Add(z{i}, m{i})"
        for i in range(1250)
    )
    model = network_without_check(
        f"z0 = Identity(x) {body} y = Identity(z1250)".replace("w)", "weight0)") + " n = Identity(%[8,8,1,1])"
    )
    found = survey(model)
    assert found.counts == {"silu": 1250}
