"""The operators of this package's own ONNX domain: what they mean, how to read them, what stands in for them.

There is one, ``relu_deploy::PWLU``: a learned activation stays one node with its parameters, so that a person finds it
and a pass can fold it. Every file that holds one also holds its definition in standard operators, as a model-local
function: runtimes need no plugin, and no knowledge of the domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from relu_deploy.errors import ModelError

Array = npt.NDArray[np.float64]

DOMAIN = "relu_deploy"
VERSION = 1
PWLU = "PWLU"
# The first opset that can spell the definition: CastLike, and Shape of some axes.
DEFINITION_OPSET = 15

# Computed in the type of the parameters, which the exporter makes float32 at least: (x - B_L) / d has 8 bits in
# bfloat16, too few to name an interval. Clipped twice: infinities have no integer, and NaN has none either, so that any
# segment is taken and ``slope * x`` is NaN.
_PWLU_BODY = """
<domain: "relu_deploy", opset_import: ["" : {opset}]>
PWLU <channel_axis> (x, left, right, values, slope_left, slope_right) => (y)
{{
    wide = CastLike (x, values)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    minus_one = Constant <value_ints = [-1]> ()
    two = Constant <value_ints = [2]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    column = Constant <value_ints = [-1, 1]> ()
    axis = Constant <value_int: int = @channel_axis> ()
    axes = Reshape (axis, one)
    size = Shape (x)
    rank = Shape (size)
    channels = Shape (left)
    ones = ConstantOfShape <value = int64[1] {{1}}> (rank)
    spread = ScatterElements (ones, axes, channels)
    points = Shape <start = 1, end = 2> (values)
    intervals = Sub (points, one)
    segments = Add (intervals, two)
    count = CastLike (intervals, values)
    width = Sub (right, left)
    step = Div (width, count)
    steps = Reshape (step, column)
    starts = Slice (values, zero, minus_one, one)
    stops = Slice (values, one, end, one)
    rise = Sub (stops, starts)
    inner = Div (rise, steps)
    left_column = Reshape (left, column)
    right_column = Reshape (right, column)
    low_column = Reshape (slope_left, column)
    high_column = Reshape (slope_right, column)
    slopes = Concat <axis = 1> (low_column, inner, high_column)
    scalar_zero = Constant <value_int = 0> ()
    minus_one_scalar = Constant <value_int = -1> ()
    scalar_one = Constant <value_int = 1> ()
    scalar_count = Squeeze (intervals)
    numbers = Range (scalar_zero, scalar_count, scalar_one)
    places = CastLike (numbers, values)
    shifts = Mul (steps, places)
    inner_anchors = Add (left_column, shifts)
    anchors = Concat <axis = 1> (left_column, inner_anchors, right_column)
    first_height = Slice (values, zero, one, one)
    anchor_heights = Concat <axis = 1> (first_height, values)
    drop = Mul (slopes, anchors)
    offsets = Sub (anchor_heights, drop)
    flat_slopes = Reshape (slopes, minus_one)
    flat_offsets = Reshape (offsets, minus_one)
    left_along = Reshape (left, spread)
    width_along = Reshape (width, spread)
    distance = Sub (wide, left_along)
    share = Div (distance, width_along)
    place = Mul (share, count)
    whole = Floor (place)
    lowest = CastLike (minus_one_scalar, values)
    bounded = Clip (whole, lowest, count)
    lowered = Cast <to = 7> (bounded)
    raised = Add (lowered, one)
    most = Add (intervals, one)
    not_negative = Max (raised, zero)
    segment = Min (not_negative, most)
    scalar_channels = Squeeze (channels)
    channel = Range (scalar_zero, scalar_channels, scalar_one)
    row = Mul (channel, segments)
    row_along = Reshape (row, spread)
    index = Add (segment, row_along)
    slope = Gather (flat_slopes, index)
    offset = Gather (flat_offsets, index)
    scaled = Mul (slope, wide)
    result = Add (scaled, offset)
    y = CastLike (result, x)
}}
"""


@dataclasses.dataclass(frozen=True)
class PwluFunction:
    """A trained PWLU: C functions of one variable, each linear between N + 1 equally spaced points and beyond them.

    Attributes:
        left: B_L, float64 (C,), units of the input; C is 1 where one function serves the whole layer.
        right: B_R, (C,), above ``left``.
        values: Y_0 .. Y_N, (C, N + 1).
        slope_left: K_L, (C,).
        slope_right: K_R, (C,).

    Raises:
        ModelError: shapes do not fit together, a number is not finite, or ``right`` is not above ``left``.

    Source: PWLU (Zhou et al. 2021), section 3.1 (definition) and 3.4 (tables).
    """

    left: Array
    right: Array
    values: Array
    slope_left: Array
    slope_right: Array

    def __post_init__(self) -> None:
        rows = (self.left, self.right, self.slope_left, self.slope_right)
        fits = self.left.ndim == 1 and self.left.size > 0 and all(row.shape == self.left.shape for row in rows)
        if not fits or self.values.ndim != 2 or self.values.shape[0] != self.left.size or self.values.shape[1] < 2:
            shapes = ", ".join(str(part.shape) for part in (*rows, self.values))
            raise ModelError(f"parameters of a PWLU have the shapes {shapes}; wanted are four (C,) and one (C, N + 1)")
        if not all(np.isfinite(part).all() for part in (*rows, self.values)):
            raise ModelError("a parameter of a PWLU is not finite")
        if not (self.right > self.left).all():
            raise ModelError("a PWLU has its right boundary at or left of its left one")

    @property
    def channels(self) -> int:
        """C."""
        return int(self.left.size)

    @property
    def intervals(self) -> int:
        """N."""
        return int(self.values.shape[1] - 1)

    @property
    def points(self) -> Array:
        """B_0 .. B_N, the points at which the functions bend, (C, N + 1)."""
        share = np.arange(self.intervals + 1) / self.intervals
        inner = self.left[:, None] + (self.right - self.left)[:, None] * share
        inner[:, -1] = self.right
        return inner

    def tables(self) -> tuple[Array, Array]:
        """Slope K' and intercept Z' of each segment, (C, N + 2) each: 0 is left of B_L, N + 1 from B_R on."""
        step = ((self.right - self.left) / self.intervals)[:, None]
        inner = np.diff(self.values, axis=1) / step
        slopes = np.concatenate([self.slope_left[:, None], inner, self.slope_right[:, None]], axis=1)
        anchors = np.concatenate([self.left[:, None], self.points[:, :-1], self.right[:, None]], axis=1)
        heights = np.concatenate([self.values[:, :1], self.values], axis=1)
        return slopes, heights - slopes * anchors

    def __call__(self, x: npt.ArrayLike, channel_axis: int = 1) -> Array:
        """The functions in float64.

        Args:
            x: Any shape; C elements along ``channel_axis`` unless C is 1.
            channel_axis: Where the channels are; may be negative.

        Returns:
            float64, shape of ``x``. NaN gives NaN.

        >>> relu = PwluFunction(*map(np.asarray, ([-1.0], [1.0], [[0.0, 0.0, 1.0]], [0.0], [1.0])))
        >>> relu([[-2.0], [0.5]]).tolist()
        [[0.0], [0.5]]
        """
        wide = np.asarray(x, dtype=np.float64)
        slopes, offsets = self.tables()
        shape = [1] * wide.ndim
        if self.channels > 1:
            shape[channel_axis] = self.channels
        left, width = self.left.reshape(shape), (self.right - self.left).reshape(shape)
        with np.errstate(invalid="ignore", over="ignore"):
            place = np.floor((wide - left) / width * self.intervals)
            segment = np.nan_to_num(np.clip(place, -1, self.intervals)).astype(np.int64) + 1
            flat = segment + (np.arange(self.channels) * slopes.shape[1]).reshape(shape)
            result: Array = slopes.reshape(-1)[flat] * wide + offsets.reshape(-1)[flat]
        return result


def is_pwlu(node: gs.Node) -> bool:
    """Whether a node is ``relu_deploy::PWLU``."""
    return bool(node.op == PWLU and node.domain == DOMAIN)


def read_pwlu(node: gs.Node) -> PwluFunction:
    """The functions of a ``relu_deploy::PWLU`` node.

    Raises:
        ModelError: as :func:`pwlu_of`, or its input is known not to have that many channels on its channel axis.
    """
    function = pwlu_of(node.name, node.inputs)
    shape, axis = node.inputs[0].shape, channel_axis(node)
    if function.channels == 1 or not shape:
        return function
    if not -len(shape) <= axis < len(shape):
        raise ModelError(f"node {node.name!r} has its channels on axis {axis} of a tensor of {len(shape)} axes")
    if isinstance(shape[axis], int) and shape[axis] != function.channels:
        raise ModelError(
            f"node {node.name!r} has functions for {function.channels} channels, and its input has {shape[axis]} on "
            f"axis {axis}"
        )
    return function


def pwlu_of(title: str, inputs: Sequence[gs.Tensor]) -> PwluFunction:
    """The functions that the inputs of a ``relu_deploy::PWLU`` node of this name make.

    Raises:
        ModelError: a parameter is missing or not a constant, or they do not fit together.
    """
    if len(inputs) != 6:
        raise ModelError(f"node {title!r} has {len(inputs)} inputs; a PWLU has six")
    names = ("left", "right", "values", "slope_left", "slope_right")
    parts: list[Array] = []
    for name, tensor in zip(names, inputs[1:], strict=True):
        if not isinstance(tensor, gs.Constant):
            raise ModelError(f"{name} of the PWLU {title!r} is computed at run time", hint="freeze its parameters")
        parts.append(np.asarray(tensor.values, dtype=np.float64))
    try:
        return PwluFunction(*parts)
    except ModelError as error:
        raise ModelError(f"node {title!r}: {error}") from error


def channel_axis(node: gs.Node) -> int:
    """The attribute of a ``relu_deploy::PWLU`` node: where its channels are; may be negative."""
    return int(node.attrs.get("channel_axis", 1))


def pwlu_definition(opset: int) -> onnx.FunctionProto:
    """``relu_deploy::PWLU`` in standard operators, of any rank, channel axis, N and float type.

    Args:
        opset: Of the model that it is put into, ``DEFINITION_OPSET`` or newer.
    """
    return onnx.parser.parse_function(_PWLU_BODY.format(opset=opset))


def is_definition(function: onnx.FunctionProto) -> bool:
    """Whether a local function is what this package writes for its operator, of any opset.

    A function of the same name may compute anything: it is a stranger's, and unfolded like those of other domains.
    """
    if (function.domain, function.name) != (DOMAIN, PWLU):
        return False
    opsets = [entry.version for entry in function.opset_import if entry.domain in ("", "ai.onnx")]
    ours = pwlu_definition(opsets[0] if opsets else DEFINITION_OPSET)
    return _spelled(function) == _spelled(ours)


def _spelled(function: onnx.FunctionProto) -> tuple[object, ...]:
    """What a function computes, without names of nodes, their order (tensors have one maker each) and remarks."""
    nodes = sorted(
        (node.domain, node.op_type, tuple(node.input), tuple(node.output),
         sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute))
        for node in function.node
    )  # fmt: skip
    return (*function.input,), (*function.output,), (*function.attribute,), nodes


def check_operators(model: onnx.ModelProto) -> None:
    """Refuse nodes of this domain that cannot be what they say, before inference stumbles over their definition.

    Raises:
        ModelError: a PWLU has other inputs than six, or no channel axis, or its parameters do not fit; names the node.
    """
    if any((f.domain, f.name) == (DOMAIN, PWLU) and not is_definition(f) for f in model.functions):
        return  # a stranger's
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for node in _nodes(model.graph.node):
        if (node.domain, node.op_type) == (DOMAIN, PWLU) and (why := _fault(node, shapes)):
            raise ModelError(
                f"the PWLU {node.name or node.op_type!r} {why}",
                hint="it takes x, left, right, values, slope_left, slope_right: values (C, N + 1), the other four (C,)",
            )


def _fault(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with a PWLU by its looks alone; empty where nothing is."""
    if len(node.input) != 6 or not all(node.input):
        return f"has {sum(map(bool, node.input))} inputs"
    if len(node.output) != 1:
        return f"has {len(node.output)} outputs"
    if not any(a.name == "channel_axis" and a.type == onnx.AttributeProto.INT for a in node.attribute):
        return "has no integer attribute channel_axis"
    left, right, values, low, high = (shapes.get(name) for name in node.input[1:])
    rows = {shape for shape in (left, right, low, high) if shape is not None}
    wide = values is None or (len(values) == 2 and values[1] > 1)
    if len(rows) > 1 or not all(len(row) == 1 and row[0] > 0 for row in rows) or not wide:
        return "has parameters of the shapes " + ", ".join(str(shapes.get(name)) for name in node.input[1:])
    if values is not None and rows and next(iter(rows)) != values[:1]:
        return f"has parameters for {next(iter(rows))[0]} channels and values for {values[0]}"
    return ""


