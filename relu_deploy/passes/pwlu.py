"""Fold a learned activation into the cheapest form that stays within a bound: ReLU, or PReLU with neighbours.

A channel of a PWLU is a continuous piecewise-linear function. Where all of a node's channels are ReLU within the bound
on the domain, the node is a Relu. Where they have two pieces each, with a rising right one,

    f(x) = b PRelu_s(x - t) + c,    s = a / b

and, PReLU being positively homogeneous, ``b PRelu_s(x - t) = PRelu_s(b x - b t)``: the scale and the shift are
per-channel arithmetic that ``fold_affine`` folds into the layer before, ``c`` into the bias of a layer behind. More
pieces stay one node here; :mod:`relu_deploy.passes.pwlu_spell` spells them for a target.

Source: PWLU (Zhou et al. 2021), section 3.4; Imai and Iri 1986 for the fewest pieces.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy import ops
from relu_deploy.errors import ModelError
from relu_deploy.passes.edit import Names, pinned_names
from relu_deploy.passes.polyline import Polyline
from relu_deploy.passes.segments import fewest_segments
from relu_deploy.report import PassReport, Skip

Array = npt.NDArray[np.float64]

# What rounding the parameters to float32 alone does to a function, relative to its largest value: half a unit each of a
# height, a boundary and a slope. A unit that never trained is ReLU up to this.
_ROUNDED = 2.0**-22
_LAYERS = ("Conv", "ConvTranspose", "Gemm")


@dataclasses.dataclass(frozen=True)
class Bound:
    """How far off a folded activation may be, and where.

    Attributes:
        eps: Largest error, in units of the output; 0 allows what rounding the parameters explains.
        low: Smallest input of the domain.
        high: Largest.
    """

    eps: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def __str__(self) -> str:
        where = "everywhere" if math.isinf(self.low) else f"for {self.low:.6g} <= x <= {self.high:.6g}"
        return f"within {self.eps:.3g} {where}"


EXACT = Bound()


def fold_pwlu(graph: gs.Graph, bounds: Mapping[str, Bound] | None = None, *, two_pieces: bool = True) -> PassReport:
    """Replace every ``relu_deploy::PWLU`` that is ReLU, or two pieces behind a layer.

    Args:
        graph: Sorted topologically, with types and shapes where they are known. Edited in place.
        bounds: Error allowed and domain, by name of the node's output. Those without one are folded only where nothing
            but rounding changes, everywhere.
        two_pieces: Also fold what has two pieces; the tensor before it then has another scale for each channel.

    Returns:
        Changed: the nodes that were replaced; notes say by what, with the largest error and its domain. Skipped: the
        others, with what they are.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    notes: dict[str, str] = {}
    pinned, names = pinned_names(graph), Names(graph)
    for node, function in units_of(graph, skipped):
        bound = (bounds or {}).get(node.outputs[0].name, EXACT)
        note: str | Skip | None = _to_relu(graph, node, function, bound)
        if note is None:
            note = _to_prelu(graph, node, function, bound, pinned, names) if two_pieces else _left(node, function)
        if isinstance(note, Skip):
            skipped.append(note)
        else:
            changed.append(node.name)
            notes[node.name] = note
    return PassReport("fold_pwlu", tuple(changed), tuple(skipped), notes)


def units_of(graph: gs.Graph, skipped: list[Skip]) -> Iterator[tuple[gs.Node, ops.PwluFunction]]:
    """Every ``relu_deploy::PWLU`` with its functions; those that cannot be read go to ``skipped``, with the reason."""
    for node in list(graph.nodes):
        if not ops.is_pwlu(node):
            continue
        try:
            yield node, ops.read_pwlu(node)
        except ModelError as error:
            skipped.append(Skip(node.name, str(error)))


def polylines(function: ops.PwluFunction) -> list[Polyline]:
    """The function of each channel, with all its N + 1 points."""
    return [
        Polyline(points, values, float(left), float(right))
        for points, values, left, right in zip(
            function.points, function.values, function.slope_left, function.slope_right, strict=True
        )
    ]


def allowance(function: ops.PwluFunction, bound: Bound) -> Array:
    """Error allowed in each channel: the bound's, or what rounding explains; ``(C,)``."""
    size = np.abs(function.values).max(axis=1) + np.abs(function.points).max(axis=1)
    return np.asarray(np.maximum(bound.eps, _ROUNDED * size))


def largest_error(line: Polyline, other: Polyline, low: float, high: float) -> float:
    """``sup |line - other|`` from ``low`` to ``high``; inf where their outer slopes part for ever."""
    if (math.isinf(low) and line.slope_left != other.slope_left) or (
        math.isinf(high) and line.slope_right != other.slope_right
    ):
        return math.inf
    breaks = np.concatenate([line.breaks, other.breaks, [v for v in (low, high) if math.isfinite(v)]])
    inside = breaks[(breaks >= low) & (breaks <= high)]
    return float(np.abs(line(inside) - other(inside)).max(initial=0.0))


_RELU = Polyline(np.zeros(1), np.zeros(1), 0.0, 1.0)


def fewest(function: ops.PwluFunction, bound: Bound) -> tuple[list[Polyline], float]:
    """Each channel in the fewest pieces that its allowance permits, and the largest error of any."""
    lines = polylines(function)
    found = [
        fewest_segments(line, float(eps), bound.low, bound.high)
        for line, eps in zip(lines, allowance(function, bound), strict=True)
    ]
    error = max(largest_error(a, b, bound.low, bound.high) for a, b in zip(lines, found, strict=True))
    return found, error


