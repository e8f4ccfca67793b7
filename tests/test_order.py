"""Files whose nodes are out of order are read as runtimes read them."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.errors import ModelError
from relu_deploy.graph import load_model
from relu_deploy.order import sort_nodes

CHAIN = """<ir_version: 8, opset_import: ["": 17]> g (float[N] x) => (float[N] y)
{ [a] t0 = Neg(x) [b] t1 = Abs(t0) [c] t2 = Add(t1, t0) [d] t3 = Exp(t2) [e] y = Mul(t3, t1) }"""
BRANCHES = """<ir_version: 8, opset_import: ["": 17]> g (float[N] x, bool c) => (float[N] y)
{ [k] k = Neg(x)
  [if] y = If<then_branch = t () => (float[N] p) { [q] q = Abs(k) [p] p = Exp(q) },
              else_branch = e () => (float[N] r) { [r] r = Identity(k) }>(c) }"""


def shuffled(model: onnx.ModelProto, order) -> onnx.ModelProto:
    nodes = [onnx.NodeProto.FromString(model.graph.node[at].SerializeToString()) for at in order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


@given(st.permutations(range(5)))
def test_any_order_of_a_chain_becomes_the_one(order):
    model = shuffled(onnx.parser.parse_model(CHAIN), order)
    sort_nodes(model.graph)
    onnx.checker.check_model(model)
    assert [node.name for node in model.graph.node] == list("abcde")


def test_nodes_that_need_not_move_stay_in_their_order():
    text = CHAIN.replace("[a] t0 = Neg(x)", "[s] s = Sin(x) [a] t0 = Neg(x)").replace("Mul(t3, t1)", "Sum(t3, t1, s)")
    model = onnx.parser.parse_model(text)
    before = model.SerializeToString(deterministic=True)
    sort_nodes(model.graph)
    assert model.SerializeToString(deterministic=True) == before
    shuffled(model, [0, 2, 1, 3, 4, 5])
    sort_nodes(model.graph)
    assert model.SerializeToString(deterministic=True) == before


def test_what_branches_read_comes_before_them_and_branches_are_sorted_inside():
    model = shuffled(onnx.parser.parse_model(BRANCHES), [1, 0])
    then = model.graph.node[0].attribute[0].g
    inner = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(then.node)]
    del then.node[:]
    then.node.extend(inner)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(model)
    sort_nodes(model.graph)
    onnx.checker.check_model(model)
    assert [node.name for node in model.graph.node] == ["k", "if"]
    assert [node.name for node in model.graph.node[1].attribute[0].g.node] == ["q", "p"]


def test_a_file_out_of_order_is_loaded_and_computes_what_it_did(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(shuffled(onnx.parser.parse_model(CHAIN), [4, 2, 3, 0, 1]).SerializeToString())
    x = np.array([-2.0, 0.5, 3.0], np.float32)
    feeds = {"x": x}
    wanted = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    loaded = load_model(path).SerializeToString()
    found = ort.InferenceSession(loaded, providers=["CPUExecutionProvider"]).run(None, feeds)
    assert np.array_equal(wanted, found)


def test_a_cycle_is_still_an_error(tmp_path):
    path = tmp_path / "m.onnx"
    model = onnx.parser.parse_model(CHAIN)
    model.graph.node[0].input[0] = "t3"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        load_model(path)
