"""Freeze the coefficients of a DY-ReLU that calibration saw (almost) constant: ``max_k (a_k x + b_k)``, a and b fixed.

A trained unit may have learned not to be dynamic. Each coefficient goes to the middle of what calibration saw of it;
with radius r around that middle and |x| <= X, the output moves by at most ``max_k (r_a X + r_b)``, channel by channel.
What is left is an ordinary function of x, which the passes after this one make a Relu, a PRelu or a table of; the
network that computed the coefficients is dead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from calib.ranges import Ranges, TensorRange
from relu_deploy.passes.coefficients import STEPS
from relu_deploy.passes.dyrelu import DyReluSite, find_dyrelu
from relu_deploy.passes.edit import Names, RefusedError
from relu_deploy.passes.lines import LAYOUT, axes_of, rank_of
from relu_deploy.passes.region import constant_values
from relu_deploy.report import PassReport, Skip

Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class _Frozen:
    """One coefficient: its middle, as stored, and how far it was ever seen from that; the batch axis has one entry."""

    middle: Array
    radius: Array


@dataclasses.dataclass(frozen=True)
class _Bound:
    """Of one tensor of the unit: largest magnitude, dynamic or frozen, and largest difference between the two."""

    size: Array
    error: Array


@dataclasses.dataclass(frozen=True)
class Folded:
    """One unit that was made static.

    Attributes:
        node: The node that makes its output.
        input: Name of its x.
        output: Name of its output.
        variant: ``A``, ``B`` or ``C``.
        radius: How far its coefficients were ever seen from where they are now.
        bound: Largest error of the output, in its units, while coefficients and x keep to their ranges.
    """

    node: str
    input: str
    output: str
    variant: str
    radius: float
    bound: float

    def __str__(self) -> str:
        return (
            f"DY-ReLU-{self.variant} made static: its coefficients stay within {self.radius:.3g} of their middle; "
            f"off by at most {self.bound:.3g} where they and x keep to their ranges"
        )


def fold_dyrelu(graph: gs.Graph, ranges: Ranges, *, tolerance: float) -> PassReport:
    """Make a DY-ReLU static where that moves its output by at most ``tolerance``.

    Args:
        graph: Sorted topologically, with shapes. Edited in place; the nodes that computed coefficients are left for
            ``cleanup``.
        ranges: Measured on this network: of x, and of the vectors that the coefficients are cut from.
        tolerance: Largest error, in units of the output, >= 0. It is a bound for inputs that keep to the ranges.

    Returns:
        Changed: the nodes that make the output of a unit. Notes: the bound of each. Skipped: the other units, with the
        bound or with what stands in the way.
    """
    return fold_units(graph, ranges, tolerance=tolerance)[0]


def fold_units(graph: gs.Graph, ranges: Ranges, *, tolerance: float) -> tuple[PassReport, tuple[Folded, ...]]:
    """As :func:`fold_dyrelu`, with the figures of what was folded."""
    decided = [_decide(graph, site, ranges, tolerance) for site in find_dyrelu(graph)]
    folded = tuple(item for item in decided if isinstance(item, Folded))
    skipped = tuple(item for item in decided if isinstance(item, Skip))
    notes = {unit.node: str(unit) for unit in folded}
    return PassReport("fold_dyrelu", tuple(notes), skipped, notes), folded


def _decide(graph: gs.Graph, site: DyReluSite, ranges: Ranges, tolerance: float) -> Folded | Skip:
    try:
        return _fold(graph, site, ranges, tolerance)
    except RefusedError as error:
        return Skip(site.name, f"DY-ReLU-{site.variant} stays: {error}")


def _fold(graph: gs.Graph, site: DyReluSite, ranges: Ranges, tolerance: float) -> Folded:
    """Decide on one unit and freeze it."""
    entries = [(node, tensor) for node, tensor in site.entries if tensor is not site.attention]
    frozen = {id(tensor): _freeze(tensor, ranges) for _, tensor in entries}
    bound = float(_bound(site, frozen, ranges).max())
    radius = max(float(part.radius.max()) for part in frozen.values())
    if not bound <= tolerance:
        raise RefusedError(
            f"its coefficients were seen up to {radius:.3g} from their middle, so frozen it would be off by up to "
            f"{bound:.3g}; allowed is {tolerance:.3g}"
        )
    names = Names(graph)
    for node, tensor in entries:
        values = frozen[id(tensor)].middle.astype(_dtype(tensor, site))
        constant = names.constant(f"{tensor.name}/frozen", values)
        node.inputs = [constant if old is tensor else old for old in node.inputs]
    return Folded(site.name, site.input.name, site.output.name, site.variant, radius, bound)


def _dtype(tensor: gs.Tensor, site: DyReluSite) -> np.dtype[np.float64]:
    """Type of a coefficient; where inference does not tell, that of x."""
    found = tensor.dtype if tensor.dtype is not None else site.input.dtype
    if found is None:
        raise RefusedError(f"the type of {tensor.name} is not known")
    kind: np.dtype[np.float64] = np.dtype(found)
    return kind


def _freeze(tensor: gs.Tensor, ranges: Ranges) -> _Frozen:
    """The middle of what was seen of a coefficient."""
    low, high = _interval(tensor, ranges)
    middle = (low + high) / 2
    if rank_of(tensor) not in (None, middle.ndim):
        raise RefusedError(f"the shape of {tensor.name} is not known")
    stored = middle.astype(tensor.dtype).astype(np.float64) if tensor.dtype is not None else middle
    return _Frozen(middle, (high - low) / 2 + np.abs(stored - middle))


def _interval(tensor: gs.Tensor, ranges: Ranges) -> tuple[Array, Array]:
    """Least and largest value of each element: as measured, or by way of the vectors that it is computed from.

    The operators in between are monotone in each element and mix none, so images of extremes are extremes.
    """
    found = _vector_range(tensor, ranges)
    if found is not None:
        return found
    if len(tensor.inputs) != 1:
        raise RefusedError(f"there is no range for each element of {tensor.name}")
    (node,) = tensor.inputs
    live = [side for side in node.inputs if constant_values(side) is None and not side.is_empty()]
    if node.op in ("Add", "Sub") and len(live) == 2:
        (a, b), (c, d) = (_interval(side, ranges) for side in node.inputs)
        return (a + c, b + d) if node.op == "Add" else (a - d, b - c)
    if node.op not in STEPS:
        raise RefusedError(f"there is no range for each element of {tensor.name}")
    ends = [STEPS[node.op](end, node, tensor) for end in _interval(live[0], ranges)]
    return np.minimum(*ends), np.maximum(*ends)


def _vector_range(tensor: gs.Tensor, ranges: Ranges) -> tuple[Array, Array] | None:
    """Extremes of each element, of a tensor that varies along the batch and one more axis."""
    found = ranges.tensors.get(tensor.name)
    if found is None or tensor.shape is None or found.channel_min is None or found.channel_max is None:
        return None
    if any(size != 1 for axis, size in enumerate(tensor.shape) if axis not in (0, found.axis)) or not found.axis:
        return None
    shape = [-1 if axis == found.axis else 1 for axis in range(len(tensor.shape))]
    return found.channel_min.astype(np.float64).reshape(shape), found.channel_max.astype(np.float64).reshape(shape)


def _bound(site: DyReluSite, frozen: dict[int, _Frozen], ranges: Ranges) -> Array:
    """Largest error of the output, shaped to broadcast against it."""
    bounds = {key: _Bound(np.abs(part.middle) + part.radius, part.radius) for key, part in frozen.items()}
    bounds[id(site.input)] = _exact(site.input, ranges, by_channel=True)
    if site.attention is not None:
        bounds[id(site.attention)] = _exact(site.attention, ranges, by_channel=False)
    for node in site.body:
        if node.op in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
            continue  # it only chooses between the two that it compares
        operands = node.inputs[:1] if node.op in (*LAYOUT, "ReduceMax") else node.inputs
        operands = operands[1:] if node.op == "Where" else operands
        bounds[id(node.outputs[0])] = _after(node, [_operand(tensor, bounds) for tensor in operands])
    return bounds[id(site.output)].error


def _exact(tensor: gs.Tensor, ranges: Ranges, *, by_channel: bool) -> _Bound:
    """Of a tensor that freezing does not touch: its range."""
    found = ranges.tensors.get(tensor.name)
    rank = rank_of(tensor)
    if found is None or rank is None:
        raise RefusedError(f"there is no range for {tensor.name}")
    size = _channel_sizes(found, rank) if by_channel else None
    size = np.full((1,) * rank, found.absmax) if size is None else size
    return _Bound(size, np.zeros_like(size))


def _channel_sizes(found: TensorRange, rank: int) -> Array | None:
    """Largest magnitude of each channel, on its axis."""
    if found.axis is None or found.channel_min is None or found.channel_max is None:
        return None
    sizes = np.maximum(np.abs(found.channel_min), np.abs(found.channel_max)).astype(np.float64)
    return sizes.reshape([-1 if axis == found.axis else 1 for axis in range(rank)])


def _operand(tensor: gs.Tensor, bounds: dict[int, _Bound]) -> _Bound:
    if id(tensor) in bounds:
        return bounds[id(tensor)]
    values = constant_values(tensor)
    if values is None:
        raise RefusedError(f"there is no range for {tensor.name}")
    size = np.abs(values.astype(np.float64))
    return _Bound(size, np.zeros_like(size))


def _after(node: gs.Node, parts: list[_Bound]) -> _Bound:
    """Bounds of what a node of the body makes."""
    if node.op in ("Add", "Sub"):
        return _Bound(parts[0].size + parts[1].size, parts[0].error + parts[1].error)
    if node.op == "Mul":
        one, two = parts
        return _Bound(one.size * two.size, one.error * two.size + one.size * two.error)
    if node.op in ("Max", "Where", "Relu", "Identity", "Cast", "Dropout"):
        return _each(parts, lambda *arrays: _largest(arrays))
    if node.op == "Transpose":
        return _each(parts, lambda array: np.transpose(array, node.attrs.get("perm")))
    axes = axes_of(node)
    if axes and node.op == "Unsqueeze":
        return _each(parts, lambda array: np.expand_dims(array, tuple(axes)))
    if axes and node.op == "Squeeze":
        return _each(parts, lambda array: np.squeeze(array, tuple(axes)))
    if axes and node.op == "ReduceMax":
        keep = bool(node.attrs.get("keepdims", 1))
        return _each(parts, lambda array: array.max(tuple(axes), keepdims=keep))
    if node.op == "Concat":
        return _each(parts, lambda *arrays: np.concatenate(np.broadcast_arrays(*arrays), node.attrs["axis"]))
    raise RefusedError(f"no bound is known across {node.op} {node.name}")


def _each(parts: list[_Bound], function: Callable[..., Array]) -> _Bound:
    """Apply it to sizes and to errors."""
    return _Bound(function(*(part.size for part in parts)), function(*(part.error for part in parts)))


def _largest(arrays: tuple[Array, ...]) -> Array:
    result = arrays[0]
    for array in arrays[1:]:
        result = np.maximum(result, array)
    return result
