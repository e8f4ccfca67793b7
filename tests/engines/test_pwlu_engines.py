"""Learned activations in real engines: one kernel each on TensorRT-RTX, tables of codes in ONNX Runtime."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import ops
from relu_deploy.engines.audit import part_of
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.engines.promise import disagreements
from relu_deploy.int8.run import quantize

NAMES = ("left", "right", "values", "slope_left", "slope_right")
CHANNELS = 64


def network(activation):
    """Three convolutions, each with an activation behind it, a mean over all positions and a classifier."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.normal(0, 0.4, (CHANNELS, 8, 3, 3)), "v": rng.normal(0, 0.1, (CHANNELS, 10)), "d": np.zeros(10),
        **{f"w{i}": rng.normal(0, 0.1, (CHANNELS, CHANNELS, 3, 3)) for i in (2, 3)},
        **{f"b{i}": rng.normal(0, 0.1, CHANNELS) for i in (1, 2, 3)},
    }  # fmt: skip
    points = np.tile(np.linspace(-3, 3, 17), (CHANNELS, 1))
    unit = {
        "left": np.full(CHANNELS, -3.0), "right": np.full(CHANNELS, 3.0), "slope_left": rng.normal(0, 0.1, CHANNELS),
        "slope_right": 1 + rng.normal(0, 0.1, CHANNELS),
        "values": np.maximum(points, 0) + rng.normal(0, 0.2, points.shape),
    }  # fmt: skip
    act = {
        "relu": "a{i} = Relu(c{i})",
        "pwlu": "a{i} = relu_deploy.PWLU <channel_axis: int = 1> (c{i}, " + ", ".join(NAMES) + ")",
    }[activation]
    text = " ".join(
        f"c{i} = Conv <pads = [1, 1, 1, 1]> ({'x' if i == 1 else f'a{i - 1}'}, w{i}, b{i}) {act.format(i=i)}"
        for i in (1, 2, 3)
    )
    tail = "axes = Constant <value_ints = [2, 3]> () m = ReduceMean <keepdims = 0> (a3, axes) y = Gemm(m, v, d)"
    model = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["": 18, "relu_deploy": 1]> g (float[1, 8, 24, 24] x) => (float[1, 10] y) '
        f"{{ {text} {tail} }}"
    )
    weights |= unit if activation == "pwlu" else {}
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    ops.define_operators(model, 18)
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    return model


def quantized(activation, target, granularity="channel"):
    model = network(activation)
    x = np.random.default_rng(1).normal(size=(4, 8, 24, 24)).astype(np.float32)
    ranges = calibrate(model, open_source({"x": x}, model_inputs(model)))
    return quantize(model, ranges, target=target, weight_granularity=granularity)


@pytest.mark.engine
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_each_unit_is_one_kernel_and_costs_none(granularity, tmp_path):
    audits = {}
    for activation in ("relu", "pwlu"):
        network, report = quantized(activation, "tensorrt-rtx", granularity)
        engine = tmp_path / f"{activation}.engine"
        audits[activation] = get_backend("tensorrt-rtx").build(network, engine, BuildConfig("tensorrt-rtx")).audit
        assert audits[activation].int8 == len(audits[activation].linear) == 4
        assert not disagreements(network, audits[activation])
    units = [found for found in audits["pwlu"].activations if found.kind == "hinges"]
    assert len(units) == len(report.folded) == 3
    assert all(int(form.split()[0]) > 4 for form in report.folded.values()), "really bent"
    assert {len(unit.kernel.split(", ")) for unit in units} == {1}, "each in one kernel"
    relu, pwlu = audits["relu"], audits["pwlu"]
    assert pwlu.kernels <= relu.kernels
    # Their constants are read too; the tensors are the same.
    assert pwlu.bytes_moved <= 1.1 * relu.bytes_moved


def test_tables_are_no_float_islands(tmp_path):
    network, report = quantized("pwlu", "ort")
    audit = get_backend("ort").build(network, tmp_path / "pwlu.ort.onnx", BuildConfig("ort")).audit
    assert audit.activation_counts() == {"table": 3}
    assert {found.name for found in audit.activations} == set(report.folded)
    assert audit.int8 == len(audit.linear) == 4
    assert not audit.islands
    assert not disagreements(network, audit)


def test_names_of_parts():
    assert part_of("block/act/hinge_12/Relu") == ("block/act", "hinges")
    assert part_of("block/act/slopes/found") == part_of("block/act/offsets/found") == ("block/act", "table")
    assert part_of("block/hinge/Relu") is None


def test_half_a_step_counts_through_a_pool():
    """The stem of a ResNet: the quantiser stands behind the MaxPool; half its step is what the unit may be off by."""
    model = network("pwlu")
    points = np.tile(np.linspace(-3, 3, 17), (CHANNELS, 1))
    noisy = np.maximum(points, 0) + np.random.default_rng(0).uniform(-1e-3, 1e-3, points.shape)
    fresh = {"values": noisy, "slope_left": np.zeros(CHANNELS), "slope_right": np.ones(CHANNELS)}
    for tensor in model.graph.initializer:
        if tensor.name in fresh:
            tensor.CopyFrom(numpy_helper.from_array(fresh[tensor.name].astype(np.float32), tensor.name))
    place = next(i for i, node in enumerate(model.graph.node) if "a1" in node.input)
    model.graph.node[place].input[0] = "pooled"
    pool = onnx.helper.make_node("MaxPool", ["a1"], ["pooled"], "pool", kernel_shape=[3, 3], pads=[1] * 4)
    model.graph.node.insert(place, pool)
    x = np.random.default_rng(1).normal(size=(4, 8, 24, 24)).astype(np.float32)
    ranges = calibrate(model, open_source({"x": x}, model_inputs(model)))
    _, report = quantize(model, ranges, target="tensorrt-rtx")
    assert [form.split(",")[0] for form in report.folded.values()] == ["ReLU"] * 3
