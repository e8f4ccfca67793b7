# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""An If whose condition is known becomes the branch that is taken; outputs that nobody reads go."""

from __future__ import annotations

import numpy as np
import pytest

from relu_deploy.graph import check_model, count_ops, export_graph, import_graph
from relu_deploy.passes import remove_dead_nodes
from relu_deploy.passes.branches import inline_branches
from relu_deploy.passes.run import rewrite

IF = "If ({}) <then_branch = t () => (float[3] {a}) {{ {then} }}, else_branch = e () => (float[3] {b}) {{ {other} }}>"


def branch(condition, then="a = Neg(k)", other="b = Abs(k)", *, a="a", b="b"):
    return IF.format(condition, then=then, other=other, a=a, b=b)


@pytest.mark.parametrize(("condition", "left"), [(True, "Neg"), (False, "Abs")])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_branch_that_is_taken_stays(parse, prove, condition, left, shape):
    model = parse(f"(float[3] x) => (float[3] y) {{ k = Sin(x) y = {branch('c')} }}", c=np.full(shape, condition))
    after, report = prove(model, inline_branches, within=0)
    assert report.changed == ("If_1",)
    assert count_ops(after) == {"Sin": 1, left: 1}
    assert count_ops(rewrite(model)[0]) == {"Sin": 1, left: 1}


def test_branches_that_use_the_same_names_do_not_meet(parse, prove):
    body = f"k = Sin(x) u = {branch('c', 'h = Exp(k) a = Neg(h)')} v = {branch('d', 'a = Neg(k)', 'h = Exp(k) b = Cos(h)')} h = Add(u, v) y = Abs(h)"
    model = parse(f"(float[3] x) => (float[3] y) {{ {body} }}", c=np.array(True), d=np.array(False))
    after, _ = prove(model, inline_branches, within=0)
    assert count_ops(after) == {"Sin": 1, "Exp": 2, "Neg": 1, "Cos": 1, "Add": 1, "Abs": 1}


def test_a_branch_inside_a_branch(parse, prove):
    inner = branch("c", "p = Exp(k)", "q = Neg(k)", a="p", b="q")
    model = parse(
        f"(float[3] x) => (float[3] y) {{ k = Sin(x) y = {branch('c', f'h = {inner} a = Cos(h)')} }}", c=np.array(True)
    )
    after, report = prove(model, inline_branches, within=0)
    assert len(report.changed) == 2
    assert count_ops(after) == {"Sin": 1, "Exp": 1, "Cos": 1}


def test_a_live_if_inside_the_branch_that_is_taken_stays(parse, prove):
    inner = branch("live", "p = Exp(h)", "q = Neg(h)", a="p", b="q")
    model = parse(
        f"(float[3] x, bool live) => (float[3] y) {{ k = Sin(x) y = {branch('c', f'h = Cos(k) a = {inner}')} }}",
        c=np.array(True),
    )
    after, _ = prove(model, inline_branches, within=0)
    assert count_ops(after) == {"Sin": 1, "Cos": 1, "If": 1}


def test_constants_of_the_branch_come_along(parse, prove):
    body = "w = Constant <value = float[3] {1, 2, 3}> () h = Mul(k, w) a = Add(h, outer)"
    model = parse(
        f"(float[3] x) => (float[3] y) {{ k = Sin(x) y = {branch('c', body)} }}",
        c=np.array(True),
        outer=np.float32(0.5),
    )
    after, _ = prove(model, inline_branches, within=0)
    assert count_ops(after)["Mul"] == 1
    assert count_ops(rewrite(model)[0]) == {"Sin": 1, "Mul": 1, "Add": 1}


def test_several_results_some_of_them_unread(parse, prove):
    node = "If (c) <then_branch = t () => (float[3] a, float[3] b) { a = Neg(k) b = Exp(k) }, else_branch = e () => (float[3] d, float[3] f) { d = Abs(k) f = Cos(k) }>"
    model = parse(f"(float[3] x) => (float[3] y) {{ k = Sin(x) y, z = {node} }}", c=np.array(False))
    prove(model, inline_branches, within=0)
    assert count_ops(rewrite(model)[0]) == {"Sin": 1, "Abs": 1}


def test_what_the_branch_has_not_made_or_hands_on_twice_is_handed_on(parse, prove):
    node = "If (c) <then_branch = t () => (float[3] a, float[3] b, float[3] d) { a = Exp(k) b = Neg(a) d = Identity(b) }, else_branch = e () => (float[3] p, float[3] q, float[3] r) { p = Abs(k) q = Abs(k) r = Abs(k) }>"
    model = parse(
        f"(float[3] x) => (float[3] y, float[3] z, float[3] u) {{ k = Sin(x) y, z, u = {node} }}", c=np.array(True)
    )
    prove(model, inline_branches, within=0)
    inner = model.graph.node[1].attribute[0].g
    inner.output[2].name = "b"  # twice
    del inner.node[2]
    graph = import_graph(model)
    assert inline_branches(graph).changed == ("If_1",)
    after = export_graph(graph, model)
    check_model(after, "the rewritten model")
    assert count_ops(after) == {"Sin": 1, "Exp": 1, "Neg": 1, "Identity": 2}


def test_a_condition_that_is_computed_from_constants(parse):
    model = parse(
        f"(float[3] x) => (float[3] y) {{ k = Sin(x) s = Shape(x) n = Size(s) g = Greater(n, zero) y = {branch('g')} }}",
        zero=np.int64(0),
    )
    after, report = rewrite(model)
    assert count_ops(after) == {"Sin": 1, "Neg": 1}
    assert report.exact


def test_a_live_condition_stays(parse, prove):
    model = parse(f"(float[3] x, bool c) => (float[3] y) {{ k = Sin(x) y = {branch('c')} }}")
    assert prove(model, inline_branches, within=0)[1].changed == ()


UNREAD = {
    "MaxPool": ("float[1, 2, 4] x", "y, at = MaxPool <kernel_shape = [2]> (x)", 1),
    "Dropout": ("float[1, 2, 4] x", "y, mask = Dropout(x)", 1),
    "LSTM": ("float[5, 1, 6] x", "y, h, c = LSTM <hidden_size = 2> (x, w, r)", 1),
    "LSTM, the last state": ("float[5, 1, 6] x", "a, y, c = LSTM <hidden_size = 2> (x, w, r)", 2),
    "TopK": ("float[5] x", "y, at = TopK(x, two)", 2),
    "Split": ("float[4] x", "y, z = Split <axis = 0> (x)", 2),
}


@pytest.mark.parametrize("op", UNREAD)
def test_optional_outputs_that_nobody_reads_go(parse, prove, op):
    inputs, call, left = UNREAD[op]
    constants = {"w": np.ones((1, 8, 6), np.float32), "r": np.ones((1, 8, 2), np.float32), "two": np.array([2])}
    used = {name: values for name, values in constants.items() if f", {name}" in call}
    rank = "A, B, C, D" if op == "LSTM" else "A, B, C" if inputs.count(",") else "A"
    after, report = prove(parse(f"({inputs}) => (float[{rank}] y) {{ {call} }}", **used), remove_dead_nodes, within=0)
    (node,) = after.graph.node
    assert len(node.output) == left
    assert len(report.changed) == (left < call.partition("=")[0].count(",") + 1)


def test_outputs_that_are_read_anywhere_stay(parse):
    model = parse(
        "(float[1, 2, 4] x) => (float[1, 2, 3] y, int64[1, 2, 3] at) { y, at = MaxPool <kernel_shape = [2]> (x) }"
    )
    assert remove_dead_nodes(import_graph(model)).changed == ()
