"""The errors of relu-deploy, and the exit code each of them ends a command with.

::

    ToolkitError                 2   (calib.errors) something a user can mend
    |-- FileError                2   (calib.errors) a file cannot be read or written
    |-- DataError                2   (calib.errors) input data is missing, empty or of the wrong shape
    |-- CalibrationError         2   (calib.errors) ranges cannot be measured
    |-- RangesError              2   (calib.errors) a ranges file is damaged or stale
    |-- MissingExtraError        2   (calib.errors) a package is not installed; names the extra
    |-- ModelError               2   an ONNX file is damaged, unsupported or unsafe to read
    |-- TrainingError            2   a model cannot be trained or changed as asked, or its loss is not finite
    |-- ExportError              2   a torch model cannot be loaded or exported
    |-- QuantizationError        2   a network cannot be quantised as asked
    |-- BackendUnavailableError  2   a runtime, or the GPU it needs, is not there
    |-- EngineError              2   an engine cannot be built, read or run
    `-- CheckFailedError         1   everything ran, and the result is wrong

Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from calib.errors import (
    CalibrationError,
    DataError,
    FileError,
    MissingExtraError,
    RangesError,
    ToolkitError,
)

__all__ = [
    "BackendUnavailableError",
    "CalibrationError",
    "CheckFailedError",
    "DataError",
    "EngineError",
    "ExportError",
    "FileError",
    "MissingExtraError",
    "ModelError",
    "NetworkWarning",
    "QuantizationError",
    "RangesError",
    "ToolkitError",
    "TrainingError",
]


class ModelError(ToolkitError):
    """An ONNX file is damaged, of an unsupported version, or unsafe to read."""


class NetworkWarning(UserWarning):
    """A network can be read, and is not what one may take it for; the command line prints it and goes on."""


class TrainingError(ToolkitError):
    """A model cannot be trained or changed as asked, or its loss is not finite."""


class ExportError(ToolkitError):
    """A torch model cannot be loaded or exported."""


class QuantizationError(ToolkitError):
    """A network cannot be quantised as asked."""


class BackendUnavailableError(ToolkitError):
    """A runtime is not installed, or the GPU it needs is not there."""


class EngineError(ToolkitError):
    """An engine cannot be built, read or run."""


class CheckFailedError(ToolkitError):
    """Everything ran, and the result is wrong: outputs differ, or a rule is broken."""

    exit_code = 1
