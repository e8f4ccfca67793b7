# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""A corpus of spellings: what must become Relu, what must not, and what is said about it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from relu_deploy.graph import export_graph, import_graph
from relu_deploy.passes import collapse_relu
from relu_deploy.passes.run import rewrite
from relu_deploy.report import PassReport

NUMBERS = "float z = {0}, float o = {1}, float t = {2}, float h = {0.5}, float n = {-1}, float inf = {inf}"


def parse(
    body: str, *, init: str = NUMBERS, opset: int = 17, kind: str = "float", shape: str = "N,4"
) -> onnx.ModelProto:
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    g ({kind}[{shape}] x) => ({kind}[{shape}] y) <{init}> {{ {body} }}"""
    model = onnx.parser.parse_model(text.replace(", float inf = {inf}", ""))
    if "{inf}" in text:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(np.inf, np.float32), "inf"))
    return onnx.shape_inference.infer_shapes(model)


def collapse(model: onnx.ModelProto) -> tuple[list[str], PassReport]:
    graph = import_graph(model)
    report = collapse_relu(graph)
    return [node.op_type for node in export_graph(graph, model).graph.node], report


SILU = "s = Sigmoid(x) a = Mul(x, s)"
GELU = "d = Div(x, t) e = Erf(d) f = Add(e, o) g = Mul(x, f) a = Mul(g, h)"
SPELLINGS = {
    "max": "y = Max(x, z)", "max swapped": "y = Max(z, x)", "max three": "y = Max(x, z, n)",
    "min of negatives": "m = Neg(x) k = Min(m, z) y = Neg(k)",
    "sat, two products": f"{SILU} r = Relu(x) p = Mul(a, z) q = Mul(r, o) y = Add(p, q)",
    "sat of gelu": f"{GELU} r = Relu(x) p = Mul(a, z) q = Mul(r, o) y = Add(p, q)",
    "sat by max": f"{SILU} r = Max(x, z) p = Mul(a, z) y = Add(p, r)",
    "sum": f"{SILU} r = Relu(x) p = Mul(z, a) y = Sum(r, p)",
    "lerp": f"{SILU} r = Relu(x) d2 = Sub(r, a) w = Mul(d2, o) y = Add(a, w)",
    "lerp, other branch": f"{SILU} r = Relu(x) d2 = Sub(r, a) w = Mul(d2, z) y = Sub(r, w)",
    "lerp, 1 - gamma in the graph": f"{SILU} r = Relu(x) w = Sub(o, z) p = Mul(r, w) q = Mul(a, z) y = Add(p, q)",
    "prelu": "y = PRelu(x, z)", "leaky": "y = LeakyRelu <alpha = 0.0> (x)",
    "where greater": "c = Greater(x, z) y = Where(c, x, z)",
    "where greater or equal": "c = GreaterOrEqual(x, z) y = Where(c, x, z)",
    "where less": "c = Less(x, z) y = Where(c, z, x)", "where not less": "c = Less(x, z) k = Not(c) y = Where(k, x, z)",
    "clip": "y = Clip(x, z)", "clip inf": "y = Clip(x, z, inf)", "thresholded": "y = ThresholdedRelu <alpha = 0.0> (x)",
    "elu": "y = Elu <alpha = 0.0> (x)", "abs": "k = Abs(x) p = Add(x, k) y = Mul(p, h)",
    "abs div": "k = Abs(x) p = Add(k, x) y = Div(p, t)",
    "mask": "c = Greater(x, z) k = Cast <to = 1> (c) y = Mul(k, x)", "mask, cast like": "c = Greater(x, z) k = CastLike(c, x) y = Mul(k, x)", "relu twice": "k = Relu(x) y = Relu(k)",
    "sign": "k = Sign(x) r = Relu(k) y = Mul(r, x)", "pow one": "k = Pow(x, o) y = Max(k, z)",
    "identity": "k = Identity(x) p = Dropout(k) y = Max(p, z)", "scale round": "k = Mul(x, t) r = Relu(k) y = Div(r, t)",
    "affine around": "k = Mul(x, t) b = Add(k, o) r = Max(b, z) y = Mul(r, t)",
    "hard sigmoid gate": "k = HardSigmoid(x) b = Mul(k, z) r = Max(x, z) y = Add(b, r)",
    "mean": "r = Relu(x) y = Mean(r, r)",
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_becomes_one_relu(spelling):
    before = parse(SPELLINGS[spelling])
    after, report = rewrite(before)
    operators = [node.op_type for node in after.graph.node]
    assert operators == (["Mul", "Add", "Relu", "Mul"] if spelling == "affine around" else ["Relu"])
    assert report.verification is not None
    assert report.verification.samples > 0
    assert rewrite(after)[0] is after


BODIES = (
    "y = Clip <min = 0.0> (x)", "y = Clip(x, z)", "y = Clip(x, z, )", "y = LeakyRelu <alpha = 0.0> (x)", "y = PRelu(x, z)",
    "y = Max(x, z)", f"{SILU} r = Relu(x) p = Mul(a, z) y = Add(p, r)", "k = Dropout(x) y = Max(k, z)",
)  # fmt: skip


def exists(opset: int, body: str) -> bool:
    """Clip took its bounds as attributes before opset 11, and as inputs since."""
    return "Clip" not in body or ("<" in body) == (opset < 11)


@pytest.mark.parametrize(
    ("opset", "body"),
    [(o, b) for o in (7, 9, 11, 12, 13, 15, 18, 20, 22, 24) for b in BODIES if exists(o, b)],
)
def test_across_opsets(opset, body):
    assert collapse(parse(body, opset=opset))[0] == ["Relu"]


LARGEST = float(np.finfo(np.float32).max)


def test_clip_to_the_largest_float_is_relu_and_to_a_smaller_one_is_not():
    # The text format of the parser rounds, so the bound goes in as an array.
    for bound, expected in ((LARGEST, ["Relu"]), (np.nextafter(np.float32(LARGEST), np.float32(0)), ["Clip"])):
        model = parse("y = Clip(x, z, m)", init="float z = {0}, float m = {0}")
        model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.array(bound, np.float32), "m"))
        assert collapse(model)[0] == expected


# What equals ReLU on most sample grids, but not everywhere or not in floats.
IMPOSTORS = {
    "a narrow spike": ("k = Sub(x, c) a = Abs(k) m = Sub(w, a) s = Max(m, z) r = Relu(x) y = Add(r, s)",
                       "float c = {3.14159}, float w = {1e-7}, float z = {0}", "breakpoints"),
    "a kink far out": ("r = Relu(x) y = Min(r, c)", "float c = {1e37}", "1 breakpoint (1e+37)"),
    "nearly zero slope": ("y = LeakyRelu <alpha = 1e-30> (x)", "", "LeakyReLU with slope 1e-30"),
    "a tiny shift": ("y = Max(x, c)", "float c = {1e-40}", "breakpoint"),
    "gamma not quite zero": (f"{SILU} r = Relu(x) p = Mul(a, c) q = Mul(r, b) y = Add(p, q)",
                             "float c = {0.001}, float b = {0.999}", "a blend of ReLU"),
    "0 * log(1 + exp(x))": ("e = Exp(x) p = Add(e, o) l = Log(p) k = Mul(l, z) r = Relu(x) y = Add(k, r)", NUMBERS, "x| > 32"),
    "0 * exp(x)": ("e = Exp(x) k = Mul(e, z) r = Relu(x) y = Add(k, r)", NUMBERS, "not finite"),
    "0 * log(x)": ("e = Log(x) k = Mul(e, z) r = Relu(x) y = Add(k, r)", NUMBERS, "not finite"),
    "0 / x": ("e = Div(z, x) r = Relu(x) y = Add(e, r)", NUMBERS, "not"),
    "an overflow in between": ("r = Relu(x) k = Mul(r, c) y = Mul(k, b)",
                               "float c = {1073741824}, float b = {9.31322574615478515625e-10}", "not finite"),
    "digits lost": ("r = Relu(x) k = Add(r, c) y = Sub(k, c)", "float c = {1152921504606846976}", "lost digits"),
    "one channel of four": ("y = PRelu(x, c)", "float[4] c = {0, 0, 0.25, 0}", "in some channels only"),
    "a point": ("c = Equal(x, t) k = Where(c, o, z) r = Relu(x) y = Add(r, k)", NUMBERS, "not continuous"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPOSTORS)
def test_impostors_stay(name):
    body, init, reason = IMPOSTORS[name]
    model = parse(body, init=init)
    operators, report = collapse(model)
    assert sorted(operators) == sorted(node.op_type for node in model.graph.node)
    assert any(reason in skip.reason for skip in report.skipped), report.skipped


LABELS = {
    "SiLU": SILU.replace("a =", "y ="), "GELU (tanh)": "y = Gelu <approximate = \"tanh\"> (x)", "GELU (erf)": "y = Gelu(x)",
    "HardSwish": "y = HardSwish(x)", "Mish": "y = Mish(x)", "Sigmoid": "y = Sigmoid(x)", "Tanh": "y = Tanh(x)",
    "ELU": "y = Elu(x)", "Softplus": "y = Softplus(x)", "clipped ReLU [0, 6]": "y = Clip(x, z, c)",
    "LeakyReLU with slope 0.5": "y = LeakyRelu <alpha = 0.5> (x)", "HardSigmoid": "y = HardSigmoid(x)",
    "SELU": "y = Selu(x)", "unknown": "",
}  # fmt: skip


@pytest.mark.parametrize("label", [label for label in LABELS if label != "unknown"])
def test_names_what_it_leaves_alone(label):
    _, report = collapse(parse(LABELS[label], init=f"{NUMBERS}, float c = {{6}}", opset=20))
    (skip,) = report.skipped
    assert label in skip.reason
    assert ("not a proof" in skip.reason) == (not label.startswith(("clipped", "Leaky", "HardSigmoid")))


def test_a_gate_with_two_live_inputs_is_left_alone():
    body = "k = ReduceMean <keepdims = 1> (x) s = Sigmoid(k) y = Mul(x, s)"
    operators, report = collapse(parse(body))
    assert operators == ["ReduceMean", "Sigmoid", "Mul"]
    assert any("two live inputs" in skip.reason for skip in report.skipped)


def test_interior_tensors_that_others_read_survive():
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,4] y, float[N,4] a, float[N,4] w) <float z = {{0}}>
    {{ {SILU} p = Mul(a, z) r = Relu(x) y = Add(p, r) w = Tanh(p) }}"""
    before = onnx.parser.parse_model(text)
    after, report = rewrite(before)
    assert report.passes[3].changed == ("Add_4",)
    assert [output.name for output in after.graph.output] == ["y", "a", "w"]
    assert report.verification is not None
    assert all(check.error == 0 for check in report.verification.outputs)


