"""The little of CUDA that running an engine takes: memory, a stream, events, graphs; over pycuda, else cuda-python.

This module has never been run on a GPU: it was written against the documentation of both packages, on a machine without
one, and its tests use a stand-in for the binding.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from relu_deploy.errors import BackendUnavailableError, EngineError

_CAPTURE_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may go on allocating meanwhile


class Cuda(Protocol):
    """Device memory, one stream, events and graphs. Addresses and handles are integers, times are milliseconds."""

    stream: int

    def allocate(self, size: int) -> int:
        """Reserve ``size`` bytes on the device; their address."""

    def free(self, address: int) -> None:
        """Give memory back."""

    def to_device(self, address: int, value: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to the device, on the stream."""

    def to_host(self, value: npt.NDArray[Any], address: int) -> None:
        """Copy device memory into a contiguous array, on the stream; valid after :meth:`synchronize`."""

    def synchronize(self) -> None:
        """Wait until the stream is empty."""

    def elapsed_ms(self, launch: Callable[[], None]) -> float:
        """Milliseconds between an event before and one after what ``launch`` puts on the stream."""

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """Record what ``launch`` puts on the stream as a graph; calling the result replays it."""


def require_gpu(purpose: str) -> None:
    """Refuse early, and say what is missing, on a machine that cannot run CUDA.

    Raises:
        BackendUnavailableError: no driver, or no GPU that it can use.
    """
    hint = "build here, and copy the engine with its .json to a machine with an NVIDIA GPU"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendUnavailableError(
            f"{purpose} needs an NVIDIA GPU and driver; none is here (libcuda.so.1 cannot be loaded)", hint=hint
        ) from error
    count = ctypes.c_int(0)
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or not count.value:
        raise BackendUnavailableError(
            f"{purpose} needs an NVIDIA GPU; the driver reports {count.value} of them (CUDA error {status})", hint=hint
        )


@contextlib.contextmanager
def open_cuda() -> Iterator[Cuda]:
    """The first binding that is installed, with a stream of its own.

    Raises:
        BackendUnavailableError: neither pycuda nor cuda-python is installed.
    """
    driver = _module("pycuda.driver")
    if driver is not None:
        driver.init()
        context = driver.Device(0).retain_primary_context()
        context.push()
        try:
            yield PyCuda(driver)
        finally:
            context.pop()
        return
    runtime = _module("cuda.bindings.runtime") or _module("cuda.cudart")
    if runtime is None:
        raise BackendUnavailableError(
            "running an engine needs a CUDA binding for Python; neither pycuda nor cuda-python is installed",
            hint="pip install cuda-python",
        )
    yield CudaPython(runtime)


class PyCuda:
    """``Cuda`` over pycuda's driver interface."""

    def __init__(self, driver: Any) -> None:
        self._driver, self._stream = driver, driver.Stream()
        self.stream = int(self._stream.handle)
        # An allocation lives as long as its Python object.
        self._held: dict[int, Any] = {}

    def allocate(self, size: int) -> int:
        """See :class:`Cuda`."""
        memory = self._driver.mem_alloc(max(size, 1))
        self._held[int(memory)] = memory
        return int(memory)

    def free(self, address: int) -> None:
        """See :class:`Cuda`."""
        self._held.pop(address).free()

    def to_device(self, address: int, value: npt.NDArray[Any]) -> None:
        """See :class:`Cuda`."""
        self._driver.memcpy_htod_async(address, value, self._stream)

    def to_host(self, value: npt.NDArray[Any], address: int) -> None:
        """See :class:`Cuda`."""
        self._driver.memcpy_dtoh_async(value, address, self._stream)

    def synchronize(self) -> None:
        """See :class:`Cuda`."""
        self._stream.synchronize()

    def elapsed_ms(self, launch: Callable[[], None]) -> float:
        """See :class:`Cuda`."""
        before, after = self._driver.Event(), self._driver.Event()
        before.record(self._stream)
        launch()
        after.record(self._stream)
        after.synchronize()
        return float(before.time_till(after))

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Cuda`. Not every pycuda has an interface to graphs, so this replays by launching."""
        return launch


class CudaPython:
    """``Cuda`` over cuda-python's runtime interface, whose calls return ``(status, value...)``."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.stream = int(self._do("cudaStreamCreate"))

    def allocate(self, size: int) -> int:
        """See :class:`Cuda`."""
        return int(self._do("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        """See :class:`Cuda`."""
        self._do("cudaFree", address)

    def to_device(self, address: int, value: npt.NDArray[Any]) -> None:
        """See :class:`Cuda`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._do("cudaMemcpyAsync", address, value.ctypes.data, value.nbytes, kind, self.stream)

    def to_host(self, value: npt.NDArray[Any], address: int) -> None:
        """See :class:`Cuda`."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._do("cudaMemcpyAsync", value.ctypes.data, address, value.nbytes, kind, self.stream)

    def synchronize(self) -> None:
        """See :class:`Cuda`."""
        self._do("cudaStreamSynchronize", self.stream)

    def elapsed_ms(self, launch: Callable[[], None]) -> float:
        """See :class:`Cuda`."""
        before, after = self._do("cudaEventCreate"), self._do("cudaEventCreate")
        self._do("cudaEventRecord", before, self.stream)
        launch()
        self._do("cudaEventRecord", after, self.stream)
        self._do("cudaEventSynchronize", after)
        milliseconds = float(self._do("cudaEventElapsedTime", before, after))
        self._do("cudaEventDestroy", before)
        self._do("cudaEventDestroy", after)
        return milliseconds

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """See :class:`Cuda`."""
        mode = self._runtime.cudaStreamCaptureMode(_CAPTURE_THREAD_LOCAL)
        self._do("cudaStreamBeginCapture", self.stream, mode)
        launch()
        replay = self._do("cudaGraphInstantiate", self._do("cudaStreamEndCapture", self.stream), 0)
        return lambda: self._do("cudaGraphLaunch", replay, self.stream)

    def _do(self, call: str, *arguments: Any) -> Any:
        """Make one call; its value, or an error that names it."""
        status, *values = getattr(self._runtime, call)(*arguments)
        if int(status) != 0:
            raise EngineError(f"CUDA failed in {call}: {getattr(status, 'name', status)}")
        return values[0] if values else None


def host_array(shape: tuple[int, ...], dtype: str) -> npt.NDArray[Any]:
    """An array for results to be copied into."""
    return np.empty(shape, dtype=np.dtype(dtype))


def _module(name: str) -> ModuleType | None:
    """A module, or None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
