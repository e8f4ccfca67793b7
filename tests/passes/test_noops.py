# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""What hands a tensor on goes, bit for bit; what only looks like it stays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from calib.session import open_session
from relu_deploy.graph import export_graph, import_graph
from relu_deploy.passes import remove_identities
from relu_deploy.passes.noops import holds
from relu_deploy.passes.shapes import annotate

END = (1 << 63) - 1


def ints(*values):
    return np.array(values, np.int64)


def f32(*values):
    return np.array(values, np.float32)


# Each between two nodes that do something, on float[N, 3, 4, 1] unless it says otherwise.
GONE = {
    "transpose and back": "a = Transpose <perm = [0, 2, 3, 1]> (t) u = Transpose <perm = [0, 3, 1, 2]> (a)",
    "transpose of nothing": "u = Transpose <perm = [0, 1, 2, 3]> (t)",
    "transpose reversed twice": "a = Transpose(t) u = Transpose(a)",
    "reshape to what is known": "u = Reshape(t, same)",
    "reshape to what is open": "u = Reshape(t, copied)",
    "unsqueeze and squeeze": "a = Unsqueeze(t, one) u = Squeeze(a, one)",
    "unsqueeze and squeeze, from the end": "a = Unsqueeze(t, one) u = Squeeze(a, minus_four)",
    "squeeze and unsqueeze": "a = Squeeze(t, three) u = Unsqueeze(a, three)",
    "slice of all": "u = Slice(t, zeros, ends, axes)",
    "slice of all, sizes": "u = Slice(t, zeros, sizes, axes)",
    "concat of one": "u = Concat <axis = 1> (t)",
    "sum of one": "u = Sum(t)",
    "max of one": "u = Max(t)",
    "mean of one": "u = Mean(t)",
    "split in one": "u = Split <axis = 1> (t)",
    "times one": "u = Mul(one_f, t)",
    "times ones": "u = Mul(t, ones_f)",
    "by one": "u = Div(t, one_f)",
    "to the first": "u = Pow(t, one_f)",
    "plus minus zero": "u = Add(t, minus_zero)",
    "minus zero": "u = Sub(t, zero_f)",
    "pad of nothing": "u = Pad(t, no_pads)",
    "expand to itself": "u = Expand(t, ones_shape)",
    "tile once": "u = Tile(t, ones_shape)",
    "neg twice": "a = Neg(t) u = Neg(a)",
    "cast to double and back": "a = Cast <to = 11> (t) u = Cast <to = 1> (a)",
    "cast like": "u = CastLike(t, x)",
    "where always": "u = Where(always, t, other)",
    "where never": "u = Where(never, other, t)",
}  # fmt: skip
CONSTANTS = {
    "same": ints(2, 3, 4, 1), "copied": ints(0, -1, 4, 1), "one": ints(1), "minus_four": ints(-4), "three": ints(3),
    "zeros": ints(0, 0), "ends": ints(END, 4), "sizes": ints(3, 4), "axes": ints(1, 2), "one_f": np.float32(1),
    "ones_f": np.ones((3, 1, 1), np.float32), "minus_zero": np.float32(-0.0), "zero_f": np.float32(0.0),
    "no_pads": ints(*[0] * 8), "ones_shape": ints(1, 1, 4, 1), "always": np.array(True), "never": np.array([False]),
    "other": np.ones((2, 3, 4, 1), np.float32),
}  # fmt: skip


def network(parse, body, *, shape="2, 3, 4, 1", opset=17, **more):
    constants = {
        name: values
        for name, values in (CONSTANTS | more).items()
        if any(f"{sep}{name}{end}" in body for sep in ("(", ", ") for end in (")", ","))
    }
    if "ones_shape" in constants and "Tile" in body:
        constants["ones_shape"] = ints(1, 1, 1, 1)
    rank = shape.count(",") + 1
    dims = ", ".join(f"D{i}" for i in range(rank))
    return parse(
        f"(float[{shape}] x) => (float[{dims}] y) {{ t = Tanh(x) {body} y = Sin(u) }}", opset=opset, **constants
    )


@pytest.mark.parametrize("form", GONE)
def test_it_goes(parse, prove, ops, form):
    after, report = prove(network(parse, GONE[form]), remove_identities, within=0)
    assert ops(after) == ["Tanh", "Sin"]
    assert report.changed


