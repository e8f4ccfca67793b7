"""Spell what is left of a learned activation in standard operators, in the form that its target computes best.

* ``tensorrt``, ``tensorrt-rtx``: hinges, ``y = c + k x + sum_i w_i relu(x - b_i)``, as few as the bound allows. The
  compiler makes one pointwise kernel of them, whatever their number.
* ``ort``: every node is a pass over memory there. Up to ``MOST_HINGES`` hinges are still the fastest; beyond, the
  segment's number is computed and slope and intercept are looked up with ``GatherElements`` (benchmarks/tables.py).

Both agree with the definition of ``relu_deploy::PWLU`` up to rounding, NaN included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from relu_deploy import ops
from relu_deploy.passes.edit import Names
from relu_deploy.passes.polyline import Hinges, stack
from relu_deploy.passes.pwlu import EXACT, Bound, along, become, fewest, units_of, within
from relu_deploy.report import PassReport, Skip
from relu_deploy.targets import Target

Array = npt.NDArray[np.float64]

MOST_HINGES = 2
# The first opset with Shape of some axes.
_SHAPE_OPSET = 15


def spell_pwlu(
    graph: gs.Graph, target: Target, bounds: Mapping[str, Bound] | None = None, *, most: int | None = None
) -> PassReport:
    """Replace every ``relu_deploy::PWLU`` by standard operators.

    Args:
        graph: Sorted topologically, with types and shapes where they are known. Edited in place.
        target: Whose form is wanted.
        bounds: Error allowed and domain, by name of the node's output; without one, what rounding explains, everywhere.
        most: Only replace those that need no more hinges than this.

    Returns:
        Changed: the nodes that were replaced; notes say by what. Skipped: those that stay, which is no harm where the
        runtime reads model-local functions.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    notes: dict[str, str] = {}
    names = Names(graph)
    for node, function in units_of(graph, skipped):
        shape = along(node, function.channels)
        if shape is None:
            skipped.append(Skip(node.name, "the rank of its input is not known, so its channels cannot be lined up"))
            continue
        bound = (bounds or {}).get(node.outputs[0].name, EXACT)
        if most is not None and not within(function, bound, most):
            skipped.append(Skip(node.name, f"it needs more than {most} hinges"))
            continue
        notes[node.name] = _spell(graph, node, function, bound, target, _Writer(node.name, names, shape))
        changed.append(node.name)
    return PassReport("spell_pwlu", tuple(changed), tuple(skipped), notes)


def _spell(
    graph: gs.Graph, node: gs.Node, function: ops.PwluFunction, bound: Bound, target: Target, writer: _Writer
) -> str:
    if target != "ort" or graph.opset < _SHAPE_OPSET or within(function, bound, MOST_HINGES):
        lines, error = fewest(function, bound)
        bends = max(line.bends for line in lines)
        hinges = stack(lines, bound.low, bound.high)
        become(graph, node, lambda data, result: _hinges(writer, data, result, hinges))
        return f"{bends} hinges a channel, {Bound(error, bound.low, bound.high)}"
    last = function.channels == 1 or writer.shape == (function.channels,)
    axis = ops.channel_axis(node)
    rank = None if node.inputs[0].shape is None else len(node.inputs[0].shape)
    front = axis if axis >= 0 or rank is None else axis + rank
    become(graph, node, lambda data, result: _lookup(writer, data, result, function, None if last else (front, rank)))
    return f"a table of {function.intervals + 2} slopes and intercepts a channel"


class _Writer:
    """Makes nodes with constants that vary along the channels, named after the activation they stand for."""

    def __init__(self, title: str, names: Names, shape: tuple[int, ...]) -> None:
        self.title, self.names, self.shape = title, names, shape
        self.nodes: list[gs.Node] = []

    def along(self, name: str, values: Array, dtype: Any) -> gs.Constant:
        """One number a channel; a scalar where all are the same."""
        shaped = values.reshape(self.shape) if (values != values[0]).any() else values[:1].reshape(())
        return self.constant(name, np.asarray(shaped, dtype))

    def constant(self, name: str, values: np.ndarray) -> gs.Constant:
        return self.names.constant(f"{self.title}/{name}", values)

    def ints(self, name: str, *values: int) -> gs.Constant:
        return self.constant(name, np.asarray(values, np.int64))

    def add(
        self, op: str, name: str, inputs: list[gs.Tensor], like: gs.Tensor | None = None,
        out: gs.Tensor | None = None, dtype: Any = None, **attrs: Any,
    ) -> gs.Tensor:  # fmt: skip
        """A node; its output has the type and shape of ``like``, or the type ``dtype``."""
        if out is None:
            out = gs.Variable(
                self.names.new(f"{self.title}/{name}/out"), dtype=dtype or (like.dtype if like is not None else None),
                shape=like.shape if like is not None else None,
            )  # fmt: skip
        self.nodes.append(gs.Node(op, f"{self.title}/{name}", attrs, inputs, [out]))
        return out


