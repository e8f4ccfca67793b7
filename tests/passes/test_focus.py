# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Pixels rearranged into channels in front of a convolution: every spelling becomes one convolution, or says why not."""

from __future__ import annotations

import io
import itertools
import warnings

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.graph import count_ops
from relu_deploy.passes.focus import fold_focus
from relu_deploy.passes.run import rewrite

RNG = np.random.default_rng(3)
# The same products in another order: sums of at most 250 of them, of random signs.
ROUNDING = 1e-5
END = (1 << 63) - 1


def f32(*shape):
    return RNG.normal(0, 1, shape).astype(np.float32)


def focus(
    order,
    *,
    block=(2, 2),
    nested="two",
    end=END,
    size="8",
    conv="Conv <pads = [1, 1, 1, 1]> (f, w, b)",
    rest="",
    out="float[N, 5, A, B] y",
):
    """Text and constants of a Focus whose pixels come in the given order."""
    body, ints, seen = "", {}, {}
    for index, (row, column) in enumerate(order):
        ints |= {f"r{row}": [row], f"c{column}": [column], "end": [end], "ends": [end, end], "h": [2], "v": [3], "hv": [2, 3],
                 "br": [block[0]], "bc": [block[1]], "brc": list(block), f"rc{row}{column}": [row, column]}  # fmt: skip
        if nested == "two":
            body += f"s{index} = Slice(x, rc{row}{column}, ends, hv, brc) "
        else:
            first, second = (
                (("r", row, "h", "br"), ("c", column, "v", "bc"))
                if nested == "rows first"
                else (("c", column, "v", "bc"), ("r", row, "h", "br"))
            )
            half = f"{first[0]}half{first[1]}"
            if half not in seen:
                body += f"{half} = Slice(x, {first[0]}{first[1]}, end, {first[2]}, {first[3]}) "
                seen[half] = True
            body += f"s{index} = Slice({half}, {second[0]}{second[1]}, end, {second[2]}, {second[3]}) "
    body += f"f = Concat <axis = 1> ({', '.join(f's{i}' for i in range(len(order)))}) y = {conv} {rest}"
    used = {
        name: np.array(values, np.int64) for name, values in ints.items() if f" {name}," in body or f" {name})" in body
    }
    return f"(float[N, 3, {size}, {size}] x) => ({out}) {{ {body} }}", used


def weights(channels=12):
    return {"w": f32(5, channels, 3, 3), "b": f32(5)}


ORDERS = list(itertools.permutations([(0, 0), (1, 0), (0, 1), (1, 1)]))


@pytest.mark.parametrize("nested", ["two", "rows first", "columns first"])
@pytest.mark.parametrize("order", ORDERS[::5])
@pytest.mark.parametrize("size", ["8", "H"])
def test_any_order_of_slices_and_any_nesting(parse, prove, ops, order, nested, size):
    text, ints = focus(order, nested=nested, size=size)
    after, report = prove(parse(text, **weights(), **ints), fold_focus, within=ROUNDING, sizes=(2, 3, 6, 10))
    assert ops(after) == ["Conv"]
    assert len(report.changed) == 1
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in after.graph.node[0].attribute}
    assert (attributes["kernel_shape"], attributes["strides"], attributes["pads"]) == ([6, 6], [2, 2], [2, 2, 2, 2])


@pytest.mark.parametrize("block", [(3, 3), (2, 4)])
def test_any_block(parse, prove, ops, block):
    order = list(itertools.product(*map(range, block)))[::-1]
    text, ints = focus(order, block=block, size="24")
    after, _ = prove(parse(text, **weights(3 * len(order)), **ints), fold_focus, within=ROUNDING)
    assert ops(after) == ["Conv"]


