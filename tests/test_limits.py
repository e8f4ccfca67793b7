"""The newest files that the runtimes read: asked of the runtimes themselves."""

from __future__ import annotations

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from calib.runtime import RUNTIME_ERRORS
from relu_deploy.graph import MAX_IR_VERSION, MAX_OPSET

# Older and newer releases read other versions; the limits are those of the one that constraints.txt pins.
pinned_runtime = pytest.mark.skipif(
    not onnxruntime.__version__.startswith("1.31."), reason="the limits were asked of onnxruntime 1.31"
)


def relu(*, opset: int, ir: int) -> bytes:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"], "r")], "g", [x], [y])
    made: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir
    ).SerializeToString()
    return made


def runs(model: bytes) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS:
        return False
    return True


@pinned_runtime
def test_onnxruntime_reads_the_limits_and_nothing_newer() -> None:
    assert runs(relu(opset=MAX_OPSET, ir=MAX_IR_VERSION))
    assert not runs(relu(opset=MAX_OPSET + 1, ir=MAX_IR_VERSION))
    assert not runs(relu(opset=MAX_OPSET, ir=MAX_IR_VERSION + 1))


@pytest.mark.engine
@pytest.mark.parametrize(("opset", "ir"), [(7, 3), (MAX_OPSET, MAX_IR_VERSION), (MAX_OPSET + 2, MAX_IR_VERSION + 2)])
def test_tensorrt_rtx_reads_at_least_as_much(opset: int, ir: int) -> None:
    from relu_deploy.engines.tensorrt import load_tensorrt, make_logger

    trt = load_tensorrt("tensorrt-rtx", purpose="this test")
    logger, _, errors = make_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(relu(opset=opset, ir=ir)), errors


def test_the_checker_knows_what_onnxruntime_reads() -> None:
    assert onnx.defs.onnx_opset_version() >= MAX_OPSET or not onnx.__version__.startswith("1.23")
