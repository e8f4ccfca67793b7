"""Outputs that are chosen by values: what is compared in their place."""

import numpy as np
import onnx
import pytest

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.int8.choices import chosen_tensors, comparable
from relu_deploy.int8.drift import measure_drift
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.run import quantize

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 6] x, bool[1, 4, 6] m) => '


def parts(body, outputs):
    """What is compared of each output."""
    model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(f"{HEAD} ({outputs}) {{{body}}}"))
    files.name_nodes(model.graph)
    graph = files.import_graph(model)
    chosen = chosen_tensors(graph)
    return [sorted(tensor.name for tensor in comparable(output, chosen)) for output in graph.outputs]


@pytest.mark.parametrize(("body", "outputs", "found"), [
    ("y = Tanh(x)", "float[1, 4, 6] y", ["y"]),
    ("a = Tanh(x) y = ArgMax<axis = 1>(a)", "int64[1, 1, 6] y", ["a"]),
    ("a = Tanh(x) y = Shape(a)", "int64[3] y", []),
    ("a = Tanh(x) z = Constant<value_float = 0.0>() y = Greater(a, z)", "bool[1, 4, 6] y", ["a"]),
    ("y = Not(m)", "bool[1, 4, 6] y", []),
    ("a = Tanh(x) n = NonZero(a) y = Transpose(n)", "int64[n, 3] y", ["a"]),
    ("a = Tanh(x) k = Constant<value_ints = [2]>() y, i = TopK(a, k)", "float[1, 4, 2] y, int64[1, 4, 2] i", ["a"]),
    ("a = Tanh(x) b = Neg(x) k = Constant<value_ints = [2]>() v, i = TopK(a, k) y = GatherElements<axis = 2>(b, i)",
     "float[1, 4, 2] y", ["a", "b"]),
    ("a = Tanh(x) n = NonZero(m) t = Transpose(n) y = GatherND(a, t)", "float[n] y", ["a"]),
])  # fmt: skip
def test_floats_are_compared_in_place_of_choices(body, outputs, found):
    assert parts(body, outputs)[0] == found


def test_behind_a_layer_values_are_compared_again():
    body = (
        "a = Tanh(x) k = Constant<value_ints = [2]>() v, i = TopK<axis = 1>(a, k) "
        "b = GatherElements<axis = 1>(a, i) c = MatMul(b, w) y = Relu(c)"
    )
    model = onnx.parser.parse_model(f"{HEAD} (float[1, 2, 3] y) <float[6, 3] w> {{{body}}}")
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((6, 3), np.float32), "w"))
    files.name_nodes(model.graph)
    assert "y" not in chosen_tensors(files.import_graph(onnx.shape_inference.infer_shapes(model)))


def detector() -> onnx.ModelProto:
    """A small detector with its suppression inside: how many boxes there are hangs on the last digit."""
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1, 3, 16, 16] x) => (float[n, 4] boxes, float[n] best) '
        "<int64[1] most = {50}, float[1] iou = {0.5}, float[1] least = {0.62}, int64[3] rows = {1, -1, 4}, "
        "int64[3] line = {1, 1, -1}, int64 two = {2}, int64[1] first = {0}, int64[1] all = {-1}> {"
        "a = Conv<pads = [1, 1, 1, 1]>(x, w1) r = Relu(a) b = Conv<strides = [2, 2]>(r, w2) p = Abs(b) "
        "t = Transpose<perm = [0, 2, 3, 1]>(p) found = Reshape(t, rows) s = Conv<strides = [2, 2]>(r, w3) "
        "g = Sigmoid(s) scores = Reshape(g, line) i = NonMaxSuppression(found, scores, most, iou, least) "
        "j = Gather<axis = 1>(i, two) k = Reshape(j, all) flat = Squeeze(found, first) boxes = Gather(flat, k) "
        "line_of = Reshape(scores, all) best = Gather(line_of, k) }"
    )
    for name, shape, size in (("w1", (8, 3, 3, 3), 1.0), ("w2", (4, 8, 1, 1), 1.0), ("w3", (1, 8, 1, 1), 0.3)):
        values = (size * rng.normal(size=shape)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    return model


def test_a_detector_with_its_suppression_inside_is_corrected_and_not_called_collapsed():
    model = detector()
    data = np.random.default_rng(0).normal(size=(16, 3, 16, 16)).astype(np.float32)
    source = open_source(data, model_inputs(model))
    quantized, report = quantize(model, calibrate(model, source), weight_bits=8, evidence=Evidence(source, rank=True))
    assert report.drift == measure_drift(model, quantized, source, integer_kernels=True) == ()
    assert report.sensitivity.before_db > 20
    assert len(report.correction.layers) == 3
    assert not [warning for warning in report.warnings if "corrected" in warning or "ranked" in warning]
