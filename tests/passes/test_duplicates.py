# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Equal initializers and equal nodes become one; what only looks equal does not."""

from __future__ import annotations

import gc
import time

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from relu_deploy.graph import count_ops, export_graph, import_graph
from relu_deploy.passes.duplicates import merge_duplicates
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate

RNG = np.random.default_rng(6)


def f32(*values):
    return np.array(values, np.float32)


def initializers(model):
    return {tensor.name for tensor in model.graph.initializer}


def test_equal_weights_are_one(parse, prove):
    weight = RNG.normal(size=(3, 3)).astype(np.float32)
    model = parse(
        "(float[N, 3] x) => (float[N, 3] y) { a = MatMul(x, v) b = Add(a, s) c = MatMul(b, w) y = Mul(c, t) }",
        v=weight,
        w=weight.copy(),
        s=f32(0.5),
        t=f32(0.5),
    )
    after, report = prove(model, merge_duplicates, within=0)
    assert report.changed == ("w", "t")
    assert initializers(after) == {"v", "s"}


DIFFERENT = {
    "sign of zero": (f32(0.0, 1), f32(-0.0, 1)),
    "bits of NaN": (
        np.array([0x7FC00000], np.uint32).view(np.float32),
        np.array([0x7FC00001], np.uint32).view(np.float32),
    ),
    "type": (f32(0, 0), np.zeros(2, np.int32)),
    "shape": (f32(1, 2), f32(1, 2).reshape(1, 2)),
    "value": (f32(1, 2), f32(1, 3)),
    "the last of many": (np.zeros(100000, np.float32), np.append(np.zeros(99999, np.float32), np.float32(1))),
    "the order of its bytes": (
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(6, dtype=np.float32).reshape(3, 2).T.copy(),
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_stays_two(parse, what):
    first, second = DIFFERENT[what]
    kinds = [
        helper.tensor_dtype_to_string(helper.np_dtype_to_tensor_dtype(v.dtype)).rpartition(".")[2].lower()
        for v in (first, second)
    ]
    shapes = [", ".join(map(str, v.shape)) for v in (first, second)]
    model = parse(
        f"() => ({kinds[0]}[{shapes[0]}] y, {kinds[1]}[{shapes[1]}] z) {{ y = Abs(p) z = Abs(q) }}", p=first, q=second
    )
    graph = import_graph(model)
    annotate(graph, model)
    assert merge_duplicates(graph).changed == ()


def test_equal_nans_and_empty_tensors_are_one(parse):
    nan = np.array([np.nan, 1], np.float32)
    model = parse(
        "() => (float[2] y, float[2] z, float[0] a, float[0] b) { y = Abs(p) z = Neg(q) a = Abs(e) b = Neg(f) }",
        p=nan,
        q=nan.copy(),
        e=f32(),
        f=f32(),
    )
    assert merge_duplicates(import_graph(model)).changed == ("q", "f")


def test_types_that_numpy_has_not_are_compared_as_they_are(parse):
    model = parse(
        "(bfloat16[2] x, bfloat16[2] p, bfloat16[2] q, bfloat16[2] r) => (bfloat16[2] y) { a = Add(x, p) b = Sub(a, q) y = Mul(b, r) }"
    )
    for name, bits in (("p", (1, 2)), ("q", (1, 2)), ("r", (1, 3))):
        raw = np.array(bits, np.uint16).tobytes()
        model.graph.initializer.append(TensorProto(name=name, data_type=TensorProto.BFLOAT16, dims=[2], raw_data=raw))
    del model.graph.input[1:]
    graph = import_graph(model)
    assert merge_duplicates(graph).changed == ("q",)
    kept = {tensor.name: tensor for tensor in export_graph(graph, model).graph.initializer}
    assert {name: (t.data_type, t.raw_data) for name, t in kept.items()} == {
        t.name: (t.data_type, t.raw_data) for t in model.graph.initializer if t.name != "q"
    }


def test_strings_are_left_alone(parse):
    model = parse(
        "() => (string[1] y, string[1] z) { y = Identity(p) z = Identity(q) }",
        p=np.array(["a"], object),
        q=np.array(["b"], object),
    )
    assert merge_duplicates(import_graph(model)).changed == ()


def test_an_initializer_that_is_an_output_keeps_its_name(parse):
    model = parse(
        "(float[2] x) => (float[2] y, float[2] p, float[2] q) { a = Add(x, p) y = Mul(a, q) }", p=f32(1, 2), q=f32(1, 2)
    )
    graph = import_graph(model)
    assert merge_duplicates(graph).changed == ()
    after = export_graph(graph, model)
    onnx.checker.check_model(after, full_check=True)
    assert initializers(after) == {"p", "q"}


def test_what_a_branch_reads_is_kept_for_it(parse, prove):
    model = parse(
        "(float[2] x, bool c) => (float[2] y, float[2] z) { a = Add(x, p) z = Add(x, q) "
        "y = If (c) <then_branch = t () => (float[2] u) { u = Mul(z, q) }, else_branch = e () => (float[2] v) { v = Sub(a, q) }> }",
        p=f32(1, 2), q=f32(1, 2),
    )  # fmt: skip
    after, report = prove(model, merge_duplicates, within=0)
    assert report.changed == ("q",)
    assert count_ops(after)["Add"] == 2  # z is an output, and has its name


def test_equal_nodes_and_what_is_behind_them(parse, prove, ops):
    model = parse(
        "(float[2, 3] x) => (float[3, 2] y) { a = Transpose(x) b = Transpose(x) c = Add(a, p) d = Add(b, q) e = Mul(c, d) f = Add(q, b) y = Sub(e, f) }",
        p=f32(1, 2), q=f32(1, 2),
    )  # fmt: skip
    after, report = prove(model, merge_duplicates, within=0)
    # operands the other way round are not compared
    assert sorted(ops(after)) == ["Add", "Add", "Mul", "Sub", "Transpose"]
    assert len(report.changed) == 3


NOT_EQUAL = {
    "attributes": "a = Softmax <axis = 0> (x) b = Softmax <axis = 1> (x)",
    "sign of an attribute": "a = LeakyRelu <alpha = 0.0> (x) b = LeakyRelu <alpha = -0.0> (x)",
    "draws": "a = RandomNormalLike(x) b = RandomNormalLike(x)",
    "draws that depend": "a = Bernoulli <dtype = 1> (p) b = Bernoulli <dtype = 1> (p)",
    "types": "c = Cast <to = 10> (x) d = Cast <to = 11> (x) a = Cast <to = 1> (c) b = Cast <to = 1> (d)",
    "number of outputs": "s = Sigmoid(x) a, i = MaxPool <kernel_shape = [1]> (s3) b = MaxPool <kernel_shape = [1]> (s3)".replace(
        "s3", "x3"
    ),
    "quantisers": "q = QuantizeLinear(x, s) r = QuantizeLinear(x, s) a = DequantizeLinear(q, s) b = DequantizeLinear(r, s)",
}


@pytest.mark.parametrize("what", NOT_EQUAL)
def test_nodes_that_differ_stay_two(parse, what):
    body = NOT_EQUAL[what]
    inputs = "float[1, 2, 3] x3" if "x3" in body else "float[2, 3] x"
    body = body.replace("s = Sigmoid(x) ", "")
    body = f"p = Sigmoid(x) {body}" if "Bernoulli" in body else body
    shape = "1, 2, 3" if "x3" in body else "2, 3"
    model = parse(
        f"({inputs}) => (float[{shape}] y) {{ {body} y = Sub(a, b) }}",
        **({"s": np.float32(0.5)} if "Quant" in body else {}),
    )
    assert merge_duplicates(import_graph(model)).changed == ()


def test_foreign_operators_and_graphs_are_not_compared():
    text = """<ir_version: 8, opset_import: ["": 17, "mine": 1]> g (float[2] x, bool c) => (float[2] y) {
      a = mine.Thing(x) b = mine.Thing(x)
      d = If (c) <then_branch = t () => (float[2] u) { u = Neg(x) }, else_branch = e () => (float[2] v) { v = Abs(x) }>
      f = If (c) <then_branch = t2 () => (float[2] u2) { u2 = Neg(x) }, else_branch = e2 () => (float[2] v2) { v2 = Abs(x) }>
      y = Sum(a, b, d, f) }"""
    assert merge_duplicates(import_graph(onnx.parser.parse_model(text))).changed == ()


def test_merged_weights_are_copied_by_a_pass_that_changes_one(parse):
    """Two layers with equal weights, a normalisation behind one of them: the other keeps its own."""
    weight = RNG.normal(size=(4, 4)).astype(np.float32)
    model = parse(
        "(float[N, 4] x) => (float[N, 4] y) { a = Gemm(x, v) b = Mul(a, s) c = Relu(b) d = Gemm(c, w) y = Relu(d) }",
        v=weight,
        w=weight.copy(),
        s=f32(1, 2, 3, 4),
    )
    after, report = rewrite(model)
    assert count_ops(after) == {"Gemm": 2, "Relu": 2}
    assert report.verification is not None
    assert report.verification.outputs[0].error < 1e-6  # a few units of roundoff of float32
    values = [numpy_helper.to_array(tensor) for tensor in after.graph.initializer if tensor.dims == [4, 4]]
    assert any(np.array_equal(value, weight) for value in values)


def many(count: int) -> onnx.ModelProto:
    """One constant for each of many nodes, all equal."""
    nodes = [helper.make_node("Add", [f"x{i}", f"c{i}"], [f"x{i + 1}"]) for i in range(count)]
    tensors = [numpy_helper.from_array(f32(1, 2), f"c{i}") for i in range(count)]
    info = [helper.make_tensor_value_info(name, 1, [2]) for name in ("x0", f"x{count}")]
    return helper.make_model(
        helper.make_graph(nodes, "g", info[:1], info[1:], tensors),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )


def seconds(count: int) -> float:
    """Of this process, the quicker of two runs, without the collector, which looks at all that other tests left."""
    found = []
    for _ in range(2):
        graph = import_graph(many(count))
        gc.collect()
        gc.disable()
        try:
            start = time.process_time()
            assert len(merge_duplicates(graph).changed) == count - 1
            found.append(time.process_time() - start)
        finally:
            gc.enable()
    return min(found)


def test_time_grows_with_the_number_of_readers_and_not_with_its_square():
    # Eight times the nodes; a quadratic pass would take 64 times as long, and this machine may be three times slower at will.
    assert seconds(8000) < 24 * max(seconds(1000), 0.01)