OPEN = (
    "reshape to what is open",
    "slice of all, sizes",
    "slice of all",
    "times ones",
    "expand to itself",
    "unsqueeze and squeeze",
    "squeeze and unsqueeze",
)


@pytest.mark.parametrize("form", OPEN)
def test_it_goes_where_the_batch_is_open(parse, prove, ops, form):
    assert ops(prove(network(parse, GONE[form], shape="N, 3, 4, 1"), remove_identities, within=0)[0]) == ["Tanh", "Sin"]


STAYS = {
    "another order": "a = Transpose <perm = [0, 2, 3, 1]> (t) b = Relu(a) u = Transpose <perm = [0, 2, 1, 3]> (b)",
    "another axis": "a = Unsqueeze(t, one) b = Relu(a) u = Squeeze(b, minus_one)",
    "backwards": "u = Slice(t, minus_one, minus_end, axis_one, minus_one)",
    "one less": "u = Slice(t, one, ends_one, axis_one)",
    "a step of two": "u = Slice(t, zero, ends_one, axis_one, two)",
    "times one, wider": "u = Mul(t, wide)",
    "one by it": "u = Div(one_f, t)",
    "zero minus it": "u = Sub(zero_f, t)",
    "one to it": "u = Pow(one_f, t)",
    "one and two": "u = Mul(t, mixed)",
    "expand": "u = Expand(t, five)",
    "cast to half and back": "a = Cast <to = 10> (t) u = Cast <to = 1> (a)",
    "cast to int and back": "a = Cast <to = 7> (t) u = Cast <to = 1> (a)",
    "where": "u = Where(partly, t, other)",
    "where, wider": "u = Where(always_wide, t, other)",
    "neg": "u = Neg(t)",
    "pad": "u = Pad(t, one_pad)",
}
MORE = {
    "minus_one": ints(-1), "minus_end": ints(-END), "axis_one": ints(1), "ends_one": ints(END), "zero": ints(0), "two": ints(2),
    "wide": np.ones((5, 1, 1, 1, 1), np.float32), "mixed": np.array([[[1]], [[2]], [[1]]], np.float32), "five": ints(5, 1, 1, 1, 1),
    "partly": np.array([True, False, True, False]).reshape(4, 1), "always_wide": np.ones((5, 1, 1, 1, 1), bool), "one_pad": ints(0, 0, 0, 1, 0, 0, 0, 0),
}  # fmt: skip


@pytest.mark.parametrize("form", STAYS)
def test_it_stays(parse, prove, form):
    wider = "D0, D1, D2, D3, D4" if form in ("times one, wider", "expand", "where, wider") else None
    constants = {
        k: v
        for k, v in (CONSTANTS | MORE).items()
        if any(f"{a}{k}{b}" in STAYS[form] for a in ("(", ", ") for b in (")", ","))
    }
    text = f"(float[2, 3, 4, 1] x) => (float[{wider or 'D0, D1, D2, D3'}] y) {{ t = Tanh(x) {STAYS[form]} y = Sin(u) }}"
    assert prove(parse(text, **constants), remove_identities, within=0)[1].changed == ()


def test_old_spellings(parse, prove, ops):
    body = "a = Unsqueeze <axes = [0]> (t) b = Squeeze <axes = [0]> (a) c = Slice <axes = [1], starts = [0], ends = [2147483647]> (b) d = Pad <pads = [0, 0, 0, 0, 0, 0, 0, 0]> (c) u = Flatten <axis = 1> (d)"
    model = parse(
        f"(float[N, 3, 4, 1] x) => (float[N, 12] y) {{ t = Tanh(x) {body} e = Flatten(u) f = Dropout(e) y = Sin(f) }}",
        opset=9,
    )
    assert ops(prove(model, remove_identities, within=0)[0]) == ["Tanh", "Flatten", "Sin"]


def test_two_that_do_not_cancel_become_one(parse, prove, ops):
    body = "a = Transpose <perm = [0, 2, 3, 1]> (t) b = Transpose <perm = [1, 0, 2, 3]> (a) c = Unsqueeze(b, one) d = Reshape(c, twelve) u = Reshape(d, other)"
    model = parse(
        f"(float[2, 3, 4, 1] x) => (float[A, B] y) {{ t = Tanh(x) {body} y = Sin(u) }}",
        one=ints(1),
        twelve=ints(2, 12),
        other=ints(6, -1),
    )
    assert ops(prove(model, remove_identities, within=0)[0]) == ["Tanh", "Transpose", "Reshape", "Sin"]


