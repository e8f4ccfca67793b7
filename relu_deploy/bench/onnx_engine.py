"""A plain ONNX file as an engine: ONNX Runtime on the CPU, nothing built, nothing written."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from relu_deploy.engines.ort import OrtEngine, open_file
from relu_deploy.errors import EngineError
from relu_deploy.tensors import TensorSpec

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip


@contextlib.contextmanager
def open_onnx(path: Path, *, threads: int) -> Iterator[OrtEngine]:
    """Open an ONNX file with every optimisation and a pinned number of threads.

    It is opened and wrapped as the ``ort`` backend opens and wraps its own engines, so that both pay the same for a
    call and their threads wait alike.

    Raises:
        EngineError: ONNX Runtime cannot load it.
    """
    session = open_file(path, threads=threads)
    inputs, outputs = (tuple(_spec(v) for v in values) for values in (session.get_inputs(), session.get_outputs()))
    yield OrtEngine(session, inputs, outputs)


def _spec(value: Any) -> TensorSpec:
    if value.type not in _DTYPES:
        raise EngineError(f"tensor {value.name!r} has type {value.type}, which cannot be fed from numpy")
    shape = tuple(axis if isinstance(axis, int) else str(axis or "?") for axis in value.shape)
    return TensorSpec(value.name, shape, _DTYPES[value.type])
