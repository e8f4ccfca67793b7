"""ONNX Runtime sessions that compute the network as it is written, and whose failures name a node."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from calib.errors import CalibrationError, message_of
from calib.model import fits_one_message
from calib.runtime import RUNTIME_ERRORS
from calib.weights import values_of

_AT_NODE = re.compile(r"running (?P<op>\S+) node\. Name:'(?P<name>[^']*)' Status Message: (?P<why>.*)", re.DOTALL)
# Of a failed check the runtime gives source file, line and C++ signature before what a person can read.
_CXX = re.compile(r"^\S+:\d+ .*? was false\.\s*", re.DOTALL)


def open_session(
    model: onnx.ModelProto, *, optimise: bool = False, threads: int | None = None,
    weights: Mapping[str, ort.OrtValue] | None = None,
) -> ort.InferenceSession:  # fmt: skip
    """Open a model in memory on the CPU, to look at what it computes; engines that are timed are opened from files.

    Args:
        model: One past what a protobuf message can hold goes through a temporary folder.
        optimise: Let the runtime fuse operators; without it, each node runs as it is written.
        threads: None: one a core.
        weights: What the model only names, see :mod:`calib.weights`; they must live as long as the session.

    Raises:
        RUNTIME_ERRORS: the runtime cannot load it; the caller knows what that means for the user.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4  # failures are raised, and our message says more than the log line
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    if optimise:
        # Nodes in the order in which they are there; the other order starts at whatever output the runtime made last.
        options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        # Planning which tensor lies where another one was takes half of the loading: a tenth of a second for a thousand
        # nodes of a network with open extents. Without a plan they are freed and allocated, which costs nothing.
        options.enable_mem_reuse = False
    options.intra_op_num_threads = threads or 0
    # Memory patterns hold every activation at once: 455 MB against 325 on a detector of 280 tensors.
    options.enable_mem_pattern = False
    if weights:
        options.add_external_initializers(list(weights), list(weights.values()))
    with _loadable(model) as loadable:
        return ort.InferenceSession(loadable, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _loadable(model: onnx.ModelProto) -> Iterator[bytes | str]:
    """The model as bytes; past what one message can hold, as a temporary file with its weights beside it."""
    if fits_one_message(model):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="calib-") as folder:
        path = Path(folder) / "model.onnx"
        stored = onnx.ModelProto()
        stored.CopyFrom(model)
        onnx.save_model(stored, path, save_as_external_data=True, location="weights", size_threshold=1024)
        yield str(path)


class Session:
    """A network that runs on the CPU.

    Args:
        model: What is to be looked at is an output of it, or read by several operators.
        threads: Of the runtime; None: one a core.
        optimise: Let the runtime lay activations out as its kernels like them. It fuses operators too, but none whose
            tensors in between are outputs. Without it failures name a node; with it, a part of one perhaps.
        weights: What the model only names, see :mod:`calib.weights`.

    Raises:
        CalibrationError: the runtime cannot load it.
    """

    def __init__(
        self, model: onnx.ModelProto, *, threads: int | None = None, optimise: bool = False,
        weights: Mapping[str, onnx.TensorProto] | None = None,
    ) -> None:  # fmt: skip
        self._weights = values_of(model, weights or {})
        try:
            self._session = open_session(model, threads=threads, optimise=optimise, weights=self._weights)
        except RUNTIME_ERRORS as error:
            raise CalibrationError(f"onnxruntime cannot load the model: {message_of(error)}") from error

    def describe(self) -> dict[str, tuple[str, Sequence[Any]]]:
        """Type and shape of each output, as the runtime inferred them. A shape of no axes may also mean: not known."""
        return {output.name: (output.type, output.shape) for output in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]], what: str) -> list[Any]:
        """Compute outputs.

        Raises:
            CalibrationError: an operator failed; names it, and ``what`` was fed.
        """
        try:
            values: list[Any] = self._session.run(list(outputs), dict(feeds))
        except RUNTIME_ERRORS as error:
            text = message_of(error)
            if match := _AT_NODE.search(text):
                text = f"{match['op']} node {match['name']!r}: {_CXX.sub('', match['why']).strip()}"
            raise CalibrationError(f"the network fails on {what}, at {text}") from error
        return values


def with_outputs(model: onnx.ModelProto, names: Iterable[str], nodes: Iterable[onnx.NodeProto] = ()) -> onnx.ModelProto:
    """Copy of a model with nodes appended, and tensors that become outputs. Types are left for the runtime to infer."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.node.extend(nodes)
    present = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    return copy
