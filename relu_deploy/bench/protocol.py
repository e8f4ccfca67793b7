"""What the bench and its workers say to each other: one JSON object a line, over pipes of their own.

Requests: ``load`` (engine, target, threads), ``feed`` (a ``.npz`` by path), ``warmup`` (seconds, runs), ``round``
(settle, seconds), ``usage``, ``outputs`` (feed, names, out). Every answer is ``{"ok": ...}`` or
``{"error": {type, message, hint}}``. A worker that cannot even say so exits; its standard error tells why.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt

from relu_deploy.tensors import TensorSpec

# A round of a very fast network: more runs would only make the file of raw samples long, since rounds are what counts.
MAX_RUNS = 1000
PLAIN_ONNX = "onnx"


class Runnable(Protocol):
    """The part of an engine that a worker needs.

    An engine may also have ``time(feeds, runs) -> Sequence[float]``, milliseconds of each run by its own clock (CUDA
    events, a CUDA graph, no copies); a worker then takes those instead of the host's clock. No engine with such a clock
    has been run: that path was tested with a stand-in, never on a GPU.
    """

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives."""

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """One inference."""
