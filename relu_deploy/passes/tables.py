"""Operators that read tables: elementwise where the table is a constant and the index is what varies.

``Gather`` and ``GatherND`` of a flat table (one function's, or those of all channels one after another, with the
channel's offset in the index) or at a channel and an index, ``GatherElements`` of a table a channel, and
``relu_deploy::PWLU`` with its parameters.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.errors import ModelError
from relu_deploy.ops import channel_axis, is_pwlu, read_pwlu
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.operands import (
    STANDARD,
    constant_shape,
    constant_values,
    is_constant,
    table_and_coordinates,
)
from relu_deploy.passes.program import Builder
from relu_deploy.passes.reads import live_inputs


class Scope(Protocol):
    """Where a node is lowered: :class:`relu_deploy.passes.assemble.Assembly`."""

    build: Builder

    def argument(self, tensor: gs.Tensor) -> int:
        """Step of a live input."""

    def channels(self, values: npt.ArrayLike, axis: int) -> int:
        """Step of a constant with one entry a channel, along ``axis`` counted from the last (-1)."""


def reads_table(node: gs.Node) -> bool:
    """Whether a node is one of these, with its table or parameters constant and one live input."""
    if is_pwlu(node):
        return len(node.inputs) == 6 and not is_constant(node.inputs[0]) and all(map(is_constant, node.inputs[1:]))
    if node.domain not in STANDARD or len(node.inputs) != 2:
        return False
    read = table_and_coordinates(node)
    if read is not None:
        return any(True for _ in live_inputs(node))
    if node.op not in ("Gather", "GatherElements") or is_constant(node.inputs[1]):
        return False
    shape = constant_shape(node.inputs[0])
    if not shape or 0 in shape:
        return False
    if node.op == "GatherElements":
        axis = node.attrs.get("axis", 0) % len(shape)
        return sum(size != 1 for place, size in enumerate(shape) if place != axis) <= 1
    return len(shape) == 1


def lower_table(node: gs.Node, scope: Scope) -> int:
    """Add what such a node computes to a program.

    Raises:
        UnsupportedError: the table is not numeric, or parameters of a PWLU do not fit together.
    """
    if is_pwlu(node):
        return _lower_pwlu(node, scope)
    table, coordinates = table_and_coordinates(node) or (node.inputs[0], [node.inputs[1]])
    values = constant_values(table)
    if values is None or values.dtype.kind not in "fiub":
        raise UnsupportedError(f"table {table.name} is not of a numeric type")
    steps = [scope.argument(tensor) for tensor in coordinates]
    if len(steps) > 1:
        return _lower_grid(values, steps, scope.build)
    (index,) = steps
    if node.op != "GatherElements":
        return scope.build.lookup(values, index)
    axis = node.attrs.get("axis", 0) % values.ndim
    return _lower_rows(np.moveaxis(values, axis, -1), _channel_axis_beside(values.shape, axis), index, scope)


def _lower_grid(values: np.ndarray, steps: list[int], build: Builder) -> int:
    """A table of several axes, read at one coordinate an axis; a negative one counts from the end of its axis."""
    place = build.const(0.0)
    for step, size in zip(steps, values.shape, strict=True):
        wrapped = build.step("add", step, build.const(float(size)))
        inside = build.step("select", build.step("gt", build.const(0.0), step), wrapped, step)
        place = build.step("add", build.step("mul", place, build.const(float(size))), inside)
    return build.lookup(values, place)


def _lower_rows(values: np.ndarray, axis: int | None, index: int, scope: Scope) -> int:
    """One row of a table for each channel: a flat table, and an index that starts where the channel's row does."""
    rows, build = values.reshape(-1, values.shape[-1]), scope.build
    size = build.const(float(rows.shape[1]))
    if axis is None:
        return build.lookup(rows, index)
    from_end = build.step("gt", build.const(0.0), index)
    place = build.step("select", from_end, build.step("add", index, size), index)
    offset = scope.channels(np.arange(len(rows)) * rows.shape[1], axis)
    return build.lookup(rows, build.step("add", place, offset))


def _channel_axis_beside(shape: tuple[int, ...], axis: int) -> int | None:
    """The other axis along which a table varies, counted from the last."""
    return next((place - len(shape) for place, size in enumerate(shape) if place != axis and size != 1), None)


def _lower_pwlu(node: gs.Node, scope: Scope) -> int:
    """Its definition: ``x < B_i`` chooses between the lines on both sides of each point, from left to right."""
    try:
        unit = read_pwlu(node)
    except ModelError as error:
        raise UnsupportedError(str(error)) from error
    build, x, axis = scope.build, scope.argument(node.inputs[0]), channel_axis(node)
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    if axis >= 0 and unit.channels > 1:
        if rank is None:
            raise UnsupportedError(f"the rank of {node.inputs[0].name} is not known, so neither is its channel axis")
        axis -= rank

    def each(values: npt.NDArray[np.float64]) -> int:
        return scope.channels(values, axis)

    left, right = each(unit.left), each(unit.right)
    heights = [each(column) for column in unit.values.T]
    step = build.step("div", build.step("add", right, build.neg(left)), build.const(float(unit.intervals)))
    points = [build.step("add", left, build.step("mul", step, build.const(float(i)))) for i in range(unit.intervals)]
    points.append(right)
    slopes = [
        build.step("div", build.step("add", after, build.neg(before)), step)
        for before, after in itertools.pairwise(heights)
    ]
    result = _line(build, x, points[-1], each(unit.slope_right), heights[-1])
    for point, anchor, slope, height in reversed(
        list(
            zip(
                points, [left, *points[:-1]], [each(unit.slope_left), *slopes], [heights[0], *heights[:-1]], strict=True
            )
        )
    ):
        line = _line(build, x, anchor, slope, height)
        result = build.step("select", build.step("gt", point, x), line, result)
    return result


def _line(build: Builder, x: int, anchor: int, slope: int, height: int) -> int:
    """``(x - anchor) slope + height``."""
    return build.step("add", build.step("mul", build.step("add", x, build.neg(anchor)), slope), height)
