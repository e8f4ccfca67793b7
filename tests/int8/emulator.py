"""A network of integer operators computed from its table of multipliers, with numpy integers and nothing else.

Sums are int32, products with mantissas int64, and the only rounding is that of the right shift: to nearest, ties to
even. ONNX Runtime computes the same sums and scales them in float32. Where the two give different codes,
:func:`explain` takes the exact rational value and shows that it lies so near to the middle of two codes that float32
cannot tell on which side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import onnx
import onnxruntime
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Half a unit in the last place of a float32 number of magnitude 1: what one operation rounds away at most.
UNIT = Fraction(1, 1 << 24)
SPREAD = 22  # docs/integer.md: how far apart the shifts of two terms may be


def shift_right(values: np.ndarray, shift: np.ndarray | int) -> np.ndarray:
    """``values / 2**shift`` in int64, to the nearest integer, ties to even.

    >>> shift_right(np.array([5, 6, 7, -5, -6, -7, 10]), 2)
    array([ 1,  2,  2, -1, -2, -2,  2])
    """
    values, shift = np.broadcast_arrays(np.asarray(values, np.int64), np.asarray(shift, np.int64))
    inside = np.minimum(shift, 62)
    floor = values >> inside
    rest = values - (floor << inside)
    half = np.int64(1) << np.maximum(inside - 1, 0)
    up = (inside > 0) & ((rest > half) | ((rest == half) & (floor & 1 == 1)))
    assert np.all(np.abs(values[shift > 62]) < 1 << 62), "beyond what a table promises"
    return np.where(shift > 62, 0, floor + up)


@dataclasses.dataclass
class Result:
    """Codes of one operator, and what is needed to say how near they are to other ones.

    Attributes:
        codes: As written; floats where the operator writes floats.
        exact: Index -> the rational number that is rounded, in codes and without the zero point. None with floats.
        noise: That number and its index -> bound of what ONNX Runtime's float32 and our mantissa may be off by.
    """

    codes: np.ndarray
    exact: Callable[[tuple[int, ...]], Fraction] | None
    noise: Callable[[Fraction, tuple[int, ...]], Fraction] | None


class Emulator:
    """Executes nodes of a model of integer operators.

    Args:
        model: Integer operators; the weights are taken from it.
        table: The JSON of its multipliers.
    """

    def __init__(self, model: onnx.ModelProto, table: dict) -> None:
        assert table["rounding"] == "half_even"
        self.model = model
        self.entries = {entry["name"]: entry for entry in table["entries"]}
        self.moves = table["moves"]
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant":
                self.constants[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)

    def run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """All tensors of a network that computes on codes everywhere but at its borders."""
        values = dict(feeds)
        for node in self.model.graph.node:
            values.update(zip(node.output, self.outputs(node, values), strict=True))
        return values

    def outputs(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Outputs of any node that is on codes or at their border."""
        if node.name in self.entries and node.op_type != "QuantizeLinear":
            return [self.compute(node, values).codes]
        given = [values.get(name, self.constants.get(name)) for name in node.input]
        if node.op_type == "QuantizeLinear":
            scaled = given[0].astype(np.float32) / given[1] + np.float32(0)
            limits = np.iinfo(given[2].dtype)
            return [np.clip(np.rint(scaled) + given[2], limits.min, limits.max).astype(given[2].dtype)]
        if node.op_type == "DequantizeLinear":
            return [((given[0].astype(np.int32) - given[2].astype(np.int32)) * given[1]).astype(np.float32)]
        return moved(node, given)

    def compute(self, node: onnx.NodeProto, values: dict[str, np.ndarray]) -> Result:
        """Codes of a node that has an entry."""
        entry = self.entries[node.name]
        codes = [self._codes(grid, values) for grid in entry["inputs"]]
        return getattr(self, f"_{entry['rule']}")(entry, codes, values)

    def _codes(self, grid: dict, values: dict[str, np.ndarray]) -> np.ndarray:
        """Codes less their zero point, as int32."""
        name = grid["tensor"]
        raw = values[name] if name in values else self.constants[name]
        assert str(raw.dtype) == grid["dtype"], name
        zero = np.asarray(grid["zero_point"], np.int32)
        if grid["axis"] is not None:
            zero = zero.reshape([-1 if axis == grid["axis"] else 1 for axis in range(raw.ndim)])
        return raw.astype(np.int32) - (zero if zero.size > 1 else zero.reshape(-1)[0])

    def _products(self, entry: dict, codes: list[np.ndarray], values: dict[str, np.ndarray]) -> Result:
        data, weight = codes[0], self._codes(entry["weight"], values)
        attributes = entry.get("attributes", {})
        if entry["op"] == "QLinearConv":
            sums, axis = convolve(data, weight, attributes), 1
        else:
            weight = weight.T if entry["op"] == "QGemm" and attributes.get("transB", 0) else weight
            sums, axis = exact_product(data, weight), -1
        along = [1] * sums.ndim
        along[axis] = -1
        if "bias" in entry:
            sums = sums + np.asarray(entry["bias"], np.int64).reshape(along)
        if "accumulator" in entry:
            assert entry["accumulator"]["low"] <= sums.min(initial=0), entry["name"]
            assert sums.max(initial=0) <= entry["accumulator"]["high"], entry["name"]
        assert np.all(sums == sums.astype(np.int32)), "the sum leaves int32"
        if entry.get("output") is None:
            scale = np.asarray(entry["real_scale"]).reshape(along)
            return Result((sums * scale).astype(np.float32), None, None)
        row = entry["multipliers"][0]
        many = len(row["mantissa"]) > 1
        channel = np.broadcast_to(np.arange(sums.shape[axis]).reshape(along) if many else 0, sums.shape)
        factors = [
            Fraction(entry["inputs"][0]["scale"][0]) * Fraction(scale) / Fraction(entry["output"]["scale"][0])
            for scale in entry["weight"]["scale"]
        ]
        # int32 to float, two operations for the factor, one for their product.
        return scaled(entry, [(sums, row, channel, factors)], lambda value, at: 5 * UNIT * abs(value))

    def _sum(self, entry: dict, codes: list[np.ndarray], _: object) -> Result:
        shape = np.broadcast_shapes(*(array.shape for array in codes))
        terms, whole = [], Fraction(0)
        for array, grid, row in zip(codes, entry["inputs"], entry["multipliers"], strict=True):
            factor = Fraction(grid["scale"][0]) / Fraction(entry["output"]["scale"][0])
            whole += (
                512 * factor
            )  # a code less a zero point, with the zero point alone as a part of the kernel's offset
            terms.append((np.broadcast_to(array, shape), row, np.zeros(shape, int), [factor]))
        # The kernel forms a r_a + (b r_b + offset), the offset from both zero points: under eight operations on
        # numbers below all magnitudes together.
        return scaled(entry, terms, lambda value, at: 8 * UNIT * (whole + 256))

    def _product(self, entry: dict, codes: list[np.ndarray], _: object) -> Result:
        sums = codes[0].astype(np.int64) * codes[1]
        factor = math.prod(Fraction(grid["scale"][0]) for grid in entry["inputs"])
        terms = [(sums, entry["multipliers"][0], np.zeros(sums.shape, int), [factor / out_scale(entry)])]
        return scaled(entry, terms, lambda value, at: 5 * UNIT * abs(value) + UNIT * 256)

    def _each(self, entry: dict, codes: list[np.ndarray], _: object) -> Result:
        parts = []
        for array, grid, row in zip(codes, entry["inputs"], entry["multipliers"], strict=True):
            factor = Fraction(grid["scale"][0]) / out_scale(entry)
            terms = [(array, row, np.zeros(array.shape, int), [factor])]
            parts.append(scaled(entry, terms, lambda value, at: 3 * UNIT * abs(value) + UNIT * 256))
        if entry["op"] != "QLinearConcat":
            return parts[0]
        axis = entry["attributes"]["axis"] % codes[0].ndim
        starts = np.cumsum([0, *(array.shape[axis] for array in codes)])

        def part(at: tuple[int, ...]) -> tuple[Result, tuple[int, ...]]:
            which = int(np.searchsorted(starts, at[axis], side="right")) - 1
            return parts[which], (*at[:axis], at[axis] - int(starts[which]), *at[axis + 1 :])

        return Result(
            np.concatenate([each.codes for each in parts], axis),
            lambda at: part(at)[0].exact(part(at)[1]),
            lambda value, at: part(at)[0].noise(value, part(at)[1]),
        )

    def _mean(self, entry: dict, codes: list[np.ndarray], _: object) -> Result:
        sums, magnitudes, counts = pooled(codes[0], entry)
        row, known = entry["multipliers"][0], entry.get("counts")
        unit = Fraction(entry["inputs"][0]["scale"][0]) / out_scale(entry)
        if known is None:
            return divided(entry, sums, counts, unit)
        place = {count: index for index, count in enumerate(known)}
        channel = np.vectorize(place.__getitem__, otypes=[int])(counts)
        factors = [unit / count for count in known]

        def noise(value: Fraction, at: tuple[int, ...]) -> Fraction:
            if entry["op"] == "QLinearGlobalAveragePool":  # an integer sum, scaled as that of a layer
                return 5 * UNIT * abs(value) + UNIT * 256
            # Each element is dequantised, and added in float32.
            spread = factors[channel[at]] * int(magnitudes[at])
            return (int(counts[at]) + 4) * UNIT * spread + UNIT * (abs(value) + 256)

        return scaled(entry, [(sums, row, channel, factors)], noise)

    def _slopes(self, entry: dict, codes: list[np.ndarray], _: object) -> Result:
        negative = (codes[0] < 0).astype(int)
        above, below = entry["multipliers"]
        row = {name: [*above[name], *below[name]] for name in ("mantissa", "shift")}
        unit = Fraction(entry["inputs"][0]["scale"][0]) / out_scale(entry)
        factors = [unit, unit * Fraction(entry["attributes"]["alpha"])]
        terms = [(codes[0], row, negative, factors)]
        return scaled(entry, terms, lambda value, at: 4 * UNIT * abs(value) + UNIT * 256)

    def _lookup(self, entry: dict, codes: list[np.ndarray], values: dict[str, np.ndarray]) -> Result:
        grid = entry["inputs"][0]
        lowest = np.iinfo(grid["dtype"]).min - grid["zero_point"][0]
        table = np.asarray(entry["codes"], entry["output"]["dtype"])
        assert table.shape == (256,)

        def exact(at: tuple[int, ...]) -> Fraction:
            real = grid["scale"][0] * int(codes[0][at])
            return Fraction(1 / (1 + math.exp(-real))) / out_scale(entry)

        def noise(value: Fraction, at: tuple[int, ...]) -> Fraction:
            # What the kernel's logistic function is off by at this very point, as its float operator shows it.
            real = np.float32(grid["scale"][0]) * np.float32(codes[0][at])
            off = abs(Fraction(float(float_sigmoid(real))) / out_scale(entry) - value)
            return off + 3 * UNIT * (abs(value) + 256)

        return Result(table[codes[0] - lowest], exact, noise)


