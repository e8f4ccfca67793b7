"""What of the outputs is measured: parts of concatenated outputs, and scores in place of probabilities and choices."""

import numpy as np
import onnx
import pytest

from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.heads import CLEAN_DB, heads
from relu_deploy.int8.place import place


def found(body: str, outputs: str, opset: int = 17):
    """The heads of a network of two inputs, and what its outputs are on samples."""
    text = (
        f'<ir_version: 8, opset_import: ["": {opset}]> g (float[2, 4, 6] x, float[2, 4, 6] u) => ({outputs}) {{{body}}}'
    )
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
    files.name_nodes(model.graph)
    graph, number = files.import_graph(model), number_format("ort")
    draft = Draft(graph, model, place(graph, (), number), {}, number)
    measured = heads(draft)
    rng = np.random.default_rng(0)
    feed = {value.name: rng.normal(size=(2, 4, 6)).astype(np.float32) for value in model.graph.input}
    part = files.export_graph(measured.graph, model)
    session = open_session(part)
    feed = {value.name: feed[value.name] for value in session.get_inputs()}
    names = [value.name for value in part.graph.output]
    return measured, dict(zip(names, session.run(names, feed), strict=True)), feed, graph


def softmax(values, axis):
    raised = np.exp(values - values.max(axis=axis, keepdims=True))
    return raised / raised.sum(axis=axis, keepdims=True)


@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("axis", [-1, 1])
def test_scores_are_measured_in_front_of_a_last_softmax(axis, opset):
    measured, values, feed, _ = found(f"a = Tanh(x) y = Softmax<axis = {axis}>(a)", "float[2, 4, 6] y", opset)
    assert measured.parts == (("y/part",),)
    scores = np.tanh(feed["x"])
    np.testing.assert_allclose(values["y/part"], scores - scores.mean(axis=axis, keepdims=True), atol=1e-6)
    assert "Softmax" not in {node.op for node in measured.graph.nodes}


@pytest.mark.parametrize("body", [
    "a = Softmax(x) y = Mul(a, a)",
    "a = Softmax(x) y = Add(a, u)",
    "a = Softmax(x) b = Relu(x) y = MatMul(a, b)",
])  # fmt: skip
def test_a_softmax_in_the_middle_stays(body):
    if "MatMul" in body:
        body = "a = Softmax(x) b = Transpose<perm = [0, 2, 1]>(x) y = MatMul(a, b)"
    measured, _, _, _ = found(body, "float[a, b, c] y")
    assert "Softmax" in {node.op for node in measured.graph.nodes}
    assert measured.parts == (("y/part",),)


def test_a_moved_softmax_is_seen_through():
    measured, values, feed, _ = found("a = Softmax(x) y = Transpose<perm = [0, 2, 1]>(a)", "float[2, 6, 4] y")
    assert measured.parts == (("a/part",),)
    assert values["a/part"].shape == feed["x"].shape


def test_boxes_and_scores_are_apart_and_levels_together():
    level = "b{0} = Mul({1}, {1}) s{0} = Sigmoid({1}) l{0} = Concat<axis = 1>(b{0}, s{0}) "
    body = (
        level.format(0, "x") + level.format(1, "u") + "c = Concat<axis = 2>(l0, l1) y = Transpose<perm = [0, 2, 1]>(c)"
    )
    measured, _, _, _ = found(body, "float[2, 12, 8] y")
    assert measured.parts == (("b0/part", "b1/part"), ("s0/part", "s1/part"))


def test_of_a_choice_the_scores_are_measured():
    measured, values, feed, _ = found("a = Tanh(x) y = ArgMax<axis = 1, keepdims = 0>(a)", "int64[2, 6] y")
    assert measured.parts == (("a/part",),)
    np.testing.assert_allclose(values["a/part"], np.tanh(feed["x"]), atol=1e-6)


def test_outputs_that_no_floats_decide_are_left_out():
    measured, _, _, _ = found(
        "a = Tanh(x) s = Shape(x) y = Identity(a) z = Identity(s)", "float[2, 4, 6] y, int64[3] z"
    )
    assert measured.parts == (("y/part",),)


def test_the_draft_is_not_changed():
    _, _, _, graph = found("a = Tanh(x) y = Softmax(a)", "float[2, 4, 6] y")
    assert [node.op for node in graph.nodes] == ["Tanh", "Softmax"]
    assert [tensor.name for tensor in graph.outputs] == ["y"]


def test_the_worst_part_counts_and_levels_add_up():
    level = "b{0} = Mul({1}, {1}) s{0} = Sigmoid({1}) l{0} = Concat<axis = 1>(b{0}, s{0}) "
    body = level.format(0, "x") + level.format(1, "u") + "y = Concat<axis = 2>(l0, l1)"
    measured, values, _, _ = found(body, "float[2, 8, 12] y")
    names = [name for part in measured.parts for name in part]
    ones = {name: np.ones((2, 2), np.float32) for name in names}
    off = dict(ones) | {"s0/part": np.full((2, 2), 1.1, np.float32)}
    assert measured.worst_db([ones], [off]) == pytest.approx(10 * np.log10(8 / 0.04), abs=1e-4)
    assert measured.worst_db([ones], [ones]) == CLEAN_DB
    assert measured.worst_db([ones], [dict(ones) | {"b1/part": np.full((2, 2), np.nan)}]) == -CLEAN_DB
    assert values.keys() == set(names)


def test_infinity_around_scores_is_not_compared():
    measured, _, _, _ = found("a = Tanh(x) y = Mul(a, u)", "float[2, 4, 6] y")
    exact = np.array([3.0, 4.0, -np.inf])
    near = exact + np.array([0.3, 0.4, 0.0])
    assert measured.worst_db([{"y/part": exact}], [{"y/part": near}]) == pytest.approx(20)
    assert measured.worst_db([{"y/part": exact}], [{"y/part": np.array([3.0, 4.0, 7.0])}]) == CLEAN_DB
    assert measured.worst_db([{"y/part": exact}], [{"y/part": np.array([np.nan, 4.0, -np.inf])}]) == -CLEAN_DB
    assert measured.worst_db([{"y/part": exact}], [{"y/part": np.array([-np.inf, 4.0, -np.inf])}]) == -CLEAN_DB
    assert measured.worst_db([{"y/part": np.array([np.nan, 4.0])}], [{"y/part": np.array([np.nan, 4.0])}]) == -CLEAN_DB
