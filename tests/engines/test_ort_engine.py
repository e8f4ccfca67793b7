from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from relu_deploy.engines.base import BuildConfig, BuildReport, get_backend
from relu_deploy.engines.promise import disagreements
from relu_deploy.errors import CheckFailedError, DataError, EngineError, FileError, ModelError

Stack = Callable[..., onnx.ModelProto]


def build(model: onnx.ModelProto | Path, folder: Path, **config: object) -> BuildReport:
    return get_backend("ort").build(model, folder / "e.onnx", BuildConfig(**config))


def test_a_quantized_relu_student_is_integer_throughout(stack: Stack, tmp_path: Path) -> None:
    model = stack(target="ort", per_channel_weights=True, last_quantizer=True)
    report = build(model, tmp_path, require_int8=True)
    assert [(layer.name, layer.precision) for layer in report.audit.linear] == [(f"conv{i}", "int8") for i in range(3)]
    assert report.audit.activations == ()
    assert report.audit.islands == ()
    assert disagreements(model, report.audit, student=True) == ()
    written = onnx.load(tmp_path / "e.onnx")
    assert [node.op_type for node in written.graph.node].count("QLinearConv") == report.audit.int8 == 3
    # The file is for any CPU: no layout of this one is in it.
    assert not [node for node in written.graph.node if "nchwc" in node.domain or node.op_type == "Transpose"]


def test_a_float_layer_between_quantised_ones_is_an_island(stack: Stack, tmp_path: Path) -> None:
    report = build(stack(target="ort", quantized=(True, False, True), last_quantizer=True), tmp_path)
    assert [layer.precision for layer in report.audit.linear] == ["int8", "fp32", "int8"] or report.audit.int8 == 1
    assert len(report.audit.islands) >= 1
    assert any("conv1" in island for island in report.audit.islands)
    assert {layer.name: layer.reason for layer in report.audit.linear}["conv1"] == (
        "neither its input nor its weight is quantised"
    )


def test_silu_keeps_the_layers_in_float_and_the_report_says_so(stack: Stack, tmp_path: Path) -> None:
    model = stack(target="ort", activation="SiLU", last_quantizer=True)
    report = build(model, tmp_path)
    assert report.audit.int8 == 0
    assert report.audit.activation_counts() == {"silu": 3}
    assert len(report.disagreements) == 3
    assert "read by several nodes (Mul, Sigmoid)" in report.disagreements[0]
    assert len(disagreements(model, report.audit, student=True)) == 6
    with pytest.raises(CheckFailedError, match="and 2 more"):
        build(model, tmp_path / "..", require_int8=True)


def test_a_float_network_promises_nothing(stack: Stack, tmp_path: Path) -> None:
    report = build(stack(target="ort", quantized=(False,) * 3), tmp_path)
    assert report.disagreements == ()
    assert [(layer.precision, layer.relu, layer.bias) for layer in report.audit.linear] == [("fp32", True, True)] * 3
    assert report.audit.activation_counts() == {"relu": 3}
    assert report.audit.islands == ()


def test_runs_like_the_network_it_was_built_from(stack: Stack, tmp_path: Path) -> None:
    model = stack(target="ort", quantized=(False,) * 3, batch="N")
    build(model, tmp_path)
    value = np.random.default_rng(1).standard_normal((2, 8, 16, 16)).astype(np.float32)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    with get_backend("ort").open(tmp_path / "e.onnx", threads=1) as engine:
        assert engine.inputs[0].shape == ("N", 8, 16, 16)
        assert engine.inputs[0].dynamic
        result = engine.run({"x": value})
    assert list(result) == [engine.outputs[0].name]
    # The order of float sums differs between the optimised and the given graph: a few units in the last place.
    np.testing.assert_allclose(result["act2_out"], session.run(None, {"x": value})[0], rtol=1e-4, atol=1e-5)


def test_wrong_feeds_are_refused_in_our_words(stack: Stack, tmp_path: Path) -> None:
    build(stack(target="ort"), tmp_path)
    good = np.zeros((1, 8, 16, 16), np.float32)
    with get_backend("ort").open(tmp_path / "e.onnx", threads=1) as engine:
        with pytest.raises(DataError, match="missing x; unknown y"):
            engine.run({"y": good})
        with pytest.raises(DataError, match=r"input 'x' is float32\[1, 3, 16, 16\]; the engine takes x float32\[1, 8"):
            engine.run({"x": good[:, :3]})
        with pytest.raises(DataError, match="is float64") as caught:
            engine.run({"x": good.astype(np.float64)})
        assert ".astype('float32')" in str(caught.value.hint)


