# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""The runner: real models, real exports, size, and what the comparison finds."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import onnx
import pytest

from relu_deploy.errors import CheckFailedError
from relu_deploy.graph import count_ops, import_graph, load_model
from relu_deploy.passes import collapse_relu
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.verify import MOST_NOISE, compare


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(text)


@pytest.mark.models
def test_a_published_silu_network_is_named_and_its_activations_are_left_as_they_are(common_det):
    model = load_model(common_det)
    after, report = rewrite(model)
    passes = {entry.name: entry for entry in report.passes}
    assert passes["collapse_relu"].changed == ()
    assert len(passes["fold_focus"].changed) == 1
    before, left = count_ops(model), count_ops(after)
    assert {op: before[op] - left.get(op, 0) for op in before if before[op] != left.get(op)} == {
        "Slice": 8,
        "Concat": 1,
    }
    reasons = [skip.reason for skip in passes["collapse_relu"].skipped]
    assert sum(reason.startswith("SiLU") for reason in reasons) == 74
    assert sum(reason.startswith("Sigmoid") for reason in reasons) == 6


def chain(length: int) -> onnx.ModelProto:
    """Many blends in a row, each between other elementwise nodes that all belong to one tree."""
    nodes = []
    for i in range(length // 5):
        s, r, p, a = (f"{kind}{i}" for kind in "srpa")
        x = f"x{i}"
        nodes += [
            onnx.helper.make_node("Sigmoid", [x], [s]), onnx.helper.make_node("Relu", [x], [r]),
            onnx.helper.make_node("Mul", [s, "z"], [p]), onnx.helper.make_node("Add", [p, r], [a]),
            onnx.helper.make_node("Mul", [a, "t"], [f"x{i + 1}"]),
        ]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.array(v, np.float32), k) for k, v in (("z", 0.0), ("t", -0.5))]
    info = [onnx.helper.make_tensor_value_info(name, 1, [2]) for name in ("x0", f"x{length // 5}")]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def seconds(length: int) -> float:
    model = chain(length)
    graph = import_graph(model)
    annotate(graph, model)
    start = time.perf_counter()
    assert len(collapse_relu(graph).changed) == length // 5
    return time.perf_counter() - start


def test_time_grows_with_the_size_of_the_graph_and_not_with_its_square():
    # Five times the nodes; a quadratic pass would take 25 times as long, and this machine may be three times slower at will.
    assert seconds(5000) < 15 * max(min(seconds(1000), seconds(1000)), 0.01)


def residual(length: int) -> onnx.ModelProto:
    """Blocks of Conv, BatchNormalization, a blend with ``1 - gamma`` in the graph, and a residual Add."""
    nodes, random = [], np.random.default_rng(0)
    weights = {"w": random.normal(0, 0.2, (4, 4, 3, 3)), "gamma": np.array(0.01)}
    weights |= {name: random.uniform(0.5, 1, 4) for name in ("scale", "shift", "mean", "var")}
    for i in range(length // 8):
        c, n, s, a, r, p, q = (f"{kind}{i}" for kind in "cnsarpq")
        nodes += [
            onnx.helper.make_node("Conv", [f"x{i}", "w"], [c], pads=[1, 1, 1, 1]),
            onnx.helper.make_node("BatchNormalization", [c, "scale", "shift", "mean", "var"], [n]),
            onnx.helper.make_node("Swish", [n], [a]), onnx.helper.make_node("Relu", [n], [r]),
            onnx.helper.make_node("Sub", [a, r], [s]), onnx.helper.make_node("Mul", [s, "gamma"], [p]),
            onnx.helper.make_node("Add", [r, p], [q]), onnx.helper.make_node("Add", [q, f"x{i}"], [f"x{i + 1}"]),
        ]  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items()]
    info = [onnx.helper.make_tensor_value_info(name, 1, ["N", 4, 4, 4]) for name in ("x0", f"x{length // 8}")]
    graph = onnx.helper.make_graph(nodes, "g", info[:1], info[1:], tensors)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 24)], ir_version=10)