def define_operators(model: onnx.ModelProto, opset: int) -> None:
    """Give a model the definitions of the operators of this domain that it uses and does not define, in place."""
    if not any(node.domain == DOMAIN and node.op_type == PWLU for node in _all_nodes(model)):
        return
    if not any(entry.domain == DOMAIN for entry in model.opset_import):
        model.opset_import.append(onnx.helper.make_opsetid(DOMAIN, VERSION))
    if not any((function.domain, function.name) == (DOMAIN, PWLU) for function in model.functions):
        model.functions.append(pwlu_definition(opset))


def drop_definitions(model: onnx.ModelProto) -> None:
    """Take out the definitions and the import of this domain where no node uses them, in place."""
    if any(node.domain == DOMAIN for node in _all_nodes(model)):
        return
    kept = [function for function in model.functions if function.domain != DOMAIN]
    imports = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.functions[:], model.opset_import[:]
    model.functions.extend(kept)
    model.opset_import.extend(imports)


def _all_nodes(model: onnx.ModelProto) -> Iterable[onnx.NodeProto]:
    """Those of the graph and of its local functions, and those inside them."""
    yield from _nodes(model.graph.node)
    for function in model.functions:
        yield from _nodes(function.node)


def _nodes(nodes: Iterable[onnx.NodeProto]) -> Iterable[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner.node)
