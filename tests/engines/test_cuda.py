"""The CUDA layer against a stand-in for the binding: it has never been run on a GPU."""

from __future__ import annotations

import ctypes
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from relu_deploy.engines import cuda as module
from relu_deploy.engines.cuda import CudaPython, open_cuda, require_gpu
from relu_deploy.engines.tensorrt import TensorRTEngine
from relu_deploy.errors import BackendUnavailableError, DataError, EngineError
from relu_deploy.tensors import TensorSpec


class FakeRuntime:
    """cuda-python's runtime over host memory: calls return ``(status, value...)``."""

    cudaMemcpyKind = types.SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815

    def __init__(self) -> None:
        self.held: dict[int, Any] = {}
        self.fail = ""

    def __getattr__(self, name: str) -> Any:
        values = {"cudaStreamCreate": (7,), "cudaEventCreate": (9,), "cudaEventElapsedTime": (1.5,)}
        return lambda *_: (700 if self.fail == name else 0, *values.get(name, ()))

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        memory = ctypes.create_string_buffer(size)
        self.held[ctypes.addressof(memory)] = memory
        return 0, ctypes.addressof(memory)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.held[address]
        return (0,)

    def cudaMemcpyAsync(self, to: int, start: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        assert kind in (1, 2)
        assert stream == 7
        ctypes.memmove(to, start, size)
        return (0,)


class FakeContext:
    """An execution context that doubles its input."""

    def __init__(self) -> None:
        self.shape, self.places, self.runs = (0, 0), {}, 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return shape[0] <= 4

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> None:
        self.places[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        self.runs += 1
        size = int(np.prod(self.shape))
        arrays = {n: np.ctypeslib.as_array((ctypes.c_float * size).from_address(a)) for n, a in self.places.items()}
        arrays["y"][:] = 2 * arrays["x"]
        return stream == 7


@pytest.fixture
def opened() -> Iterator[tuple[TensorRTEngine, FakeRuntime, FakeContext]]:
    runtime, context = FakeRuntime(), FakeContext()
    specs = (TensorSpec("x", ("N", 3), "float32"),), (TensorSpec("y", ("N", 3), "float32"),)
    engine = TensorRTEngine(
        types.SimpleNamespace(create_execution_context=lambda: context), *specs, CudaPython(runtime)
    )
    yield engine, runtime, context
    engine.close()
    assert runtime.held == {}


def test_runs_shapes_that_grow_and_shrink(opened: tuple[TensorRTEngine, FakeRuntime, FakeContext]) -> None:
    engine, runtime, _ = opened
    for batch in (1, 4, 2):
        value = np.random.default_rng(batch).standard_normal((batch, 3)).astype(np.float32)
        # A transposed view is not contiguous; it must be copied, not read as if it were.
        for given in (value, np.asfortranarray(value)):
            np.testing.assert_array_equal(engine.run({"x": given})["y"], 2 * value)
    assert len(runtime.held) == 2


def test_a_shape_outside_the_profile_and_a_failed_launch(
    opened: tuple[TensorRTEngine, FakeRuntime, FakeContext],
) -> None:
    engine, runtime, context = opened
    with pytest.raises(EngineError, match="outside the range"):
        engine.run({"x": np.zeros((5, 3), np.float32)})
    with pytest.raises(DataError, match="the engine takes x"):
        engine.run({"x": np.zeros((1, 2), np.float32)})
    runtime.fail = "cudaStreamSynchronize"
    with pytest.raises(EngineError, match="CUDA failed in cudaStreamSynchronize"):
        engine.run({"x": np.zeros((1, 3), np.float32)})
    context.execute_async_v3 = lambda stream: False
    with pytest.raises(EngineError, match="enqueue"):
        engine.run({"x": np.zeros((1, 3), np.float32)})


def test_times_come_from_events(opened: tuple[TensorRTEngine, FakeRuntime, FakeContext]) -> None:
    engine, _, context = opened
    assert engine.time({"x": np.zeros((1, 3), np.float32)}, 3, graph=False) == [1.5] * 3
    assert context.runs == 1 + 3


def test_no_driver_no_gpu_and_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(module.ctypes, "CDLL", no_driver)
    with pytest.raises(BackendUnavailableError, match="running it needs an NVIDIA GPU and driver"):
        require_gpu("running it")
    driver = types.SimpleNamespace(cuInit=lambda flags: 100, cuDeviceGetCount=lambda count: 0)
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: driver)
    with pytest.raises(BackendUnavailableError, match="CUDA error 100"):
        require_gpu("running it")
    monkeypatch.setattr(module, "_module", lambda name: None)
    with pytest.raises(BackendUnavailableError, match="neither pycuda nor cuda-python"), open_cuda():
        pass
