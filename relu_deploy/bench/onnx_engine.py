"""A plain ONNX file as an engine: ONNX Runtime on the CPU, nothing built, nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime as ort

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from relu_deploy.engines.base import TensorSpec
from relu_deploy.engines.ort import OrtEngine
from relu_deploy.errors import EngineError

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip


@contextlib.contextmanager
def open_onnx(path: Path, *, threads: int) -> Iterator[OrtEngine]:
    """Open an ONNX file with every optimisation and a pinned number of threads.

    The session is wrapped as the ``ort`` backend wraps its own, so that both pay the same for a call.

    Threads do not spin while they wait, as in the backend: a spinning pool keeps burning its cores for a while after a
    run has ended, and that while belongs to the next engine's round.

    Raises:
        EngineError: ONNX Runtime cannot load it.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise EngineError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
    inputs, outputs = (tuple(_spec(v) for v in values) for values in (session.get_inputs(), session.get_outputs()))
    yield OrtEngine(session, inputs, outputs)


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise EngineError(f"tensor {value.name!r} has type {value.type}, which cannot be fed from numpy")
    shape = tuple(axis if isinstance(axis, int) else str(axis or "?") for axis in value.shape)
    return TensorSpec(value.name, shape, _DTYPES[value.type])
