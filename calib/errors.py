"""What can go wrong while data is read and ranges are measured.

``ToolkitError`` is the root of every error that is a user's to mend, here and in ``relu_deploy.errors``: it carries
what failed, on which file or tensor, and the fix. A bug is any other exception and keeps its traceback.
"""

from __future__ import annotations

import re

# What onnxruntime puts in front of its messages; it tells a user nothing.
_RUNTIME_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class ToolkitError(Exception):
    """Something a user can mend.

    Args:
        message: What failed, on which node or file.
        hint: What to do about it; printed on a line of its own.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class FileError(ToolkitError):
    """A file cannot be read or written."""


class DataError(ToolkitError):
    """Input data is missing, empty, of the wrong name, shape or type, or not finite."""


class NoSampleError(DataError):
    """There is data, and none of it is for this run: a shard of fewer samples than shards."""


class CalibrationError(ToolkitError):
    """Ranges cannot be measured: the network produced NaN or Inf, or has nothing to measure."""


class RangesError(ToolkitError):
    """A ranges file is damaged, or belongs to another network."""


class MissingExtraError(ToolkitError):
    """A feature needs a package that is not installed.

    Args:
        package: Import name of what is missing.
        extra: The extra of ``relu-deploy`` that installs it.
        purpose: What it is needed for.
    """

    def __init__(self, package: str, *, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f"pip install 'relu-deploy[{extra}]'",
        )


def message_of(error: BaseException) -> str:
    """All of a library's message, without the code that onnxruntime puts in front of its own."""
    return _RUNTIME_CODE.sub("", str(error)).strip()


def first_line(error: BaseException, *, limit: int = 400) -> str:
    r"""The first line of a library's message, which says what failed; the lines after it are usually a stack.

    >>> first_line(RuntimeError("[ONNXRuntimeError] : 1 : FAIL : no such node\n  at graph.cc:12"))
    'no such node'
    >>> first_line(ValueError())
    'no reason given'
    """
    return (message_of(error).splitlines() or ["no reason given"])[0].strip()[:limit]
