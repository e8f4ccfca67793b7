# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Arithmetic with constants behind a layer goes into the layer, unless it is something else."""

from __future__ import annotations

import re
import time

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.graph import count_ops, import_graph
from relu_deploy.passes.affine import fold_affine
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate

RNG = np.random.default_rng(1)
# Sums of at most 36 products and four steps behind them: a few dozen units of roundoff, 2**-24.
ROUNDING = 8e-6


def f32(*shape):
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


LAYERS = {
    "conv": ("float[N, 4, 5, 5] x", "float[N, 6, 3, 3]", "Conv(x, w)", {"w": f32(6, 4, 3, 3)}, (6, 1, 1)),
    "grouped": (
        "float[N, 4, 5, 5] x",
        "float[N, 6, 3, 3]",
        "Conv <group = 2> (x, w, b)",
        {"w": f32(6, 2, 3, 3), "b": f32(6)},
        (1, 6, 1, 1),
    ),
    "transposed": (
        "float[N, 4, 5, 5] x",
        "float[N, 6, 7, 7]",
        "ConvTranspose <group = 2> (x, w)",
        {"w": f32(4, 3, 3, 3)},
        (6, 1, 1),
    ),
    "1-d": ("float[N, 4, 5] x", "float[N, 6, 3]", "Conv(x, w, b)", {"w": f32(6, 4, 3), "b": f32(6)}, (6, 1)),
    "gemm": (
        "float[N, 4] x",
        "float[N, 6]",
        "Gemm <alpha = 0.5, beta = 2.0> (x, w, b)",
        {"w": f32(4, 6), "b": f32(1, 6)},
        (6,),
    ),
    "gemm without bias": ("float[N, 4] x", "float[N, 6]", "Gemm <transB = 1> (x, w)", {"w": f32(6, 4)}, (1, 6)),
}
STEPS = {
    "Add": "Add(k, c)", "Add from the left": "Add(c, k)", "Sub": "Sub(k, c)", "Sub from": "Sub(c, k)",
    "Mul": "Mul(k, c)", "Mul from the left": "Mul(c, k)", "Div": "Div(k, c)",
}  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
def test_one_step_goes_into_the_layer(parse, prove, layer, step):
    x, y, call, weights, shape = LAYERS[layer]
    model = parse(f"({x}) => ({y} y) {{ k = {call} y = {STEPS[step]} }}", **weights, c=f32(*shape))
    after, report = prove(model, fold_affine, within=ROUNDING)
    assert len(after.graph.node) == len(report.changed) == 1


@pytest.mark.parametrize("layer", LAYERS)
def test_a_normalisation_spelled_out_goes_into_the_layer_at_once(parse, prove, ops, layer):
    x, y, call, weights, shape = LAYERS[layer]
    constants = {name: f32(*shape) for name in ("m", "v", "s", "t")}
    body = f"k = {call} a = Sub(k, m) e = Div(a, v) f = Mul(s, e) y = Add(f, t)"
    after, report = prove(parse(f"({x}) => ({y} y) {{ {body} }}", **weights, **constants), fold_affine, within=ROUNDING)
    assert len(report.changed) == 4
    assert len(ops(after)) == 1


PRODUCTS = {
    "scaled": ("k = MatMul(x, w) y = Mul(k, c)", ["MatMul"]),
    "scaled behind its bias": ("k = MatMul(x, w) a = Add(k, b) y = Mul(k2, c)".replace("k2", "a"), ["MatMul", "Add"]),
    "scaled before its bias": ("k = MatMul(x, w) a = Mul(k, c) y = Add(b, a)", ["MatMul", "Add"]),
    "two biases": ("k = MatMul(x, w) a = Add(k, b) y = Sub(a, c)", ["MatMul", "Add"]),
}


@pytest.mark.parametrize("shape", ["N, 4", "N, 3, 4", "4"])
@pytest.mark.parametrize("form", PRODUCTS)
def test_products_of_any_number_of_axes(parse, prove, ops, shape, form):
    body, left = PRODUCTS[form]
    y = shape.replace("4", "6")
    model = parse(f"(float[{shape}] x) => (float[{y}] y) {{ {body} }}", w=f32(4, 6), b=f32(6), c=f32(6))
    assert ops(prove(model, fold_affine, within=ROUNDING)[0]) == left


def test_the_bias_of_a_product_is_where_it_belongs(parse, prove):
    model = parse("(float[N, 3, 4] x) => (float[N, 3, 6] y) { k = MatMul(x, w) y = Add(k, b) }", w=f32(4, 6), b=f32(6))
    report = prove(model, fold_affine, within=0)[1]
    assert (report.changed, report.skipped) == ((), ())


