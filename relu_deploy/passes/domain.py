"""Where a bound has to hold: every finite number of a type, a range that a person gives, or one that was calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from calib.ranges import Ranges

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, eq=False)
class Domain:
    """An interval for each channel.

    Attributes:
        low: float64, ``(C,)`` or ``(1,)``; finite.
        high: The same, ``>= low``.
        source: ``given`` or ``calibrated``.
        axis: Where the channels are, counted from the last (-1); None where there is one range for all.
    """

    low: Array
    high: Array
    source: str
    axis: int | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Smallest and largest number in any channel."""
        return float(self.low.min()), float(self.high.max())

    def along(self, rank: int) -> tuple[Array, Array]:
        """Both ends, of a shape that goes with a tensor of that many axes."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = len(self.low)
        return self.low.reshape(shape), self.high.reshape(shape)

    def __str__(self) -> str:
        low, high = self.ends
        each = f", a range for each of {len(self.low)} channels" if len(self.low) > 1 else ""
        return f"{low:.4g} <= x <= {high:.4g} ({self.source}{each})"


class Domains(Protocol):
    """Tells the domain of a region from its input."""

    def of(self, tensor: gs.Tensor, channels: int, axis: int | None) -> Domain | str | None:
        """Domain of a region.

        Args:
            tensor: The region's input.
            channels: How many channels its constants have; 1 where none varies.
            axis: Where they are, counted from the last (-1); None where none varies.

        Returns:
            None for every finite number of the tensor's type; a text says why the domain is not known.
        """


@dataclasses.dataclass(frozen=True)
class Everywhere:
    """Every finite number of the type."""

    def of(self, tensor: gs.Tensor, channels: int, axis: int | None) -> Domain | str | None:  # noqa: ARG002
        """As :class:`Domains` says."""
        return None


@dataclasses.dataclass(frozen=True)
class Given:
    """One range for every region.

    Attributes:
        low: Finite.
        high: Finite, above ``low``.
    """

    low: float
    high: float

    def of(self, tensor: gs.Tensor, channels: int, axis: int | None) -> Domain | str | None:  # noqa: ARG002
        """As :class:`Domains` says."""
        return Domain(np.array([self.low]), np.array([self.high]), "given")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibrated:
    """What calibration measured of each region's input: channel by channel where both have the same channels.

    Attributes:
        ranges: Measured on the network that is rewritten.
    """

    ranges: Ranges

    def of(self, tensor: gs.Tensor, channels: int, axis: int | None) -> Domain | str | None:
        """As :class:`Domains` says."""
        found = self.ranges.tensors.get(tensor.name)
        if found is None:
            return _missing(tensor.name, self.ranges.skipped)
        rank = None if tensor.shape is None else len(tensor.shape)
        place = None if found.axis is None or rank is None else found.axis - rank
        if (
            found.channel_min is None
            or found.channel_max is None
            or place != axis
            or len(found.channel_min) != channels
        ):
            return Domain(np.array([float(found.min)]), np.array([float(found.max)]), "calibrated")
        low, high = found.channel_min.astype(np.float64), found.channel_max.astype(np.float64)
        return Domain(low, high, "calibrated", axis)


def _missing(name: str, skipped: Mapping[str, str]) -> str:
    why = f" ({skipped[name]})" if name in skipped else ""
    return f"the ranges file has no range of its input {name}{why}"
