import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from relu_deploy.distinct import make_distinct
from relu_deploy.graph import export_graph, import_graph

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[2] x) => (float[2] z) <float[2] k = {1, 2}>
{ [a] y = Add(x, k) [b] z = Mul(y, k) }"""


@pytest.fixture
def graph():
    return import_graph(onnx.parser.parse_model(MODEL))


def values(model):
    return {t.name: onnx.numpy_helper.to_array(t).tolist() for t in model.graph.initializer}


def add_to_output(graph, constant, made="new"):
    """Append ``Sub(z, constant)`` whose result, named ``made``, becomes the output."""
    out = gs.Variable(made, dtype=np.float32, shape=(2,))
    graph.nodes.append(gs.Node("Sub", "c", inputs=[graph.outputs[0], constant], outputs=[out]))
    graph.outputs = [out]


def test_a_new_constant_does_not_take_the_place_of_an_old_one(graph):
    add_to_output(graph, gs.Constant("k", np.array([7, 8], np.float32)))
    model = export_graph(graph, onnx.parser.parse_model(MODEL))
    onnx.checker.check_model(model, full_check=True)
    assert values(model) == {"k": [1, 2], "k_1": [7, 8]}
    assert [list(n.input) for n in model.graph.node] == [["x", "k"], ["y", "k"], ["z", "k_1"]]


@pytest.mark.parametrize("name", ["x", "y", "z"])
def test_a_new_constant_does_not_take_the_place_of_an_activation(graph, name):
    add_to_output(graph, gs.Constant(name, np.array([7, 8], np.float32)))
    model = export_graph(graph, onnx.parser.parse_model(MODEL))
    onnx.checker.check_model(model, full_check=True)
    assert [list(n.output) for n in model.graph.node] == [["y"], ["z"], ["new"]]
    assert values(model)[f"{name}_1"] == [7, 8]


def test_the_older_of_two_activations_keeps_its_name_and_an_output_keeps_it_in_any_case(graph):
    add_to_output(graph, gs.Constant("k2", np.array([7, 8], np.float32)), made="y")
    assert make_distinct(graph) == ("y_1",)
    assert [[t.name for t in n.outputs] for n in graph.nodes] == [["y_1"], ["z"], ["y"]]


def test_constants_of_equal_bits_stay_one(graph):
    add_to_output(graph, gs.Constant("k", np.array([1, 2], np.float32)))
    assert make_distinct(graph) == ()
    nan = gs.Constant("n", np.array([np.nan, -0.0], np.float32))
    add_to_output(graph, nan, made="new2")
    add_to_output(graph, gs.Constant("n", nan.values.copy()), made="new3")
    assert make_distinct(graph) == ()
    add_to_output(graph, gs.Constant("n", np.array([np.nan, 0.0], np.float32)), made="new4")
    assert make_distinct(graph) == ("n_1",)
    assert make_distinct(graph) == ()


def test_a_name_that_is_taken_is_not_given(graph):
    add_to_output(graph, gs.Constant("k_1", np.array([5, 5], np.float32)), made="k_2")
    add_to_output(graph, gs.Constant("k", np.array([7, 8], np.float32)))
    assert make_distinct(graph) == ("k_3",)


INNER = """<ir_version: 8, opset_import: ["": 17]>
g (float[2] x, bool c) => (float[2] z) <float[2] k = {1, 2}>
{ y = Add(x, k)
  z = If(c) <then_branch = t () => (float[2] tz) { h = Mul(y, k) tz = Relu(h) },
             else_branch = e () => (float[2] ez) { ez = Neg(y) }> }"""


def test_tensors_inside_nodes_count_and_keep_what_they_refer_to():
    graph = import_graph(onnx.parser.parse_model(INNER))
    assert make_distinct(graph) == ()
    add_to_output(graph, gs.Constant("h", np.array([7, 8], np.float32)))
    assert make_distinct(graph) == ("h_1",)
    model = export_graph(graph, onnx.parser.parse_model(INNER))
    onnx.checker.check_model(model, full_check=True)
    body = next(a.g for n in model.graph.node if n.op_type == "If" for a in n.attribute if a.name == "then_branch")
    assert [list(n.input) for n in body.node] == [["y", "k"], ["h"]]