def out_scale(entry: dict) -> Fraction:
    return Fraction(entry["output"]["scale"][0])


def scaled(entry: dict, terms: list[tuple], noise: object) -> Result:
    """Terms brought to one shift, added, shifted right, and clipped.

    Args:
        entry: Of the table.
        terms: Integers, a set of multipliers, which of the set each integer has, and the exact factors of the set.
        noise: See :class:`Result`.
    """
    mantissas = [np.asarray(row["mantissa"], np.int64)[channel] for _, row, channel, _ in terms]
    shifts = [np.asarray(row["shift"], np.int64)[channel] for _, row, channel, _ in terms]
    common = shifts[0]
    if len(terms) > 1:
        common = np.minimum(np.maximum.reduce(shifts), np.minimum.reduce(shifts) + SPREAD)
    total = np.zeros(terms[0][0].shape, np.int64)
    for (sums, *_), mantissa, shift in zip(terms, mantissas, shifts, strict=True):
        product = sums.astype(np.int64) * mantissa
        total = total + np.where(
            shift <= common,
            product << np.maximum(common - shift, 0),
            shift_right(product, np.maximum(shift - common, 0)),
        )
    low, high = entry["clip"]
    codes = np.clip(shift_right(total, common) + entry["output"]["zero_point"][0], low, high)

    def exact(at: tuple[int, ...]) -> Fraction:
        return sum((int(sums[at]) * factors[channel[at]] for sums, _, channel, factors in terms), Fraction(0))

    def both(value: Fraction, at: tuple[int, ...]) -> Fraction:
        # The mantissas' own rounding: half a unit of 31 bits, and of the smaller term half a unit of the common shift.
        own = sum((abs(int(sums[at])) * factors[channel[at]] for sums, _, channel, factors in terms), Fraction(0))
        return noise(value, at) + abs(own) / (1 << 31) + Fraction(len(terms) - 1, 1 << int(common[at]))

    return Result(codes.astype(entry["output"]["dtype"]), exact, both)


