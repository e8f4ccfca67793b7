# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""A Pad goes into the window behind it where the two are equal, and stays with a reason where they are not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.graph import count_ops
from relu_deploy.passes.pad import fold_pad

RNG = np.random.default_rng(4)
# Convolutions of padded pictures may sum in another order; sums of at most 36 products.
ROUNDING = 4e-6
HEAD = "(float[N, 3, {s}, {s}] x) => (float[N, C, A, B] y) "


def f32(*shape):
    return RNG.normal(0, 1, shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


READERS = {
    "conv": ("Conv(p, w)", True),
    "conv with pads": ("Conv <pads = [1, 0, 2, 1], strides = [2, 1]> (p, w)", True),
    "conv valid": ('Conv <auto_pad = "VALID"> (p, w)', True),
    "conv same": ('Conv <auto_pad = "SAME_UPPER"> (p, w)', True),
    "conv same lower": ('Conv <auto_pad = "SAME_LOWER", strides = [2, 3]> (p, w)', True),
    "dilated conv": ("Conv <dilations = [2, 1]> (p, w)", True),
    "average": ("AveragePool <kernel_shape = [3, 4]> (p)", False),
    "average that counts": (
        "AveragePool <kernel_shape = [4, 4], pads = [1, 0, 0, 1], count_include_pad = 1> (p)",
        False,
    ),
    "average that pads nothing but would not count": (
        "AveragePool <kernel_shape = [3, 4], pads = [0, 0, 0, 0], count_include_pad = 0, strides = [2, 1]> (p)",
        False,
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("pads", [(0, 0, 1, 1, 0, 0, 1, 1), (0, 0, 2, 0, 0, 0, 1, 3)])
def test_into_every_reader(parse, prove, ops, reader, pads):
    call, weighted = READERS[reader]
    model = parse(
        f"{HEAD.format(s=9)} {{ p = Pad(x, pads) y = {call} }}",
        pads=ints(*pads),
        **({"w": f32(5, 3, 3, 4)} if weighted else {}),
    )
    after, report = prove(model, fold_pad, within=ROUNDING)
    if "that counts" in reader and 3 in pads:  # 1 + 3 entries are as many as the window has
        assert "altogether" in report.skipped[0].reason
        return
    assert ops(after) == [call.partition(" <")[0].partition("(")[0]]
    assert report.changed == ("Pad_0",)


SPELLINGS = {
    "attributes": (7, "Pad <pads = [0, 0, 1, 2, 0, 0, 2, 1]> (x)", {}),
    "attributes, value": (10, 'Pad <mode = "constant", pads = [0, 0, 1, 2, 0, 0, 2, 1], value = 0.0> (x)', {}),
    "value": (13, "Pad(x, pads, zero)", {"zero": np.float32(0)}),
    "minus zero": (13, "Pad(x, pads, zero)", {"zero": np.float32(-0.0)}),
    "no value": (13, 'Pad <mode = "constant"> (x, pads,)', {}),
    "axes": (18, "Pad(x, some, zero, axes)", {"zero": np.float32(0), "some": ints(1, 2, 2, 1), "axes": ints(-2, 3)}),
    "axes the other way": (18, "Pad(x, some, , axes)", {"some": ints(2, 1, 1, 2), "axes": ints(3, -2)}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling(parse, prove, ops, spelling):
    opset, call, constants = SPELLINGS[spelling]
    if "pads" in call and "<pads" not in call and "pads =" not in call:
        constants = constants | {"pads": ints(0, 0, 1, 2, 0, 0, 2, 1)}
    model = parse(f"{HEAD.format(s='H')} {{ p = {call} y = Conv(p, w) }}", opset=opset, **constants, w=f32(5, 3, 3, 3))
    after, _ = prove(model, fold_pad, within=ROUNDING, sizes=(2, 3, 7, 7))
    assert ops(after) == ["Conv"]
    pads = next(a.ints for a in after.graph.node[0].attribute if a.name == "pads")
    assert list(pads) == [1, 2, 2, 1]


def test_two_in_a_row_and_one_axis(parse, prove, ops):
    model = parse(
        "(float[N, 3, L] x) => (float[N, 5, A] y) { p = Pad(x, a) q = Pad(p, b) y = Conv(q, w) }",
        a=ints(0, 0, 1, 0, 0, 0),
        b=ints(0, 0, 0, 0, 0, 2),
        w=f32(5, 3, 3),
    )
    after, report = prove(model, fold_pad, within=ROUNDING, sizes=(2, 3, 7))
    assert ops(after) == ["Conv"]
    assert report.changed == ("Pad_0", "Pad_1")


MAXIMA = {
    "of minus infinity": (
        "p = Pad(x, pads, low) y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (p)",
        ["MaxPool"],
    ),
    "of zeros behind a ReLU": (
        "r = Relu(x) p = Pad(r, pads) y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (p)",
        ["Relu", "MaxPool"],
    ),
    "of zeros behind a ReLU, it pads itself": (
        "r = Relu(x) p = Pad(r, pads) y = MaxPool <kernel_shape = [4, 3], pads = [2, 0, 1, 1]> (p)",
        ["Relu", "MaxPool"],
    ),
}


@pytest.mark.parametrize("kind", MAXIMA)
def test_maxima(parse, prove, ops, kind):
    body, left = MAXIMA[kind]
    low = {"low": np.float32(-np.inf)} if "low" in body else {}
    after, _ = prove(
        parse(f"{HEAD.format(s=9)} {{ {body} }}", pads=ints(0, 0, 1, 1, 0, 0, 1, 1), **low), fold_pad, within=0
    )
    assert ops(after) == left


MAX = "MaxPool <kernel_shape = [3, 3]> (p)"
REFUSED = {
    "mode reflect": ('p = Pad <mode = "reflect"> (x, pads) y = Conv(p, w)', {}),
    "it pads with 1, ": ("p = Pad(x, pads, one) y = Conv(p, w)", {"one": np.float32(1)}),
    "it pads with -inf": (
        "p = Pad(x, pads, low) y = AveragePool <kernel_shape = [3, 3]> (p)",
        {"low": np.float32(-np.inf)},
    ),
    "it pads with 0, the layer behind it with -inf": (f"p = Pad(x, pads) y = {MAX}", {}),
    "negative": ("p = Pad(x, pads) y = Conv(p, w)", {"pads": ints(0, 0, -1, 1, 0, 0, 1, 1)}),
    "the batch or the channels": ("p = Pad(x, pads) y = Conv(p, u)", {"pads": ints(0, 1, 1, 1, 0, 0, 1, 1), "u": None}),
    "computed at run time": (
        "s = Shape(x) e = Sub(s, s) d = Concat <axis = 0> (e, e) p = Pad(x, d) y = Conv(p, w)",
        {},
    ),
    "its value is computed": ("m = ReduceMax <keepdims = 0> (x) p = Pad(x, pads, m) y = Conv(p, w)", {}),
    "leaves its own padding out": (
        "p = Pad(x, pads) y = AveragePool <kernel_shape = [3, 3], pads = [1, 0, 0, 0]> (p)",
        {},
    ),
    "altogether": (
        "p = Pad(x, pads) y = AveragePool <kernel_shape = [2, 2]> (p)",
        {"pads": ints(0, 0, 2, 0, 0, 0, 0, 0)},
    ),
    "rounds its size up": (
        "p = Pad(x, pads) y = AveragePool <kernel_shape = [3, 3], ceil_mode = 1, strides = [2, 2]> (p)",
        {},
    ),
    "or is dilated": ("r = Relu(x) p = Pad(r, pads) y = MaxPool <kernel_shape = [2, 2], dilations = [2, 2]> (p)", {}),
    "places of its maxima": (
        "r = Relu(x) p = Pad(r, pads) y, at = MaxPool <kernel_shape = [3, 3]> (p) g = Cast <to = 1> (at) z = Neg(g)",
        {},
    ),
    "depends on a size": ('p = Pad(x, pads) y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (p, w)', {}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_stays_says_why(parse, prove, reason):
    body, constants = REFUSED[reason]
    used = {"pads": ints(0, 0, 1, 1, 0, 0, 1, 1), "w": f32(5, 3, 3, 3), "u": f32(5, 4, 3, 3)} | {
        k: v for k, v in constants.items() if v is not None
    }
    used = {name: values for name, values in used.items() if f", {name})" in body or f", {name}," in body}
    head = HEAD.format(s="H").replace(" y) ", " y, float[N, C, A, B] z) ") if "z =" in body else HEAD.format(s="H")
    _, report = prove(parse(f"{head} {{ {body} }}", **used), fold_pad, within=0, sizes=(2, 3, 7, 7))
    assert report.changed == ()
    assert reason in report.skipped[0].reason


def test_a_pad_that_others_read_stays_for_them(parse, prove):
    model = parse("(float[N, 3, 7, 7] x) => (float[N, 5, 7, 7] y, float[N, 3, 9, 9] z, float[N, 5, 9, 9] q) { p = Pad(x, pads) y = Conv(p, w) z = Neg(p) q = ConvTranspose(x, u) }",
                  pads=ints(0, 0, 1, 1, 0, 0, 1, 1), w=f32(5, 3, 3, 3), u=f32(3, 5, 3, 3))  # fmt: skip
    after, report = prove(model, fold_pad, within=ROUNDING)
    assert report.changed == ("Pad_0",)
    assert count_ops(after) == {"Pad": 1, "Conv": 1, "Neg": 1, "ConvTranspose": 1}


def test_a_transposed_convolution_crops_by_its_pads(parse, prove, ops):
    model = parse(
        "(float[N, 3, 7, 7] x) => (float[N, 5, A, B] y) { p = Pad(x, pads) y = ConvTranspose(p, u) }",
        pads=ints(0, 0, 1, 1, 0, 0, 1, 1),
        u=f32(3, 5, 3, 3),
    )
    assert ops(prove(model, fold_pad, within=0)[0]) == ["Pad", "ConvTranspose"]


def test_a_padded_tensor_that_is_an_output_stays(parse, prove):
    model = parse(
        "(float[N, 3, 7, 7] x) => (float[N, 3, 9, 9] p, float[N, 5, 7, 7] y) { p = Pad(x, pads) y = Conv(p, w) }",
        pads=ints(0, 0, 1, 1, 0, 0, 1, 1),
        w=f32(5, 3, 3, 3),
    )
    after, _ = prove(model, fold_pad, within=ROUNDING)
    assert count_ops(after) == {"Pad": 1, "Conv": 1}
    assert next(n for n in after.graph.node if n.op_type == "Conv").input[0] == "x"


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    amounts=st.lists(st.integers(0, 3), min_size=4, max_size=4), own=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    op=st.sampled_from(["Conv", "AveragePool", "MaxPool"]), count=st.integers(0, 1), ceil=st.integers(0, 1), low=st.booleans(), relu=st.booleans(),
)  # fmt: skip
def test_whatever_the_amounts_the_result_is_right(
    parse, prove, amounts, own, kernel, strides, op, count, ceil, low, relu
):
    """Any Pad in front of any window: folded or not, the same comes out."""
    if op != "Conv":
        own = [min(o, k - 1) for o, k in zip(own, [*kernel] * 2, strict=True)]  # ONNX Runtime wants no more
    attributes = f"kernel_shape = [{kernel[0]}, {kernel[1]}], strides = [{strides[0]}, {strides[1]}], pads = {list(map(int, own))}"
    attributes += f", ceil_mode = {ceil}" if op != "Conv" else ""
    attributes += f", count_include_pad = {count}" if op == "AveragePool" else ""
    value = np.float32(-np.inf if low and op == "MaxPool" else 0)
    constants = {"pads": ints(0, 0, *amounts[:2], 0, 0, *amounts[2:]), "value": value} | (
        {"w": f32(5, 3, *kernel)} if op == "Conv" else {}
    )
    body = f"r = {'Relu' if relu else 'Neg'}(x) p = Pad(r, pads, value) y = {op} <{attributes}> ({'p, w' if op == 'Conv' else 'p'})"
    prove(parse(f"{HEAD.format(s=6)} {{ {body} }}", **constants), fold_pad, within=ROUNDING)
