"""Fold DY-ReLUs in a model, and measure what that changes: at every unit, and at the outputs.

The bound of a unit holds where its coefficients and its input keep to their ranges. What is measured depends on what
the network is fed: on the samples that the ranges come from, each unit is within its bound; on random inputs it need
not be, and the report shows that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx

from calib.errors import ToolkitError, first_line
from calib.ranges import Ranges
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session, with_outputs
from relu_deploy.graph import export_graph, import_graph
from relu_deploy.passes.approximate import Drift
from relu_deploy.passes.fold_dyrelu import Folded, fold_units
from relu_deploy.passes.recognise import recognise_pwlu
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.verify import Feed, difference, random_feeds
from relu_deploy.report import PassReport


@dataclasses.dataclass(frozen=True)
class FoldedUnit:
    """One DY-ReLU that was made static, and how far off that was seen to be.

    Attributes:
        node: The node that makes its output.
        variant: ``A``, ``B`` or ``C``.
        bound: Proven for coefficients and inputs that keep to their ranges, in units of the output.
        measured: Largest difference of its output when it is fed what the original feeds it; None where nothing ran.
        largest: Largest magnitude of that output; None likewise.
    """

    node: str
    variant: str
    bound: float
    measured: float | None = None
    largest: float | None = None


@dataclasses.dataclass(frozen=True)
class Folding:
    """What folding dynamic units did.

    Attributes:
        tolerance: What was allowed at a unit, in units of its output.
        units: Those that were folded.
        outputs: How far each output of the network moved; empty where nothing could be run.
        samples: Inputs on which that was measured.
        given: Whether the caller gave them; random ones go beyond what calibration saw.
        note: Why nothing was measured; empty otherwise.
    """

    tolerance: float
    units: tuple[FoldedUnit, ...]
    outputs: tuple[Drift, ...] = ()
    samples: int = 0
    given: bool = False
    note: str = ""


def fold_dynamic(
    model: onnx.ModelProto, ranges: Ranges, tolerance: float
) -> tuple[onnx.ModelProto, PassReport, tuple[Folded, ...]]:
    """Fold every DY-ReLU that the ranges allow; the model itself where there is none.

    Args:
        model: Not changed. Its tensors have the names that they have in ``ranges``.
        ranges: Measured on it, or on the network that it was rewritten from.
        tolerance: Largest error at a unit.
    """
    graph = import_graph(model)
    annotate(graph, model)
    report, units = fold_units(graph, ranges, tolerance=tolerance)
    return (export_graph(graph, model) if units else model), report, units


def gather_static(model: onnx.ModelProto, units: Sequence[Folded]) -> tuple[onnx.ModelProto, PassReport]:
    """Make what is left of folded units one PWLU each, which the passes for those make PReLU, hinges or a table.

    Args:
        model: Not changed.
        units: Those that were folded in it.
    """
    graph = import_graph(model)
    annotate(graph, model)
    report = recognise_pwlu(graph, fewest_bends=1, of={unit.input for unit in units})
    return (export_graph(graph, model) if report.changed else model), report


def check_folding(tolerance: float, ranges: object) -> None:
    """Refuse a tolerance that is not a finite number from 0 on, and folding without ranges.

    Raises:
        ToolkitError: it is not, or there are none.
    """
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise ToolkitError(
            f"a fold tolerance of {tolerance:g} makes no sense",
            hint="give the largest error of a unit's output that is acceptable, such as 0.01; 0 accepts none",
        )
    if not isinstance(ranges, Ranges):
        raise ToolkitError(
            "making dynamic units static needs ranges: only calibration knows how far their coefficients move",
            hint="measure them on this network with: relu-deploy calibrate",
        )


def describe_folding(units: Sequence[Folded], tolerance: float) -> Folding:
    """The bounds as a report, nothing measured."""
    return Folding(tolerance, tuple(FoldedUnit(unit.node, unit.variant, unit.bound) for unit in units))


def measure_folding(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    units: Sequence[Folded],
    tolerance: float,
    *,
    samples: Sequence[Feed] | None = None,
    seed: int = 0,
) -> Folding:
    """Run both networks: each folded unit on what reaches it in the original, and the outputs.

    Args:
        before: With dynamic units.
        after: With static ones, nothing else changed.
        units: Those that were folded.
        tolerance: What was allowed.
        samples: Inputs; None makes random ones.
        seed: Of the random inputs.
    """
    report = dataclasses.replace(describe_folding(units, tolerance), given=samples is not None)
    try:
        pair = _Pair(before, after, units)
        feeds = list(samples) if samples is not None else random_feeds(before, pair.old, seed)
        for feed in feeds:
            pair.run(feed)
    except RUNTIME_ERRORS as error:
        return dataclasses.replace(report, note=f"ONNX Runtime cannot run it: {first_line(error)}")
    if not feeds:
        return dataclasses.replace(report, note="no random input was found that the original accepts")
    rows = tuple(
        dataclasses.replace(row, measured=error, largest=size)
        for row, error, size in zip(report.units, pair.errors, pair.sizes, strict=True)
    )
    drifts = tuple(Drift(name, difference(name, found)) for name, found in pair.outputs.items())
    return dataclasses.replace(report, units=rows, outputs=drifts, samples=len(feeds))


class _Pair:
    """The network before and after, each folded unit alone, and what running them showed."""

    def __init__(self, before: onnx.ModelProto, after: onnx.ModelProto, units: Sequence[Folded]) -> None:
        ends = dict.fromkeys(name for unit in units for name in (unit.input, unit.output))
        self.old, self.new = open_session(with_outputs(before, ends)), open_session(after)
        self.units = [(unit, open_session(_unit(after, unit))) for unit in units]
        self.errors, self.sizes = [0.0] * len(units), [0.0] * len(units)
        self.outputs: dict[str, list[tuple[object, object]]] = {output.name: [] for output in self.new.get_outputs()}

    def run(self, feed: Feed) -> None:
        """Take in one input."""
        seen = dict(zip([o.name for o in self.old.get_outputs()], self.old.run(None, dict(feed)), strict=True))
        for name, value in zip(self.outputs, self.new.run(None, dict(feed)), strict=True):
            self.outputs[name].append((seen[name], value))
        for index, (unit, alone) in enumerate(self.units):
            (value,) = alone.run(None, {unit.input: seen[unit.input]})
            wanted = seen[unit.output].astype(np.float64)
            gap = np.abs(value.astype(np.float64) - wanted)
            self.errors[index] = max(self.errors[index], float(gap.max(initial=0.0)))
            self.sizes[index] = max(self.sizes[index], float(np.abs(wanted).max(initial=0.0)))


def _unit(model: onnx.ModelProto, unit: Folded) -> onnx.ModelProto:
    """The folded unit alone, from its x to its output."""
    graph = import_graph(model)
    annotate(graph, model)
    tensors = graph.tensors()
    x, y = tensors[unit.input], tensors[unit.output]
    x.inputs.clear()
    graph.inputs, graph.outputs = [x], [y]
    x.dtype = x.dtype if x.dtype is not None else np.float32
    y.dtype = y.dtype if y.dtype is not None else x.dtype
    return export_graph(graph, model)
