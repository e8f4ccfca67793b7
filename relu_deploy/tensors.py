"""An input or output of a network, in the words of every report. Needs neither onnx nor a runtime."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: As in the ONNX file.
        shape: A number for each fixed axis, a name (or ``?``) for each that is known only at run time; ``...`` alone
            where not even the number of axes is known.
        dtype: numpy's name: ``float32``, ``float16``, ``int64``, ...

    >>> str(TensorSpec("x", ("N", 3, 8, 8), "float32"))
    'x float32[N, 3, 8, 8]'
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> TensorSpec:
        """Read what ``dataclasses.asdict`` and JSON made of one."""
        return cls(value["name"], tuple(value["shape"]), value["dtype"])

    @property
    def dynamic(self) -> bool:
        """Whether any axis is known only at run time."""
        return any(isinstance(axis, str) for axis in self.shape)

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an array of this shape fits: as many axes, and every fixed one as it says."""
        return len(shape) == len(self.shape) and all(
            isinstance(want, str) or want == have for want, have in zip(self.shape, shape, strict=True)
        )

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}[{', '.join(map(str, self.shape))}]"
