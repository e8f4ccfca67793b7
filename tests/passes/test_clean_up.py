# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""BatchNormalization, constants, identities, dead nodes: each changes what it should, and says why it does not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from relu_deploy.graph import import_graph
from relu_deploy.passes import fold_batchnorm, fold_constants, remove_dead_nodes, remove_identities
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate
from relu_deploy.report import PassReport


def network(
    nodes, tensors, *, inputs=(("x", (2, 4, 5, 5)),), outputs=("y",), opset=17, kind=np.float32
) -> onnx.ModelProto:
    random = np.random.default_rng(0)
    given = [
        onnx.numpy_helper.from_array(
            np.asarray(value if not isinstance(value, tuple) else random.uniform(0.5, 1.5, value)).astype(
                getattr(value, "dtype", kind) if isinstance(value, np.ndarray) else kind
            ),
            name,
        )
        for name, value in tensors.items()
    ]
    number = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    graph = onnx.helper.make_graph(
        nodes,
        "g",
        [onnx.helper.make_tensor_value_info(name, number, shape) for name, shape in inputs],
        [onnx.helper.make_tensor_value_info(name, number, None) for name in outputs],
        given,
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)


def node(op, inputs, output="y", **attributes):
    return onnx.helper.make_node(
        op, inputs, [output] if isinstance(output, str) else output, name=op.lower(), **attributes
    )


BN = ["scale", "shift", "mean", "var"]
STATISTICS = dict.fromkeys(BN, (6,))
LAYERS = {
    "conv": (node("Conv", ["x", "w"], "k"), {"w": (6, 4, 3, 3)}, (2, 4, 5, 5)),
    "conv with bias": (node("Conv", ["x", "w", "b"], "k"), {"w": (6, 4, 3, 3), "b": (6,)}, (2, 4, 5, 5)),
    "grouped conv": (node("Conv", ["x", "w"], "k", group=2), {"w": (6, 2, 3, 3)}, (2, 4, 5, 5)),
    "transposed": (node("ConvTranspose", ["x", "w"], "k"), {"w": (4, 6, 3, 3)}, (2, 4, 5, 5)),
    "grouped transposed": (node("ConvTranspose", ["x", "w"], "k", group=2), {"w": (4, 3, 3, 3)}, (2, 4, 5, 5)),
    "1-d": (node("Conv", ["x", "w"], "k"), {"w": (6, 4, 3)}, (2, 4, 5)),
    "gemm": (node("Gemm", ["x", "w", "b"], "k", alpha=0.5, beta=2.0), {"w": (4, 6), "b": (1, 6)}, (2, 4)),
    "gemm transposed": (node("Gemm", ["x", "w"], "k", transB=1), {"w": (6, 4)}, (2, 4)),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_batchnorm_folds_into_every_layer(layer):
    first, tensors, shape = LAYERS[layer]
    norm = node("BatchNormalization", ["k", *BN], epsilon=0.25)
    before = network([first, norm], {**tensors, **STATISTICS}, inputs=[("x", shape)])
    after, report = rewrite(before)
    assert [n.op_type for n in after.graph.node] == [first.op_type]
    assert report.verification is not None
    # A few units of float32 roundoff: two layers deep, nothing amplifies it.
    assert report.verification.outputs[0].error < 1e-6
    assert rewrite(after)[0] is after


def test_shared_weights_are_copied():
    nodes = [
        node("Conv", ["x", "w"], "k"),
        node("BatchNormalization", ["k", *BN]),
        onnx.helper.make_node("Conv", ["x", "w"], ["v"]),
    ]
    before = network(nodes, {"w": (6, 4, 3, 3), **STATISTICS}, outputs=("y", "v"))
    after, report = rewrite(before)
    assert report.passes[2].changed == ("batchnormalization",)
    assert len(after.graph.node) == 2
    assert report.verification is not None
    assert report.verification.outputs[1].error == 0


def fold(model: onnx.ModelProto, function) -> PassReport:
    graph = import_graph(model)
    annotate(graph, model)
    return function(graph)


REFUSALS = {
    "used elsewhere": ([node("Conv", ["x", "w"], "k"), node("BatchNormalization", ["k", *BN]), node("Relu", ["k"], "v")], ("y", "v")),
    "no Conv": ([node("Relu", ["x"], "k"), node("BatchNormalization", ["k", *BN])], ("y",)),
    "training mode": ([node("Conv", ["x", "w"], "k"),
                       node("BatchNormalization", ["k", *BN], ["y", "m", "v"], training_mode=1)], ("y", "m", "v")),
    "not a constant": ([node("Identity", ["u"], "p"), node("Conv", ["x", "p"], "k"), node("BatchNormalization", ["k", *BN])], ("y",)),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSALS)
def test_batchnorm_refusals(reason):
    nodes, outputs = REFUSALS[reason]
    inputs = [("x", (2, 4, 5, 5)), ("u", (6, 4, 3, 3))]
    statistics = dict.fromkeys(BN, (4 if reason == "no Conv" else 6,))
    model = network(nodes, {"w": (6, 4, 3, 3), **statistics}, outputs=outputs, inputs=inputs)
    report = fold(model, fold_batchnorm)
    assert report.changed == ()
    assert reason in report.skipped[0].reason


def test_negative_variance_and_float16_overflow_are_refused():
    nodes = [node("Conv", ["x", "w"], "k"), node("BatchNormalization", ["k", *BN])]
    tensors = {"w": (6, 4, 3, 3), **STATISTICS, "var": np.full(6, -1.0, np.float32)}
    assert "negative" in fold(network(nodes, tensors), fold_batchnorm).skipped[0].reason
    large = {"w": (6, 4, 3, 3), **STATISTICS, "scale": np.full(6, 60000.0, np.float16)}
    large["var"] = np.full(6, 1e-4, np.float16)
    report = fold(network(nodes, large, kind=np.float16), fold_batchnorm)
    assert "do not fit into float16" in report.skipped[0].reason


def test_constants_fold_and_large_results_do_not():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x) => (float[2,3] y, float[1024,1024] w, float[6] v)
    <float gamma = {0.25}, float one = {1}, int64[2] big = {1024, 1024}, int64[1] flat = {-1}>
    { k = Sub(one, gamma) y = Mul(x, k) m = ConstantOfShape(big) w = Identity(m)
      c = Constant <value_float = 3.0> () s = Shape(x) p = ReduceProd <keepdims = 1> (s) r = Reshape(x, p) v = Mul(r, c) }"""
    model = onnx.parser.parse_model(text)
    report = fold(model, fold_constants)
    assert set(report.changed) == {"Sub_0", "Constant_4", "Shape_5", "ReduceProd_6"}
    assert [skip.name for skip in report.skipped] == ["ConstantOfShape_2"]
    assert "bytes" in report.skipped[0].reason
    after, whole = rewrite(model)
    assert whole.exact
    assert {n.op_type for n in after.graph.node} >= {"Mul", "Reshape", "ConstantOfShape"}
    assert rewrite(after)[0] is after


def test_quantised_weights_stay_quantised():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2,3] x) => (float[2,3] y)
    <int8[3] q = {1, 2, 3}, float s = {0.5}, int8 zp = {0}> { w = DequantizeLinear(q, s, zp) y = Mul(x, w) }"""
    model = onnx.parser.parse_model(text)
    assert rewrite(model)[0] is model