OWN = {
    "shape": "u = Reshape(t, s)",
    "gathered": "g = Gather(s, zero) h = Unsqueeze(g, axis) i = Gather(s, one) j = Unsqueeze(i, axis) k = Concat <axis = 0> (h, j) u = Reshape(t, k)",
    "gathered from the end": "g = Gather(s, minus) k = Concat <axis = 0> (any, g) u = Reshape(t, k)",
    "sliced": "g = Slice(s, axis, ones) h = Slice(s, ones, twos) k = Concat <axis = 0> (g, h) u = Reshape(t, k)",
    "expanded": "u = Expand(t, s)",
    "swapped": "g = Gather(s, swap) u = Reshape(t, g)",
    "of another": "g = Shape(x) u = Reshape(t, g)",
    "twice the first": "g = Gather(s, firsts) u = Expand(t, g)",
}


@pytest.mark.parametrize("form", OWN)
def test_a_reshape_to_its_own_shape(parse, prove, ops, form):
    constants = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "axis": ints(0),
        "minus": ints(-1),
        "any": ints(-1),
        "ones": ints(1),
        "twos": ints(2),
        "swap": ints(1, 0),
        "firsts": ints(0, 0),
    }
    used = {
        name: values
        for name, values in constants.items()
        if any(f"{a}{name}{b}" in OWN[form] for a in ("(", ", ") for b in (")", ","))
    }
    text = f"(float[N, M] x) => (float[A, B] y) {{ t = Tanh(x) s = Shape(t) {OWN[form]} y = Sin(u) }}"
    after, report = prove(parse(text, **used), remove_identities, within=0, sizes=(3, 3))
    stays = form in ("swapped", "of another", "twice the first")
    assert bool(report.changed) != stays
    assert stays or ops(after) == ["Tanh", "Sin"]


def test_a_gather_past_the_end_is_not_followed(parse):
    text = "(float[N, M] x) => (float[A, B] y) { t = Tanh(x) s = Shape(t) g = Gather(s, far) y = Reshape(t, g) }"
    graph = import_graph(parse(text, far=ints(-1, 2)))
    assert remove_identities(graph).changed == ()


def test_a_reshape_that_copies_an_extent_of_the_shape_in_between_stays(parse, prove, ops):
    model = parse(
        "(float[N, 12] x) => (float[A, B, C] y) { t = Tanh(x) a = Reshape(t, first) u = Reshape(a, second) y = Sin(u) }",
        first=ints(4, -1),
        second=ints(0, 3, -1),
    )
    assert ops(prove(model, remove_identities, within=0)[0]) == ["Tanh", "Reshape", "Reshape", "Sin"]


def test_a_tensor_in_between_that_others_read_stays_for_them(parse, prove):
    model = parse(
        "(float[2, 3] x) => (float[2, 3] y, float[3, 2] z) { t = Tanh(x) a = Transpose(t) b = Transpose(a) y = Sin(b) z = Cos(a) }"
    )
    after, _ = prove(model, remove_identities, within=0)
    assert sorted(n.op_type for n in after.graph.node) == ["Cos", "Sin", "Tanh", "Transpose"]


def test_outputs_keep_their_names_through_pairs(parse, prove, ops):
    model = parse(
        "(float[2, 3] x) => (float[2, 3] y, float[2, 3] z) { t = Tanh(x) a = Transpose(t) y = Transpose(a) z = Sin(t) b = Transpose(x) }"
    )
    after, _ = prove(model, remove_identities, within=0)
    assert ops(after) == ["Tanh", "Sin"]
    model = parse("(float[2, 3] x) => (float[2, 3] y) { a = Transpose(x) y = Transpose(a) }")
    after, report = prove(model, remove_identities, within=0)
    assert ops(after) == ["Identity"]
    assert "name it must have" in report.skipped[0].reason


