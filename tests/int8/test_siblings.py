"""Convolutions of one tensor, merged: the same numbers, and one layer; which layers float16 moves in fewer bytes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.int8 import decide
from relu_deploy.int8.cheaper import DEPTHWISE, cheaper_in_half
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.granularity import may_share, shared_noise, shares_scale
from relu_deploy.int8.run import quantize
from relu_deploy.int8.sensitivity import Damage, Sensitivity
from relu_deploy.int8.siblings import merge_siblings

RTX = number_format("tensorrt-rtx", weight_granularity="auto", float_part="auto")


def parse(text: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = random.normal(0, 0.3, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model, full_check=True)
    return onnx.shape_inference.infer_shapes(model)


CSP = """(float[1,4,6,6] x) => (float[1,7,6,6] y) { [left] a = Conv(x, w1, b1) ra = Relu(a)
  [right] b = Conv(x, w2) rb = Relu(b) [inner] c = Conv<pads=[1,1,1,1]>(ra, w3, b1) y = Concat<axis=1>(c, rb) }"""
SHAPES = {"w1": (3, 4, 1, 1), "b1": (3,), "w2": (4, 4, 1, 1), "w3": (3, 3, 3, 3)}
BOUNDS = {"a": (-1.0, 2.0), "b": (-3.0, 1.0), "ra": (0.0, 2.0), "rb": (0.0, 1.0)}


def merged(model: onnx.ModelProto, bounds: dict, **options: object):
    graph = files.import_graph(model)
    report = merge_siblings(graph, bounds, **options)
    files.tidy(graph)
    after = files.export_graph(graph, model)
    files.check_model(after, "the merged model")
    x = np.random.default_rng(1).normal(size=(1, 4, 6, 6)).astype(np.float32)
    for old, new in zip(*(open_session(m, threads=1).run(None, {"x": x}) for m in (model, after)), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)  # each sum is the same, its kernel may be another
    again = files.import_graph(after)
    assert merge_siblings(again, dict(bounds), **options).changed == ()
    return after, report


def test_siblings_and_their_relu_are_merged():
    bounds = dict(BOUNDS)
    after, report = merged(parse(CSP, **SHAPES), bounds)
    assert report.changed == ("left+right/Split",)
    assert [node.op_type for node in after.graph.node] == ["Conv", "Relu", "Split", "Conv", "Concat"]
    assert bounds["left+right/output"] == (-3.0, 2.0)
    assert bounds["left+right/relu"] == (0.0, 2.0)
    assert {"ra", "rb"} <= {name for node in after.graph.node for name in node.output}


@pytest.mark.parametrize("other", ["Elu(b)", "HardSwish(b)"])
def test_siblings_with_another_activation_stay_apart(other):
    """Measured on common_det, whose activations are SiLU: 16 kernels less, and 2 % more bytes."""
    _, report = merged(parse(CSP.replace("Relu(b)", other), **SHAPES), dict(BOUNDS))
    assert report.changed == ()


def test_siblings_without_activations_are_merged():
    text = """(float[1,4,6,6] x) => (float[1,7,6,6] y) {
      [box] a = Conv(x, w1, b1) [score] b = Conv(x, w2) s = Sigmoid(b)
      y = Concat<axis=1>(a, s) }"""
    after, _ = merged(parse(text, **{k: v for k, v in SHAPES.items() if k != "w3"}), dict(BOUNDS))
    assert [node.op_type for node in after.graph.node] == ["Conv", "Split", "Sigmoid", "Concat"]


@pytest.mark.parametrize("change", [("Conv(x, w2)", "Conv<group=2>(x, w4)"), ("Conv(x, w2)", "Conv(x2, w2)")])
def test_what_is_no_sibling(change):
    text = CSP.replace(*change).replace("{ [left]", "{ x2 = Relu(x) [left]")
    shapes = {**SHAPES, "w4": (4, 2, 1, 1)} if "group" in change[1] else SHAPES
    shapes = {name: shape for name, shape in shapes.items() if name in text}
    text = text if "x2)" in text or "x2," in text else text.replace("x2 = Relu(x) ", "")
    _, report = merged(parse(text, **shapes), dict(BOUNDS))
    assert report.changed == ()


def test_layers_that_are_to_be_left_alone_are():
    _, report = merged(parse(CSP, **SHAPES), dict(BOUNDS), skip=["right"])
    assert report.changed == ()


def test_a_sibling_of_unknown_range_is_left_alone():
    _, report = merged(parse(CSP, **SHAPES), {"a": (0.0, 1.0)})
    assert [(skip.name, skip.reason) for skip in report.skipped] == [
        (name, "the range of a sibling's output is not known") for name in ("left", "right")
    ]


def test_siblings_of_unlike_size_do_not_share_a_scale():
    model = parse(CSP, **SHAPES)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-3), "w2"))
    _, report = merged(model, dict(BOUNDS), number=RTX)
    assert {skip.reason for skip in report.skipped} == {
        "one weight scale for all siblings would be too coarse for some of them"
    }
    _, report = merged(parse(CSP, **SHAPES), dict(BOUNDS), number=RTX)
    assert report.changed == ("left+right/Split",)


def test_an_output_of_the_network_keeps_siblings_apart():
    text = CSP.replace("(float[1,7,6,6] y)", "(float[1,7,6,6] y, float[1,4,6,6] b)")
    _, report = merged(parse(text, **SHAPES), dict(BOUNDS))
    assert report.changed == ()


def layers(convs: int, size: int, width: int = 64) -> onnx.ModelProto:
    """A chain of 3x3 convolutions on one map, and a depthwise one at its end."""
    body, last, shapes = "", "x", {}
    for i in range(convs):
        body += f"[c{i}] t{i} = Conv<pads=[1,1,1,1]>({last}, w{i}) r{i} = Relu(t{i}) "
        last, shapes[f"w{i}"] = f"r{i}", (width, width, 3, 3)
    body += f"[dw] y = Conv<pads=[1,1,1,1], group={width}>({last}, d)"
    shapes["d"] = (width, 1, 3, 3)
    io = f"(float[1,{width},{size},{size}] x) => (float[1,{width},{size},{size}] y)"
    return parse(f"{io} {{ {body} }}", **shapes)


def left(model: onnx.ModelProto, number=RTX) -> dict[str, str]:
    return cheaper_in_half(files.import_graph(model), number)


def test_the_first_layers_are_left_in_half_while_that_moves_less_up_to_a_tenth():
    # 2 x 64 x 32 x 32 numbers against 64 x 64 x 9 weights; then 2 x 64 x 16 x 16.
    assert [name for name in left(layers(19, 32)) if name != "dw"] == ["c0", "c1"]
    assert [name for name in left(layers(19, 16)) if name != "dw"] == []
    assert [name for name in left(layers(8, 32)) if name != "dw"] == []


def test_depthwise_layers_are_left_in_half_wherever_they_are():
    assert left(layers(3, 16)) == {"dw": DEPTHWISE}


@pytest.mark.parametrize("number", [
    number_format("ort"), number_format("tensorrt", float_part="fp16"), number_format("tensorrt-rtx"),
])  # fmt: skip
def test_nothing_is_chosen_for_what_was_not_measured(number):
    assert left(layers(19, 32), number) == {}


@given(arrays(np.float32, (3, 4), elements=st.floats(-8, 8, width=32)))
def test_shared_noise_is_what_one_scale_does(weight):
    step = max(float(np.abs(weight).max()) / 127, 2.0**-60)
    wide = weight.astype(np.float64)
    rows = [row for row in wide if row.any()]
    errors = [((row - np.rint(row / np.float32(step)) * np.float32(step)) ** 2).sum() / (row**2).sum() for row in rows]
    assert shared_noise(weight, 127) == pytest.approx(np.mean(errors) if rows else 0.0, rel=1e-3, abs=1e-12)


def test_one_scale_where_little_is_lost():
    even, uneven = np.ones((8, 8, 1, 1), np.float32), np.ones((8, 8, 1, 1), np.float32)
    even *= np.linspace(0.5, 1, 64, dtype=np.float32).reshape(8, 8, 1, 1)
    uneven[1:] *= 0.003  # under half a step of the first channel
    text = "(float[1,8,4,4] x) => (float[1,8,4,4] y) { [c] y = Conv(x, w) }"
    chosen = {}
    for name, values in (("even", even), ("uneven", uneven)):
        model = parse(text, w=(8, 8, 1, 1))
        model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "w"))
        (node,) = files.import_graph(model).nodes
        assert may_share(node, RTX)
        chosen[name] = shares_scale(node, RTX)
    assert chosen == {"even": True, "uneven": False}


@pytest.mark.parametrize(("target", "part", "found"), [
    ("tensorrt-rtx", "auto", "auto"), ("tensorrt-rtx", "fp32", "auto"), ("tensorrt", "auto", "channel"),
    ("ort", "auto", "channel"),
])  # fmt: skip
def test_granularity_is_chosen_only_where_it_was_measured(target, part, found):
    assert number_format(target, weight_granularity="auto", float_part=part).weight_granularity == found


def test_siblings_stay_whole_where_the_most_damaged_layer_is_left_in_float(monkeypatch):
    tail = "d = Concat<axis=1>(c, rb) [four] e = Conv(d, w4) [last] y = Conv(e, w4)"
    model = parse(CSP.replace("y = Concat<axis=1>(c, rb)", tail), **SHAPES, w4=(7, 7, 1, 1))
    source = open_source(np.random.default_rng(1).normal(size=(4, 4, 6, 6)).astype(np.float32), model_inputs(model))
    ranges = calibrate(model, source)
    worst = Sensitivity(1, 5.0, 20.0, (Damage("last", 5.0),), ("last",))
    monkeypatch.setattr(decide, "measure_sensitivity", lambda *_: worst)
    before, after = (
        quantize(model, ranges, target="tensorrt-rtx", evidence=seen)[1]
        for seen in (None, Evidence(source, correct=False))
    )
    assert "left+right/relu" in before.activations
    assert {name.split("/")[0] for name in set(before.activations) - set(after.activations)} == {"e"}
    assert [layer.name for layer in after.layers if not layer.int8] == ["last"]
