"""Engines of the real TensorRT-RTX compiler, built without a GPU: are they the INT8 ReLU engines that were promised?"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from relu_deploy.engines.base import BuildConfig, BuildReport, ShapeRange, get_backend
from relu_deploy.engines.log import read_log
from relu_deploy.engines.manifest import manifest_path, read_manifest
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.promise import disagreements
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import BackendUnavailableError, CheckFailedError, EngineError

pytestmark = pytest.mark.engine
Stack = Callable[..., onnx.ModelProto]


def build(model: onnx.ModelProto, folder: Path, **config: object) -> BuildReport:
    return get_backend("tensorrt-rtx").build(model, folder / "e.plan", BuildConfig(target="tensorrt-rtx", **config))


@pytest.mark.parametrize("sm", ["86", "89", "120"])
def test_a_quantized_relu_student_is_int8_throughout(stack: Stack, tmp_path: Path, sm: str) -> None:
    model = stack()
    report = build(model, tmp_path, sm=(sm,), require_int8=True)
    assert [(layer.name, layer.precision) for layer in report.audit.linear] == [(f"conv{i}", "int8") for i in range(3)]
    assert disagreements(model, report.audit, student=True) == ()
    assert report.audit.conflicts == ()
    assert report.audit.activation_counts() == {"relu": 3}
    assert report.sm == (sm,)
    programs = read_plan((tmp_path / "e.plan").read_bytes())
    assert {program.accelerators for program in programs} == {(f"sm{sm}",)}


def test_one_plan_for_three_cards(stack: Stack, tmp_path: Path) -> None:
    report = build(stack(), tmp_path, sm=("86", "89", "120"))
    assert report.audit.int8 == 3
    assert report.audit.conflicts == ()


@pytest.mark.parametrize(
    ("fields", "relu", "output"),
    [
        # One scale for all weights of a layer lets the compiler fuse bias and ReLU and write the graph's own type;
        # a scale for each channel does not: it writes fp32 and runs a second kernel.
        ({"half": True}, True, "fp16"),
        ({"half": True, "per_channel_weights": True}, False, "fp32"),
        ({}, True, "fp32"),
        ({"per_channel_weights": True, "groups": 16}, False, "fp32"),
    ],
)
def test_what_is_fused_and_written(
    stack: Stack, tmp_path: Path, fields: dict[str, bool], relu: bool, output: str
) -> None:
    audit = build(stack(**fields), tmp_path).audit
    assert [(layer.precision, layer.relu, layer.output) for layer in audit.linear] == [("int8", relu, output)] * 3


def test_matrix_products_are_int8(network: type, tmp_path: Path) -> None:
    net = network()
    product = net.node("MatMul", "fc", net.qdq("x", "a"), net.weight("w", (64, 32), axis=1))
    model = net.model(net.node("Relu", "act", net.node("Add", "sum", product, net.bias("b", 32))), 4, 64)
    report = build(model, tmp_path)
    assert [(layer.name, layer.precision) for layer in report.audit.linear] == [("fc", "int8")]
    assert disagreements(model, report.audit, student=True) == ()


def test_the_gates_of_a_recurrent_layer_are_no_foreign_activations(network: type, tmp_path: Path) -> None:
    net = network()
    weights = [net.weight(name, shape, quantized=False) for name, shape in (("w", (1, 8, 8)), ("r", (1, 8, 2)))]
    model = net.model(net.node("LSTM", "recurrent", "x", *weights, hidden_size=2), 3, 1, 8)
    report = build(model, tmp_path)
    assert {"sigmoid", "tanh"} <= set(report.audit.activation_counts())
    assert report.disagreements == ()


def test_bytes_moved_are_those_of_a_count_by_hand(network: type, tmp_path: Path) -> None:
    net = network(half=True)
    conv = net.node("Conv", "conv", net.qdq("x", "a"), net.weight("w", (16, 16, 1, 1)), net.bias("b", 16))
    report = build(net.model(net.node("Relu", "act", conv), 1, 16, 32, 32), tmp_path)
    elements = 16 * 32 * 32
    quantise, convolve, transpose = elements * (2 + 1), elements * (1 + 2), elements * (2 + 2)
    constants = 16 * 16 + 3 * 16 * 4  # int8 weights; fp32 scale, shift and bias of each channel
    assert report.audit.kernels == 3
    assert report.audit.bytes_moved == quantise + convolve + transpose + constants


# What follows shows that the checks above can fail.


def test_a_float_convolution_left_in_is_seen(stack: Stack, tmp_path: Path) -> None:
    audit = build(stack(quantized=(True, False, True)), tmp_path).audit
    assert [layer.precision for layer in audit.linear] == ["int8", "fp32", "int8"]
    assert audit.fallbacks[0].reason == "neither its input nor its weight is quantised"


@pytest.mark.parametrize(
    ("activation", "kind"),
    [("SiLU", "silu"), ("Gelu", "gelu"), ("HardSwish", "hardswish"), ("Sigmoid", "sigmoid"), ("Tanh", "tanh"),
     ("LeakyRelu", "leaky_relu")],
)  # fmt: skip
def test_an_activation_left_in_a_student_is_seen(stack: Stack, tmp_path: Path, activation: str, kind: str) -> None:
    model = stack(activation=activation)
    audit = build(model, tmp_path).audit
    assert audit.activation_counts() == {kind: 3}
    found = disagreements(model, audit, student=True)
    assert len(found) == 3
    assert all(f"{kind} " in line and "ReLU student" in line for line in found)
    # The network itself holds them, so that without the student's promise nothing is wrong.
    assert disagreements(model, audit) == ()


def test_a_scale_for_each_activation_channel_runs_in_float(stack: Stack, tmp_path: Path) -> None:
    model = stack(per_channel_activations=True)
    report = build(model, tmp_path)
    assert report.audit.int8 == 0
    assert len(report.disagreements) == 3
    before = (tmp_path / "e.plan").read_bytes(), manifest_path(tmp_path / "e.plan").read_bytes()
    with pytest.raises(CheckFailedError, match=r"conv0.*runs in fp32: its input has a scale for each channel"):
        build(model, tmp_path, require_int8=True)
    assert ((tmp_path / "e.plan").read_bytes(), manifest_path(tmp_path / "e.plan").read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.plan", "e.plan.json"]


def test_a_log_that_tells_another_story_than_the_plan_is_seen(stack: Stack, tmp_path: Path) -> None:
    model = stack()
    build(model, tmp_path, log=tmp_path / "build.log")
    text = (tmp_path / "build.log").read_text()
    start, end = text.index("Layers:\n"), text.index("I/O Tensors:")
    listing, programs = text[start:end], read_plan((tmp_path / "e.plan").read_bytes())
    assert audit_engine(programs, read_log([listing]), model).conflicts == ()
    lines = listing.split("\n")
    shorter = [line for line in lines if not line.startswith("Name: conv1_")]
    assert len(shorter) == len(lines) - 1
    conflicts = audit_engine(programs, read_log(["\n".join(shorter)]), model).conflicts
    assert any("the plan holds" in line for line in conflicts)
    assert any("only the plan says that conv1" in line for line in conflicts)
    floats = listing.replace("Datatype: Int8", "Datatype: Float")
    audit = audit_engine(programs, read_log([floats]), model)
    assert len([line for line in audit.conflicts if line.startswith("only the build log")]) == 3
    assert set(audit.conflicts) <= set(disagreements(model, audit))


def test_the_log_alone_tells_the_same_of_linear_layers(stack: Stack, tmp_path: Path) -> None:
    model = stack(half=True)
    from_plan = build(model, tmp_path, log=tmp_path / "build.log").audit
    text = (tmp_path / "build.log").read_text()
    from_log = audit_engine((), read_log([text[text.index("Layers:\n") :]]), model)
    assert from_log.source == "build log"
    assert (from_log.kernels, from_log.bytes_moved) == (from_plan.kernels, from_plan.bytes_moved)
    unknown = [dataclasses.replace(layer, relu=None, bias=None) for layer in from_plan.linear]
    assert list(from_log.linear) == unknown


def test_dynamic_batch_needs_a_range_and_counts_bytes_at_its_optimum(stack: Stack, tmp_path: Path) -> None:
    model = stack(batch="N")
    with pytest.raises(EngineError, match=r"'x' is dynamic") as caught:
        build(model, tmp_path)
    assert "--shape x=" in str(caught.value.hint)
    shapes = {"x": ShapeRange((1, 8, 16, 16), (4, 8, 16, 16), (8, 8, 16, 16))}
    dynamic, fixed = build(model, tmp_path, shapes=shapes), build(stack(batch=4), tmp_path)
    assert dynamic.audit.int8 == 3
    assert dynamic.audit.bytes_moved == fixed.audit.bytes_moved
    assert dynamic.inputs[0].shape == ("N", 8, 16, 16)


def test_errors_name_the_node_the_flag_or_the_choice(network: type, stack: Stack, tmp_path: Path) -> None:
    net = network(integer_bias=True)
    conv = net.node("Conv", "conv", net.qdq("x", "a"), net.weight("w", (8, 8, 1, 1)), net.bias("b", 8))
    with pytest.raises(EngineError, match=r"cannot read node 'b_dq' \(DequantizeLinear\)") as caught:
        build(net.model(conv, 1, 8, 8, 8), tmp_path)
    assert "leave biases in float" in str(caught.value.hint)
    with pytest.raises(EngineError, match="cannot build for SM 99"):
        build(stack(), tmp_path, sm=("99",))
    with pytest.raises(EngineError, match="no input is called 'y'"):
        build(stack(), tmp_path, shapes={"y": ShapeRange((1,), (1,), (1,))})
    with pytest.raises(EngineError, match="does not fit"):
        build(stack(), tmp_path, shapes={"x": ShapeRange(*[(1, 3, 16, 16)] * 3)})
    assert list(tmp_path.iterdir()) == []


def test_opening_without_a_gpu_says_what_is_missing(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = build(stack(), tmp_path)
    assert read_manifest(tmp_path / "e.plan") == report

    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr("relu_deploy.engines.cuda.ctypes.CDLL", no_driver)
    with (
        pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU and driver"),
        get_backend("tensorrt-rtx").open(tmp_path / "e.plan"),
    ):
        pass


@pytest.mark.models
def test_the_detector_as_published(common_det: Path, tmp_path: Path) -> None:
    report = get_backend("tensorrt-rtx").build(common_det, tmp_path / "e.plan", BuildConfig(target="tensorrt-rtx"))
    assert len(report.audit.linear) == 83
    assert report.audit.int8 == 0
    assert report.audit.activation_counts() == {"silu": 74, "sigmoid": 6}
    assert report.audit.conflicts == ()
    assert report.audit.bytes_moved