@pytest.mark.parametrize(("axis", "block"), [(2, 4), (3, 2), (-1, 3)])
def test_a_block_along_one_of_two_axes(parse, prove, ops, axis, block):
    body = "".join(f"s{i} = Slice(x, a{i}, end, axis, step) " for i in range(block))
    parts = ", ".join(f"s{i}" for i in reversed(range(block)))
    ints = {f"a{i}": [i] for i in range(block)} | {"end": [END], "axis": [axis], "step": [block]}
    model = parse(
        f"(float[N, 3, H, W] x) => (float[N, 5, A, B] y) {{ {body} f = Concat <axis = 1> ({parts}) y = Conv(f, w, b) }}",
        **weights(3 * block), **{name: np.array(values) for name, values in ints.items()},
    )  # fmt: skip
    assert ops(prove(model, fold_focus, within=ROUNDING, sizes=(2, 3, 12, 12))[0]) == ["Conv"]


CONVS = {
    "stride": "Conv <strides = [2, 1], pads = [0, 1, 2, 1]> (f, w, b)",
    "valid": 'Conv <auto_pad = "VALID"> (f, w)',
    "same": 'Conv <auto_pad = "SAME_UPPER"> (f, w)',
    "same lower": 'Conv <auto_pad = "SAME_LOWER", kernel_shape = [3, 3]> (f, w, b)',
    "same with stride": 'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (f, w, b)',
}


@pytest.mark.parametrize("conv", CONVS)
def test_strides_and_paddings_of_the_convolution(parse, prove, ops, conv):
    text, ints = focus(ORDERS[7], conv=CONVS[conv])
    bias = weights() if ", b)" in CONVS[conv] else {"w": f32(5, 12, 3, 3)}
    after, _ = prove(parse(text, **bias, **ints), fold_focus, within=ROUNDING)
    assert ops(after) == ["Conv"]


def test_space_to_depth(parse, prove, ops):
    model = parse(
        "(float[N, 3, H, W] x) => (float[N, 5, A, B] y) { f = SpaceToDepth <blocksize = 2> (x) y = Conv <pads = [1, 1, 1, 1]> (f, w, b) }",
        **weights(),
    )
    assert ops(prove(model, fold_focus, within=ROUNDING, sizes=(2, 3, 6, 8))[0]) == ["Conv"]


@pytest.mark.parametrize("perm", list(itertools.permutations([1, 3, 5])))
@pytest.mark.parametrize("batch", [0, -1, 2])
def test_reshape_transpose_reshape(parse, prove, ops, perm, batch):
    n = "2" if batch == 2 else "N"
    model = parse(
        f"(float[{n}, 3, 8, 12] x) => (float[{n}, 5, 4, 4] y) {{ a = Reshape(x, split) t = Transpose <perm = [0, {', '.join(map(str, perm))}, 2, 4]> (a) f = Reshape(t, joined) y = Conv <pads = [1, 1, 1, 1]> (f, w, b) }}",
        w=f32(5, 18, 3, 3), b=f32(5), split=np.array([batch, 3, 4, 2, 4, 3]), joined=np.array([batch, 18, 4, 4]),
    )  # fmt: skip
    assert ops(prove(model, fold_focus, within=ROUNDING)[0]) == ["Conv"]


def test_one_axis(parse, prove, ops):
    model = parse(
        "(float[N, 3, 12] x) => (float[N, 5, A] y) { a = Slice(x, zero, end, two, two) e = Slice(x, one, end, two, two) f = Concat <axis = -2> (e, a) y = Conv <dilations = [1]> (f, w) }",
        w=f32(5, 6, 3), zero=np.array([0]), one=np.array([1]), two=np.array([2]), end=np.array([END]),
    )  # fmt: skip
    assert ops(prove(model, fold_focus, within=ROUNDING)[0]) == ["Conv"]


def test_slices_that_others_read_stay_for_them(parse, prove):
    text, ints = focus(ORDERS[0], rest="z = Neg(s1)", out="float[N, 5, A, B] y, float[N, 3, 4, 4] z")
    after, _ = prove(parse(text, **weights(), **ints), fold_focus, within=ROUNDING)
    assert count_ops(after) == {"Conv": 1, "Slice": 1, "Neg": 1}