def test_a_model_with_unnamed_nodes_is_built_and_left_as_it_was(stack: Stack, tmp_path: Path) -> None:
    model = stack(target="ort")
    for node in model.graph.node:
        node.name = ""
    before = model.SerializeToString(deterministic=True)
    report = build(model, tmp_path)
    assert model.SerializeToString(deterministic=True) == before
    assert all(layer.name for layer in report.audit.linear)


def test_external_data(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "m.onnx"
    onnx.save_model(stack(target="ort"), source, save_as_external_data=True, location="m.data", size_threshold=0)
    assert (tmp_path / "in" / "m.data").stat().st_size > 0
    report = build(source, tmp_path)
    assert report.audit.int8 == build(stack(target="ort"), tmp_path).audit.int8
    (tmp_path / "in" / "m.data").unlink()
    before = (tmp_path / "e.onnx").read_bytes()
    with pytest.raises(ModelError, match=r"external data of tensor .* is missing"):
        build(source, tmp_path)
    assert (tmp_path / "e.onnx").read_bytes() == before


def test_bad_input_leaves_nothing_behind(network: type, tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"\x00\x01garbage")
    with pytest.raises(ModelError, match="not an ONNX file"):
        build(tmp_path / "garbage.onnx", tmp_path)
    net = network()
    with pytest.raises(EngineError, match="onnxruntime cannot build this network"):
        build(net.model(net.node("Foo", "foo", "x"), 1, 2), tmp_path)
    with pytest.raises(FileError, match="is not a folder"):
        build(tmp_path / "garbage.onnx", tmp_path / "nowhere")
    assert [path.name for path in tmp_path.iterdir()] == ["garbage.onnx"]


def test_a_large_engine_keeps_its_weights_beside_it(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relu_deploy.engines.ort_build.PROTOBUF_LIMIT", 2048)
    report = build(stack(target="ort", quantized=(False,) * 3), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.onnx", "e.onnx.data", "e.onnx.json"]
    assert report.engine_bytes == sum((tmp_path / name).stat().st_size for name in ("e.onnx", "e.onnx.data"))
    with get_backend("ort").open(tmp_path / "e.onnx", threads=1) as engine:
        assert engine.run({"x": np.zeros((1, 8, 16, 16), np.float32)})["act2_out"].shape == (1, 16, 16, 16)
    data = tmp_path / "e.onnx.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(EngineError, match=r"e\.onnx\.data is not what"), get_backend("ort").open(tmp_path / "e.onnx"):
        pass
    data.unlink()
    with pytest.raises(EngineError, match="weights are missing"), get_backend("ort").open(tmp_path / "e.onnx"):
        pass


def test_pooling_of_codes_and_arithmetic_of_shapes_are_no_islands(network: Callable[..., Any], tmp_path: Path) -> None:
    net = network(integer_bias=True, dtype="uint8")
    first = net.node("Conv", "first", net.qdq("x", "in"), net.weight("w0", (8, 8, 3, 3)), net.bias("b0", 8))
    pooled = net.node("MaxPool", "pool", net.qdq(first, "mid"), kernel_shape=[2, 2])
    size = net.node("Div", "divide", net.node("Shape", "size", "x"), net.constant("one", np.int64([1, 1, 1, 1])))
    shape = net.node(
        "Concat", "shape", net.node("Gather", "batch", size, net.constant("0", np.int64([0]))),
        net.constant("rest", np.int64([8, -1, 1])), axis=0,
    )  # fmt: skip
    flat = net.node("Reshape", "reshape", net.qdq(pooled, "pooled"), shape)
    last = net.node("Conv", "last", net.qdq(flat, "flat"), net.weight("w1", (4, 8, 1, 1)), net.bias("b1", 4))
    report = build(net.model(net.qdq(last, "out"), "N", 8, 16, 16), tmp_path, require_int8=True)
    kinds = [node.op_type for node in onnx.load(tmp_path / "e.onnx").graph.node]
    assert {"MaxPool", "Div", "QLinearConv"} <= set(kinds)
    assert report.audit.islands == ()


def test_a_recurrent_layer_is_float_for_its_own_reason(network: Callable[..., Any], tmp_path: Path) -> None:
    net = network()
    weights = [net.weight(name, shape, quantized=False) for name, shape in (("w", (1, 8, 8)), ("r", (1, 8, 2)))]
    state = net.node("LSTM", "recurrent", "x", *weights, hidden_size=2)
    (layer,) = build(net.model(state, 5, 1, 8), tmp_path).audit.linear
    assert (layer.name, layer.precision, layer.reason) == ("recurrent", "fp32", "a recurrent layer computes in float")
