"""Compile one plan, in a process of its own: ``python -m relu_deploy.engines.tensorrt_compile``.

A process for each build, because TensorRT-RTX 1.7.1 keeps state from one build to the next: after a build that failed
for SM 75, the next one of the same process, for SM 89, compiles INT8 layers in float and says nothing of it (the test
of this file shows it). A compiler that crashes takes only that process with it, too.

The request is a ``Job`` as JSON on standard input; the answer is an ``Outcome`` as JSON in the file that the job names.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import relu_deploy
from relu_deploy.engines.tensorrt import Flavour, load_tensorrt, make_logger
from relu_deploy.errors import EngineError


@dataclasses.dataclass(frozen=True)
class Job:
    """What to compile.

    Attributes:
        flavour: Which TensorRT.
        source: ONNX file; external data beside it.
        plan: Where the plan goes.
        answer: Where the ``Outcome`` goes.
        sm: Compute capabilities without the dot; empty: the card that is there.
        shapes: Input name -> smallest, best and largest shape; empty: no profile.
        optimization_level: None: the compiler's default.
        workspace_mib: None: no limit.
    """

    flavour: Flavour
    source: str
    plan: str
    answer: str
    sm: tuple[str, ...]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    optimization_level: int | None
    workspace_mib: int | None


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why there is no plan.

    Attributes:
        stage: What failed: reading the network, the shape profile, compiling, or writing the plan.
        reason: In the library's words; of ``write``, the system's.
        node: Name of the ONNX node, where one is known.
        op: Its operator.
        index: Its place in the graph; -1: not known.
        errno: Of ``write``.
    """

    stage: Literal["parse", "profile", "build", "write"]
    reason: str
    node: str = ""
    op: str = ""
    index: int = -1
    errno: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        messages: The whole log, verbose.
        errors: Those of its messages that are errors.
        failure: None: the plan was written.
    """

    messages: tuple[str, ...]
    errors: tuple[str, ...]
    failure: Failure | None


def run_apart(job: Job) -> Outcome:
    """Compile in a new process and wait for it.

    Raises:
        EngineError: the compiler crashed; tells how, and the last it said.
    """
    finished = subprocess.run(
        [sys.executable, "-m", "relu_deploy.engines.tensorrt_compile"],
        input=json.dumps(dataclasses.asdict(job)),
        text=True,
        errors="replace",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # -m looks in the current folder first; there it would find a user's own calib/ or onnx.py.
        cwd=Path(relu_deploy.__file__).parents[1],
        check=False,
    )
    answer = Path(job.answer)
    if finished.returncode != 0 or not answer.is_file():
        said = finished.stderr.strip().splitlines()[-1:] or ["nothing"]
        how = f"was ended by signal {-finished.returncode}" if finished.returncode < 0 else "broke off"
        raise EngineError(
            f"the compiler of {job.flavour} {how}; the last it said: {said[0][:400]}",
            hint="it may have run out of memory" if finished.returncode == -9 else None,
        )
    found = json.loads(answer.read_text(encoding="utf-8"))
    failure = None if found["failure"] is None else Failure(**found["failure"])
    return Outcome(tuple(found["messages"]), tuple(found["errors"]), failure)


def compile_here(trt: Any, job: Job) -> Outcome:
    """Compile in this process, which should not be asked for a second plan."""
    logger, messages, errors = make_logger(trt)
    failure = _compile(trt, logger, job, errors)
    return Outcome(tuple(messages), tuple(errors), failure)


def _compile(trt: Any, logger: Any, job: Job, errors: list[str]) -> Failure | None:
    builder = trt.Builder(logger)
    # Strongly typed: precision comes from Q/DQ and casts. TensorRT 11 knows nothing else and may drop the flag.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(job.source):
        return _parse_failure(parser)
    _tell_axes_apart(network, job)
    settings = _settings(trt, builder, job)
    if job.shapes and settings.add_optimization_profile(_profile(builder, job)) < 0:
        return Failure("profile", "TensorRT refused the shape ranges")
    plan = builder.build_serialized_network(network, settings)
    if plan is None:
        return Failure("build", errors[-1] if errors else "")
    try:
        with Path(job.plan).open("wb") as stream:
            stream.write(plan)
    except OSError as error:
        return Failure("write", error.strerror or str(error), errno=error.errno or 0)
    return None


def _tell_axes_apart(network: Any, job: Job) -> None:
    """Give axes of one name a name each where their ranges differ; the compiler takes equal names for equal extents.

    Some exporters call every axis that they know nothing of ``?``. The first range keeps the name, which the compiler
    has bound.
    """
    ranges: dict[str, tuple[int, ...]] = {}
    for tensor in (network.get_input(index) for index in range(network.num_inputs)):
        shapes = job.shapes.get(tensor.name, ())
        for axis in range(len(tensor.shape) if shapes else 0):
            name, extents = tensor.get_dimension_name(axis), tuple(shape[axis] for shape in shapes)
            if name and ranges.setdefault(name, extents) != extents:
                tensor.set_dimension_name(axis, f"{tensor.name}:{axis}")


def _settings(trt: Any, builder: Any, job: Job) -> Any:
    """The builder configuration."""
    settings = builder.create_builder_config()
    # Without it neither the plan nor the log names kernels, and nothing could be audited.
    settings.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job.sm:
        settings.num_compute_capabilities = len(job.sm)
        for index, sm in enumerate(job.sm):
            settings.set_compute_capability(trt.ComputeCapability.__members__[f"SM{sm}"], index)
    if job.optimization_level is not None:
        settings.builder_optimization_level = job.optimization_level
    if job.workspace_mib is not None:
        settings.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.workspace_mib << 20)
    return settings


def _profile(builder: Any, job: Job) -> Any:
    """One optimisation profile for all dynamic inputs."""
    profile = builder.create_optimization_profile()
    for name, (minimum, optimum, maximum) in job.shapes.items():
        profile.set_shape(name, minimum, optimum, maximum)
    return profile


def _parse_failure(parser: Any) -> Failure:
    """The parser's first error."""
    if not parser.num_errors:
        return Failure("parse", "")
    error = parser.get_error(0)
    return Failure("parse", error.desc(), error.node_name(), error.node_operator(), error.node())


def _main() -> None:
    request = json.loads(sys.stdin.read())
    shapes = {name: tuple(tuple(shape) for shape in three) for name, three in request.pop("shapes").items()}
    job = Job(**{**request, "sm": tuple(request["sm"])}, shapes=shapes)  # type: ignore[arg-type]  # our own JSON
    outcome = compile_here(load_tensorrt(job.flavour, purpose=f"building for {job.flavour}"), job)
    Path(job.answer).write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    _main()