def _hinges(w: _Writer, data: gs.Tensor, result: gs.Tensor, h: Hinges) -> list[gs.Node]:
    """``x k + c``, then one ``Sub, Relu, Mul, Add`` for each hinge; in float32 at least, as the definition says."""
    if data.dtype == np.float16:
        wide = w.add("Cast", "wide", [data], dtype=np.float32, to=onnx.TensorProto.FLOAT)
        wide.shape = data.shape
        out = gs.Variable(w.names.new(f"{w.title}/total"), dtype=np.float32, shape=data.shape)
        _hinges(w, wide, out, h)
        w.add("Cast", "narrow", [out], data, result, to=onnx.TensorProto.FLOAT16)
        return w.nodes
    dtype, count = data.dtype or np.float32, h.weights.shape[1]
    total = data
    if (h.slope != 1).any():
        total = w.add("Mul", "slope", [data, w.along("slope/constant", h.slope, dtype)], data)
    if (h.intercept != 0).any() or not count:
        total = w.add("Add", "intercept", [total, w.along("intercept/constant", h.intercept, dtype)], data,
                      None if count else result)  # fmt: skip
    for i in range(count):
        breaks = w.along(f"hinge_{i}/break", h.breaks[:, i], dtype)
        operands = [breaks, data] if i < h.mirrored else [data, breaks]
        bent = w.add("Relu", f"hinge_{i}/Relu", [w.add("Sub", f"hinge_{i}/Sub", operands, data)], data)
        weighed = w.add("Mul", f"hinge_{i}/Mul", [bent, w.along(f"hinge_{i}/weight", h.weights[:, i], dtype)], data)
        total = w.add("Add", f"hinge_{i}/Add", [total, weighed], data, result if i == count - 1 else None)
    return w.nodes


def _lookup(
    w: _Writer, data: gs.Tensor, result: gs.Tensor, f: ops.PwluFunction, place: tuple[int, int | None] | None
) -> list[gs.Node]:
    """``j = int(clip((x - B_L) / d + 1, 0, N + 1))``, then ``K'[j] x + Z'[j]``.

    Truncation is the floor of what is not negative. Where x is NaN its integer is any number, so ``j`` is clipped
    again, and ``K' x`` is NaN.
    """
    slopes, offsets = f.tables()
    step = (f.right - f.left) / f.intervals
    wide = data if data.dtype in (None, np.float32, np.float64) else w.add(
        "Cast", "wide", [data], dtype=np.float32, to=onnx.TensorProto.FLOAT)  # fmt: skip
    dtype = wide.dtype or np.float32
    # Subtracted first: 1 - B_L / d loses the digits of x where the boundaries are far from 0 and close together.
    distance = w.add("Sub", "distance", [wide, w.along("left", f.left - step, dtype)], wide)
    steps = w.add("Mul", "steps", [distance, w.along("per_step", 1 / step, dtype)], wide)
    ends = [w.constant(name, np.asarray(value, dtype)) for name, value in (("first", 0), ("last", f.intervals + 1))]
    inside = w.add("Clip", "inside", [steps, *ends], wide)
    whole = w.add("Cast", "whole", [inside], dtype=np.int32, to=onnx.TensorProto.INT32)
    least, most = (w.constant(name, np.asarray(v, np.int32)) for name, v in (("least", 0), ("most", f.intervals + 1)))
    segment = w.add("Clip", "segment", [whole, least, most], dtype=np.int32)
    tables = (("slopes", slopes.astype(dtype)), ("offsets", offsets.astype(dtype)))
    slope, offset = _find(w, segment, data, tables, place)
    scaled = w.add("Mul", "scaled", [slope, wide], wide)
    if wide is data:
        w.add("Add", "shifted", [scaled, offset], data, result)
    else:
        shifted = w.add("Add", "shifted", [scaled, offset], wide)
        w.add("Cast", "narrow", [shifted], data, result, to=int(onnx.helper.np_dtype_to_tensor_dtype(data.dtype)))
    return w.nodes


def _find(
    w: _Writer, segment: gs.Tensor, data: gs.Tensor, tables: tuple[tuple[str, np.ndarray], ...],
    place: tuple[int, int | None] | None,
) -> list[gs.Tensor]:  # fmt: skip
    """Entries of the tables, shaped as ``data``; ``place``: channel axis and rank where the channels are not last."""
    channels = tables[0][1].shape[0]
    size = w.add("Shape", "size", [data], dtype=np.int64)
    if place is None:
        rows, axis = w.add("Reshape", "rows", [segment, w.ints("rows/shape", -1, channels)], dtype=np.int32), 0
        stored: list[gs.Tensor] = [w.constant(name, values.T) for name, values in tables]
    else:
        rows, axis = _rows(w, segment, place, channels), 2
        batch = w.add("Shape", "batch", [rows], dtype=np.int64, start=0, end=1)
        whole = w.add("Concat", "tables/shape", [batch, w.ints("ones", 1, 1)], dtype=np.int64, axis=0)
        stored = [
            w.add("Expand", f"{name}/all", [w.constant(name, values[None]), whole], dtype=values.dtype)
            for name, values in tables
        ]
    found = []
    for (name, values), table in zip(tables, stored, strict=True):
        entries = w.add("GatherElements", f"{name}/found", [table, rows], dtype=values.dtype, axis=axis)
        found.append(w.add("Reshape", f"{name}/back", [entries, size], dtype=values.dtype))
    return found


def _rows(w: _Writer, segment: gs.Tensor, place: tuple[int, int | None], channels: int) -> gs.Tensor:
    """``(everything before the channels, C, everything behind)``."""
    axis, _ = place
    if axis == 1:
        return w.add("Reshape", "rows", [segment, w.ints("rows/shape", 0, channels, -1)], dtype=np.int32)
    behind = w.add("Shape", "behind", [segment], dtype=np.int64, start=axis + 1)
    inner = w.add("ReduceProd", "inner", [behind], dtype=np.int64, keepdims=1)
    shape = w.add("Concat", "rows/shape", [w.ints("rows/front", -1, channels), inner], dtype=np.int64, axis=0)
    return w.add("Reshape", "rows", [segment, shape], dtype=np.int32)