def divided(entry: dict, sums: np.ndarray, counts: np.ndarray, unit: Fraction) -> Result:
    """A mean whose number of elements the table does not know: one more integer division."""
    row = entry["multipliers"][0]
    mantissa, shift = row["mantissa"][0], row["shift"][0]
    low, high = entry["clip"]
    codes = np.empty(sums.shape, np.int64)
    for at in np.ndindex(*sums.shape):
        codes[at] = round(Fraction(int(sums[at]) * mantissa, int(counts[at]) << shift))
    codes = np.clip(codes + entry["output"]["zero_point"][0], low, high).astype(entry["output"]["dtype"])
    return Result(
        codes,
        lambda at: int(sums[at]) * unit / int(counts[at]),
        lambda value, at: 5 * UNIT * abs(value) + UNIT * 256 + abs(value) / (1 << 31),
    )


def explain(result: Result, theirs: np.ndarray, zero_point: int) -> tuple[int, Fraction]:
    """How many codes differ; each by one, and only where float32 cannot tell.

    Returns:
        The number, and how near the worst of them is to the limit of what is explained, 1 being at it.

    Raises:
        AssertionError: a code differs that nothing explains.
    """
    assert result.codes.dtype == theirs.dtype
    assert result.codes.shape == theirs.shape
    worst, different = Fraction(0), np.argwhere(result.codes != theirs)
    for where in different:
        at = tuple(int(index) for index in where)
        ours, other = int(result.codes[at]), int(theirs[at])
        assert abs(ours - other) == 1, f"{ours} and {other} at {at}"
        value = result.exact(at)
        middle = Fraction(ours + other, 2) - zero_point
        allowed = result.noise(value, at)
        # The explanation must explain little: far less than the half code that it is about.
        assert allowed < Fraction(1, 50), f"a bound of {float(allowed)} codes would explain anything"
        assert abs(value - middle) <= allowed, (
            f"{float(value)} is no tie of {ours} and {other}, within {float(allowed)}"
        )
        worst = max(worst, abs(value - middle) / allowed)
    return len(different), worst


