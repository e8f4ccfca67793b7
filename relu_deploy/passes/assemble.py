"""Nodes of a region, one after another, into one program."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from relu_deploy.passes.lower import LOWERINGS, Call, UnsupportedError
from relu_deploy.passes.operands import (
    constant_shape,
    constant_values,
    draw,
    fill,
    least_rank,
    one_axis,
    onnx_type,
    without_repeats,
)
from relu_deploy.passes.program import Builder, Program
from relu_deploy.passes.reads import read_inputs
from relu_deploy.passes.spread import Spread, spread_sum
from relu_deploy.passes.tables import lower_table, reads_table


class Assembly:
    """A program in the making.

    Attributes:
        build: Where its steps go.
    """

    def __init__(self, root: gs.Tensor, *, same_shape: bool) -> None:
        self.build = Builder()
        self._root = root
        self._same_shape = same_shape
        self._steps = {id(root): self.build.step("x")}
        self._axes: dict[int, int] = {}

    def add(self, node: gs.Node) -> None:
        """Lower one node, whose live inputs have been lowered."""
        self.build.node = node.name
        if reads_table(node):
            self._steps[id(node.outputs[0])] = lower_table(node, self)
            return
        spread = spread_sum(node)
        if spread is not None:
            self._steps[id(node.outputs[0])] = self._sum(spread)
            return
        args = [None if tensor.is_empty() else self.argument(tensor) for tensor in read_inputs(node)]
        self._steps[id(node.outputs[0])] = self._call(node, args)

    def _call(self, node: gs.Node, args: list[int | None]) -> int:
        types = [onnx_type(tensor) for tensor in node.inputs]
        integers = any(_is_integer_constant(tensor) for tensor in node.inputs)
        call = Call(self.build, args, node.attrs, types, onnx_type(self._root), integers, node.name)
        return LOWERINGS[node.op](call)

    def _sum(self, spread: Spread) -> int:
        """Each term with its own slice of the constants, one after another."""
        terms = []
        for place in range(spread.terms):
            steps = {id(spread.column): self.argument(spread.source)}
            for node in spread.nodes:
                args = [self._in_term(tensor, steps, place) for tensor in read_inputs(node)]
                steps[id(node.outputs[0])] = self._call(node, args)
            term = steps[id(spread.summand)]
            if spread.weights is not None:
                term = self.build.step("mul", term, self.build.const(float(spread.weights[place])))
            terms.append(term)
        return self.build.chain("add", terms)

    def _in_term(self, tensor: gs.Tensor, steps: dict[int, int], place: int) -> int | None:
        """A step of the term, or a constant at the term's place of the added axis."""
        if tensor.is_empty() or id(tensor) in steps:
            return steps.get(id(tensor))
        values = constant_values(tensor)
        if values is None:
            raise UnsupportedError(f"{tensor.name} is neither constant nor a function of {self._root.name}")
        part = values[..., min(place, values.shape[-1] - 1)] if values.ndim else values
        self._check_broadcast(tensor.name, part.shape)
        return self._constant(tensor.name, part)

    def finish(self, result: gs.Tensor) -> Program:
        """The program that ends in a tensor."""
        return self.build.finish(self._steps[id(result)], next(iter(self._axes.values()), None))

    def argument(self, tensor: gs.Tensor) -> int:
        """Step of one input of a node: live, constant, filled with one number, or drawn at random."""
        if id(tensor) in self._steps:
            return self._steps[id(tensor)]
        values, filled, drawn = constant_values(tensor), fill(tensor), draw(tensor)
        if values is not None:
            self._check_broadcast(tensor.name, values.shape)
        elif filled is not None:
            values, like = filled
            if self._same_shape and not self._has_shape_of_root(tensor, like):
                raise UnsupportedError(f"{tensor.name} is filled at run time: the shape may change")
        elif drawn is not None:
            return self._draw(drawn)
        else:
            raise UnsupportedError(f"{tensor.name} is neither constant nor a function of {self._root.name}")
        return self._constant(tensor.name, values)

    def _draw(self, node: gs.Node) -> int:
        """A node that reads no tensor, or the shape or probability of a constant."""
        shape = constant_shape(node.inputs[0]) if node.inputs else tuple(node.attrs.get("shape", ()))
        self._check_broadcast(node.outputs[0].name, shape or ())
        if node.op == "Bernoulli":
            return self.build.step("bernoulli", self.argument(node.inputs[0]), param=node.name)
        low, high = (
            self.build.const(float(np.float32(node.attrs.get(end, i)))) for i, end in enumerate(("low", "high"))
        )
        return self.build.step("random", low, high, param=node.name)

    def channels(self, values: npt.ArrayLike, axis: int) -> int:
        """Step of a constant with one entry a channel, or one for all, along ``axis`` counted from the last (-1)."""
        row = np.asarray(values, dtype=np.float64).reshape(-1)
        if row.size > 1:
            if self._axes.setdefault(row.size, axis) != axis:
                raise UnsupportedError("side constants vary along two different axes")
            if len(self._axes) > 1:
                raise UnsupportedError("side constants of different lengths")
        return self.build.const(row)

    def _constant(self, name: str, values: np.ndarray) -> int:
        if values.dtype.kind not in "fiub" and str(values.dtype) != "bfloat16":
            raise UnsupportedError(f"constant {name} is not of a numeric type")
        numbers = np.asarray(values, dtype=np.float64)
        if np.isnan(numbers).any():
            raise UnsupportedError(f"constant {name} holds NaN")
        numbers = numbers if one_axis(numbers.shape) else without_repeats(numbers)
        wide = [axis - values.ndim for axis, size in enumerate(numbers.shape) if size != 1]
        return self.channels(numbers, wide[0] if wide else -1)

    def _has_shape_of_root(self, tensor: gs.Tensor, like: gs.Tensor | None) -> bool:
        """Whether a fill is shaped as a tensor of the region, by its making or by what is known of it."""
        known = tensor.shape is not None and self._root.shape is not None
        return (like is not None and id(like) in self._steps) or (
            known and list(tensor.shape) == list(self._root.shape)
        )

    def _check_broadcast(self, name: str, given: tuple[int, ...]) -> None:
        """Refuse a constant that may give the result another shape than the root."""
        if not self._same_shape:
            return
        root = self._root
        shape, rank = root.shape, least_rank(root)
        if len(given) > rank:
            what = f"has rank {rank}" if shape is not None else "is of unknown rank"
            raise UnsupportedError(
                f"constant {name} has rank {len(given)} and {root.name} {what}: the shape may change"
            )
        for axis, size in enumerate(given, start=-len(given)):
            if size != 1 and (shape is None or shape[axis] != size):
                extent = "an unknown extent" if shape is None else shape[axis]
                raise UnsupportedError(
                    f"constant {name} has {size} entries along an axis where {root.name} has {extent}: "
                    "the shape may change"
                )


def _is_integer_constant(tensor: gs.Tensor) -> bool:
    integers = (TensorProto.INT32, TensorProto.INT64, TensorProto.UINT8)
    return isinstance(tensor, gs.Constant) and onnx_type(tensor) in integers
