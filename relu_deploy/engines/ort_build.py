"""Builds engines of target ``ort``: ONNX Runtime's own graph optimisation, done once and written down."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import BuildConfig, BuildReport
from relu_deploy.engines.build import Compile, build_engine
from relu_deploy.engines.manifest import data_path
from relu_deploy.engines.ort_audit import audit_graph
from relu_deploy.errors import EngineError, FileError
from relu_deploy.graph import PROTOBUF_LIMIT, parse_model

_EXTERNAL = "session.optimized_model_external_initializers_"


def build_ort(model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
    """Optimise a model offline. See :meth:`relu_deploy.engines.base.Backend.build`."""
    versions = {"onnxruntime": onnxruntime.__version__, "onnx": onnx.__version__}
    return build_engine(model, out, config, versions=versions, compile_=_compiler)


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
            if "serialization failed" in str(error):  # all that it says of a disk that is full
                raise FileError(
                    f"cannot write {out.name}: onnxruntime says {first_line(error)}", hint="is the disk full?"
                ) from error
            raise EngineError(
                f"onnxruntime cannot build this network: {first_line(error)}",
                hint="the message names the node; is the opset newer than this onnxruntime reads?",
            ) from error
        return audit_graph(parse_model(out), model)

    return optimise
