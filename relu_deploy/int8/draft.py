"""A network right before Q/DQ are written: what is measured on, and changed by what was measured."""

from __future__ import annotations

import dataclasses

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
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
    """

    graph: gs.Graph
    source: onnx.ModelProto
    placement: Placement
    bounds: dict[str, tuple[float, float]]
    number: NumberFormat
