"""Gather a learned activation that arrives spelled out into one node ``relu_deploy::PWLU``.

Exporters that do not know the unit write it as a sum of hinges, as a chain of ``Where``, or as ``floor`` and two table
look-ups. What a region computes is found exactly, whatever its spelling; where each channel is a continuous
piecewise-linear function whose bends lie on a grid of equal steps, the grid and the heights on it are the parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Container

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy import ops
from relu_deploy.errors import ModelError
from relu_deploy.passes.edit import Names
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.polyline import Polyline
from relu_deploy.passes.pwl import PiecewiseLinear
from relu_deploy.passes.pwlu import largest_error, polylines
from relu_deploy.passes.region import Cut
from relu_deploy.passes.spans import Span, find_spans
from relu_deploy.passes.spread import spread_sum
from relu_deploy.report import PassReport, Skip

Array = npt.NDArray[np.float64]

_Float = type[np.float32] | type[np.float64]

_KINDS = ("pwlu", "piecewise_linear", "mixed")
# Fewer bends than this have operators of their own: PRelu, Clip, HardSigmoid.
_FEWEST_BENDS = 3
_MOST_INTERVALS = 256
# Bends are where float32 constants put them: off the grid by a few units in the last place of what they were computed
# from, never by a thousandth of a step. What the grid then changes is measured, and is the bound in the note.
_OFF_GRID = 1e-3
_HINGE = re.compile(r"/hinge_\d+/\w+$")
# Largest jump and error, relative to the largest height or boundary, in roundings of the parameters' type.
_ROUNDINGS = 16


def recognise_pwlu(
    graph: gs.Graph, *, for_file: bool = True, fewest_bends: int = _FEWEST_BENDS, of: Container[str] | None = None
) -> PassReport:
    """Replace regions that are a PWLU by one node, its parameters in float32, or float64 where the network is.

    Args:
        graph: Sorted topologically, with types and shapes where they are known. Edited in place; nodes that nobody
            needs any more are left for ``cleanup``.
        for_file: The graph is to be written with these nodes, which takes an opset that can spell their definition.
        fewest_bends: Of the channel that has most; less than this stays as it is.
        of: Names of the tensors whose functions are looked at; None: all.

    Returns:
        Changed: the nodes whose output a PWLU now makes; notes give N and the largest error of the new parameters.
        Skipped: piecewise-linear activations of three bends and more that are none, with the reason.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    notes: dict[str, str] = {}
    functions, names = Functions(graph), Names(graph)
    for span in find_spans(functions) if _bends(functions, fewest_bends) else ():
        node = span.bottom.node
        if node is None or span.program is None or span.label.kind not in _KINDS:
            continue
        if len(span.nodes) < 2 and spread_sum(node) is None:  # one node that is a whole expression, or an operator
            continue
        if of is not None and span.top.tensor.name not in of:
            continue
        try:
            dtype = np.float64 if span.top.tensor.dtype == np.float64 else np.float32
            lines = [_polyline(functions.exact(span.program, channel), dtype) for channel in range(span.channels)]
            if max(line.bends for line in lines) < fewest_bends:
                continue
            _check_opset(graph.opset if for_file else ops.DEFINITION_OPSET)
            function, error = _on_grid(lines, dtype)
            new = _node(span, function, names, dtype)
        except _OtherError as reason:
            skipped.append(Skip(node.name, f"a piecewise-linear activation that stays spelled out: {reason}"))
            continue
        place = next(index for index, other in enumerate(graph.nodes) if other is node)
        result = span.bottom.tensor
        node.inputs.clear()
        node.outputs.clear()
        new.outputs = [result]
        graph.nodes[place] = new
        changed.append(new.name)
        notes[new.name] = f"PWLU of {function.intervals} intervals, within {error:.3g} of the {len(span.nodes)} nodes"
    return PassReport("recognise_pwlu", tuple(changed), tuple(skipped), notes)


def _bends(functions: Functions, fewest: int) -> bool:
    """Whether any function that is spelled out bends so often: most networks have none, and need not be named."""
    found = False

    def visit(cut: Cut, _: list[Cut]) -> Cut:
        nonlocal found
        assert cut.parent is not None  # noqa: S101 - roots are not visited
        spelled = cut.node is not None and not ops.is_pwlu(cut.node) and functions.of_floats(cut)
        first = functions.segment(cut).first if spelled and not found else None
        found = found or (first is not None and len(first.breaks) >= fewest)
        return cut.parent

    functions.walk(visit)
    return found


class _OtherError(Exception):
    """Why a region is no PWLU."""


def _rounding(dtype: _Float) -> float:
    return _ROUNDINGS * float(np.finfo(dtype).eps)


def _check_opset(opset: int) -> None:
    if opset < ops.DEFINITION_OPSET:
        raise _OtherError(f"opset {opset} cannot spell the unit's definition; quantising folds it all the same")


