"""The noise model of a network: the terms of :mod:`relu_deploy.int8.fuse_noise`, from its ranges and weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from calib.histogram import Histogram
from calib.ranges import Ranges, TensorRange
from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_noise import Array, Numbers, Product, Span
from relu_deploy.int8.fuse_ranges import Extents
from relu_deploy.int8.fuse_rules import Labelling, LinearUse
from relu_deploy.int8.granularity import may_share
from relu_deploy.int8.place import MOVING_OPS, place
from relu_deploy.passes.edit import dims, int_values

# Second moment over squared maximum where only the maximum is known: between a Gaussian's 1/9 to 1/20 over as many
# samples as calibration takes and the longer tails of activations.
_MOMENT = 1 / 16
# Of an open axis of an image.
_USUAL_EXTENT = 16
# Behind these a layer's output is a part of a larger signal, or the same one.
_ADDING = ("Add", "Sub", "Sum", "Relu", "Identity", "Dropout")


def build_terms(
    graph: gs.Graph,
    state: Labelling,
    ranges: Ranges,
    known: Mapping[str, Extents],
    number: NumberFormat,
    numbers: Numbers,
) -> list[Span | Product]:
    """Terms of the layers and tensors that will be INT8.

    Args:
        graph: The network.
        state: Its labels.
        ranges: Measured on it.
        known: Extents by channel, by tensor name.
        number: The target's format.
        numbers: Number of the group of each label, ``(labels,)``.
    """
    layers = [layer for layer in state.layers if layer.node.inputs[_data(layer)].name in ranges.tensors]
    signal = [_signal(layer, ranges) for layer in layers]
    gain = np.zeros(int(numbers.max(initial=0)) + 1)
    for layer, power in zip(layers, signal, strict=True):
        energy = (layer.weight.astype(np.float64) ** 2).sum(axis=2)
        if power > 0:
            ids = numbers[np.broadcast_to(layer.inputs, energy.shape)].reshape(-1)
            gain += np.bincount(ids, energy.reshape(-1) / power, gain.size)
    terms: list[Span | Product] = []
    for layer, power in zip(layers, signal, strict=True):
        outputs = numbers[layer.outputs]
        if power > 0:
            weight = _share(gain, outputs)
            weight = np.where(weight > 0, weight, 1 / power)
            terms.append(_product(layer, ranges, number, numbers, weight))
    positions = averaged_positions(graph)
    rounded = [name for name in _quantised(graph, ranges.tensors, number) if name in known]
    tensors, codes = graph.tensors(), 255 if number.unsigned else 127
    spans = []
    for name in rounded:
        room = headroom(values_seen(tensors[name], ranges.tensors[name]), codes)
        spans.append(_span(known[name], number, numbers, gain / positions.get(name, 1), room))
    return terms + [span for span in spans if span.gain.any()]


def _data(layer: LinearUse) -> int:
    """Position of the operand that is no constant."""
    return 1 if isinstance(layer.node.inputs[0], gs.Constant) else 0


def _signal(layer: LinearUse, ranges: Ranges) -> float:
    """Power of the signal that a layer's noise is compared with, summed over channels.

    Of a residual branch that is the sum behind it: noise of a branch that hardly counts hardly counts either. Taken
    from ranges; where there are none, from input and weights.
    """
    powers, queue, seen = [0.0], [layer.node.outputs[0]], set[int]()
    while queue:
        tensor = queue.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if (measured := ranges.tensors.get(tensor.name)) is not None:
            powers.append(float(second_moments(measured, layer.outputs.size).sum()))
        queue += [reader.outputs[0] for reader in tensor.outputs if reader.op in _ADDING]
    if max(powers) > 0:
        return max(powers)
    energy = (layer.weight.astype(np.float64) ** 2).sum(axis=2)
    return float((energy * _energy(layer, ranges)).sum())


def _energy(layer: LinearUse, ranges: Ranges) -> Array:
    """Second moment of each input channel, shape of ``layer.inputs``."""
    rows, columns = layer.inputs.shape
    measured = ranges.tensors[layer.node.inputs[_data(layer)].name]
    groups = int(layer.node.attrs.get("group", 1)) if rows > 1 else 1
    if layer.node.op == "Mul":
        return second_moments(measured, rows).reshape(-1, 1)
    moments = second_moments(measured, groups * columns).reshape(groups, columns)
    return moments.repeat(rows // groups, axis=0) if rows > 1 else moments


def second_moments(measured: TensorRange, channels: int) -> Array:
    """Second moment of each channel, ``(channels,)``: from histograms where there are any, else as maxima tell."""
    low, high, counts = measured.channel_min, measured.channel_max, measured.channel_histograms
    if counts is not None and len(counts) == channels:
        return np.array([_moment(each) for each in counts])
    if low is None or high is None or low.size != channels:
        whole = measured.histogram
        return np.full(channels, _MOMENT * measured.absmax**2 if whole is None else _moment(whole))
    squares = np.maximum(np.abs(low), np.abs(high)).astype(np.float64) ** 2
    if measured.histogram is None or not squares.any():
        return np.asarray(_MOMENT * squares)
    return np.asarray(squares * (_moment(measured.histogram) / squares.mean()))


def _moment(counts: Histogram) -> float:
    """Mean square of what was counted."""
    low, high = counts.edges()
    return float((((low + high) / 2) ** 2 * counts.counts).sum() / max(counts.total, 1))


def _product(layer: LinearUse, ranges: Ranges, number: NumberFormat, numbers: Numbers, weight: Array) -> Product:
    positions = layer.weight.shape[2]
    # A constant factor is rounded with one step whatever the weights of layers have.
    shared = may_share(layer.node, number) or layer.node.op == "Mul"
    return Product(
        numbers[layer.inputs], numbers[layer.outputs],
        np.abs(layer.weight).astype(np.float64).max(axis=2), positions * _energy(layer, ranges),
        weight, number.weight_max, shared,
    )  # fmt: skip


def _span(extents: Extents, number: NumberFormat, numbers: Numbers, gain: Array, room: float) -> Span:
    """A tensor's term; ``room`` is how far each channel is expected to reach, over its maximum in calibration."""
    ids = numbers[extents.labels]
    below, above = (np.minimum(reach * room, reach.max()) for reach in (-extents.low, extents.high))
    return Span(ids, below, above, _share(gain, ids), 255 if number.unsigned else 127, not number.unsigned)