def exact_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Matrix product of integers. In float64 it is exact, since every partial sum stays far below 2^53."""
    bound = int(np.abs(left).max(initial=0)) * int(np.abs(right).max(initial=0)) * left.shape[-1]
    assert bound < 1 << 53
    return np.rint(left.astype(np.float64) @ right.astype(np.float64)).astype(np.int64)


def convolve(data: np.ndarray, weight: np.ndarray, attributes: dict) -> np.ndarray:
    """Convolution of integers over any number of spatial axes. Padding adds zeros, which codes less zero point are."""
    spatial = data.ndim - 2
    strides = attributes.get("strides", [1] * spatial)
    dilations, group = attributes.get("dilations", [1] * spatial), attributes.get("group", 1)
    kernel = weight.shape[2:]
    pads = padding(data.shape[2:], kernel, strides, dilations, attributes)
    padded = np.pad(data, [(0, 0), (0, 0), *zip(pads[:spatial], pads[spatial:], strict=True)])
    windows = window(padded, kernel, strides, dilations)
    batch, places = data.shape[0], windows.shape[2 : 2 + spatial]
    rows = windows.reshape(batch, group, data.shape[1] // group, *places, *kernel)
    order = (0, 1, *range(3, 3 + spatial), 2, *range(3 + spatial, 3 + 2 * spatial))
    rows = rows.transpose(order).reshape(batch, group, math.prod(places), -1)
    columns = weight.reshape(group, weight.shape[0] // group, -1).transpose(0, 2, 1)
    sums = exact_product(rows, columns[None])
    return sums.transpose(0, 1, 3, 2).reshape(batch, weight.shape[0], *places)


def window(data: np.ndarray, kernel: tuple, strides: list[int], dilations: list[int]) -> np.ndarray:
    """Every window: (N, C, places..., kernel...)."""
    spatial = len(kernel)
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    views = sliding_window_view(data, extent, tuple(range(2, 2 + spatial)))
    return views[(..., *(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))]


def padding(shape: tuple, kernel: tuple, strides: list[int], dilations: list[int], attributes: dict) -> list[int]:
    """Begins, then ends."""
    automatic = attributes.get("auto_pad", "NOTSET")
    if automatic in ("NOTSET", "VALID"):
        return list(attributes.get("pads", [0] * 2 * len(kernel))) if automatic == "NOTSET" else [0] * 2 * len(kernel)
    begins, ends = [], []
    for size, width, stride, dilation in zip(shape, kernel, strides, dilations, strict=True):
        total = max((math.ceil(size / stride) - 1) * stride + (width - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if automatic == "SAME_UPPER" else large)
        ends.append(large if automatic == "SAME_UPPER" else small)
    return begins + ends


def pooled(data: np.ndarray, entry: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums over windows, sums of magnitudes, and how many elements each is to be divided by."""
    spatial = data.ndim - 2
    attributes = entry.get("attributes", {})
    if entry["op"] == "QLinearGlobalAveragePool":
        axes = tuple(range(2, data.ndim))
        sums = data.sum(axes, np.int64, keepdims=True)
        return sums, np.abs(data).sum(axes, np.int64, keepdims=True), np.full(sums.shape, math.prod(data.shape[2:]))
    kernel = tuple(attributes["kernel_shape"])
    strides = attributes.get("strides", [1] * spatial)
    pads = padding(data.shape[2:], kernel, strides, [1] * spatial, attributes)
    ends = rounded_up(data.shape[2:], kernel, strides, pads) if attributes.get("ceil_mode", 0) else pads[spatial:]
    around = [(0, 0), (0, 0), *zip(pads[:spatial], ends, strict=True)]
    axes = tuple(range(2 + spatial, 2 + 2 * spatial))

    def add(values: np.ndarray) -> np.ndarray:
        return window(np.pad(values, around), kernel, strides, [1] * spatial).sum(axes, np.int64)

    inside = add(np.ones(data.shape, np.int64))
    counts = np.full(inside.shape, math.prod(kernel)) if attributes.get("count_include_pad", 0) else inside
    return add(data), add(np.abs(data)), counts


