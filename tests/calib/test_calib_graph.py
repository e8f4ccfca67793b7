from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from calib.graph import activations, channel_axes, is_mask, producer
from calib.ranges import Ranges, TensorRange
from calib.summary import DeadChannels, dead_channels, widest


def parse(text):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]>\n{text}')


def test_activations_depend_on_an_input_also_through_subgraphs():
    model = parse("""g (float[N] x, bool c) => (float[N] y) <float[1] w = {1}, bool yes = {1}>
    { k = Neg(w) a = Relu(x)
      y = If<then_branch = t () => (float[N] p) { p = Add(a, k) },
             else_branch = e () => (float[N] q) { q = Neg(k) }>(yes) }""")
    assert activations(model) == ["x", "c", "a", "y"]


@pytest.mark.parametrize(("body", "expected"), [
    ("y = Softmax(m)", True),
    ("i = ArgMax(m) y = Cast<to = 1>(i)", True),
    ("c = Greater(m, x) y = Cast<to = 1>(c)", True),
    ("p = Pad(m, pads, low) g = GatherElements(p, at) y = Softmax(g) i = ArgMax(m)", True),
    ("s, t = Split<num_outputs = 2>(m) y = Softmax(s) i = ArgMax(t)", True),
    ("y = Exp(m) i = ArgMax(m)", False),
    ("a = Relu(m) y = Softmax(a)", False),
    ("y = Identity(m) i = ArgMax(m)", False),
    ("p = Pad(m, pads, low) y = Mul(p, p)", False),
])  # fmt: skip
def test_a_mask_says_where_nothing_is_to_be_chosen_and_nothing_else(body, expected):
    model = parse(f"""g (float[4, 6] x, bool[4, 6] c, float[1] low, int64[4] pads, int64[4, 6] at) => (float[N, K] y)
    {{ m = Where(c, x, low) {body} }}""")
    assert is_mask(model, "m") == expected


def test_random_values_are_activations():
    model = parse("g (float[N] x) => (float[2] r) { r = RandomNormal<shape = [2]>() y = Relu(x) }")
    assert activations(model) == ["x", "r", "y"]


def test_a_default_value_makes_an_input_a_constant():
    model = parse("g (float[N] x, float[1] w) => (float[N] y) <float[1] w = {2}> { k = Neg(w) y = Mul(x, k) }")
    assert activations(model) == ["x", "y"]


def test_producer_names_the_node():
    model = parse("g (float[N] x) => (float[N] y) { [first] a = Relu(x) y = Neg(a) }")
    assert producer(model, "a") == "made by Relu node 'first'"
    assert producer(model, "y") == "made by a Neg node"
    assert producer(model, "x") == "an input of the model"


def test_channels_of_rank_3_follow_the_neighbours():
    model = parse("""g (float[N, 4, L] x) => (float[N, 2, L] y)
    { a = Relu(x) c = Conv(a, w) b = BatchNormalization(c, s, s, s, s) y = Tanh(b) }""")
    assert channel_axes(model, dict.fromkeys("xacby", 3)) == dict.fromkeys("xacby", 1)
    tokens = parse(
        "g (float[N, T, 1] x) => (float[N, T, 2] y) <float[1, 2] w = {0, 0}> { a = Gelu(x) y = MatMul(a, w) }"
    )
    assert channel_axes(tokens, dict.fromkeys("xay", 3)) == dict.fromkeys("xay", 2)


def test_channels_last_of_rank_4_is_told_by_constant_matrices_only():
    text = "g (float[N, H, W, 4] x, float[N, H, 4, 4] z) => (float[N, H, W, 4] y) %s { a = Relu(x) y = MatMul(a, w) }"
    constant = parse(text % "<float[1, 1] w = {1}>")
    assert channel_axes(constant, {"x": 4, "a": 4, "y": 4}) == {"x": 3, "a": 3, "y": 3}
    assert channel_axes(parse((text % "").replace("z)", "w)")), {"x": 4, "a": 4, "y": 4}) == {"x": 1, "a": 1, "y": 1}


def test_usual_axes():
    model = parse("g (float x) => (float y) { y = Relu(x) }")
    ranks = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 4, "f": 5}
    assert channel_axes(model, ranks) == {"a": None, "b": None, "c": 1, "d": 2, "e": 1, "f": 1}


def test_summary_names_wide_tensors_and_dead_channels():
    low, high = np.float32([0, 0, 0]), np.float32([0, 2, 0])
    tensors = {
        "r": TensorRange(0, 2, "float32", 1, 1, low, high),
        "n": TensorRange(-9, 2, "float32", 1, 1, low - 9, high),
        "s": TensorRange(1, 1, "float32", 1),
    }
    ranges = Ranges(tensors, "a" * 64, "b" * 64, "max", 1)
    model = parse("g (float[N, 3] x) => (float[N, 3] r) { n = Neg(x) r = Relu(n) s = Relu(n) }")
    assert widest(ranges, count=2) == (("n", 9), ("r", 2))
    assert dead_channels(ranges, model) == (DeadChannels("r", (0, 2), 3),)
