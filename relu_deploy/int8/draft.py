"""A network right before Q/DQ are written: what is measured on, and changed by what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.place import Placement


@dataclasses.dataclass(frozen=True)
class Draft:
    """A network right before Q/DQ are written.

    Attributes:
        graph: Float, with every change that INT8 asked for.
        source: What it was imported from.
        placement: Where INT8 goes.
        bounds: Range of each tensor.
        number: The target's format.
        centres: Layer -> by how much the channels of what it reads were moved, see :mod:`relu_deploy.int8.settle`.
    """

    graph: gs.Graph
    source: onnx.ModelProto
    placement: Placement
    bounds: dict[str, tuple[float, float]]
    number: NumberFormat
    centres: Mapping[str, Array] = dataclasses.field(default_factory=dict)