def test_five_thousand_nodes_take_seconds():
    """All passes, with a tolerance; some 7 s on two slow processors."""
    model = residual(5000)
    start = time.perf_counter()
    _, report = rewrite(model, verify=False, collapse_tolerance=0.01)
    assert time.perf_counter() - start < 60
    assert report.approximation is not None
    assert len(report.approximation.collapses) == 625


def test_model_local_functions_are_inlined():
    model = parse("""<ir_version: 8, opset_import: ["": 17, "local": 1]>
    g (float[N,4] x) => (float[N,4] y) { y = local.Blend(x) }
    <domain: "local", opset_import: ["": 17]> Blend (x) => (y) {
      z = Constant <value = float {0}> () s = Sigmoid(x) a = Mul(x, s) p = Mul(a, z) r = Relu(x) y = Add(p, r) }""")
    after, report = rewrite(model)
    assert count_ops(after) == {"Relu": 1}
    assert report.passes[0].changed == ("local.Blend",)


def test_subgraphs_are_reported_and_what_they_read_is_kept():
    model = parse("""<ir_version: 8, opset_import: ["": 17]> g (float[3] x, bool c) => (float[3] y) <float z = {0}>
    { k = Max(x, z) i = Identity(k)
      y = If (c) <then_branch = t () => (float[3] a) { a = Neg(i) }, else_branch = e () => (float[3] b) { b = Abs(k) }> }""")
    after, report = rewrite(model)
    assert count_ops(after) == {"Relu": 1, "If": 1}
    assert report.verification is not None
    assert report.verification.outputs[0].error == 0
    assert "If" in report.passes[-1].skipped[0].reason


def test_metadata_opset_and_custom_domains_survive():
    model = parse("""<ir_version: 8, opset_import: ["": 13, "mine": 3], producer_name: "p">
    g (float[3] x) => (float[3] y) <float z = {0}> { k = Max(x, z) y = mine.Thing(k) }""")
    onnx.helper.set_model_props(model, {"author": "somebody"})
    after, report = rewrite(model)
    assert {entry.domain: entry.version for entry in after.opset_import} == {"": 13, "mine": 3}
    assert (after.producer_name, after.metadata_props[0].value, after.ir_version) == ("p", "somebody", 8)
    assert report.verification is not None
    assert report.verification.samples == 0
    assert "mine" in report.verification.note


def test_the_input_model_is_not_touched():
    model = parse(
        '<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) <float z = {0}> { y = Max(x, z) }'
    )
    before = model.SerializeToString()
    after, _ = rewrite(model)
    assert after is not model
    assert model.SerializeToString() == before


def test_integer_inputs_get_tokens_that_a_table_accepts():
    model = parse("""<ir_version: 8, opset_import: ["": 17]> g (int64[B, T] ids) => (float[B, T, 2] y)
    <float[3, 2] table = {1, -2, 3, -4, 5, -6}, float z = {0}> { k = Gather(table, ids) y = Max(k, z) }""")
    after, report = rewrite(model)
    assert count_ops(after) == {"Gather": 1, "Relu": 1}
    assert report.verification is not None
    assert report.verification.samples == 3


BASE = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) {{ {} }}'


def test_the_comparison_finds_a_wrong_network():
    right, wrong = parse(BASE.format("y = Relu(x)")), parse(BASE.format("y = LeakyRelu <alpha = 1e-3> (x)"))
    for exact in (True, False):
        with pytest.raises(CheckFailedError, match="output 'y'"):
            compare(right, wrong, exact=exact)
    close = parse(BASE.format("y = LeakyRelu <alpha = 1e-7> (x)"))
    with pytest.raises(CheckFailedError, match="allowed 0"):
        compare(right, close, exact=True)
    assert compare(right, close, exact=False).outputs[0].error > 0


FAR = """<ir_version: 8, opset_import: ["": 17]> g (float[4, 4] x) => (float[4, 4] y)
<float c = {{{}}}, float d = {{{}}}> {{ a = Sub(x, c) b = Sub(a, d) y = Sigmoid(b) }}"""


