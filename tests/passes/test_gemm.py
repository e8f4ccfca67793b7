# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""MatMul and Add become Gemm: of two axes always, of more where it is asked for."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from relu_deploy.graph import import_graph
from relu_deploy.passes.gemm import matmul_add_to_gemm, products_to_gemm
from relu_deploy.passes.shapes import annotate

RNG = np.random.default_rng(2)
# Sums of four products and a bias.
ROUNDING = 1e-6
ROWS = functools.partial(matmul_add_to_gemm, rows=True)


def f32(*shape):
    return RNG.normal(0, 1, shape).astype(np.float32)


@pytest.mark.parametrize("bias", [(6,), (1, 6)])
@pytest.mark.parametrize("order", ["k, b", "b, k"])
def test_two_axes(parse, prove, ops, bias, order):
    model = parse(
        f"(float[N, 4] x) => (float[N, 6] y) {{ k = MatMul(x, w) y = Add({order}) }}", w=f32(4, 6), b=f32(*bias)
    )
    after, report = prove(model, matmul_add_to_gemm, within=ROUNDING)
    assert ops(after) == ["Gemm"]
    assert report.changed == ("MatMul_0",)
    assert after.graph.node[0].name == "MatMul_0"


@pytest.mark.parametrize("shape", ["2, 3, 4", "N, 3, 4", "2, T, 4", "2, 3, 5, 4"])
@pytest.mark.parametrize("behind", ["Relu(a)", "Clip(a, zero, six)", "Tanh(a)"])
def test_more_axes_become_rows_and_an_activation_that_clips_stays_beside_its_layer(parse, prove, ops, shape, behind):
    y = shape.rpartition(",")[0] + ", 6"
    bounds = {"zero": np.float32(0), "six": np.float32(6)} if "Clip" in behind else {}
    model = parse(
        f"(float[{shape}] x) => (float[{y}] y) {{ k = MatMul(x, w) a = Add(k, b) y = {behind} }}",
        w=f32(4, 6),
        b=f32(6),
        **bounds,
    )
    after, _ = prove(model, ROWS, within=ROUNDING)
    op = behind.partition("(")[0]
    assert ops(after) == (
        ["Reshape", "Gemm", "Reshape", "Tanh"] if op == "Tanh" else ["Reshape", "Gemm", op, "Reshape"]
    )
    unasked = prove(model, matmul_add_to_gemm, within=0)[1]
    assert unasked.changed == ()
    assert f"{shape.count(',') + 1} axes" in unasked.skipped[0].reason


def test_aliases_tell_which_old_tensor_a_new_one_equals(parse):
    model = parse(
        "(float[2, 3, 4] x) => (float[2, 3, 6] y) { k = MatMul(x, w) a = Add(k, b) y = Relu(a) }", w=f32(4, 6), b=f32(6)
    )
    graph = import_graph(model)
    annotate(graph, model)
    assert sorted(products_to_gemm(graph, rows=True).aliases.values()) == ["a", "x", "y"]


def test_an_output_in_the_middle_keeps_its_shape(parse, prove, ops):
    model = parse(
        "(float[2, 3, 4] x) => (float[2, 3, 6] a, float[2, 3, 6] y) { k = MatMul(x, w) a = Add(k, b) y = Relu(a) }",
        w=f32(4, 6),
        b=f32(6),
    )
    assert ops(prove(model, ROWS, within=ROUNDING)[0]) == ["Reshape", "Gemm", "Reshape", "Relu"]


REFUSED = {
    "two open axes": "(float[N, T, 4] x) => (float[N, T, 6] y, float[A] z) { k = MatMul(x, w) y = Add(k, b) z = Shape(y) }",
    "one axis": "(float[4] x) => (float[6] y, float[A] z) { k = MatMul(x, w) y = Add(k, b) z = Shape(y) }",
}


@pytest.mark.parametrize("why", REFUSED)
def test_products_that_stay_say_why(parse, prove, why):
    model = parse(REFUSED[why].replace("float[A]", "int64[A]"), w=f32(4, 6), b=f32(6))
    _, report = prove(model, ROWS, within=0)
    assert report.changed == ()
    assert len(report.skipped) == 1


NO_BIAS = {
    "the product is read twice": "k = MatMul(x, w) y = Add(k, b) z = Abs(k)",
    "the product is an output": "z = MatMul(x, w) y = Add(z, b)",
    "the addend is a matrix": "k = MatMul(x, w) y = Add(k, m) z = Abs(y)",
    "the addend is a scalar": "k = MatMul(x, w) y = Add(k, s) z = Abs(y)",
    "the addend is live": "k = MatMul(x, w) y = Add(k, z) z = MatMul(x, w)",
    "the weights are live": "u = Abs(x) k = MatMul(x, u) y = Add(k, b6) z = Abs(y)",
    "the addend has more axes": "k = MatMul(x, w) y = Add(k, deep) z = Abs(y)",
    "it is added to itself": "k = MatMul(x, w) y = Add(k, k) z = Abs(y)",
}


@pytest.mark.parametrize("why", NO_BIAS)
def test_what_is_no_bias_is_left_alone(parse, prove, ops, why):
    body = NO_BIAS[why]
    if "live" in why and "addend" in why:
        body = "z = MatMul(x, w) k = MatMul(x, w) y = Add(k, z)"
    constants = {"w": f32(6, 6), "b": f32(6), "b6": f32(6), "m": f32(6, 6), "s": f32(), "deep": f32(1, 1, 6)}
    used = {name: values for name, values in constants.items() if f", {name})" in body}
    rank = "1, 6, 6" if "more axes" in why else "6, 6"
    model = parse(
        f"(float[6, 6] x) => (float[{rank}] y, float[{rank if 'Abs(y)' in body else '6, 6'}] z) {{ {body} }}", **used
    )
    after, report = prove(model, ROWS, within=0)
    assert (report.changed, report.skipped) == ((), ())
    assert "Gemm" not in ops(after)


def test_shared_weights_and_biases(parse, prove, ops):
    model = parse(
        "(float[N, 6] x) => (float[N, 6] y, float[N, 6] z) { k = MatMul(x, w) a = Add(k, b) y = MatMul(a, w) z = Add(y, b) }",
        w=f32(6, 6),
        b=f32(6),
    )
    assert ops(prove(model, matmul_add_to_gemm, within=1e-5)[0]) == ["Gemm", "MatMul", "Add"]