def _polyline(function: PiecewiseLinear | None, dtype: _Float) -> Polyline:
    """An exact function in floats; jumps no larger than rounding are closed.

    A look-up of rounded slope and intercept jumps by a rounding at each point.
    """
    if function is None:
        raise _OtherError("not piecewise linear in every channel")
    slopes = np.array([float(slope) for slope, _ in function.lines])
    if not function.breaks:
        here = float(function(0))
        return Polyline(np.zeros(1), np.array([here]), float(slopes[0]), float(slopes[0]))
    sides = [
        (float(a * x + b), float(point), float(c * x + d))
        for x, point, (a, b), (c, d) in zip(
            function.breaks, function.points, function.lines[:-1], function.lines[1:], strict=True
        )
    ]
    breaks, values = np.array([float(x) for x in function.breaks]), np.array([sum(side) / 3 for side in sides])
    jump = max(max(side) - min(side) for side in sides)
    size = np.abs(values).max() + (np.abs(slopes).max() * np.abs(breaks)).max()
    if jump > _rounding(dtype) * max(size, np.finfo(np.float32).tiny):
        raise _OtherError(f"it jumps by {jump:.3g}")
    return Polyline(breaks, values, float(slopes[0]), float(slopes[-1]))


def _on_grid(lines: list[Polyline], dtype: _Float) -> tuple[ops.PwluFunction, float]:
    """Parameters of a type that give these functions, and their largest error anywhere.

    Raises:
        _OtherError: the bends of a channel do not lie on a grid of at most 256 steps.
    """
    grids = [_grid(line) for line in lines]
    intervals = max(grid.intervals for grid in grids)
    single = [value.astype(dtype).astype(np.float64) for value in np.array([(g.left, g.step) for g in grids]).T]
    left, right = single[0], (single[0] + intervals * single[1]).astype(dtype).astype(np.float64)
    points = left[:, None] + (right - left)[:, None] * np.arange(intervals + 1) / intervals
    values = np.array([line(row) for line, row in zip(lines, points, strict=True)])
    ends = np.array([(line.slope_left, line.slope_right) for line in lines]).T
    try:
        function = ops.PwluFunction(
            left, right, *(part.astype(dtype).astype(np.float64) for part in (values, ends[0], ends[1]))
        )
    except ModelError as error:
        raise _OtherError(str(error)) from error
    return function, _error(lines, function, dtype)


def _error(lines: list[Polyline], function: ops.PwluFunction, dtype: _Float) -> float:
    """Largest error within a hundred times the width of each channel's grid; refuses more than rounding explains."""
    worst = 0.0
    for line, new in zip(lines, polylines(function), strict=True):
        low, high = new.breaks[0], new.breaks[-1]
        margin = 100 * (high - low)
        error = largest_error(line, new, float(low - margin), float(high + margin))
        size = np.abs(line(np.array([low - margin, high + margin]))).max() + np.abs(new.values).max() + abs(low) + high
        if error > _rounding(dtype) * size:
            raise _OtherError(f"the nearest one is off by {error:.3g}")
        worst = max(worst, error)
    return worst


@dataclasses.dataclass(frozen=True)
class _Grid:
    """``left + i step`` for i from 0 to ``intervals``."""

    left: float
    step: float
    intervals: int


def _grid(line: Polyline) -> _Grid:
    """The coarsest grid of equal steps that holds every bend of a function."""
    spots = line.breaks
    if line.bends < 2:
        return _Grid(float(spots[0]) - 1.0, 1.0, 2)
    gaps = np.diff(spots)
    # A bend of the unit vanishes where two neighbouring pieces have one slope, so even the smallest gap may be several
    # steps: fractions of it are tried.
    divisor, least = 1, float(gaps.min())
    while (intervals := round(float(spots[-1] - spots[0]) / (least / divisor))) <= _MOST_INTERVALS:
        divisor += 1
        step = float(spots[-1] - spots[0]) / intervals
        places = (spots - spots[0]) / step
        if np.abs(places - np.rint(places)).max() < _OFF_GRID:
            return _Grid(float(spots[0]), step, intervals)
    raise _OtherError(f"its bends lie on no grid of {_MOST_INTERVALS} steps or fewer")


def _node(span: Span, function: ops.PwluFunction, names: Names, dtype: _Float) -> gs.Node:
    """The node, without its output."""
    node, program = span.bottom.node, span.program
    assert node is not None and program is not None  # noqa: S101, PT018 - looked at before
    if function.channels > 1 and program.axis is None:
        raise _OtherError("its channel axis is not known")
    # Spelled for a target before, it gets the name back that it had.
    title = _HINGE.sub("", node.name)
    parameters = [
        names.constant(f"{title}/{name}", np.asarray(getattr(function, name), dtype))
        for name in ("left", "right", "values", "slope_left", "slope_right")
    ]
    attrs = {"channel_axis": -1 if program.axis is None else program.axis}
    return gs.Node(ops.PWLU, title, attrs, [span.top.tensor, *parameters], domain=ops.DOMAIN)
