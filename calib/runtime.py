"""What ONNX Runtime raises. Imports the runtime alone, so that a process that only runs engines needs no onnx."""

from __future__ import annotations

from onnxruntime.capi import onnxruntime_pybind11_state as _errors

# They have no common base but Exception.
RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    _errors.EngineError, _errors.EPFail, _errors.Fail, _errors.InvalidArgument, _errors.InvalidGraph,
    _errors.InvalidProtobuf, _errors.NoModel, _errors.NoSuchFile, _errors.NotImplemented, _errors.RuntimeException,
)  # fmt: skip