def test_the_mask_of_a_dropout_that_is_an_output_stays(parse, prove):
    model = parse("(float[2, 3] x) => (float[2, 3] y, bool[2, 3] m) { t = Tanh(x) a, m = Dropout(t) y = Sin(a) }")
    assert prove(model, remove_identities, within=0)[1].changed == ()


@pytest.mark.parametrize(("before", "goes"), [("Conv(r, w)", True), ("Identity(r)", False)])
def test_a_one_of_one_axis_where_the_shape_is_not_known(parse, ops, before, goes):
    """It goes where what it scales has an axis at least; a scalar would get one from it."""
    weight = {"w": np.ones((1, 1, 1, 1), np.float32)} if goes else {}
    model = parse(
        f"(float[1, 1, 2, 2] x, int64[K] s) => (float[A, B, C, D] y) {{ r = Reshape(x, s) k = {before} y = Mul(k, one) z = Neg(y) }}",
        one=f32(1),
        **weight,
    )
    graph = import_graph(model)
    for tensor in graph.tensors().values():
        if tensor.name in ("r", "k"):
            assert tensor.shape is None
    assert bool(set(remove_identities(graph).changed) & {"Mul_2"}) == goes


PLUS_ZERO = "(float[4] x) => (float[4] y) {{ t = Tanh(x) a = Add(t, zero) {} }}"


@pytest.mark.parametrize(("behind", "goes"), [
    ("y = Sin(a)", True), ("b = Relu(a) y = Div(b, two)", True), ("y = Reciprocal(a)", False), ("b = Mul(a, two) y = Div(two, b)", False),
    ("y = Pow(a, minus)", False), ("b = Abs(a) y = Pow(b, two)", True), ("s = Cast <to = 8> (a) y = Cast <to = 1> (s)", False),
])  # fmt: skip
def test_plus_zero_goes_only_where_nobody_sees_the_sign_of_a_zero(parse, behind, goes):
    constants = {"zero": np.float32(0), "two": np.float32(2), "minus": np.float32(-1)}
    used = {
        name: values
        for name, values in constants.items()
        if name == "zero" or f" {name})" in behind or f"({name}," in behind
    }
    model = parse(PLUS_ZERO.format(behind), **used)
    graph = import_graph(model)
    annotate(graph, model)
    report = remove_identities(graph)
    assert bool(report.changed) == goes
    feeds = {"x": f32(-0.0, 0.0, 1.0, -2.0)}  # where it matters, the infinities have other signs
    old, new = (open_session(m).run(None, feeds)[0] for m in (model, export_graph(graph, model)))
    assert np.array_equal(old, new)
    if not goes:
        assert "-0.0" in report.skipped[0].reason


def test_signs_are_looked_for_when_nodes_are_gone_already(parse, prove, ops):
    model = parse(
        "(float[4] x) => (float[4] y) { t = Tanh(x) a = Div(t, one) b = Pow(a, one) c = Add(b, zero) y = Sin(c) }",
        one=np.float32(1),
        zero=np.float32(0),
    )
    assert ops(prove(model, remove_identities, within=0)[0]) == ["Tanh", "Sin"]


def test_plus_zero_of_integers_goes(parse, prove, ops):
    model = parse(
        "(int64[4] x) => (int64[4] y) { t = Neg(x) a = Add(zero, t) b = Sub(a, zero) c = Mul(b, one) d = Div(c, one) y = Abs(d) }",
        zero=ints(0),
        one=ints(1),
    )
    assert ops(prove(model, remove_identities, within=0)[0]) == ["Neg", "Abs"]


def test_minus_zero_is_kept_bit_for_bit(parse):
    model = parse("(float[2] x) => (float[2] y) { a = Mul(x, one) b = Add(a, minus) c = Sub(b, plus) d = Div(c, one) y = Reciprocal(d) }",
                  one=np.float32(1), minus=np.float32(-0.0), plus=np.float32(0))  # fmt: skip
    graph = import_graph(model)
    annotate(graph, model)
    assert len(remove_identities(graph).changed) == 4
    for m in (model, export_graph(graph, model)):
        assert open_session(m).run(None, {"x": f32(-0.0, 0.0)})[0].tolist() == [-np.inf, np.inf]


