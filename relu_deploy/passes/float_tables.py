"""What floats make of a region that reads tables: near a point where the index changes, rounding may name the next one.

Interval arithmetic sees a slope and an offset that are off by a whole entry each, and not that their lines meet at that
point. So the index is decided first: boxes are cut about the points where it changes, on each box every index that
rounding allows is tried as if it were certain, and the lines that belong to them are compared.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from relu_deploy.passes.float_types import FLOAT_TYPES, FloatType
from relu_deploy.passes.floats import MOST_ROUNDING, FloatBehaviour, dyadic_boxes, float_behaviour
from relu_deploy.passes.intervals import Interval, run_intervals
from relu_deploy.passes.program import Program
from relu_deploy.passes.symbolic import evaluate

Array = npt.NDArray[np.float64]

# Half the width of a box about a point where the index changes, in units of the largest such point: four roundings on
# the way to the index, of numbers up to twice that point.
_AROUND = 16.0
# More indices on one box than this are no matter of rounding.
_CANDIDATES = 4


def table_behaviour(
    program: Program, kind: FloatType, *, atoms: bool = True, domain: tuple[float, float] | None = None
) -> FloatBehaviour:
    """As :func:`relu_deploy.passes.floats.float_behaviour`, closer for regions with one index and lines behind it."""
    plain = float_behaviour(program, kind, atoms=atoms, domain=domain)
    index = _index(program)
    if plain.limit == kind.largest or index is None:
        return plain
    points = _turns(program, index)
    if points is None:
        return plain
    lo, hi = _boxes(points, kind)
    error, finite = _measure(program, index, lo, hi, kind)
    scale = np.maximum(np.minimum(np.abs(lo), np.abs(hi)), 1.0)
    bad = ~finite | ~(error <= MOST_ROUNDING * (kind.unit * scale + kind.tiny))
    relative = error / scale
    if domain is not None:
        outside = (hi < domain[0]) | (lo > domain[1])
        bad, relative = bad & ~outside, np.where(outside, 0.0, relative)
    if not bad.any():
        return FloatBehaviour(kind.largest, float(relative.max()), "")
    limit = float(np.minimum(np.abs(lo), np.abs(hi))[bad].min())
    inside = np.maximum(np.abs(lo), np.abs(hi)) <= limit
    return FloatBehaviour(limit, float(np.where(inside & ~bad, relative, 0.0).max()), plain.culprit)


def _index(program: Program) -> int | None:
    """The one step that all tables are read at, where everything behind them is a line for each index."""
    reads = {step.args[0] for step in program.steps if step.op == "lookup"}
    if len(reads) != 1:
        return None
    (index,) = reads
    degree: list[float] = []
    for number, step in enumerate(program.steps):
        sides = [degree[arg] for arg in step.args]
        if step.op == "x":
            degree.append(1)
        elif step.op in ("const", "lookup") or number == index:
            degree.append(0)
        elif step.op in ("add", "mul"):
            degree.append(max(sides) if step.op == "add" else sum(sides))
        else:
            degree.append(0 if not any(sides) else np.inf)
    return index if degree[-1] <= 1 else None


def _turns(program: Program, index: int) -> Array | None:
    """Where the index of each distinct channel changes, ``(channels, points)``, padded with a repeated point."""
    upto = dataclasses.replace(program, steps=program.steps[: index + 1], origin=program.origin[: index + 1])
    rows = []
    for column in program.channels().T:
        steps = evaluate(upto, [float(value) for value in column])
        if steps is None or not steps.is_step:
            return None
        rows.append([float(x) for x in steps.breaks])
    most = max(map(len, rows))
    return np.array([row + [row[-1]] * (most - len(row)) for row in rows]) if most and all(rows) else None


def _boxes(points: Array, kind: FloatType) -> tuple[Array, Array]:
    """All finite numbers of a type in boxes, ``(channels, boxes)``, cut on both sides of every point."""
    _, lo, hi = dyadic_boxes(kind)
    around = _AROUND * kind.unit * np.abs(points).max(axis=1, keepdims=True)
    cuts = np.concatenate(
        [np.broadcast_to([*lo, *hi], (len(points), 2 * len(lo))), points - around, points + around], axis=1
    )
    cuts = np.sort(np.clip(cuts, -kind.largest, kind.largest), axis=1)
    return cuts[:, :-1], cuts[:, 1:]


def _measure(
    program: Program, index: int, lo: Array, hi: Array, kind: FloatType
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Error on each box, of rounding and of the wrong index; and whether the result is finite."""
    none = np.zeros_like(lo)
    with np.errstate(all="ignore"):
        found = run_intervals(program, Interval(lo, hi, none), kind)[index]
        first, last = (np.broadcast_to(np.rint(end), lo.shape) for end in (found.low, found.high))
        finite = np.isfinite(first) & np.isfinite(last) & (last - first < _CANDIDATES)
        first, last = np.where(finite, first, 0.0), np.where(finite, last, 0.0)
        error, lines = none.copy(), []
        for place in range(int((last - first).max()) + 1):
            chosen = np.minimum(first + place, last)
            known = {index: Interval(chosen, chosen, none)}
            result = run_intervals(program, Interval(lo, hi, none), kind, fixed=known)[-1]
            error = np.maximum(error, np.broadcast_to(result.err, lo.shape))
            finite &= np.isfinite(result.lo) & np.isfinite(result.hi)
            lines.append([_value(program, known, end) for end in (lo, hi)])
        for side in (0, 1):
            ends = np.stack([line[side] for line in lines])
            gap = ends.max(axis=0) - ends.min(axis=0)
            error = np.where(last > first, np.maximum(error, error + gap), error)
    return np.where(np.isnan(error), np.inf, error), finite


def _value(program: Program, known: dict[int, Interval], x: Array) -> Array:
    """The line of a certain index at some points, in float64."""
    double = FLOAT_TYPES[TensorProto.DOUBLE]
    result = run_intervals(program, Interval(x, x, np.zeros_like(x)), double, fixed=known)[-1]
    return np.broadcast_to((result.lo + result.hi) / 2, x.shape)
