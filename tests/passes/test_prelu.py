"""PReLU as the larger of two products: the same bits, and what is left alone."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from relu_deploy.graph import count_ops, export_graph, import_graph
from relu_deploy.passes.prelu import spell_prelu


def model_of(slopes):
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, H] x) => (float[N, 4, H] y) { y = PRelu(x, s) }'
    )
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(slopes, np.float32), "s"))
    return model


def spelled(model):
    graph = import_graph(model)
    report = spell_prelu(graph)
    graph.toposort()
    return export_graph(graph, model), report


@pytest.mark.parametrize(
    ("slopes", "counts"),
    [
        ([0.25, -0.5, 1.0, 0.0], {"Mul": 1, "Max": 1}),
        ([0.25, -0.5, 1.3, 0.0], {"Relu": 1, "Min": 1, "Mul": 1, "Add": 1}),
    ],
)
def test_not_one_bit_changes(slopes, counts):
    before = model_of(np.reshape(slopes, (4, 1)))
    after, report = spelled(before)
    assert count_ops(after) == counts
    assert len(report.changed) == len(report.notes) == 1
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(2, 4, 500)) * 10.0 ** rng.integers(-44, 38, (2, 4, 500))).astype(np.float32)
    x[0, :, :4] = 0.0, -0.0, np.nan, 1e-45
    old, new = (ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (before, after))
    np.testing.assert_array_equal(old, new)
    assert not spelled(after)[1].changed


@pytest.mark.parametrize("slopes", [[[0.1]], [0.1], [[[1.5]]]])
def test_one_slope_for_all_stays(slopes):
    after, report = spelled(model_of(slopes))
    assert count_ops(after) == {"PRelu": 1}
    assert not report.skipped


def test_slopes_that_are_computed_stay():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x, float[4] s) => (float[N, 4] y) { y = PRelu(x, s) }'
    )
    assert "at run time" in spelled(model)[1].skipped[0].reason
