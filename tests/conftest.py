"""Networks and data that tests of several parts share. Real trained models come from packages of the dev extra."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

# The same examples in every run: a commit is judged by what it changed.
# `pytest --hypothesis-profile explore` draws others, and more.
hypothesis.settings.register_profile("explore", max_examples=1000)
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what builds with the TensorRT-RTX compiler, where it is not installed."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        missing = pytest.mark.skip(reason="needs the extra: pip install 'relu-deploy[tensorrt-rtx]'")
        for item in items:
            if item.get_closest_marker("engine") is not None:
                item.add_marker(missing)


@pytest.fixture(autouse=True)
def one_torch_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Several test processes with a pool of spinning threads each are many times slower than with one thread each."""
    if request.node.get_closest_marker("torch") is None:
        yield
        return
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def common_det() -> Path:
    """The SiLU detector of ddddocr: YOLOX-style, opset 11, input (1, 3, 416, 416)."""
    spec = importlib.util.find_spec("ddddocr")
    if spec is None or spec.origin is None:
        pytest.skip("ddddocr is not installed: pip install 'relu-deploy[dev]'")
    return Path(spec.origin).parent / "common_det.onnx"


@pytest.fixture(scope="session")
def photos() -> np.ndarray:
    """Photographs of scikit-image as the detector wants them: float32 (N, 3, 416, 416), RGB, 0 to 255."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed: pip install 'relu-deploy[dev]'")
    transform = pytest.importorskip("skimage.transform", reason="scikit-image does not load")
    pictures = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    resized = [transform.resize(picture, (416, 416), preserve_range=True) for picture in pictures]
    return np.stack(resized).transpose(0, 3, 1, 2).astype(np.float32)


def residual_model(
    *, activation: str = "Relu", batch: int | str = 1, opset: int = 17, seed: int = 0
) -> onnx.ModelProto:
    """A small residual network with every operator of the INT8 rules: (N, 3, 16, 16) float32 -> (N, 10).

    Conv, depthwise Conv, residual Add, MaxPool, Resize, Concat, GlobalAveragePool, Flatten and Gemm.

    Args:
        activation: ``Relu`` or ``Silu`` (written as ``x * Sigmoid(x)``).
        batch: Fixed size or the name of a dynamic axis.
        opset: Of the default domain, 11 and newer.
        seed: Of the random weights.
    """
    rng = np.random.default_rng(seed)
    nodes: list[onnx.NodeProto] = []
    weights: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(data: str, name: str, cin: int, cout: int, kernel: int = 3, group: int = 1) -> str:
        shape = (cout, cin // group, kernel, kernel)
        weight = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape).astype(np.float32)
        bias = rng.normal(0, 0.1, cout).astype(np.float32)
        inputs = [data, constant(f"{name}.weight", weight), constant(f"{name}.bias", bias)]
        pad = kernel // 2
        nodes.append(helper.make_node("Conv", inputs, [f"{name}.out"], name, pads=[pad] * 4, group=group))
        return f"{name}.out"

    def act(data: str, name: str) -> str:
        if activation == "Relu":
            nodes.append(helper.make_node("Relu", [data], [f"{name}.out"], name))
        else:
            nodes.append(helper.make_node("Sigmoid", [data], [f"{name}.gate"], f"{name}.sigmoid"))
            nodes.append(helper.make_node("Mul", [data, f"{name}.gate"], [f"{name}.out"], name))
        return f"{name}.out"

    stem = act(conv("x", "stem", 3, 16), "stem.act")
    inner = act(conv(stem, "block.conv1", 16, 16), "block.act1")
    nodes.append(helper.make_node("Add", [conv(inner, "block.conv2", 16, 16), stem], ["block.sum"], "block.add"))
    block = act("block.sum", "block.act2")
    nodes.append(helper.make_node("MaxPool", [block], ["pooled"], "pool", kernel_shape=[2, 2], strides=[2, 2]))
    deep = act(conv("pooled", "depthwise", 16, 16, group=16), "depthwise.act")
    scales = constant("scales", np.asarray([1, 1, 2, 2], np.float32))
    roi = constant("roi", np.zeros(0, np.float32))
    nodes.append(
        helper.make_node(
            "Resize",
            [deep, roi, scales],
            ["upsampled"],
            "upsample",
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
    )
    nodes.append(helper.make_node("Concat", [block, "upsampled"], ["joined"], "concat", axis=1))
    head = act(conv("joined", "fuse", 32, 16, kernel=1), "fuse.act")
    nodes.append(helper.make_node("GlobalAveragePool", [head], ["averaged"], "average"))
    nodes.append(helper.make_node("Flatten", ["averaged"], ["features"], "flatten"))
    matrix = constant("fc.weight", rng.normal(0, 0.3, (10, 16)).astype(np.float32))
    vector = constant("fc.bias", rng.normal(0, 0.1, 10).astype(np.float32))
    nodes.append(helper.make_node("Gemm", ["features", matrix, vector], ["y"], "fc", transB=1))
    graph = helper.make_graph(
        nodes, "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 10])],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session", name="residual_model")
def residual_model_fixture():
    return residual_model
