"""TensorRT and TensorRT for RTX: one API under two module names.

The RTX compiler builds on a machine without a GPU. Everything that needs one (opening an engine, running it, building
with the data-centre library) was written against NVIDIA's documentation and has never been run.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx

from calib.files import write_text
from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import Arrays, BuildConfig, BuildReport, TensorSpec, check_feeds, model_io
from relu_deploy.engines.build import Compile, build_engine
from relu_deploy.engines.cuda import Cuda, host_array, open_cuda, require_gpu
from relu_deploy.engines.log import read_log
from relu_deploy.engines.manifest import read_manifest
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import BackendUnavailableError, EngineError, MissingExtraError

Flavour = Literal["tensorrt-rtx", "tensorrt"]


class TensorRTBackend:
    """Builds and opens engines of targets ``tensorrt-rtx`` and ``tensorrt``."""

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour

    def check(self, model: onnx.ModelProto, config: BuildConfig) -> None:
        """Refuse a build that cannot succeed. See :meth:`relu_deploy.engines.base.Backend.check`."""
        trt = self._load()
        _check_shapes(model, config)
        if config.target == "tensorrt-rtx":
            _capabilities(trt, config)

    def _load(self) -> Any:
        """TensorRT's module, ready to build."""
        trt = load_tensorrt(self.flavour, purpose=f"building for {self.flavour}")
        if self.flavour == "tensorrt":
            require_gpu("building with the data-centre TensorRT, which times kernels on the card,")
        return trt

    def build(self, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
        """Compile a plan. See :meth:`relu_deploy.engines.base.Backend.build`."""
        trt = self._load()
        versions = {trt.__name__: str(trt.__version__), "onnx": onnx.__version__}
        return build_engine(
            model, out, config, versions=versions, compile_=lambda loaded: _compiler(trt, loaded, config)
        )

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
            value = np.ascontiguousarray(feeds[spec.name])
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


def _compiler(trt: Any, model: onnx.ModelProto, config: BuildConfig) -> Compile:
    """Compile ``model`` as ``config`` says."""

    def compile_plan(source: bytes | Path, out: Path) -> Audit:
        logger, messages, errors = make_logger(trt)
        try:
            plan = _serialize(trt, logger, model, source, config, errors)
        finally:
            if config.log is not None:
                write_text(config.log, "\n".join(messages) + "\n")
        with out.open("wb") as stream:
            stream.write(plan)
        optimum = {name: shapes.optimum for name, shapes in config.shapes.items()}
        return audit_engine(read_plan(out.read_bytes()), read_log(messages, errors=errors), model, optimum=optimum)

    return compile_plan


def _serialize(
    trt: Any, logger: Any, model: onnx.ModelProto, source: bytes | Path, config: BuildConfig, errors: list[str]
) -> Any:
    """The plan, as a buffer."""
    builder = trt.Builder(logger)
    # Strongly typed: precision comes from Q/DQ and casts. TensorRT 11 knows nothing else and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(source)) if isinstance(source, Path) else parser.parse(source)
    if not parsed:
        raise _parser_error(trt, parser, model)
    settings = _settings(trt, builder, model, config)
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        raise EngineError(
            f"{trt.__name__} cannot build this network: {_tidy(errors[-1]) if errors else 'no reason given'}"
        )
    return plan


def _settings(trt: Any, builder: Any, model: onnx.ModelProto, config: BuildConfig) -> Any:
    """The builder configuration."""
    settings = builder.create_builder_config()
    # Without it neither the plan nor the log names kernels, and nothing could be audited.
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if config.target == "tensorrt-rtx":
        settings.num_compute_capabilities = len(config.sm)
        for index, capability in enumerate(_capabilities(trt, config)):
            settings.set_compute_capability(capability, index)
    if config.optimization_level is not None:
        settings.builder_optimization_level = config.optimization_level
    if config.workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
    _add_profile(builder, settings, model, config)
    return settings


def _capabilities(trt: Any, config: BuildConfig) -> list[Any]:
    """TensorRT's names of the compute capabilities asked for."""
    known = trt.ComputeCapability.__members__
    for sm in config.sm:
        if f"SM{sm}" not in known:
            supported = ", ".join(name[2:] for name in sorted(known, key=len) if name.startswith("SM"))
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot build for SM {sm}", hint=f"one of {supported}")
    return [known[f"SM{sm}"] for sm in config.sm]


def _check_shapes(model: onnx.ModelProto, config: BuildConfig) -> None:
    """Refuse shape ranges that are missing, or do not fit the inputs."""
    inputs = {spec.name: spec for spec in model_io(model)[0]}
    unknown = [name for name in config.shapes if name not in inputs]
    if unknown:
        raise EngineError(f"no input is called {unknown[0]!r}", hint=f"the inputs are {', '.join(inputs)}")
    for spec in inputs.values():
        if spec.dynamic and spec.name not in config.shapes:
            like = "x".join(str(axis) if isinstance(axis, int) else "1" for axis in spec.shape)
            raise EngineError(
                f"input {spec.name!r} is dynamic, {list(spec.shape)}, and TensorRT needs the range of its shapes",
                hint=f"give --shape {spec.name}=MIN..OPT..MAX, for example --shape {spec.name}={like}..{like}..{like}",
            )
    for name, shapes in config.shapes.items():
        wanted = inputs[name].shape
        if len(shapes.optimum) != len(wanted) or any(
            isinstance(axis, int) and {low, middle, high} != {axis}
            for axis, low, middle, high in zip(wanted, shapes.minimum, shapes.optimum, shapes.maximum, strict=True)
        ):
            raise EngineError(f"the shape range of {name!r} does not fit {list(wanted)}: {shapes}")


def _add_profile(builder: Any, settings: Any, model: onnx.ModelProto, config: BuildConfig) -> None:
    """One optimisation profile for all dynamic inputs."""
    _check_shapes(model, config)
    profile = builder.create_optimization_profile()
    for name, shapes in config.shapes.items():
        profile.set_shape(name, shapes.minimum, shapes.optimum, shapes.maximum)
    if any(spec.dynamic for spec in model_io(model)[0]) and settings.add_optimization_profile(profile) < 0:
        raise EngineError(
            "TensorRT refused the shape ranges", hint="every MIN <= OPT <= MAX has to make sense together"
        )


def _parser_error(trt: Any, parser: Any, model: onnx.ModelProto) -> EngineError:
    """The parser's first error, with the ONNX node it is about."""
    if not parser.num_errors:
        return EngineError(f"{trt.__name__} cannot read this network, and gives no reason")
    error = parser.get_error(0)
    name, op = error.node_name(), error.node_operator()
    if not name and 0 <= error.node() < len(model.graph.node):
        name, op = model.graph.node[error.node()].name, model.graph.node[error.node()].op_type
    message = f"{trt.__name__} cannot read node {name!r} ({op}): {_tidy(error.desc())}"
    return EngineError(message, hint=_parser_hint(op, error.desc()))


def _parser_hint(op: str, text: str) -> str | None:
    """What to do about the parser errors that quantised networks run into."""
    if op == "DequantizeLinear" and "Int32" in text:
        return "leave biases in float: this compiler rejects an int32 bias behind a DequantizeLinear"
    if op in ("QuantizeLinear", "DequantizeLinear") and "zero" in text.lower():
        return "quantise for this target (int8, symmetric): this compiler wants zero points of 0"
    if "Plugin not found" in text:
        return "the operator is not one that this compiler knows; rewrite the network without it"
    return None


def _tidy(text: str) -> str:
    """The lines of a library message that are about the network, on one line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "cudaError" not in line]
    return "; ".join(lines)[:600] or "no reason given"
