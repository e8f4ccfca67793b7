"""ONNX Runtime on a CPU: the optimised graph is the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnxruntime

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import Arrays, BuildConfig, BuildReport, TensorSpec, check_feeds
from relu_deploy.engines.build import Compile, build_engine
from relu_deploy.engines.manifest import data_path, read_manifest
from relu_deploy.engines.ort_audit import audit_graph
from relu_deploy.errors import EngineError
from relu_deploy.graph import PROTOBUF_LIMIT, parse_model

_EXTERNAL = "session.optimized_model_external_initializers_"


class OrtBackend:
    """Builds and opens engines of target ``ort``."""

    def check(self, model: onnx.ModelProto, config: BuildConfig) -> None:
        """ONNX Runtime takes dynamic shapes as they are, and is always there."""

    def build(self, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
        """Optimise a model offline. See :meth:`relu_deploy.engines.base.Backend.build`."""
        versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
        return build_engine(model, out, config, versions=versions, compile_=_compiler)

    @contextlib.contextmanager
    def open(self, engine: Path, *, threads: int | None = None) -> Iterator[OrtEngine]:
        """Load an engine. See :meth:`relu_deploy.engines.base.Backend.open`."""
        report = read_manifest(engine)
        yield OrtEngine(_session(engine, threads), report.inputs, report.outputs)


class OrtEngine:
    """An open ``ort`` engine."""

    def __init__(
        self, session: onnxruntime.InferenceSession, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
    ) -> None:
        self.inputs, self.outputs, self._session = inputs, outputs, session
        self._names = [spec.name for spec in outputs]

    def run(self, feeds: Mapping[str, npt.NDArray[Any]]) -> Arrays:
        """One inference. See :meth:`relu_deploy.engines.base.Engine.run`."""
        check_feeds(self.inputs, feeds)
        try:
            values: Sequence[Any] = self._session.run(self._names, dict(feeds))
        except RUNTIME_ERRORS as error:
            raise EngineError(f"onnxruntime failed: {first_line(error)}") from error
        return dict(zip(self._names, values, strict=True))


def _compiler(model: onnx.ModelProto) -> Compile:
    """Optimise ``model`` with the ``extended`` level of graph optimisation.

    That level turns Q/DQ into integer operators and fuses what fuses. The levels above it (``layout`` and ``all``)
    write the channel order and blocking of the CPU that builds into the file, which another CPU could not load or
    would run slowly; they are applied again when the engine is opened, on the CPU that runs it.
    """

    def optimise(source: bytes | Path, out: Path) -> Audit:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(out)
        options.log_severity_level = 3
        if isinstance(source, Path) or len(source) > PROTOBUF_LIMIT // 2:
            options.add_session_config_entry(f"{_EXTERNAL}file_name", data_path(out).name)
            options.add_session_config_entry(f"{_EXTERNAL}min_size_in_bytes", "1024")
        given = str(source) if isinstance(source, Path) else source
        try:
            onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            raise EngineError(
                f"onnxruntime cannot build this network: {first_line(error)}",
                hint="the message names the node; is the opset newer than this onnxruntime reads?",
            ) from error
        return audit_graph(parse_model(out), model)

    return optimise


def _session(engine: Path, threads: int | None) -> onnxruntime.InferenceSession:
    """A session with pinned threads; ``threads`` is None for one for each physical core."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that go on spinning after an inference take the cores of whatever else runs here: two engines open in one
    # process halve each other's speed. During an inference spinning is what makes small layers fast.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(engine), options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise EngineError(
            f"onnxruntime cannot load {engine}: {first_line(error)}", hint="build it again with this onnxruntime"
        ) from error