def test_shared_weights_are_copied_and_two_convolutions_share_the_picture(parse, prove):
    text, ints = focus(
        ORDERS[0],
        rest="z = Conv(f, w) q = Conv(p, w)",
        out="float[N, 5, A, B] y, float[N, 5, C, D] z, float[N, 5, E, F] q",
    )
    text = text.replace("(float[N, 3, 8, 8] x)", "(float[N, 3, 8, 8] x, float[N, 12, 6, 6] p)")
    after, report = prove(parse(text, **weights(), **ints), fold_focus, within=ROUNDING)
    assert count_ops(after) == {"Conv": 3}
    assert len(report.changed) == 2
    assert [list(node.input)[1] for node in after.graph.node].count("w") == 1


REFUSED = {
    "used elsewhere": {"rest": "z = Neg(f)", "out": "float[N, 5, A, B] y, float[N, 12, C, D] z"},
    "each pixel": {"order": [(0, 0), (0, 0), (0, 1), (1, 1)]},
    "has groups": {"conv": "Conv <group = 3> (f, g)"},
    "dilated": {"conv": "Conv <dilations = [2, 2], pads = [2, 2, 2, 2]> (f, w, b)"},
    "end early": {"end": 6, "size": "H"},
    "into blocks": {"end": 6},
    "depends on a size": {"conv": 'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (f, w, b)', "size": "H"},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_stays_says_why(parse, prove, reason):
    options = {"order": ORDERS[0]} | REFUSED[reason]
    text, ints = focus(options.pop("order"), **options)
    constants = weights() | {"g": f32(6, 4, 3, 3)}
    used = {name: values for name, values in constants.items() if f", {name}," in text or f", {name})" in text}
    if reason == "has groups":
        text = text.replace("float[N, 5", "float[N, 6")
    _, report = prove(parse(text, **used, **ints), fold_focus, within=0, sizes=(2, 3, 6, 6))
    assert report.changed == ()
    assert reason in report.skipped[0].reason


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    starts=st.lists(st.tuples(st.integers(-9, 3), st.integers(-9, 3)), min_size=4, max_size=4),
    ends=st.lists(st.sampled_from([END, 8, 7, 9, -1, 100, (1 << 31) - 1]), min_size=4, max_size=4),
    known=st.booleans(),
)
def test_whatever_the_bounds_the_result_is_right(parse, prove, starts, ends, known):
    """Slices are given any start and end; only those that make a Focus may be folded, and all must compute the same."""
    body = "".join(f"s{i} = Slice(x, a{i}, e{i}, hv, two) " for i in range(4))
    ints = {f"a{i}": np.array(pair) for i, pair in enumerate(starts)} | {
        f"e{i}": np.array([end, end]) for i, end in enumerate(ends)
    }
    size = "8" if known else "H"
    shapes = {len(range(8)[slice(s, e, 2)]) for pair, e in zip(starts, ends, strict=True) for s in pair}
    if len(shapes) != 1 or 0 in shapes:
        return
    text = f"(float[N, 3, {size}, {size}] x) => (float[N, 5, A, B] y) {{ {body} f = Concat <axis = 1> (s0, s1, s2, s3) y = Conv <pads = [1, 1, 1, 1]> (f, w, b) }}"
    prove(
        parse(text, **weights(), **ints, hv=np.array([2, 3]), two=np.array([2, 2])),
        fold_focus,
        within=ROUNDING,
        sizes=(2, 3, 8, 8),
    )


def test_torch_spelling_through_the_whole_pipeline():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

    class Focus(torch.nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind, self.conv, self.norm = (
                kind,
                torch.nn.Conv2d(12, 8, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(8),
            )

        def forward(self, x):
            if self.kind == "slices":
                x = torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)
            else:
                x = torch.nn.functional.pixel_unshuffle(x, 2)
            return torch.relu(self.norm(self.conv(x)))

    for kind in ("slices", "unshuffle"):
        stream = io.BytesIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(Focus(kind).eval(), (torch.randn(1, 3, 16, 16),), stream, dynamo=False, opset_version=13)
        after, report = rewrite(onnx.load_from_string(stream.getvalue()))
        assert count_ops(after) == {"Conv": 1, "Relu": 1}, kind
        assert report.verification is not None
        assert report.verification.samples == 3
