"""What a person should know of a ranges file: the widest tensors, and channels that are dead."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx

from calib.ranges import Ranges


@dataclasses.dataclass(frozen=True)
class DeadChannels:
    """Channels that a Relu or a Clip at 0 never let through.

    Attributes:
        tensor: Output of the Relu or Clip.
        channels: Their indices.
        of: How many channels the tensor has.
    """

    tensor: str
    channels: tuple[int, ...]
    of: int


def widest(ranges: Ranges, *, count: int = 5) -> tuple[tuple[str, float], ...]:
    """Names and magnitudes of the tensors with the largest values, largest first."""
    found = sorted(((name, r.absmax) for name, r in ranges.tensors.items()), key=lambda item: -item[1])
    return tuple(found[:count])


def dead_channels(ranges: Ranges, model: onnx.ModelProto) -> tuple[DeadChannels, ...]:
    """Channels that are 0 after a Relu in all samples; a quantiser must not make a scale of 0 of them."""
    dead = []
    for node in model.graph.node:
        measured = ranges.tensors.get(node.output[0]) if node.op_type in ("Relu", "Clip") else None
        if measured is None or measured.channel_max is None or measured.channel_min is None:
            continue
        channels = np.flatnonzero((measured.channel_max <= 0) & (measured.channel_min >= 0))
        if channels.size:
            dead.append(DeadChannels(node.output[0], tuple(int(c) for c in channels), len(measured.channel_max)))
    return tuple(dead)
