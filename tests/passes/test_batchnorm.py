# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""BatchNormalization behind products, and in front of layers. Behind convolutions: test_clean_up.py."""

from __future__ import annotations

import numpy as np
import pytest

from relu_deploy.graph import import_graph
from relu_deploy.passes import fold_batchnorm, remove_dead_nodes
from relu_deploy.passes.shapes import annotate

RNG = np.random.default_rng(0)
# Each output is a sum of at most 36 products: a few dozen units of roundoff, 2**-24, and nothing amplifies them.
ROUNDING = 4e-6


def f32(*shape):
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def statistics(channels):
    return {"s": f32(channels), "t": f32(channels), "m": f32(channels), "v": f32(channels)}


BN = "BatchNormalization <epsilon = 0.25> ({}, s, t, m, v)"


@pytest.mark.parametrize("bias", ["", "b", "row", "left"])
def test_behind_a_product_with_and_without_bias(parse, prove, ops, bias):
    weights = {"w": f32(4, 6), **statistics(6)}
    body = {
        "": f"k = MatMul(x, w) y = {BN.format('k')}",
        "b": f"k = MatMul(x, w) a = Add(k, b) y = {BN.format('a')}",
        "row": f"k = MatMul(x, w) a = Add(k, b) y = {BN.format('a')}",
        "left": f"k = MatMul(x, w) a = Add(b, k) y = {BN.format('a')}",
    }[bias]
    weights |= {"": {}, "b": {"b": f32(6)}, "row": {"b": f32(1, 6)}, "left": {"b": f32(6)}}[bias]
    model = parse(f"(float[N, 4] x) => (float[N, 6] y) {{ {body} }}", **weights)
    after, report = prove(model, fold_batchnorm, within=ROUNDING)
    assert report.changed == ("BatchNormalization_2" if bias else "BatchNormalization_1",)
    assert ops(after) == (["MatMul", "Add"] if bias else ["Gemm"])


def test_a_product_of_three_axes_has_its_channels_elsewhere(parse, prove):
    model = parse(
        f"(float[2, 6, 4] x) => (float[2, 6, 6] y) {{ k = MatMul(x, w) y = {BN.format('k')} }}",
        w=f32(4, 6),
        **statistics(6),
    )
    _, report = prove(model, fold_batchnorm, within=0)
    assert report.changed == ()
    assert "axis 1" in report.skipped[0].reason


FORWARD = {
    "conv": ("float[N, 4, 5, 5] x", "Conv(n, w)", (6, 4, 3, 3), "Conv"),
    "grouped": ("float[N, 4, 5, 5] x", "Conv <group = 2> (n, w, b)", (6, 2, 3, 3), "Conv"),
    "1-d": ("float[N, 4, 5] x", "Conv <strides = [2]> (n, w, b)", (6, 4, 3), "Conv"),
    "gemm": ("float[N, 4] x", "Gemm <alpha = 0.5, beta = 2.0> (n, w, b)", (4, 6), "Gemm"),
    "gemm transposed": ("float[N, 4] x", "Gemm <transB = 1> (n, w)", (6, 4), "Gemm"),
    "product": ("float[N, 4] x", "MatMul(n, w)", (4, 6), "Gemm"),
}


@pytest.mark.parametrize("layer", FORWARD)
def test_in_front_of_a_layer(parse, prove, ops, layer):
    x, call, shape, op = FORWARD[layer]
    out = "float[N, 6]" if "N, 4]" in x else "float[N, 6, A]" if "1-d" in layer else "float[N, 6, A, B]"
    bias = {"b": f32(6)} if ", b)" in call else {}
    model = parse(f"({x}) => ({out} y) {{ n = {BN.format('x')} y = {call} }}", w=f32(*shape), **bias, **statistics(4))
    after, report = prove(model, fold_batchnorm, within=ROUNDING)
    assert len(report.changed) == 1
    assert ops(after) == [op]


def test_in_front_of_a_product_whose_bias_is_an_add(parse, prove, ops):
    model = parse(
        f"(float[N, 4] x) => (float[N, 6] y) {{ n = {BN.format('x')} k = MatMul(n, w) y = Add(k, b) }}",
        w=f32(4, 6),
        b=f32(6),
        **statistics(4),
    )
    after, _ = prove(model, fold_batchnorm, within=ROUNDING)
    assert ops(after) == ["MatMul", "Add"]


