"""What each operator on codes computes, as integers: sums, factors, bounds. One entry of the table for each."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.multipliers import Accumulator, Multiplier, accumulator, multiplier, multipliers

# Where scales and zero points stand among the inputs of an operator; a Concat has as many more as it has inputs.
_SCALES = {
    "QLinearConv": (1, 2, 4, 5, 6, 7), "QLinearMatMul": (1, 2, 4, 5, 6, 7), "QGemm": (1, 2, 4, 5, 7, 8),
    "MatMulIntegerToFloat": (2, 3, 4, 5), "QLinearAdd": (1, 2, 4, 5, 6, 7), "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearAveragePool": (1, 2, 3, 4), "QLinearGlobalAveragePool": (1, 2, 3, 4), "QLinearLeakyRelu": (1, 2, 3, 4),
    "QLinearSigmoid": (1, 2, 3, 4), "QuantizeLinear": (1, 2), "DequantizeLinear": (1, 2),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Grid:
    """A tensor of codes.

    Attributes:
        tensor: Name in the file of integer operators; codes of a Q/DQ file have the same.
        dtype: Of the codes.
        scale: One number, or one for each channel along ``axis``; float32 values.
        zero_point: As many.
        axis: None for one scale.
    """

    tensor: str
    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    axis: int | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """One operator on codes.

    Attributes:
        name: Node.
        op: Its operator.
        rule: Which arithmetic: ``products``, ``sum``, ``product``, ``mean``, ``slopes``, ``each``, ``lookup``.
        inputs: What it reads.
        weight: Constant or live right operand of ``products``.
        output: What it writes; None where it writes floats, ``real_scale * sum``.
        multipliers: For each set (one, one an input, or one a slope) the factors of its channels or counts.
        bias: int32, for each output channel.
        accumulator: What the sum can reach; None where the length of the sum is not known.
        clip: Lowest and highest code of the output.
        counts: Of ``mean``: how many elements each multiplier is for; None: it is still to be divided by their number.
        codes: Of ``lookup``: output for each input code, from the lowest.
        real_scale: Tensor units a step of the sum, where the output is float.
        attributes: Of the node.
    """

    name: str
    op: str
    rule: str
    inputs: tuple[Grid, ...]
    output: Grid | None
    weight: Grid | None = None
    multipliers: tuple[tuple[Multiplier, ...], ...] = ()
    bias: tuple[int, ...] | None = None
    accumulator: Accumulator | None = None
    clip: tuple[int, int] | None = None
    counts: tuple[int, ...] | None = None
    codes: tuple[int, ...] | None = None
    real_scale: tuple[float, ...] | None = None
    attributes: dict[str, Any] = dataclasses.field(default_factory=dict)


def read_entry(node: gs.Node) -> Entry | str | None:
    """What a node computes on codes; a reason where it has no multipliers; None where it is no operator on codes."""
    if node.op == "QLinearSoftmax":
        return "an exponential and a division, which no factor stands for"
    pair = _is_requantised(node)
    if (node.op not in _SCALES and node.op != "QLinearConcat") or (node.op.endswith("eLinear") and not pair):
        return None
    if not _is_known(node) or (pair and not _is_known(node.inputs[0].inputs[0])):
        return "its scales or zero points are not constants of bytes, or it has several for what has one elsewhere"
    if node.op in ("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"):
        return _products(node)
    if node.op in ("QLinearAdd", "QLinearMul"):
        return _pair(node)
    if node.op == "QLinearConcat":
        return _joined(node)
    if node.op in ("QLinearAveragePool", "QLinearGlobalAveragePool"):
        return _mean(node)
    return _requantised(node) if pair else _function(node)


def _is_requantised(node: gs.Node) -> bool:
    """Whether a QuantizeLinear reads a DequantizeLinear: codes of one scale become codes of another."""
    before: Sequence[gs.Node] = node.inputs[0].inputs if node.op == "QuantizeLinear" else ()
    return bool(before) and before[0].op == "DequantizeLinear"


def _is_known(node: gs.Node) -> bool:
    """Whether all scales and zero points are written out, of bytes, and single but for weights."""
    places = _SCALES.get(node.op) or [p for p in range(len(node.inputs)) if p < 2 or p % 3 != 2]
    weights = {"QLinearConv": (4, 5), "QLinearMatMul": (4, 5), "QGemm": (4, 5), "MatMulIntegerToFloat": (3, 5)}
    for place in places:
        given = node.inputs[place] if place < len(node.inputs) else None
        if given is None and (node.op in ("QGemm", "MatMulIntegerToFloat") and place > 5):
            continue  # it writes floats
        if not isinstance(given, gs.Constant):
            return False
        if given.values.dtype not in (np.float32, np.uint8, np.int8):
            return False
        if given.values.size != 1 and place not in weights.get(node.op, ()):
            return False
    return True


def _grid(tensor: gs.Tensor, scale: gs.Tensor, zero: gs.Tensor, axis: int | None = None) -> Grid:
    """Read a tensor's scale and zero point."""
    scales, zeros = np.atleast_1d(scale.values), np.atleast_1d(zero.values)
    return Grid(
        tensor.name, str(zeros.dtype), tuple(float(v) for v in scales), tuple(int(v) for v in zeros),
        axis if scales.size > 1 else None,
    )  # fmt: skip


