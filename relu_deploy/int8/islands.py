"""A factor for each channel on both shores of a float island, so that one scale for the tensor fits every channel.

HardSwish, GELU, LayerNormalization and gates compute in float between integer layers. ReLU lets factors pass
(:mod:`relu_deploy.int8.fuse`); they do not. But a float island can begin and end with a multiplication by a constant
for each channel, which costs little beside what it already computes:

* what a convolution hands to an island is written as ``x g`` (``g`` is multiplied into its weights and bias, of which
  every output channel has a scale of its own, so nothing is lost) and the island begins with ``1 / g``;
* what an island hands to layers is written as ``y g``, and ``1 / g`` is multiplied into their weights along the input
  channels, which makes the weights of a row uneven where they were even: the factors weigh one against the other, by
  the noise model of :mod:`relu_deploy.int8.fuse_noise`. Where the island ends with arithmetic, ``g`` goes into that.

The network computes the same function, up to float rounding; and no code is spent where an island does not look
(:mod:`relu_deploy.int8.islands_tails`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from calib.ranges import TensorRange
from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_factors import alive_channels, choose_first
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.fuse_terms import second_moments
from relu_deploy.int8.islands_absorb import absorb, times
from relu_deploy.int8.islands_tails import live_range
from relu_deploy.int8.islands_terms import inlet_terms
from relu_deploy.int8.place import Placement
from relu_deploy.passes.edit import Names, RefusedError, set_input
from relu_deploy.passes.linear import Affine, after, before, read_layer, write
from relu_deploy.passes.region import Forest, find_regions
from relu_deploy.report import PassReport, Skip

Bounds = dict[str, tuple[float, float]]
_CODES = 255
# By what part the range of a channel is widened: this over the number of samples, up to that.
_ROOM, _MOST_ROOM = 8, 2


@dataclasses.dataclass(frozen=True)
class Channels:
    """One tensor by channel, ``(C,)`` each.

    Attributes:
        low: Smallest value, tensor units.
        high: Largest value.
        power: Mean square.
    """

    low: Array
    high: Array
    power: Array


def channels_of(measured: TensorRange, samples: int) -> Channels | None:
    """What calibration tells of a tensor by channel; None where it measured no channels.

    The largest value of one channel is seen less surely than that of the whole tensor: the sample after n others
    exceeds it with probability 1 / (n + 1). Room for that makes the steps coarser for all of them, so ranges of
    channels are widened by a part that falls as that probability does, as far as the tensor's own range goes. How much,
    was measured: three trained networks (convolutions with HardSwish, a transformer, a text reader) calibrated with 4
    to 128 samples and tested on others want three times what was seen of 4 samples, and next to nothing of 64. Room
    that falls as slowly as the largest of n values grows, 2 / ln n, wastes codes where samples are many.
    """
    if measured.channel_min is None or measured.channel_max is None:
        return None
    power = second_moments(measured, measured.channel_min.size)
    margin = 1 + min(_ROOM / max(samples, 1), _MOST_ROOM)
    low, high = measured.channel_min.astype(np.float64) * margin, measured.channel_max.astype(np.float64) * margin
    return Channels(np.clip(low, measured.min, measured.max), np.clip(high, measured.min, measured.max), power)


@dataclasses.dataclass(frozen=True)
class Evened:
    """What was done to the islands of a graph.

    Attributes:
        report: Changed: names of the tensors that were scaled, with how many channels. Skipped: those that were not.
        inputs: Layer -> what the channels of its input were multiplied by, ``(C,)``.
    """

    report: PassReport
    inputs: dict[str, Array]


def even_islands(
    graph: gs.Graph, placement: Placement, channels: Mapping[str, Channels], bounds: Bounds, number: NumberFormat
) -> Evened:
    """Give both shores of every float island a factor for each channel, in place.

    Args:
        graph: What ``placement`` was made from, sorted. Sorted again afterwards.
        placement: For ``ort``.
        channels: By tensor name. Tensors that are not in it get no factors.
        bounds: Tensor name -> range of its quantiser; gets those of the new tensors, and loses those of tensors that
            exist as floats only.
        number: The target's format.
    """
    work = _Work(graph, placement, channels, bounds, number)
    changed, skipped, notes = [], [], {}
    for name in [name for name in graph.tensors() if name in placement.uses]:
        try:
            scaled, size = work.outlet(name) if name in placement.coded else work.inlet(name)
        except RefusedError as refused:
            skipped.append(Skip(name, str(refused)))
            continue
        if scaled:
            changed.append(name)
            notes[name] = f"{scaled} of {size} channels scaled"
    graph.toposort()
    return Evened(PassReport("even_islands", tuple(changed), tuple(skipped), notes), work.inputs)


class _Work:
    """The pass while it runs: the graph, what is known of it, and what was found."""

    def __init__(
        self, graph: gs.Graph, placement: Placement, channels: Mapping[str, Channels], bounds: Bounds,
        number: NumberFormat,
    ) -> None:  # fmt: skip
        self.graph, self.placement, self.channels, self.bounds, self.number = graph, placement, channels, bounds, number
        self.names, self.tensors = Names(graph), graph.tensors()
        self.forest: Forest = find_regions(graph)
        self.inputs: dict[str, Array] = {}

    def outlet(self, name: str) -> tuple[int, int]:
        """A convolution's output that only a float island reads; how many channels were scaled, and of how many."""
        tensor = self.tensors[name]
        conv = tensor.inputs[0] if tensor.inputs else None
        if conv is None or conv.name not in self.placement.chosen or conv.op != "Conv":
            raise RefusedError("no integer convolution makes it")
        if self.number.weight_granularity == "tensor":
            raise RefusedError("one weight scale a layer: factors of output channels would make its weights uneven")
        self._refuse_shared(tensor)
        if any(tensor is output for output in self.graph.outputs):
            raise RefusedError("it is an output of the network")
        if any(map(self.placement.takes_codes, tensor.outputs)):
            self._narrow(name)
            raise RefusedError("not only a float island reads it")
        layer, seen = read_layer(conv), self._seen(name)
        if seen.low.size != layer.bias.size:
            raise RefusedError("its channels lie on another axis")
        low, high = live_range(self.forest, tensor, seen.low, seen.high, axis=1 - conv.inputs[1].values.ndim)
        low, high = np.minimum(low, 0), np.maximum(high, 0)
        factors = even_factors(low, high)
        write(layer, after(layer, Affine(factors, np.zeros_like(factors))), self.names, "even")
        inner = self._beside(tensor)
        conv.outputs = [inner]
        self.graph.nodes.append(times(f"{name}/uneven", inner, 1 / factors, layer, tensor, self.names))
        self.bounds[inner.name] = float((low * factors).min()), float((high * factors).max())
        del self.bounds[name]
        return int((factors != 1).sum()), factors.size

    def inlet(self, name: str) -> tuple[int, int]:
        """A float that layers read as codes; how many channels were scaled, and of how many."""
        tensor = self.tensors[name]
        readers = [node for node in tensor.outputs if self.placement.takes_codes(node)]
        if not readers or any(node.name not in self.placement.chosen for node in readers):
            raise RefusedError("an operator without weights reads its codes")
        self._refuse_shared(tensor)
        layers, seen = [read_layer(node) for node in readers], self._seen(name)
        low, high = np.minimum(seen.low, 0), np.maximum(seen.high, 0)
        alive = alive_channels(np.maximum(-low, high))
        low, high, power = (np.where(alive, part, 0) for part in (low, high, seen.power))
        factors = choose_first(inlet_terms(layers, low, high, power, self.number), alive)
        if (factors == 1).all():
            return 0, factors.size
        for layer in layers:
            write(layer, before(layer, Affine(1 / factors, np.zeros_like(factors))), self.names, "even")
            self.inputs[layer.node.name] = factors
        everybody = len(readers) == len(tensor.outputs) and not any(tensor is t for t in self.graph.outputs)
        inner = tensor
        if not (everybody and absorb(tensor, factors, layers[0], self.names)):
            inner = self._beside(tensor)
            self.graph.nodes.append(times(f"{name}/evened", tensor, factors, layers[0], inner, self.names))
            for layer in layers:
                set_input(layer.node, 0, inner)
        self.bounds[inner.name] = float((low * factors).min()), float((high * factors).max())
        return int((factors != 1).sum()), factors.size

    def _narrow(self, name: str) -> None:
        """Spend no codes where what is computed of a tensor, in integers or floats, no longer depends on it."""
        low, high = (np.asarray([bound]) for bound in self.bounds[name])
        first, last = live_range(self.forest, self.tensors[name], low, high)
        self.bounds[name] = float(np.min(first, initial=0)), float(np.max(last, initial=0))

    def _refuse_shared(self, tensor: gs.Variable) -> None:
        if any(tensor.name in group for group in self.placement.groups):
            raise RefusedError("it shares its scale with other tensors")

    def _seen(self, name: str) -> Channels:
        if name not in self.channels:
            raise RefusedError("its range was not measured by channel")
        return self.channels[name]

    def _beside(self, tensor: gs.Variable) -> gs.Variable:
        return gs.Variable(self.names.new(f"{tensor.name}/even"), dtype=tensor.dtype, shape=tensor.shape)


def even_factors(low: Array, high: Array) -> Array:
    """Factors with which each channel fills the codes of one tensor, as far as they all have one zero point.

    Of all zero points that for which the steps of the channels, in their own units, are smallest on geometric mean.

    Args:
        low: Smallest value of each channel, ``(C,)``, not above 0.
        high: Largest, not below 0.

    Returns:
        ``(C,)``; 1 for channels that are dead. The largest is a power of two near 1.

    >>> even_factors(np.array([-1.0, -4.0, 0.0]), np.array([3.0, 12.0, 0.0])).tolist()
    [1.0, 0.25, 1.0]
    """
    alive = alive_channels(np.maximum(-low, high))
    if not alive.any():
        return np.ones(low.size)
    zero = np.arange(_CODES + 1)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        below, above = (np.where(part > 0, part / codes, 0) for part, codes in ((-low, zero), (high, _CODES - zero)))
    steps = np.maximum(below, above)[:, alive]
    with np.errstate(divide="ignore"):
        chosen = steps[int(np.argmin(np.log(steps).sum(axis=1)))]
    factors = np.ones(low.size)
    factors[alive] = chosen.min() / chosen
    return factors
