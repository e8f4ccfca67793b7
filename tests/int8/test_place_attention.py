"""Which attention has INT8 operands: what is looked for, and what is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.graph import import_graph
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.place import place, with_attention
from relu_deploy.int8.place_attention import find_attention
from relu_deploy.int8.run import quantize

RTX = number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp16")
PLAIN = "[scores] s = MatMul(q, k) t = Mul(s, c) p = Softmax<axis=-1>(t) [mix] o = MatMul(p, v)"
ODD = {
    "not the last axis": PLAIN.replace("axis=-1", "axis=2"),
    "probabilities are read twice": f"{PLAIN} z = Relu(p)",
    "scores are read twice": f"{PLAIN} z = Relu(s)",
    "an exponential between": PLAIN.replace("Mul(s, c)", "Exp(s)"),
    "a stored mixture": PLAIN.replace("MatMul(p, v)", "MatMul(p, w)"),
}


def network(body: str = PLAIN, *, width: int = 16, tokens: int | str = 8, gain: float = 0.1) -> onnx.ModelProto:
    """Queries, keys and values are inputs' projections; ``gain`` says how unequal the probabilities are."""
    extra = ", float[N, 2, A, B] z" if "z =" in body else ""
    text = f"""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 2, {tokens}, {width}] x) => (float[N, 2, {tokens}, {width}] o{extra}) <float c = {{0.5}}> {{
      q = MatMul(x, wq) k0 = MatMul(x, wk) k = Transpose<perm=[0, 1, 3, 2]>(k0) v = MatMul(x, wv) {body} }}"""
    model = onnx.parser.parse_model(text)
    random = np.random.default_rng(0)
    for name, size in (("wq", gain), ("wk", gain), ("wv", 1.0)):
        values = random.normal(0, size, (width, width)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(8, width, dtype=np.float32), "w"))
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


def measured(model: onnx.ModelProto, tokens: int = 8) -> tuple[Ranges, np.ndarray]:
    width = model.graph.input[0].type.tensor_type.shape.dim[-1].dim_value
    data = np.random.default_rng(1).normal(size=(8, 2, tokens, width)).astype(np.float32)
    return calibrate(model, open_source(data, model_inputs(model))), data


def operands(model: onnx.ModelProto, tokens: int = 8, target: str = "tensorrt-rtx", **options: object) -> set[str]:
    """Tensors that the products of attention read as codes."""
    graph, ranges = import_graph(model), measured(model, tokens)[0]
    bounds = {name: (each.min, each.max) for name, each in ranges.tensors.items()}
    number = number_format(target, float_part="fp16")
    before = place(graph, bounds, number)
    after = with_attention(graph, before, bounds, number, **options)  # type: ignore[arg-type]
    return set(after.uses) - set(before.uses)


def test_all_four_operands() -> None:
    assert operands(network()) == {"q", "k", "p", "v"}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_attention(name: str) -> None:
    model = network(ODD[name])
    assert list(find_attention(import_graph(model))) == []
    assert operands(model) == set()


@pytest.mark.parametrize(
    "where", ["t = Where(b, s, c)", "t0 = Add(c, s) t = Div(t0, c)", "t0 = Mul(c, s) t = Add(t0, c)"]
)
def test_scales_and_masks_between(where: str) -> None:
    body = PLAIN.replace("t = Mul(s, c)", where)
    if "Where" in where:
        body = f"b = Greater(x1, c) {body}".replace("x1", "k0")  # any condition
        body = body.replace(
            "b = Greater(k0, c)", "b0 = MatMul(x, wk) b1 = ReduceMax<keepdims=1>(b0) b = Greater(b1, c)"
        )
    (found,) = find_attention(import_graph(network(body)))
    assert (found.scores.name, found.mix.name) == ("scores", "mix")


@pytest.mark.parametrize("options", [{"skip": ["scores"]}, {"skip": ["mix"]}, {"target": "tensorrt"}])
def test_left_alone_on_request_and_for_other_compilers(options: dict[str, object]) -> None:
    assert operands(network(), **options) == set()  # type: ignore[arg-type]


def test_heads_that_have_no_kernel() -> None:
    assert operands(network(width=24)) == set()


def test_rows_of_unknown_length() -> None:
    assert operands(network(tokens="T")) == set()


@pytest.mark.parametrize(("gain", "chosen"), [(0.01, True), (3.0, False)])
def test_probabilities_that_would_be_lost_stay_float(gain: float, chosen: bool) -> None:
    """64 equal ones beside a row with a 1 in it: each is two steps."""
    model = network(tokens=64, gain=gain)
    found = operands(model, 64)
    assert (found == {"q", "k", "p", "v"}) == chosen
    assert bool(found) == chosen


def test_the_report_and_the_network() -> None:
    model = network()
    ranges, data = measured(model)
    made, report = quantize(model, ranges, target="tensorrt-rtx")
    assert {layer.name for layer in report.layers if layer.live} == {"scores", "mix"}
    assert all(layer.int8 for layer in report.layers)
    wanted, got = (np.asarray(open_session(m).run(None, {"x": data})[0], dtype=np.float64) for m in (model, made))
    ratio = sqnr_db(float((wanted**2).sum()), float(((wanted - got) ** 2).sum()))
    assert ratio is not None
    assert ratio > 25  # six tensors of 8 bits and three of weights, at 35 to 40 dB each
