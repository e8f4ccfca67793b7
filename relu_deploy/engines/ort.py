"""ONNX Runtime on a CPU: the optimised graph is the engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import onnxruntime

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from relu_deploy.engines.base import Arrays, BuildConfig, BuildReport, check_feeds
from relu_deploy.engines.manifest import read_manifest
from relu_deploy.errors import EngineError
from relu_deploy.tensors import TensorSpec

if TYPE_CHECKING:
    import onnx


class OrtBackend:
    """Builds and opens engines of target ``ort``."""

    def check(self, model: onnx.ModelProto, config: BuildConfig) -> None:
        """ONNX Runtime takes dynamic shapes as they are, and is always there."""

    def build(self, model: Path | onnx.ModelProto, out: Path, config: BuildConfig) -> BuildReport:
        """Optimise a model offline. See :meth:`relu_deploy.engines.base.Backend.build`."""
        from relu_deploy.engines.ort_build import build_ort  # needs onnx, which running an engine does not

        return build_ort(model, out, config)

    @contextlib.contextmanager
    def open(self, engine: Path, *, threads: int | None = None) -> Iterator[OrtEngine]:
        """Load an engine. See :meth:`relu_deploy.engines.base.Backend.open`."""
        report = read_manifest(engine)
        session = open_file(engine, threads=threads, hint="build it again with this onnxruntime")
        yield OrtEngine(session, report.inputs, report.outputs)


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


def open_file(path: Path, *, threads: int | None, hint: str | None = None) -> onnxruntime.InferenceSession:
    """A session to be timed, of an engine or of a plain ONNX file: both pay the same for a call.

    Args:
        path: ONNX file.
        threads: Of one inference; None for one for each physical core.
        hint: What to do where it cannot be loaded.

    Raises:
        EngineError: ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that go on spinning after an inference take the cores of whatever else runs here: two engines open in one
    # process halve each other's speed. During an inference spinning is what makes small layers fast.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise EngineError(f"onnxruntime cannot load {path}: {first_line(error)}", hint=hint) from error