def _limits(grid: Grid) -> tuple[int, int]:
    """Lowest and highest code."""
    limits = np.iinfo(np.dtype(grid.dtype).type)
    return int(limits.min), int(limits.max)


def _ratio(out: Grid, *scales: float) -> Fraction:
    """Product of scales over the output's."""
    return math.prod((Fraction(scale) for scale in scales), start=Fraction(1)) / Fraction(out.scale[0])


def _products(node: gs.Node) -> Entry:
    """A layer: sums of products of codes."""
    given = list(node.inputs)
    if node.op == "MatMulIntegerToFloat":
        given = [given[index] for index in (0, 2, 4, 1, 3, 5)]
    data, axis = _grid(given[0], given[1], given[2]), _output_axis(node, given[3])
    weight = _grid(given[3], given[4], given[5], axis)
    at = {"QLinearConv": (6, 8), "QLinearMatMul": (6, 9), "QGemm": (7, 6), "MatMulIntegerToFloat": (9, 9)}[node.op]
    out = _grid(node.outputs[0], *given[at[0] : at[0] + 2]) if len(given) > at[0] else None
    bias = given[at[1]].values if len(given) > at[1] and isinstance(given[at[1]], gs.Constant) else None
    real = tuple(data.scale[0] * scale for scale in weight.scale)  # exact: 24 bits by 24
    rows = () if out is None else (multipliers(_ratio(out, data.scale[0], scale) for scale in weight.scale),)
    return Entry(
        node.name, node.op, "products", (data,), out, weight, rows,
        None if bias is None else tuple(int(value) for value in bias),
        _reach(data, given[3], weight, axis, bias), None if out is None else _limits(out),
        real_scale=real if out is None else None, attributes=dict(node.attrs),
    )  # fmt: skip


def _output_axis(node: gs.Node, weight: gs.Tensor) -> int | None:
    """Axis of the output channels in a weight tensor; None where the right operand is live."""
    if node.op == "QLinearConv":
        return 0
    if not isinstance(weight, gs.Constant):
        return None
    return int(weight.values.ndim) - (2 if node.op == "QGemm" and node.attrs.get("transB", 0) else 1)


def _reach(
    data: Grid, codes: gs.Tensor, weight: Grid, axis: int | None, bias: npt.NDArray[Any] | None
) -> Accumulator | None:
    """Bounds of the sum over all inputs, with and without the bias, since it may be added first or last."""
    if not isinstance(codes, gs.Constant) or axis is None:
        return None
    values = np.moveaxis(codes.values.astype(np.int64), axis, -1)
    values = (values - np.asarray(weight.zero_point)).reshape(-1, values.shape[-1])
    low, high = (limit - data.zero_point[0] for limit in _limits(data))
    least = np.minimum(values * low, values * high).sum(axis=0)
    most = np.maximum(values * low, values * high).sum(axis=0)
    added = np.zeros_like(least) if bias is None else bias.astype(np.int64)
    return accumulator(
        int(np.minimum(least, least + added).min(initial=0)), int(np.maximum(most, most + added).max(initial=0))
    )


def _pair(node: gs.Node) -> Entry:
    """Two tensors added, or multiplied."""
    first, second = _grid(*node.inputs[:3]), _grid(*node.inputs[3:6])
    out = _grid(node.outputs[0], *node.inputs[6:8])
    if node.op == "QLinearAdd":
        rows = tuple((multiplier(_ratio(out, grid.scale[0])),) for grid in (first, second))
        return Entry(
            node.name, node.op, "sum", (first, second), out, multipliers=rows, clip=_limits(out),
            attributes=dict(node.attrs),
        )  # fmt: skip
    ends = [[limit - grid.zero_point[0] for limit in _limits(grid)] for grid in (first, second)]
    products = [a * b for a, b in itertools.product(*ends)]
    return Entry(
        node.name, node.op, "product", (first, second), out,
        multipliers=((multiplier(_ratio(out, first.scale[0], second.scale[0])),),),
        accumulator=accumulator(min(products), max(products)), clip=_limits(out), attributes=dict(node.attrs),
    )  # fmt: skip


