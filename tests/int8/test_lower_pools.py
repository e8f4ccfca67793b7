"""Average pools whose windows hang over: integer and float kernels of ONNX Runtime give the same."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.graph import check_model, export_graph, import_graph
from relu_deploy.int8.lower_pools import spell_average_pools
from relu_deploy.int8.run import quantize


def pool(shape, **attributes):
    """A convolution and a pool; the shapes of what lies between are known."""
    weight = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("AveragePool", ["c"], ["p"], "pool", **attributes),
        helper.make_node("Conv", ["p", "w"], ["y"], "last"),
    ]
    graph = helper.make_graph(
        nodes, "pool", [helper.make_tensor_value_info("x", 1, shape)], [onnx.ValueInfoProto(name="y")],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    graph.output[0].type.tensor_type.elem_type = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def images(shape, seed=0):
    return np.abs(np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(4, 9), min_size=2, max_size=2), st.lists(st.integers(2, 4), min_size=2, max_size=2),
    st.lists(st.integers(1, 3), min_size=2, max_size=2), st.lists(st.integers(0, 1), min_size=4, max_size=4),
)  # fmt: skip
def test_the_spelling_is_equal(size, kernel, strides, pads):
    shape = (1, 3, *size)
    model = pool(shape, kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=1, count_include_pad=1)
    graph = import_graph(model)
    report = spell_average_pools(graph)
    steps = zip(size, pads[:2], pads[2:], kernel, strides, strict=True)
    if any(pads) and any(math.ceil((n + b + e - k) / s) * s >= n + b for n, b, e, k, s in steps):
        assert "a window starts in the padding" in report.skipped[0].reason
        return
    assert report.changed == ("pool",)
    assert spell_average_pools(graph).changed == ()
    made = export_graph(graph, model)
    check_model(made, "it")
    feeds = {"x": images(shape)}
    before, after = (open_session(each, threads=1).run(None, feeds)[0] for each in (model, made))
    assert before.shape == after.shape
    # The same numbers are added and divided; a sum of up to 16 in another order, then a product with three weights.
    assert np.allclose(before, after, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 1]])
@pytest.mark.parametrize("include", [0, 1])
@pytest.mark.parametrize("ceil", [0, 1])
def test_integer_and_float_kernels_agree(pads, include, ceil):
    """Without the new spelling the border is off by a third of its value where padding counts."""
    shape = (1, 3, 8, 8)
    model = pool(shape, kernel_shape=[3, 3], strides=[2, 2], pads=pads, ceil_mode=ceil, count_include_pad=include)
    data = np.concatenate([images(shape, seed) for seed in range(4)])
    quantized, report = quantize(model, calibrate(model, open_source(data, model_inputs(model))), target="ort")
    exact, fast = (open_session(quantized, optimise=o, threads=1).run(None, {"x": data[:1]})[0] for o in (False, True))
    # A mean of float32 numbers in another order may turn a code, which three weights of the last layer carry on.
    steps = np.abs(exact - fast) / report.activations["y"].scale
    assert steps.max() <= 4
    assert np.mean(steps > 0.5) < 0.1


def test_open_shapes_are_left_and_said_so():
    model = pool(("N", 3, "H", "W"), kernel_shape=[3, 3], pads=[1, 1, 1, 1], ceil_mode=1, count_include_pad=1)
    report = spell_average_pools(import_graph(model))
    assert report.changed == ()
    assert "not known" in report.skipped[0].reason