def test_identities_keep_the_names_of_inputs_and_outputs():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y, float[3] w, float[3] v)
    { a = Identity(x) b = Dropout(a) c = Cast <to = 1> (b) d = Tanh(c) y = Identity(d) w = Identity(x) v = Sin(d) }"""
    after, report = rewrite(onnx.parser.parse_model(text))
    assert [n.op_type for n in after.graph.node] == ["Tanh", "Identity", "Sin"]
    assert [o.name for o in after.graph.output] == ["y", "w", "v"]
    assert report.exact
    (skip,) = report.passes[1].skipped
    assert "name it must have" in skip.reason


def test_identities_that_do_something_stay():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[3] x, bool tr) => (float[3] y, bool[3] m)
    <float r = {0.5}> { a = Cast <to = 10> (x) b = Cast <to = 1> (a) y, m = Dropout(b, r, tr) }"""
    report = fold(onnx.parser.parse_model(text), remove_identities)
    assert report.changed == ()
    assert [skip.reason for skip in report.skipped] == ["Dropout is, or may be, in training mode"]


def test_dead_nodes_go():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[3] x, float[3] unused) => (float[3] y) { a = Tanh(x) b = Sin(a) y = Relu(x) }"""
    model = onnx.parser.parse_model(text)
    assert fold(model, remove_dead_nodes).changed == ("Tanh_0", "Sin_1")
    after, _ = rewrite(model)
    assert [i.name for i in after.graph.input] == ["x", "unused"]


def test_shapes_that_become_known_while_folding_are_used_at_once():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 6] x) => (float[A, B] y)
    <int64[1] two = {2}, int64[1] six = {6}, int64[2] parts = {1, 1}> {
      t = Concat <axis = 0> (six, two) r = Reshape(x, t) a, b = Split <axis = 1> (r, parts) k = Shape(a) y = Reshape(b, k) }"""
    model = onnx.parser.parse_model(text)
    graph = import_graph(model)  # not annotated: nothing is known of what is behind the first Reshape
    report = fold_constants(graph)
    assert {"Concat_0", "Shape_3"} <= set(report.changed), report
    assert fold_constants(graph).changed == ()


def test_bfloat16_constants_are_not_computed_with():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (bfloat16[2] y) { c = Cast <to = 16> (k) d = Add(c, c) z = Cast <to = 16> (x) y = Mul(z, d) }'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.float32([1, 2]), "k"))
    report = fold(model, fold_constants)
    assert report.changed == ()
    assert "of a type that is not computed with here" in report.skipped[0].reason


def test_sequences_stay_sequences_in_a_network_that_changes():
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 2] y) <int64 at = {1}, int64[2] parts = {2, 2}>
    { i = Identity(x) s = SplitToSequence <axis = 1> (i, parts) y = SequenceAt(s, at) }"""
    after, report = rewrite(onnx.parser.parse_model(text))
    assert len(after.graph.node) == 2
    assert report.verification is not None
    assert report.verification.samples == 3


def test_a_declared_output_shape_survives_an_entry_without_one():
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y) { i = Identity(x) y = Tanh(i) }'
    )
    model = onnx.parser.parse_model(text)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None))
    after, _ = rewrite(model)
    assert [d.dim_param or d.dim_value for d in after.graph.output[0].type.tensor_type.shape.dim] == ["N", 4]


def test_exact_changes_of_a_float16_network_are_not_asked_for_bits_that_the_runtime_itself_changes():
    """Without the Identity, ONNX Runtime no longer rounds to float16 between the two."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[64] x) => (float16[64] y)
    { a = Exp(x) b = Identity(a) c = Log(b) d = Identity(c) y = Exp(d) }"""
    model = onnx.parser.parse_model(text)
    after, report = rewrite(model)
    assert [n.op_type for n in after.graph.node] == ["Exp", "Log", "Exp"]
    assert report.exact
    assert report.verification is not None
    assert report.verification.samples >= 1
    assert report.verification.outputs[0].allowed > 0
