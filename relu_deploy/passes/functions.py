"""The functions of a graph: what leads from one cut of its forest to another, and how it is called.

Passes that replace activations and those that only count them ask here, so that both see the same functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.classify import (
    Activation,
    classify_piecewise_linear,
    classify_samples,
    is_arithmetic,
    summary,
)
from relu_deploy.passes.floats import FLOAT_TYPES
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import PiecewiseLinear
from relu_deploy.passes.region import Cut, Forest, find_regions, nodes_between, onnx_type, program_between
from relu_deploy.passes.symbolic import evaluate

# Distinct channels that are named one by one in a report.
NAMED_CHANNELS = 8
# What is no activation, or one already.
NOT_ACTIVATIONS = ("identity", "affine", "constant", "relu")
AFFINE_OPS = ("Add", "Sub", "Mul", "Div", "Neg", "Identity", "Dropout", "Cast", "Sum")


@dataclasses.dataclass(frozen=True)
class Segment:
    """The function between a cut and the one above it.

    Attributes:
        program: What is computed for each element; None where an operator has no lowering.
        first: Its first channel where that is exact, else None.
        refusal: Why there is no program; empty where there is one.
    """

    program: Program | None
    first: PiecewiseLinear | None
    refusal: str = ""

    @property
    def is_affine(self) -> bool:
        """Whether the first channel is a straight line."""
        return self.first is not None and self.first.is_affine


class Functions:
    """One graph's forest, and what is known of the functions in it; asking twice computes once.

    Attributes:
        forest: The cuts of the graph.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.forest: Forest = find_regions(graph)
        self._segments: dict[int, Segment] = {}
        self._exact: dict[object, PiecewiseLinear | None] = {}
        self._labels: dict[object, Activation] = {}

    def walk(self, visit: Callable[[Cut, list[Cut]], Cut]) -> None:
        """Visit every cut that a function is needed for, sinks first.

        Args:
            visit: Called with a cut that has a parent and with those visited cuts that go on from it; returns the
                ancestor to go on from, which is the parent unless a longer window belongs together.
        """
        needed = {id(cut) for cut in self.forest.exits}
        followers: dict[int, list[Cut]] = {}
        for cut in reversed(list(self.forest.cuts.values())):  # in order of creation a parent comes before its children
            if id(cut) in needed and cut.parent is not None:
                top = visit(cut, followers.get(id(cut), []))
                needed.add(id(top))
                followers.setdefault(id(top), []).append(cut)

    def segment(self, cut: Cut) -> Segment:
        """The function from the parent of a cut to the cut."""
        if id(cut) not in self._segments:
            assert cut.parent is not None  # noqa: S101 - roots have no segment
            try:
                program = program_between(cut.parent, cut, same_shape=False)
                self._segments[id(cut)] = Segment(program, self.exact(program, 0))
            except UnsupportedError as error:
                self._segments[id(cut)] = Segment(None, None, str(error))
        return self._segments[id(cut)]

    def exact(self, program: Program, channel: int) -> PiecewiseLinear | None:
        """One channel in real arithmetic, once for each distinct function: networks repeat their activation."""
        return self.exact_column(program, program.constants[:, min(channel, program.constants.shape[1] - 1)])

    def exact_channels(self, program: Program) -> Iterator[PiecewiseLinear | None]:
        """Every distinct channel in real arithmetic, in the order of ``program.channels()``, as far as it is read."""
        return (self.exact_column(program, column) for column in program.channels().T)

    def is_affine(self, cut: Cut) -> bool:
        """Whether a cut is a straight line of its parent, in its first channel."""
        return self.segment(cut).is_affine

    def of_floats(self, cut: Cut) -> bool:
        """Whether a cut and its parent are floats or of unknown type; the others are about shapes and masks."""
        return cut.parent is not None and {onnx_type(cut.tensor), onnx_type(cut.parent.tensor)} <= {*FLOAT_TYPES, 0}

    def label(self, program: Program, tensor: gs.Tensor) -> Activation:
        """What a function of a tensor is, all channels together; the tensor's type says how exact constants can be."""
        table = program.channels()
        kind = FLOAT_TYPES.get(onnx_type(tensor))
        key = (program.steps, table.tobytes(), kind)
        if key not in self._labels:
            unit = 0.0 if kind is None else kind.unit
            columns = [self._label_column(program, column, unit) for column in table.T[:NAMED_CHANNELS]]
            self._labels[key] = summary(columns, program.constants.shape[1])
        return self._labels[key]

    def activation(self, cut: Cut, followers: list[Cut]) -> Activation | None:
        """What leads from the parent to a cut; a constant factor behind it (GELU's 0.5) may belong to it.

        Args:
            cut: The result; not a root.
            followers: The cuts that go on from it.

        Returns:
            None where it is no activation: it is affine, or part of a normalisation. Kind ``unknown`` with exact False
            where an operator has no lowering.
        """
        segment = self.segment(cut)
        if segment.program is None:
            nonlinear = any(node.op not in AFFINE_OPS for node in _affordable_nodes(cut))
            return Activation("unknown", f"left alone: {segment.refusal}", exact=False) if nonlinear else None
        if segment.is_affine and segment.program.constants.shape[1] == 1:
            return None
        assert cut.parent is not None  # noqa: S101 - roots have no segment
        top = cut.parent.tensor
        label = self.label(segment.program, top)
        if label.kind in ("unknown", "relu") and len(followers) == 1 and self.is_affine(followers[0]):
            longer = self.label(program_between(cut.parent, followers[0], same_shape=False), top)
            label = longer if longer.kind != "unknown" else label
        return None if label.kind in NOT_ACTIVATIONS or is_arithmetic(label.kind) else label

    def gates(self) -> list[Cut]:
        """Products of two live tensors, one of which an activation made."""
        found = []
        for cut in self.forest.cuts.values():
            if cut.gate and cut.node is not None and cut.node.op == "Mul" and onnx_type(cut.tensor) in FLOAT_TYPES:
                sides = [self.forest.cuts.get(id(tensor)) for tensor in cut.node.inputs]
                if any(side and side.parent and not self.is_affine(side) for side in sides):
                    found.append(cut)
        return found

    def _label_column(self, program: Program, column: np.ndarray, unit: float) -> Activation:
        function = self.exact_column(program, column)
        return classify_piecewise_linear(function) if function else classify_samples(program, column, unit=unit)

    def exact_column(self, program: Program, column: np.ndarray) -> PiecewiseLinear | None:
        """One column of constants in real arithmetic."""
        values = tuple(float(value) for value in column)
        key = (program.steps, values)
        if key not in self._exact:
            self._exact[key] = evaluate(program, values)
        return self._exact[key]


def _affordable_nodes(cut: Cut) -> list[gs.Node]:
    """Nodes of a refused segment; the one that makes the tensor where there are too many to list."""
    try:
        return nodes_between(cut.parent, cut) if cut.parent else []
    except UnsupportedError:
        return [cut.node] if cut.node is not None else []
