"""Hold a torch model against its ONNX file, input by input, output by output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy.errors import CheckFailedError, ExportError
from relu_deploy.export.report import OutputCheck
from relu_deploy.export.samples import Sample
from relu_deploy.export.specs import format_shape

# The runtime's Python side raises plain RuntimeErrors for feeds it cannot read.
_ORT_ERRORS: tuple[type[Exception], ...] = (*RUNTIME_ERRORS, RuntimeError)

Array = npt.NDArray[Any]

# Relative to the largest magnitude of an output. Both runtimes compute in the output's format but sum in another
# order, so the error is some hundred units in the last place: 2^-24 for float32, 2^-11 for float16, 2^-53 for float64.
_RTOL = {"float32": 1e-4, "float16": 2e-2, "float64": 1e-8}
# For outputs that are zero but for rounding: what the sum of a few terms near 1 is off by.
_ATOL = {"float32": 1e-6, "float16": 1e-3, "float64": 1e-12}


class Comparison:
    """Runs both sides and keeps the worst error of each output.

    Args:
        reference: Takes the inputs in order and returns the model's tensors.
        model: What was exported from it.
        outputs: Names of the outputs, in the order of ``reference``.
        rtol: Replaces the default of every dtype, relative to the largest magnitude of an output.
        atol: Replaces the default of every dtype.
        warned: What the exporter warned of; told with a difference, since it usually names the cause.

    Raises:
        CheckFailedError: ONNX Runtime cannot load the model.
    """

    def __init__(
        self,
        reference: Callable[..., Sequence[torch.Tensor]],
        model: onnx.ModelProto,
        outputs: Sequence[str],
        *,
        rtol: float | None = None,
        atol: float | None = None,
        warned: Sequence[str] = (),
    ) -> None:
        self._reference = reference
        self._outputs = tuple(outputs)
        self._rtol, self._atol = rtol, atol
        self._warned = tuple(warned)
        self._checks: dict[str, OutputCheck] = {}
        self._seen_finite: set[str] = set()
        self._session = _open(model)
        self._used = [value.name for value in self._session.get_inputs()]
        found = [value.name for value in self._session.get_outputs()]
        if found != list(self._outputs):
            raise CheckFailedError(f"the exported file has the outputs {found} where the model has {list(outputs)}")

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs that the exported file has; an exporter may drop one that the model does not use."""
        return tuple(self._used)

    def check(self, sample: Sample) -> None:
        """Run one sample on both sides.

        Raises:
            ExportError: the torch model itself fails on it.
            CheckFailedError: ONNX Runtime fails on it, or an output differs by more than the tolerance.
        """
        expected = self._torch(sample)
        try:
            actual = self._session.run(None, {name: sample.feeds[name] for name in self._used})
        except _ORT_ERRORS as error:
            raise CheckFailedError(
                f"the exported file does not run where the model does, at {sample.title}: {first_line(error)}",
                hint="the exporter fixed something that depends on the input; no file was written",
            ) from error
        for name, ours, theirs in zip(self._outputs, actual, expected, strict=True):
            self._keep_worst(self._compare(name, np.asarray(ours), theirs, sample))

    def repeatable(self, sample: Sample) -> None:
        """Run the torch model twice on one sample.

        Raises:
            CheckFailedError: the two runs differ, so no file can agree with it.
        """
        for name, first, second in zip(self._outputs, self._torch(sample), self._torch(sample), strict=True):
            if first.shape != second.shape or not np.array_equal(first, second, equal_nan=first.dtype.kind == "f"):
                raise CheckFailedError(
                    f"output {name!r} of the model changes from run to run on one input, so no file can agree with it",
                    hint="look for random numbers, or dropout called with training=True, in its forward",
                )

    def results(self) -> tuple[OutputCheck, ...]:
        """The worst of each output.

        Raises:
            CheckFailedError: an output was never finite, so nothing was compared.
        """
        for name in self._outputs:
            if name not in self._seen_finite:
                raise CheckFailedError(
                    f"output {name!r} holds only NaN, Inf or nothing for every input tried: it could not be compared",
                    hint="give the inputs a range the model expects: --input NAME=SHAPE:float32:0..1",
                )
        return tuple(self._checks[name] for name in self._outputs)

    def _torch(self, sample: Sample) -> list[Array]:
        return [tensor.detach().cpu().numpy() for tensor in run_torch(self._reference, sample)]

    def _compare(self, name: str, ours: Array, theirs: Array, sample: Sample) -> OutputCheck:
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            raise CheckFailedError(
                f"output {name!r} is {ours.dtype} {format_shape(ours.shape)} in the exported file and {theirs.dtype} "
                f"{format_shape(theirs.shape)} in torch, at {sample.title}",
                hint="no file was written",
            )
        finite = np.isfinite(theirs)
        # Masked attention returns -inf on purpose; then both sides must have it at the same places.
        same_rest = np.array_equal(ours[~finite], theirs[~finite], equal_nan=True) if not finite.all() else True
        worst, limit = self._error(ours[finite], theirs[finite], theirs.dtype)
        if finite.any():
            self._seen_finite.add(name)
        if not (worst <= limit and same_rest):
            told = f"{worst:.3g}, {limit:.3g} are allowed" if same_rest else "NaN or Inf stand at other places"
            raise CheckFailedError(
                f"output {name!r} of the exported file differs from torch at {sample.title}: worst error {told}",
                hint=f"no file was written; {self._usual_cause()}",
            )
        return OutputCheck(name, str(theirs.dtype), worst, limit)

    def _error(self, ours: Array, theirs: Array, dtype: np.dtype[Any]) -> tuple[float, float]:
        """Worst error and its limit, over the places where torch is finite."""
        exact = dtype.kind != "f"
        rtol = 0.0 if exact else (_RTOL[dtype.name] if self._rtol is None else self._rtol)
        atol = 0.0 if exact else (_ATOL[dtype.name] if self._atol is None else self._atol)
        if theirs.size == 0:
            return 0.0, atol
        difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
        limit = atol + rtol * float(np.abs(theirs.astype(np.float64)).max())
        return float(difference.max()), limit

    def _usual_cause(self) -> str:
        if self._warned:
            return f"the exporter had warned: {self._warned[0]}"
        return (
            "a branch on values or a fixed size in forward is the usual cause; where such inputs never occur, as an "
            "attention mask of zeros alone, say so with --input NAME=SHAPE:DTYPE:LO..HI; --rtol allows more rounding"
        )

    def _keep_worst(self, check: OutputCheck) -> None:
        known = self._checks.get(check.name)
        if known is None or check.worst > known.worst:
            self._checks[check.name] = check


def run_torch(reference: Callable[..., Any], sample: Sample) -> Any:
    """Call the torch side with a sample's inputs.

    Raises:
        ExportError: it fails.
    """
    try:
        return reference(*(torch.from_numpy(array.copy()) for array in sample.feeds.values()))
    except (RuntimeError, IndexError, ValueError, TypeError, AssertionError, AttributeError, KeyError) as error:
        raise ExportError(
            f"the torch model itself fails at {sample.title}: {type(error).__name__}: {first_line(error)}",
            hint="check --input and --dynamic; integers take a range, NAME=1x16:int64:0..99",
        ) from error


def _open(model: onnx.ModelProto) -> ort.InferenceSession:
    try:
        return open_session(model, optimise=True)  # as a user will run it
    except _ORT_ERRORS as error:
        raise CheckFailedError(f"ONNX Runtime cannot load what was exported: {first_line(error)}") from error
