"""What the bench and its workers say to each other: one JSON object a line, over pipes of their own.

Requests: ``load`` (engine, target, threads), ``feed`` (a ``.npz`` by path), ``warmup`` (seconds, runs), ``round``
(settle, seconds), ``usage``, ``outputs`` (feed, names, out). Every answer is ``{"ok": ...}`` or
``{"error": {type, message, hint}}``. A worker that cannot even say so exits; its standard error tells why.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# A round of a very fast network: more runs would only make the file of raw samples long, since rounds are what counts.
MAX_RUNS = 1000
PLAIN_ONNX = "onnx"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, shape (None: not fixed) and numpy dtype of an input or output."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @classmethod
    def of(cls, value: Any) -> TensorSpec:
        """Read one from anything with the same attributes; symbolic axes become None."""
        shape = (axis if isinstance(axis, int) and axis >= 0 else None for axis in value.shape)
        return cls(str(value.name), tuple(shape), np.dtype(value.dtype).name)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> TensorSpec:
        """Read what ``dataclasses.asdict`` and JSON made of one."""
        return cls(value["name"], tuple(value["shape"]), value["dtype"])

    def __str__(self) -> str:
        shape = "x".join("?" if axis is None else str(axis) for axis in self.shape)
        return f"{self.name} {shape or 'scalar'} {self.dtype}"


class Runnable(Protocol):
    """The part of an engine that a worker needs.

    An engine may also have ``time(feeds, runs) -> Sequence[float]``, milliseconds of each run by its own clock (CUDA
    events, a CUDA graph, no copies); a worker then takes those instead of the host's clock. No engine with such a clock
    has been run: that path was tested with a stand-in, never on a GPU.
    """

    @property
    def inputs(self) -> Any:
        """What it takes; each with ``name``, ``shape``, ``dtype``."""

    @property
    def outputs(self) -> Any:
        """What it gives."""

    def run(self, feeds: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """One inference."""