def _joined(node: gs.Node) -> Entry:
    """Inputs joined, each on a scale of its own."""
    out = _grid(node.outputs[0], *node.inputs[:2])
    inputs = tuple(_grid(*node.inputs[at : at + 3]) for at in range(2, len(node.inputs), 3))
    rows = tuple((multiplier(_ratio(out, grid.scale[0])),) for grid in inputs)
    return Entry(
        node.name, node.op, "each", inputs, out, multipliers=rows, clip=_limits(out), attributes=dict(node.attrs)
    )


def _requantised(node: gs.Node) -> Entry:
    """A DequantizeLinear and a QuantizeLinear with nothing between them: one scale to another."""
    before = node.inputs[0].inputs[0]
    given, out = _grid(*before.inputs[:3]), _grid(node.outputs[0], *node.inputs[1:3])
    row = (multiplier(_ratio(out, given.scale[0])),)
    return Entry(node.name, node.op, "each", (given,), out, multipliers=(row,), clip=_limits(out))


def _mean(node: gs.Node) -> Entry:
    """An average: the factor holds the division by the number of elements."""
    data, out = _grid(*node.inputs[:3]), _grid(node.outputs[0], *node.inputs[3:5])
    counts = _counts(node)
    row = multipliers(_ratio(out, data.scale[0]) / count for count in counts or (1,))
    low, high = (limit - data.zero_point[0] for limit in _limits(data))
    return Entry(
        node.name, node.op, "mean", (data,), out, multipliers=(row,), counts=counts, clip=_limits(out),
        accumulator=accumulator(low * max(counts), high * max(counts)) if counts else None,
        attributes=dict(node.attrs),
    )  # fmt: skip


def _counts(node: gs.Node) -> tuple[int, ...] | None:
    """How many elements a window may hold, the full one first; None where it depends on the input."""
    if node.op == "QLinearGlobalAveragePool":
        shape: Sequence[Any] = node.inputs[0].shape or ()
        sizes = shape[2:]
        return (math.prod(sizes),) if sizes and all(isinstance(size, int) for size in sizes) else None
    kernel, attrs = node.attrs["kernel_shape"], node.attrs
    full = math.prod(kernel)
    overhang = any(attrs.get("pads", ())) or attrs.get("ceil_mode", 0) or attrs.get("auto_pad", "NOTSET") != "NOTSET"
    if attrs.get("count_include_pad", 0) or not overhang:
        return (full,)
    some = {math.prod(part) for part in itertools.product(*(range(1, size + 1) for size in kernel))}
    return (full, *sorted(some - {full}))


def _function(node: gs.Node) -> Entry:
    """LeakyRelu as one factor for each sign, Sigmoid as its 256 codes."""
    data, out = _grid(*node.inputs[:3]), _grid(node.outputs[0], *node.inputs[3:5])
    if node.op == "QLinearLeakyRelu":
        alpha = float(np.float32(node.attrs.get("alpha", 0.01)))
        slopes = ((multiplier(_ratio(out, data.scale[0])),), (multiplier(_ratio(out, data.scale[0], alpha)),))
        return Entry(node.name, node.op, "slopes", (data,), out, multipliers=slopes, clip=_limits(out),
                     attributes={"alpha": alpha})  # fmt: skip
    return Entry(node.name, node.op, "lookup", (data,), out, clip=_limits(out), codes=_sigmoid_codes(data, out))


def _sigmoid_codes(data: Grid, out: Grid) -> tuple[int, ...]:
    """Output code of each input code, from the lowest on."""
    low, high = _limits(data)
    real = data.scale[0] * (np.arange(low, high + 1) - data.zero_point[0])
    values = np.exp(-np.logaddexp(0.0, -real)) / out.scale[0]
    return _as_codes(values, out)


def _as_codes(values: npt.NDArray[np.float64], out: Grid) -> tuple[int, ...]:
    codes: Iterable[Any] = np.clip(np.rint(values) + out.zero_point[0], *_limits(out))
    return tuple(int(code) for code in codes)