def within(function: ops.PwluFunction, bound: Bound, bends: int) -> bool:
    """Whether no channel needs more bends than that; told by the first that does."""
    many = zip(polylines(function), allowance(function, bound), strict=True)
    return all(fewest_segments(line, float(eps), bound.low, bound.high).bends <= bends for line, eps in many)


def _left(node: gs.Node, function: ops.PwluFunction, why: str = "") -> Skip:
    return Skip(
        node.name, f"a learned activation of {function.channels} channels and {function.intervals + 2} pieces{why}"
    )


def _to_relu(graph: gs.Graph, node: gs.Node, function: ops.PwluFunction, bound: Bound) -> str | None:
    """Make it a Relu where every channel is one within the bound."""
    errors = np.array([largest_error(line, _RELU, bound.low, bound.high) for line in polylines(function)])
    if not (errors <= allowance(function, bound)).all():
        return None
    become(graph, node, lambda data, result: [gs.Node("Relu", node.name, inputs=[data], outputs=[result])])
    return f"ReLU, {dataclasses.replace(bound, eps=float(errors.max()))}"


def _to_prelu(
    graph: gs.Graph, node: gs.Node, function: ops.PwluFunction, bound: Bound, pinned: set[str], names: Names
) -> str | Skip:
    """Make it a PRelu where every channel has two pieces and the layer before it takes scale and shift."""
    if not within(function, bound, 1):
        return _left(node, function)
    lines, error = fewest(function, bound)
    form = _prelu(lines)
    if form is None:
        return _left(node, function, f"; 2 are enough {bound}, but a right one does not rise")
    if not _foldable(node, pinned):
        return _left(node, function, f"; 2 are enough {bound}, but no layer before it takes the scale and shift")
    shape = along(node, function.channels)
    if shape is None:
        return _left(node, function, f"; 2 are enough {bound}, but the rank of its input is not known")
    become(graph, node, lambda data, result: _prelu_nodes(node.name, data, result, form, shape, names))
    return f"PReLU with scale and shift in its neighbours, {dataclasses.replace(bound, eps=error)}"


@dataclasses.dataclass(frozen=True)
class _Prelu:
    """``b PRelu_s(x - t) + c`` for each channel, all ``(C,)``."""

    slope: Array
    scale: Array
    shift: Array
    offset: Array


def _prelu(lines: Sequence[Polyline]) -> _Prelu | None:
    """Two pieces or one of each channel as PReLU; None where a right piece does not rise."""
    scale = np.array([line.slope_right for line in lines])
    if not (scale > 0).all():
        return None
    left = np.array([line.slope_left for line in lines])
    shift = np.array([line.breaks[0] for line in lines])
    offset = np.array([line.values[0] for line in lines])
    return _Prelu(left / scale, scale, shift, offset)


def _foldable(node: gs.Node, pinned: set[str]) -> bool:
    """Whether the layer before a node can take a factor and an offset for each channel."""
    data = node.inputs[0]
    producer = data.inputs[0] if len(data.inputs) == 1 else None
    return (
        producer is not None
        and producer.op in _LAYERS
        and len(data.outputs) == 1
        and data.name not in pinned
        and all(isinstance(tensor, gs.Constant) for tensor in producer.inputs[1:])
    )


def along(node: gs.Node, channels: int) -> tuple[int, ...] | None:
    """Shape that spreads (C,) along the channel axis; None where it takes the rank and that is not known."""
    axis, shape = ops.channel_axis(node), node.inputs[0].shape
    if channels == 1:
        return (1,)
    if axis >= 0:
        if shape is None:
            return None
        axis -= len(shape)
    return (channels, *(1,) * (-axis - 1))


def _prelu_nodes(
    title: str, data: gs.Tensor, result: gs.Tensor, form: _Prelu, shape: tuple[int, ...], names: Names
) -> list[gs.Node]:
    """``x -> Mul -> Add -> PRelu -> Add``, without what would change nothing."""
    dtype = data.dtype or np.float32
    steps: list[tuple[str, Array]] = []
    if (form.scale != 1).any():
        steps.append(("Mul", form.scale))
    if (form.shift != 0).any():
        steps.append(("Add", -form.scale * form.shift))
    steps.append(("PRelu", form.slope))
    if (form.offset != 0).any():
        steps.append(("Add", form.offset))
    nodes, here = [], data
    for number, (op, values) in enumerate(steps):
        last = number == len(steps) - 1
        name = title if op == "PRelu" else f"{title}/{'after' if last else 'before'}/{op}"
        out = result if last else gs.Variable(names.new(f"{name}/out"), dtype=data.dtype, shape=data.shape)
        constant = names.constant(f"{name}/constant", np.asarray(values.reshape(shape), dtype))
        nodes.append(gs.Node(op, name, inputs=[here, constant], outputs=[out]))
        here = out
    return nodes


def become(graph: gs.Graph, node: gs.Node, make: Callable[[gs.Tensor, gs.Tensor], list[gs.Node]]) -> None:
    """Put the nodes that ``make(input, output)`` gives in the place of a node of one live input."""
    place = next(index for index, other in enumerate(graph.nodes) if other is node)
    data, result = node.inputs[0], node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    graph.nodes[place : place + 1] = make(data, result)
