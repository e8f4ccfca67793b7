"""TensorRT and TensorRT for RTX: one API under two module names.

The RTX compiler builds on a machine without a GPU. Everything that needs one (opening an engine, running it, building
with the data-centre library) was written against NVIDIA's documentation and has never been run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from relu_deploy.engines.base import Arrays, BuildConfig, BuildReport, check_feeds
from relu_deploy.engines.cuda import Cuda, host_array, open_cuda, require_gpu
from relu_deploy.engines.manifest import read_manifest
from relu_deploy.errors import BackendUnavailableError, EngineError, MissingExtraError
from relu_deploy.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx

Flavour = Literal["tensorrt-rtx", "tensorrt"]


class TensorRTBackend:
    """Builds and opens engines of targets ``tensorrt-rtx`` and ``tensorrt``."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour

    # Building needs onnx and the graph's audit, which running an engine does not: imported where it is asked for.

    def check(self, model: onnx.ModelProto, config: BuildConfig) -> None:
        """Refuse a build that cannot succeed. See :meth:`relu_deploy.engines.base.Backend.check`."""
        from relu_deploy.engines.tensorrt_build import check_plan

        check_plan(self._load(), model, config)

    def build(self, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
        """Compile a plan. See :meth:`relu_deploy.engines.base.Backend.build`."""
        from relu_deploy.engines.tensorrt_build import build_plan

        return build_plan(self._load(), model, out, config)

    def _load(self) -> Any:
        """TensorRT's module, ready to build."""
        trt = load_tensorrt(self.flavour, purpose=f"building for {self.flavour}")
        if self.flavour == "tensorrt":
            require_gpu("building with the data-centre TensorRT, which times kernels on the card,")
        return trt

    @contextlib.contextmanager
    def open(self, engine: Path, *, threads: int | None = None) -> Iterator[TensorRTEngine]:  # noqa: ARG002
        """Load an engine. See :meth:`relu_deploy.engines.base.Backend.open`."""
        report = read_manifest(engine)
        require_gpu(f"running {engine.name}, an engine for {self.flavour},")
        trt = load_tensorrt(self.flavour, purpose=f"running {engine.name}")
        logger, messages, _ = make_logger(trt)
        with open_cuda() as cuda:
            runtime = trt.Runtime(logger)
            loaded = runtime.deserialize_cuda_engine(engine.read_bytes())
            if loaded is None:
                raise EngineError(f"{self.flavour} cannot load {engine}: {(messages or ['no reason given'])[-1]}")
            with contextlib.closing(TensorRTEngine(loaded, report.inputs, report.outputs, cuda)) as running:
                yield running


class TensorRTEngine:
    """An open engine. Never run on a GPU."""

    def __init__(
        self, engine: Any, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], cuda: Cuda
    ) -> None:
        self.inputs, self.outputs, self._cuda = inputs, outputs, cuda
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError("the engine has no room to run in: the card is out of memory")
        self._memory: dict[str, tuple[int, int]] = {}

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """One inference. See :meth:`relu_deploy.engines.base.Engine.run`."""
        results = self._bind(feeds)
        self._launch()
        for name, value in results.items():
            self._cuda.to_host(value, self._memory[name][0])
        self._cuda.synchronize()
        return results

    def time(self, feeds: Mapping[str, npt.NDArray[Any]], runs: int, *, graph: bool = True) -> list[float]:
        """Milliseconds of ``runs`` inferences, by CUDA events, without copies to and from the card.

        Args:
            feeds: As for :meth:`run`; copied once.
            runs: How many.
            graph: Replay a captured CUDA graph instead of enqueueing kernel by kernel.
        """
        self._bind(feeds)
        self._launch()
        self._cuda.synchronize()
        launch = self._cuda.captured(self._launch) if graph else self._launch
        return [self._cuda.elapsed_ms(launch) for _ in range(runs)]

    def close(self) -> None:
        """Give the card's memory back."""
        for address, _ in self._memory.values():
            self._cuda.free(address)
        self._memory.clear()

    def _bind(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """Copy inputs to the card and tell the context where everything lies; arrays for the outputs."""
        check_feeds(self.inputs, feeds)
        for spec in self.inputs:
            value = np.asarray(feeds[spec.name], order="C")
            if not self._context.set_input_shape(spec.name, value.shape):
                raise EngineError(
                    f"input {spec.name!r} of shape {value.shape} is outside the range the engine was built for",
                    hint="build it with a wider --shape range",
                )
            self._cuda.to_device(self._place(spec.name, value.nbytes), value)
        results: Arrays = {}
        for spec in self.outputs:
            shape = tuple(int(axis) for axis in self._context.get_tensor_shape(spec.name))
            if min(shape, default=0) < 0:
                raise EngineError(f"the shape of output {spec.name!r} depends on data, which is not supported")
            results[spec.name] = host_array(shape, spec.dtype)
            self._place(spec.name, results[spec.name].nbytes)
        return results

    def _place(self, name: str, size: int) -> int:
        """Device memory for a tensor, kept from one inference to the next while it is large enough."""
        address, held = self._memory.get(name, (0, -1))
        if held < size:
            if held >= 0:
                self._cuda.free(address)
            address = self._cuda.allocate(size)
            self._memory[name] = (address, size)
        self._context.set_tensor_address(name, address)
        return address

    def _launch(self) -> None:
        """Enqueue one inference."""
        if not self._context.execute_async_v3(self._cuda.stream):
            raise EngineError("TensorRT failed to enqueue an inference")


def load_tensorrt(flavour: Flavour, *, purpose: str) -> Any:
    """Import the module of a flavour.

    Raises:
        MissingExtraError: TensorRT-RTX is not installed; the extra installs it.
        BackendUnavailableError: the data-centre TensorRT is not installed, which takes NVIDIA's own package host, or a
            library that the module needs cannot be loaded.
    """
    module = "tensorrt_rtx" if flavour == "tensorrt-rtx" else "tensorrt"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if flavour == "tensorrt-rtx":
            raise MissingExtraError(module, extra="tensorrt-rtx", purpose=purpose) from error
        raise BackendUnavailableError(
            f"{purpose} needs the package 'tensorrt', which is not installed",
            hint="install it from NVIDIA's own package host, on the machine with the GPU (building needs one too); "
            "--target tensorrt-rtx builds without a GPU",
        ) from error
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(f"{purpose}: {module} is installed but does not load: {error}") from error


def make_logger(trt: Any) -> tuple[Any, list[str], list[str]]:
    """A logger that prints nothing; all its messages, and those of errors."""
    messages: list[str] = []
    errors: list[str] = []

    class Collect(trt.ILogger):  # type: ignore[misc]
        """Keeps what the compiler says."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            """Called by the library."""
            messages.append(msg)
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                errors.append(msg)

    return Collect(), messages, errors