def test_bfloat16_constants_stay_what_they_are(parse):
    model = parse("(bfloat16[2] x, bfloat16[2] w) => (bfloat16[2] y) { a = Mul(x, w) y = Add(a, w) }")
    bits = np.array([0x3F80, 0x3F81], np.uint16).tobytes()
    model.graph.initializer.append(TensorProto(name="w", data_type=TensorProto.BFLOAT16, dims=[2], raw_data=bits))
    del model.graph.input[1]
    graph = import_graph(model)
    annotate(graph, model)
    assert remove_identities(graph).changed == ()
    (kept,) = export_graph(graph, model).graph.initializer
    assert (kept.data_type, kept.raw_data) == (TensorProto.BFLOAT16, bits)


NUMPY = {
    TensorProto.BOOL: np.bool_, TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8, TensorProto.UINT16: np.uint16, TensorProto.INT16: np.int16,
    TensorProto.UINT32: np.uint32, TensorProto.INT32: np.int32, TensorProto.UINT64: np.uint64, TensorProto.INT64: np.int64,
    TensorProto.FLOAT16: np.float16, TensorProto.FLOAT: np.float32, TensorProto.DOUBLE: np.float64,
}  # fmt: skip


@pytest.mark.parametrize(("narrow", "wide"), list(itertools.product(NUMPY, NUMPY)))
def test_a_type_holds_another_exactly_when_the_extremes_come_back(narrow, wide):
    kind, through = np.dtype(NUMPY[narrow]), np.dtype(NUMPY[wide])
    if kind.kind == "f":
        info = np.finfo(kind)
        values = np.array([info.max, info.min, info.smallest_subnormal, -info.tiny, 1 + info.eps, 0.1], kind)
    elif kind.kind == "b":
        values = np.array([True, False])
    else:
        info = np.iinfo(kind)
        values = np.array([info.max, info.max - 1, info.min, info.min + 1, info.max // 3], kind)
    with np.errstate(all="ignore"):
        passed = values.astype(through)
        back = passed.astype(kind)
    exact = all(
        int(a) == int(b) if kind.kind in "iu" and through.kind in "iub" else float(a) == float(b)
        for a, b in zip(values, passed, strict=True)
    )
    assert holds(wide, narrow) == (exact and np.array_equal(back, values))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["t2", "t3", "r", "u", "s", "m", "a", "c", "e"]), min_size=1, max_size=8))
def test_any_row_of_such_nodes_computes_the_same(parse, prove, kinds):
    """Transposes, Reshapes, Unsqueeze and Squeeze in any order, each fit to the shape that it finds."""
    shape, last, body, constants = [2, 3, 4], "t", "", {"one": np.float32(1), "zero": np.float32(0)}
    for index, kind in enumerate(kinds):
        name = f"n{index}"
        if kind in ("t2", "t3"):
            order = list(range(len(shape)))
            order = order[1:] + order[:1] if kind == "t3" else order[::-1]
            body += f"{name} = Transpose <perm = {order}> ({last}) "
            shape = [shape[i] for i in order]
        elif kind == "r":
            shape = [shape[0] * shape[1], *shape[2:]] if len(shape) > 2 else [shape[0], 1, *shape[1:]]
            constants[f"k{index}"] = ints(*shape)
            body += f"{name} = Reshape({last}, k{index}) "
        elif kind == "u" and len(shape) < 6:
            shape = [*shape[:1], 1, *shape[1:]]
            constants[f"k{index}"] = ints(1)
            body += f"{name} = Unsqueeze({last}, k{index}) "
        elif kind == "s" and 1 in shape:
            axis = shape.index(1)
            constants[f"k{index}"] = ints(axis - len(shape))
            shape = shape[:axis] + shape[axis + 1 :]
            body += f"{name} = Squeeze({last}, k{index}) "
        else:
            call = {"m": "Mul({}, one)", "a": "Add({}, zero)", "c": "Concat <axis = 0> ({})", "e": "Neg({})"}.get(
                kind, "Identity({})"
            )
            body += f"{name} = {call.format(last)} "
        last = name
    used = {name: values for name, values in constants.items() if f", {name})" in body}
    model = parse(
        f"(float[2, 3, 4] x) => (float[{', '.join(map(str, shape))}] y) {{ t = Tanh(x) {body} y = Sin({last}) }}",
        **used,
    )
    prove(model, remove_identities, within=0)