def test_in_front_of_two_layers_that_share_their_weights_with_a_third(parse, prove, ops):
    model = parse(
        f"(float[N, 4, 5, 5] x) => (float[N, 6, 3, 3] y, float[N, 6, 5, 5] z, float[N, 6, 3, 3] q) {{ n = {BN.format('x')} y = Conv(n, w, b) p = Conv(n, u) z = Relu(p) q = Conv(x, w, b) }}",
        w=f32(6, 4, 3, 3), u=f32(6, 4, 1, 1), b=f32(6), **statistics(4),
    )  # fmt: skip
    after, report = prove(model, fold_batchnorm, within=ROUNDING)
    assert len(report.changed) == 1
    assert ops(after).count("Conv") == 3
    (untouched,) = (node for node in after.graph.node if node.output[0] == "q")
    assert list(untouched.input) == ["x", "w", "b"]


STAYS = {
    "padding": "n = {} y = Conv <pads = [1, 1, 1, 1]> (n, w) z = Conv(x, w)",
    "one reader is no layer": "n = {} y = Conv(n, w) z = Sin(n)",
    "it is an output": "z = {} y = Conv(z, w)",
    "transposed": "n = {} y = ConvTranspose(n, w) z = Conv(x, w)",
    "same padding": 'n = {} y = Conv <auto_pad = "SAME_UPPER"> (n, w) z = Conv(x, w)',
}


@pytest.mark.parametrize("why", STAYS)
def test_it_stays_where_folding_forwards_is_not_exact(parse, prove, ops, why):
    model = parse(
        f"(float[N, 4, 5, 5] x) => (float[N, A, B, C] y, float[N, D, E, F] z) {{ {STAYS[why].format(BN.format('x'))} }}",
        w=f32(4, 4, 3, 3),
        **statistics(4),
    )
    after, report = prove(model, fold_batchnorm, within=0)
    assert report.changed == ()
    assert "BatchNormalization" in ops(after)
    assert "no Conv" in report.skipped[0].reason


def test_padding_does_not_matter_without_an_offset(parse, prove, ops):
    zero = np.zeros(4, np.float32)
    model = parse(
        f"(float[N, 4, 5, 5] x) => (float[N, 4, 5, 5] y) {{ n = {BN.format('x')} y = Conv <pads = [1, 1, 1, 1]> (n, w) }}",
        w=f32(4, 4, 3, 3), s=f32(4), v=f32(4), t=zero, m=zero,
    )  # fmt: skip
    after, _ = prove(model, fold_batchnorm, within=ROUNDING)
    assert ops(after) == ["Conv"]
    assert len(after.graph.node[0].input) == 2


def test_a_mean_far_outside_the_spread_is_not_moved_into_the_sum(parse, prove):
    mean = np.full(4, 3000.0, np.float32)
    model = parse(
        f"(float[N, 4] x) => (float[N, 6] y) {{ n = {BN.format('x')} y = MatMul(n, w) }}",
        w=f32(4, 6),
        **statistics(4) | {"m": mean},
    )
    assert prove(model, fold_batchnorm, within=0)[1].changed == ()


def test_a_layer_inside_a_branch_reads_it_too(parse):
    model = parse(
        f"(float[N, 4] x, bool c) => (float[N, 6] y, float[N, 4] z) {{ k = MatMul(x, u) n = {BN.format('k')} y = MatMul(n, w) "
        "z = If (c) <then_branch = a () => (float[N, 4] p) { p = Neg(k) }, else_branch = e () => (float[N, 4] q) { q = Abs(k) }> }",
        w=f32(4, 6), u=f32(4, 4), **statistics(4),
    )  # fmt: skip
    graph = import_graph(model)
    annotate(graph, model)
    report = fold_batchnorm(graph)
    # Into the layer before it is refused, since the branches read that one's result; into the layer behind it is not.
    assert report.changed == ("BatchNormalization_1",)
    assert [node.op for node in graph.nodes] == ["MatMul", "Gemm", "If"]


def test_old_forms_that_are_no_inference_stay(parse):
    weights = {"w": f32(6, 4, 3, 3), **statistics(6)}
    trains = parse(
        "(float[2, 4, 5, 5] x) => (float[2, 6, 3, 3] y) { k = Conv(x, w) y, a, e, c, d = BatchNormalization(k, s, t, m, v) }",
        opset=9,
        **weights,
    )
    each = {name: f32(6, 3, 3) for name in "stmv"}
    own = parse(
        "(float[2, 4, 5, 5] x) => (float[2, 6, 3, 3] y) { k = Conv(x, w) y = BatchNormalization <spatial = 0> (k, s, t, m, v) }",
        opset=8,
        w=weights["w"],
        **each,
    )
    for model, reason in ((trains, "training mode"), (own, "one number a channel")):
        graph = import_graph(model)
        annotate(graph, model)
        report = fold_batchnorm(graph)
        assert report.changed == ()
        assert reason in report.skipped[0].reason
    graph = import_graph(trains)
    assert remove_dead_nodes(graph).changed == ()  # its outputs say that it trains
