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
from relu_deploy.engines.tensorrt_compile import Failure, Job, run_apart
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import EngineError
from relu_deploy.model_io import model_io


def check_plan(trt: Any, model: onnx.ModelProto, config: BuildConfig) -> None:
    """Refuse a build that cannot succeed. See :meth:`relu_deploy.engines.base.Backend.check`."""
    _check_shapes(model, config)
    if config.target == "tensorrt-rtx":
        _check_capabilities(trt, config)


def build_plan(trt: Any, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
    """Compile a plan with the module ``trt``. See :meth:`relu_deploy.engines.base.Backend.build`."""
    versions = {trt.__name__: str(trt.__version__), "onnx": onnx.__version__}

    def prepare(loaded: onnx.ModelProto) -> Compile:
        check_plan(trt, loaded, config)
        return lambda source, plan: _compile(loaded, source, plan, config, trt.__name__)

    return build_engine(model, out, config, versions=versions, compile_=prepare)


def _compile(model: onnx.ModelProto, source: bytes | Path, plan: Path, config: BuildConfig, compiler: str) -> Audit:
    """Compile ``model``, in a process of its own, and audit what came out."""
    if isinstance(source, bytes):
        file = plan.with_name("source.onnx")
        file.write_bytes(source)
        source = file
    answer = plan.with_name("outcome.json")
    dynamic = any(spec.dynamic for spec in model_io(model)[0])
    outcome = run_apart(
        Job(
            flavour="tensorrt-rtx" if config.target == "tensorrt-rtx" else "tensorrt",
            source=str(source.resolve()),
            plan=str(plan.resolve()),
            answer=str(answer.resolve()),
            sm=config.sm if config.target == "tensorrt-rtx" else (),
            shapes={n: (s.minimum, s.optimum, s.maximum) for n, s in config.shapes.items()} if dynamic else {},
            optimization_level=config.optimization_level,
            workspace_mib=config.workspace_mib,
        )
    )
    if config.log is not None:
        write_text(config.log, "\n".join(outcome.messages) + "\n")
    if outcome.failure is not None:
        raise _error(outcome.failure, model, compiler)
    optimum = {name: shapes.optimum for name, shapes in config.shapes.items()}
    log = read_log(outcome.messages, errors=outcome.errors)
    return audit_engine(read_plan(plan.read_bytes()), log, model, optimum=optimum)


def _error(failure: Failure, model: onnx.ModelProto, compiler: str) -> Exception:
    """A failure in words."""
    if failure.stage == "write":
        return OSError(failure.errno, failure.reason)
    if failure.stage == "profile":
        return EngineError(failure.reason, hint="every MIN <= OPT <= MAX has to make sense together")
    if failure.stage == "parse":
        return _parser_error(failure, model, compiler)
    reason = _tidy(failure.reason)
    turing = "build for SM 80 or newer (--sm), or give a float16 network" if "Turing" in reason else None
    return EngineError(f"{compiler} cannot build this network: {reason}", hint=turing)


def _check_capabilities(trt: Any, config: BuildConfig) -> None:
    """Refuse compute capabilities that this TensorRT does not know."""
    known = trt.ComputeCapability.__members__
    for sm in config.sm:
        if f"SM{sm}" not in known:
            supported = ", ".join(name[2:] for name in sorted(known, key=len) if name.startswith("SM"))
            raise EngineError(f"{trt.__name__} {trt.__version__} cannot build for SM {sm}", hint=f"one of {supported}")


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


def _parser_error(failure: Failure, model: onnx.ModelProto, compiler: str) -> EngineError:
    """The parser's first error, with the ONNX node it is about."""
    if not failure.reason:
        return EngineError(f"{compiler} cannot read this network, and gives no reason")
    name, op = failure.node, failure.op
    if not name and 0 <= failure.index < len(model.graph.node):
        name, op = model.graph.node[failure.index].name, model.graph.node[failure.index].op_type
    message = f"{compiler} cannot read node {name!r} ({op}): {_tidy(failure.reason)}"
    return EngineError(message, hint=_parser_hint(op, failure.reason))


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