REFUSED = {
    "is used elsewhere": "k = Conv(x, w) y = Add(k, c) z = Abs(k)",
    "used elsewhere": "z = Conv(x, w) y = Add(z, c)",
    "along other axes": "k = Conv(x, w) y = Add(k, columns) z = Abs(y)",
    "other axes": "k = Conv(x, w) y = Add(k, full) z = Abs(y)",
    "more axes": "k = Conv(x, w) y = Add(k, deep) z = Abs(y)",
    "divides by the layer": "k = Conv(x, w) y = Div(c, k) z = Abs(y)",
    "or by zero": "k = Conv(x, w) y = Div(k, zeros) z = Abs(y)",
    "do not fit": "k = Conv(x, w) y = Mul(k, huge) z = Abs(y)",
    "not a constant": "p = Abs(u) k = Conv(x, p) y = Mul(k, c) z = Abs(y)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_not_folded_and_why(parse, reason):
    constants = {
        "c": f32(3, 1, 1), "columns": f32(3), "full": f32(3, 3, 3), "deep": f32(1, 1, 3, 1, 1),
        "zeros": np.zeros((3, 1, 1), np.float32), "huge": np.full((3, 1, 1), 3e38, np.float32),
        "w": f32(3, 2, 1, 1) + 1,
    }  # fmt: skip
    used = {name: values for name, values in constants.items() if re.search(rf"\b{name}\b", REFUSED[reason])}
    shape = "float[A, B, C, D, E]" if reason == "more axes" else "float[A, B, C, D]"
    inputs = "float[1, 2, 3, 3] x, float[3, 2, 1, 1] u"
    model = parse(f"({inputs}) => ({shape} y, {shape} z) {{ {REFUSED[reason]} }}", **used)
    graph = import_graph(model)
    annotate(graph, model)
    report = fold_affine(graph)
    assert report.changed == ()
    assert reason in report.skipped[0].reason


def test_a_hard_sigmoid_keeps_its_three_whoever_asks(parse):
    model = parse("(float[N, 4] x) => (float[N, 6] y) { k = Gemm(x, w) a = Add(k, three) e = Clip(a, zero, six) y = Div(e, six) }",
                  w=f32(4, 6), three=np.float32(3), zero=np.float32(0), six=np.float32(6))  # fmt: skip
    assert rewrite(model)[0] is model


def test_a_bias_in_front_of_a_gate_is_a_bias(parse, prove, ops):
    model = parse(
        "(float[N, 4, 1, 1] x) => (float[N, 6, 1, 1] y) { k = Conv(x, w) a = Add(k, b) y = Sigmoid(a) }",
        w=f32(6, 4, 1, 1),
        b=f32(1, 6, 1, 1),
    )
    after, _ = prove(model, fold_affine, within=ROUNDING)
    assert ops(after) == ["Conv", "Sigmoid"]


def test_shared_weights_and_shared_constants_are_copied(parse, prove):
    model = parse(
        "(float[N, 4, 5, 5] x) => (float[N, 6, 3, 3] y, float[N, 6, 3, 3] z, float[N, 6, 3, 3] q) { k = Conv(x, w, b) y = Mul(k, c) z = Conv(x, w, b) r = Relu(z) q = Mul(r, c) }",
        w=f32(6, 4, 3, 3), b=f32(6), c=f32(6, 1, 1),
    )  # fmt: skip
    after, report = prove(model, fold_affine, within=ROUNDING)
    assert len(report.changed) == 1
    assert count_ops(after) == {"Conv": 2, "Relu": 1, "Mul": 1}


def seconds(layers: int) -> float:
    nodes = []
    for i in range(layers):
        nodes.append(onnx.helper.make_node("Gemm", [f"x{i}", "w", "b"], [f"k{i}"]))
        nodes.append(onnx.helper.make_node("Mul", [f"k{i}", "s"], [f"m{i}"]))
        nodes.append(onnx.helper.make_node("Tanh", [f"m{i}"], [f"x{i + 1}"]))
    tensors = [
        onnx.numpy_helper.from_array(f32(*size), name) for name, size in (("w", (2, 2)), ("b", (2,)), ("s", (2,)))
    ]
    info = [onnx.helper.make_tensor_value_info(name, 1, [1, 2]) for name in ("x0", f"x{layers}")]
    body = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    graph = import_graph(onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8))
    start = time.perf_counter()
    assert len(fold_affine(graph).changed) == layers
    return time.perf_counter() - start


def test_time_grows_with_the_number_of_layers_that_share_their_weights_and_not_with_its_square():
    # Eight times the layers; a quadratic pass would take 64 times as long. The best of a few on either side: what else
    # runs on the machine only ever adds.
    many, few = min(seconds(8000) for _ in range(2)), min(seconds(1000) for _ in range(4))
    assert many < 40 * max(few, 0.01)


def test_float16_is_rounded_once(parse, prove):
    half = {name: values.astype(np.float16) for name, values in {"w": f32(4, 6), "c": f32(6), "d": f32(6)}.items()}
    model = parse("(float16[N, 4] x) => (float16[N, 6] y) { k = Gemm(x, w) a = Mul(k, c) y = Add(a, d) }", **half)
    # Four products, two steps: units of roundoff of float16, 2**-11, in the old network as in the new.
    after, _ = prove(model, fold_affine, within=4e-3)
    weight = onnx.numpy_helper.to_array(next(t for t in after.graph.initializer if t.dims == [4, 6]))
    assert np.array_equal(weight, (half["w"].astype(np.float64) * half["c"].astype(np.float64)).astype(np.float16))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.booleans(), st.floats(0.25, 4)), min_size=1, max_size=5
    ),
    layer=st.sampled_from(sorted(LAYERS)),
)
def test_any_row_of_steps_is_one_layer(parse, prove, steps, layer):
    x, y, call, weights, shape = LAYERS[layer]
    body, constants, last = f"k0 = {call} ", {}, "k0"
    for index, (step, scalar, size) in enumerate(steps):
        constants[f"c{index}"] = np.float32(size) * (
            np.float32(1) if scalar else RNG.uniform(0.5, 1, shape).astype(np.float32)
        )
        out = "y" if index == len(steps) - 1 else f"k{index + 1}"
        body += f"{out} = {STEPS[step].replace('k', last).replace('c', f'c{index}')} "
        last = out
    model = parse(f"({x}) => ({y} y) {{ {body} }}", **weights, **constants)
    # A scalar in front of a Mul may be the start of an activation and stays, with what comes behind it.
    after, _ = prove(model, fold_affine, within=1e-4)
    stops = [i for i, (_, scalar, _) in enumerate(steps[:-1]) if scalar and steps[i + 1][0].startswith("Mul")]
    assert len(after.graph.node) == 1 + (len(steps) - stops[0] if stops else 0)
