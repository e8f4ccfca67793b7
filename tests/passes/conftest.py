"""One pass on one small network: what it gives must be valid, equal, and final."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.session import open_session
from relu_deploy.graph import check_model, export_graph, import_graph
from relu_deploy.passes.shapes import annotate


@pytest.fixture(scope="session")
def parse():
    """A model of one graph in ONNX text; arrays given by name become its initializers, in their own types."""

    def run(text: str, *, opset: int = 17, ir: int = 8, **weights: np.ndarray) -> onnx.ModelProto:
        model = onnx.parser.parse_model(f'<ir_version: {ir}, opset_import: ["": {opset}]> g {text}')
        for name, values in weights.items():
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        check_model(model, "the model of the test")
        return model

    return run


@pytest.fixture(scope="session")
def prove():
    """Apply a pass; check, compare in ONNX Runtime, apply again.

    ``within`` is the error allowed, relative to the largest magnitude of an output; 0 asks for equality bit for bit
    but for the sign of zeros. Sizes left open are ``sizes``, in turn.
    """

    def run(model, function, *, within: float, sizes=(3, 2), scale=1.0):
        graph = import_graph(model)
        annotate(graph, model)
        report = function(graph)
        after = export_graph(graph, model)
        check_model(after, "the rewritten model")
        again = import_graph(after)
        annotate(again, after)
        assert function(again).changed == (), "a second run changes something"
        feeds = _feeds(model, sizes, scale)
        wanted, got = (open_session(m, threads=1).run(None, feeds) for m in (model, after))
        for old, new in zip(wanted, got, strict=True):
            assert old.dtype == new.dtype
            assert old.shape == new.shape
            bound = within * float(np.abs(old.astype(np.float64)).max(initial=0.0, where=np.isfinite(old)))
            np.testing.assert_allclose(new, old, rtol=0, atol=bound)
        return after, report

    return run


def _feeds(model: onnx.ModelProto, sizes, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(5)
    given = {tensor.name for tensor in model.graph.initializer}
    feeds = {}
    for value in model.graph.input:
        if value.name in given:
            continue
        kind = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        dims = value.type.tensor_type.shape.dim
        shape = [d.dim_value if d.HasField("dim_value") else sizes[i % len(sizes)] for i, d in enumerate(dims)]
        values = random.normal(0, scale, shape) if kind.kind == "f" else random.integers(0, 2, shape)
        feeds[value.name] = np.asarray(values).astype(kind)
    return feeds


@pytest.fixture(scope="session")
def ops():
    """Operators of a model, in the order of its nodes."""
    return lambda model: [node.op_type for node in model.graph.node]
