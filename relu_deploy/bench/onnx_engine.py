"""A plain ONNX file as an engine: ONNX Runtime on the CPU, nothing built, nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from relu_deploy.bench.protocol import TensorSpec
from relu_deploy.errors import EngineError

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip


class OnnxEngine:
    """An ONNX Runtime session with the interface of an engine."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self._session = session
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())
        self._names = [value.name for value in self.outputs]

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """One inference; feeds and results by tensor name."""
        return dict(zip(self._names, self._session.run(self._names, feeds), strict=True))


@contextlib.contextmanager
def open_onnx(path: Path, *, threads: int) -> Iterator[OnnxEngine]:
    """Open an ONNX file with every optimisation and a pinned number of threads.

    Threads do not spin while they wait: a spinning pool keeps burning its cores after a run has ended (measured: 64 ms
    of processor time in the half second after the last run of a 2-thread session), which is the time of the other
    engine's round.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    yield OnnxEngine(ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise EngineError(f"tensor {value.name!r} has type {value.type}, which cannot be fed from numpy")
    shape = tuple(axis if isinstance(axis, int) else None for axis in value.shape)
    return TensorSpec(value.name, shape, np.dtype(_DTYPES[value.type]).name)