def headroom(seen: float, codes: int) -> float:
    """How far beyond its largest measured value a channel should be covered.

    The largest of n values is exceeded by the next one with probability 1/n. With an exponential tail that goes on as
    it came, ``tau = M / ln n``, covering M + k tau leaves ``2 tau^2 exp(-k) / n`` of clipping noise; k is where that is
    as small as the rounding noise ``(M / codes)^2 / 12``. For many values M itself is far enough.

    Args:
        seen: How many values of the channel were measured.
        codes: Steps that cover M.

    >>> [round(headroom(n, 127), 1) for n in (24, 256, 100_000)]
    [3.3, 1.7, 1.0]
    """
    log = math.log(max(seen, 3.0))
    return 1 + max(0.0, -math.log(seen * log**2 / (24 * codes**2))) / log


def values_seen(tensor: gs.Tensor, measured: TensorRange) -> float:
    """How many independent values of each channel calibration saw; neighbours in an image are far from independent."""
    shape, axis = dims(tensor) or (), measured.axis
    positions = [_USUAL_EXTENT if size is None else size for at, size in enumerate(shape) if at not in (0, axis)]
    return float(measured.count * math.prod(positions) ** 0.5)


def averaged_positions(graph: gs.Graph) -> dict[str, int]:
    """Over how many positions the network takes the mean of a tensor, whatever way its values go to the outputs.

    Rounding noise of activations is another at each position and goes down with their number; noise of weights is the
    same at all of them and does not. Tensors that reach an output in another way, or of unknown extents, have no entry.
    """
    pooled: dict[int, bool] = {id(tensor): False for tensor in graph.outputs}
    found = {}
    for node in reversed(graph.nodes):
        for tensor in node.outputs:
            ways = [
                _pools_all(reader) or all(pooled.get(id(made), False) for made in reader.outputs)
                for reader in tensor.outputs
            ]
            pooled[id(tensor)] = bool(ways) and all(ways) and pooled.get(id(tensor), True)
            shape = dims(tensor)
            if pooled[id(tensor)] and shape is not None and len(shape) > 2 and None not in shape[2:]:
                found[tensor.name] = int(np.prod([size for size in shape[2:] if size]))
    return found


def _pools_all(node: gs.Node) -> bool:
    """Whether a node takes the mean over all positions of (N, C, ...)."""
    if node.op != "ReduceMean":
        return bool(node.op == "GlobalAveragePool")
    shape, axes = dims(node.inputs[0]), int_values(node, "axes", 1)
    return shape is not None and axes is not None and {a % len(shape) for a in axes} >= set(range(2, len(shape)))


def _share(gain: Array, ids: Numbers) -> Array:
    """Gain of each channel; where several have one number, their part of it."""
    return np.asarray(gain[ids] / np.bincount(ids, minlength=gain.size)[ids])


def _quantised(graph: gs.Graph, measured: Iterable[str], number: NumberFormat) -> list[str]:
    """Names of tensors that are rounded with a step of their own."""
    placement = place(graph, measured, number)
    made = {tensor.name: node for node in graph.nodes for tensor in node.outputs}
    moved = {name for group in placement.groups for name in group if name in made and made[name].op in MOVING_OPS}
    return [name for name in placement.uses if name not in moved]


def free_channels(
    known: Mapping[str, Extents], pinned: npt.NDArray[np.bool_], numbers: Numbers
) -> npt.NDArray[np.bool_]:
    """Channels that are not pinned and were seen alive, ``(groups,)``."""
    alive = np.zeros(pinned.size, dtype=bool)
    for extents in known.values():
        alive[numbers[extents.labels[extents.top > 0]]] = True
    return alive & ~pinned