def test_a_sigmoid_far_out_is_noise():
    """Its kernel gives multiples of a unit of 1: where all is 1e-7, rounding in front of it changes a part of that."""
    right, same, wrong = (parse(FAR.format(*pair)) for pair in (("16", "0"), ("5.3", "10.7"), ("14", "0")))
    samples = [{"x": np.linspace(-0.5, 0.5, 16, dtype=np.float32).reshape(4, 4)}]
    check = compare(right, same, exact=False, samples=samples)
    assert 1e-4 < check.outputs[0].error <= check.outputs[0].allowed
    with pytest.raises(CheckFailedError, match="output 'y'"):
        compare(right, wrong, exact=False, samples=samples)


def test_a_number_of_hits_that_rounding_changes_is_compared_as_it_is():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[4] x) => (int64[1, N] y) <float one = {1}>
    { m = GreaterOrEqual(x, one) y = NonZero(m) }"""
    same = [{"x": np.array([1, 1, 2, 0], np.float32)}]
    assert compare(parse(text), parse(text), exact=False, samples=same).outputs[0].error == 0


def test_given_samples_are_used():
    right, other = parse(BASE.format("y = Relu(x)")), parse(BASE.format("y = Abs(x)"))
    positive = [{"x": np.ones((1, 4), np.float32)}]
    assert compare(right, other, exact=True, samples=positive).samples == 1
    with pytest.raises(CheckFailedError):
        compare(right, other, exact=True, samples=[{"x": -np.ones((1, 4), np.float32)}])


def test_networks_past_what_a_message_holds_are_compared_too(monkeypatch):
    # Of such a network ByteSize raises instead of answering.
    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", 1 << 24)
    monkeypatch.setattr(onnx.ModelProto, "ByteSize", lambda self: 1 / 0, raising=False)
    after, report = rewrite(parse(BASE.format("y = Max(x, z)").replace("y) {", "y) <float z = {0}> {")))
    assert count_ops(after) == {"Relu": 1}
    assert report.verification is not None
    assert report.verification.samples == 3
    right, wrong = parse(BASE.format("y = Relu(x)")), parse(BASE.format("y = Abs(x)"))
    with pytest.raises(CheckFailedError, match="output 'y'"):
        compare(right, wrong, exact=True)


PRODUCTS = {
    "MatMul": ("y = MatMul(x, t)", {"w": (128, 96)}, (1, 128)),
    "Gemm": ("y = Gemm(x, t)", {"w": (128, 96)}, (1, 128)),
    "LSTM": ("y, h = LSTM<hidden_size = 64>(x, t, r)", {"w": (1, 256, 32), "r": (1, 256, 64)}, (5, 1, 32)),
    "GRU": ("y, h = GRU<hidden_size = 64>(x, t, r)", {"w": (1, 192, 32), "r": (1, 192, 64)}, (5, 1, 32)),
}


@pytest.mark.parametrize("op", PRODUCTS)
def test_weights_that_were_computed_may_be_stored_though_runtimes_sum_them_in_another_order(op):
    """As exporters leave them that fold nothing; a product with stored weights differs in the last bits."""
    body, shapes, shape = PRODUCTS[op]
    rng = np.random.default_rng(0)
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float[{", ".join(map(str, shape))}] x) => (float[] y)'
    model = parse(f"{text} {{ n = Neg(w) t = Neg(n) {body} }}")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    for name, sizes in shapes.items():
        values = rng.normal(size=sizes).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    model = onnx.shape_inference.infer_shapes(model)
    after, report = rewrite(model, seed=1)
    assert [node.op_type for node in after.graph.node] == [op]
    assert not report.exact
    assert report.verification is not None
    assert 0 < report.verification.outputs[0].allowed <= MOST_NOISE
    twice = rewrite(after)[1]
    assert twice.exact
    assert not twice.changed


def test_reports_are_frozen():
    report = rewrite(parse(BASE.format("y = Relu(x)")))[1]
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.exact = False


def test_quantised_networks_pass_through():
    model = parse("""<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 4] y)
    <float s = {0.1}, uint8 zp = {0}, float z = {0}>
    { a = Max(x, z) q = QuantizeLinear(a, s, zp) d = DequantizeLinear(q, s, zp) y = Tanh(d) }""")
    after, report = rewrite(model)
    assert count_ops(after) == {"Relu": 1, "QuantizeLinear": 1, "DequantizeLinear": 1, "Tanh": 1}
    assert report.exact