def rounded_up(shape: tuple, extent: tuple, strides: list[int], pads: list[int]) -> list[int]:
    """Padding behind, with as much more as the last window wants that starts before it."""
    ends = list(pads[len(shape) :])
    for axis, (size, width, stride) in enumerate(zip(shape, extent, strides, strict=True)):
        whole = size + pads[axis] + ends[axis] - width
        steps = math.ceil(whole / stride)
        if steps * stride >= size + pads[axis]:
            steps -= 1
        ends[axis] += max(steps * stride - whole, 0)
    return ends


def moved(node: onnx.NodeProto, given: list[np.ndarray | None]) -> list[np.ndarray]:
    """An operator that moves codes: MaxPool here, the others as onnx's own evaluator has them."""
    if node.op_type == "MaxPool":
        return [max_pool(given[0], {a.name: helper.get_attribute_value(a) for a in node.attribute})]
    if node.op_type == "GatherElements":  # onnx's own cannot broadcast here
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        return [np.take_along_axis(given[0], given[1].astype(np.int64), axis)]
    named = {name: value for name, value in zip(node.input, given, strict=True) if name}
    graph = helper.make_graph(
        [node], "moved",
        [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for n, v in named.items()],
        [onnx.ValueInfoProto(name=name) for name in node.output],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    return list(ReferenceEvaluator(model).run(None, named))


def max_pool(data: np.ndarray, attributes: dict) -> np.ndarray:
    """Largest code of every window; padding holds the lowest code there is."""
    spatial = data.ndim - 2
    kernel = tuple(attributes["kernel_shape"])
    strides = list(attributes.get("strides", [1] * spatial))
    dilations = list(attributes.get("dilations", [1] * spatial))
    given = {**attributes, "auto_pad": attributes.get("auto_pad", b"NOTSET").decode()}
    pads = padding(data.shape[2:], kernel, strides, dilations, given)
    extent = [(size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True)]
    ends = rounded_up(data.shape[2:], extent, strides, pads) if attributes.get("ceil_mode", 0) else pads[spatial:]
    around = [(0, 0), (0, 0), *zip(pads[:spatial], ends, strict=True)]
    padded = np.pad(data, around, constant_values=np.iinfo(data.dtype).min)
    return window(padded, kernel, strides, dilations).max(tuple(range(2 + spatial, 2 + 2 * spatial)))


def float_sigmoid(value: np.float32) -> np.float32:
    """ONNX Runtime's own, in float32."""
    graph = helper.make_graph(
        [helper.make_node("Sigmoid", ["x"], ["y"])], "sigmoid", [helper.make_tensor_value_info("x", 1, [256])],
        [helper.make_tensor_value_info("y", 1, [256])],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    # 256 of them, as the kernel that fills a table has them: another number may go through other instructions.
    return session.run(None, {"x": np.full(256, value, np.float32)})[0][0]