def test_the_rank_of_the_output_is_not_changed():
    init = "float[1,1,1] z = {0}"
    text = (
        f"""<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (float[a,b,c] y) <{init}> {{ y = Max(x, z) }}"""
    )
    operators, report = collapse(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert operators == ["Max"]
    assert "shape may change" in report.skipped[0].reason


def test_a_side_constant_must_match_a_known_axis():
    model = parse("y = PRelu(x, s)", init="float[4] s = {0, 0, 0, 0}", shape="N,C")
    assert collapse(model)[0] == ["PRelu"]
    model = parse("y = PRelu(x, s)", init="float[4,1,1] s = {0, 0, 0, 0}", shape="N,4,H,W")
    assert collapse(model)[0] == ["Relu"]


def test_a_constant_of_the_whole_shape_counts_as_what_it_repeats():
    """As exporters fold ``zeros_like`` and ``full_like`` where shapes are fixed."""
    zeros, ones = np.zeros((2, 4), np.float32), np.ones((2, 4), np.float32)
    for values, body, expected in (
        (zeros, "y = Max(x, w)", ["Relu"]), (ones, "r = Relu(x) y = Mul(r, w)", ["Relu"]),
        (zeros + np.arange(4, dtype=np.float32), "y = Max(x, w)", ["Max"]),
        (np.array([[0, 0, 0, 0], [0, 0, 0, 1]], np.float32), "y = Max(x, w)", ["Max"]),
    ):  # fmt: skip
        model = parse(body, shape="2,4")
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
        assert collapse(model)[0] == expected
    wider = parse("y = Max(x, w)", shape="1,4")  # here the constant makes the result wider
    wider.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    wider.graph.initializer.append(onnx.numpy_helper.from_array(zeros, "w"))
    assert collapse(wider)[0] == ["Max"]


@pytest.mark.parametrize("kind", ["float16", "double", "bfloat16"])
def test_other_float_types(kind):
    model = parse(f"{SILU} r = Relu(x) p = Mul(a, z) y = Add(p, r)", init=f"{kind} z = {{0}}", kind=kind)
    operators, report = collapse(model)
    assert operators == ["Relu"]
    assert {"double": "float64"}.get(kind, kind) in report.notes["Add_4"]


def test_integers_are_none_of_our_business():
    operators, report = collapse(parse("y = Max(x, z)", init="int32 z = {0}", kind="int32"))
    assert operators == ["Max"]
    assert report == PassReport("collapse_relu")


def test_the_certificate_holds_at_its_own_edge():
    model = parse(f"{GELU} p = Mul(a, z) r = Relu(x) y = Add(p, r)", init=NUMBERS)
    _, report = collapse(model)
    note = report.notes["Add_7"]
    limit = float(note.split("|x| <= ")[1].split()[0])
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    edge = np.float32(limit * 0.999)  # the text has four digits
    x = np.array([[edge, -edge, 1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], np.maximum(x, 0))
    beyond = session.run(None, {"x": np.full((1, 4), LARGEST, np.float32)})[0]
    assert not np.isfinite(beyond).any()
