"""Compile a plan with TensorRT or TensorRT for RTX: parser, builder settings, shape profile, and their errors in words.

The RTX compiler does this on a machine without a GPU. The data-centre library needs one, and was never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from calib.files import write_text
from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import BuildConfig, BuildReport
from relu_deploy.engines.build import Compile, build_engine
from relu_deploy.engines.log import read_log
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.tensorrt import make_logger
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import EngineError
from relu_deploy.model_io import model_io


def check_plan(trt: Any, model: onnx.ModelProto, config: BuildConfig) -> None:
    """Refuse a build that cannot succeed. See :meth:`relu_deploy.engines.base.Backend.check`."""
    _check_shapes(model, config)
    if config.target == "tensorrt-rtx":
        _capabilities(trt, config)


def build_plan(trt: Any, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
    """Compile a plan with the module ``trt``. See :meth:`relu_deploy.engines.base.Backend.build`."""
    versions = {trt.__name__: str(trt.__version__), "onnx": onnx.__version__}
    return build_engine(model, out, config, versions=versions, compile_=lambda loaded: _compiler(trt, loaded, config))


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
        reason = _tidy(errors[-1]) if errors else "no reason given"
        turing = "build for SM 80 or newer (--sm), or give a float16 network" if "Turing" in reason else None
        raise EngineError(f"{trt.__name__} cannot build this network: {reason}", hint=turing)
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
