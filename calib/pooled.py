"""Extremes that the runtime takes itself, of activations that it keeps in blocks of channels.

As an output a tensor would be put back in the order of the file and kept to the end of the run. So it is reduced where
it lies, as soon as it is made, by operators that the runtime knows in its own layout: GlobalMaxPool gives the largest
value of a plane, and of the negated plane the smallest (BatchNormalization with a scale of -1; a plain Neg would put it
back in order first). It passes NaN over, which GlobalAveragePool hands on. All numbers of a run are one output of shape
``(N, 3 * channels, 1, 1)``: maxima, negated minima, means.

Nothing of that moves a bit of a tensor, and none that is measured so can be fused away, since four operators read it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from calib.graph import unused_prefix
from calib.model import STANDARD_DOMAINS, opset

# From this version on BatchNormalization has the attributes that are given here.
_LEAST_OPSET = 7
# What gives other last bits in blocks.
_ADD_AS_LAID_OUT = ("BatchNormalization", "GlobalAveragePool")
_Floats = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Pooling:
    """A network that hands out the extremes of some tensors.

    Attributes:
        model: The network with the operators in it.
        made: What the operators give; the last is the output described above. A stage may end after each of them.
        channels: Of each tensor, in the order of that output.
    """

    model: onnx.ModelProto
    made: tuple[str, ...]
    channels: Mapping[str, int]


def with_pooling(model: onnx.ModelProto, channels: Mapping[str, int], planes: Container[str]) -> Pooling | None:
    """Let a network pool tensors; None where there are none, or its operators have no such attributes.

    Args:
        model: The network.
        channels: Of the tensors (N, C, H, W).
        planes: All of its float32 tensors of four axes.
    """
    if not channels or opset(model) < _LEAST_OPSET:
        return None
    prefix = unused_prefix(model)
    places = {name: f"{prefix}/{place}" for place, name in enumerate(channels)}
    nodes, added = list[onnx.NodeProto](), list[onnx.NodeProto]()
    for place, node in enumerate(model.graph.node):
        if node.op_type in _ADD_AS_LAID_OUT and node.domain in STANDARD_DOMAINS and node.input[0] in planes:
            nodes += _settled(node, f"{prefix}/{place}/settled")
        else:
            nodes.append(node)
        # Next to what makes it: a network that is cut into stages is cut between its nodes.
        for name in channels.keys() & set(node.output):
            pools = _pools(name, places[name], f"{prefix}/of {channels[name]}")
            nodes += pools
            added += pools
    parts = [f"{place}/{what}" for what in ("high", "low", "mean") for place in places.values()]
    added.append(helper.make_node("Concat", parts, [f"{prefix}/all"], axis=1))
    pooling = onnx.ModelProto()
    pooling.CopyFrom(model)
    del pooling.graph.node[:]
    pooling.graph.node.extend((*nodes, added[-1]))
    for count in sorted(set(channels.values())):
        for what, value in (("minus", -1), ("zero", 0), ("one", 1)):
            constant = numpy_helper.from_array(np.full(count, value, np.float32), f"{prefix}/of {count}/{what}")
            pooling.graph.initializer.append(constant)
    return Pooling(pooling, tuple(name for node in added for name in node.output), dict(channels))


def _settled(node: onnx.NodeProto, name: str) -> tuple[onnx.NodeProto, onnx.NodeProto]:
    """The node, and before it a pool of single elements, which changes none.

    The runtime computes this node in blocks where it is given blocks, and a pool of known channels always: so the
    layout, and with it the order of a sum, is the same whatever comes before the two in their stage. Nobody tells
    :mod:`calib.stages` the type of what is between them, so no stage ends there.
    """
    follows = onnx.NodeProto()
    follows.CopyFrom(node)
    follows.input[0] = name
    return helper.make_node("MaxPool", [node.input[0]], [name], kernel_shape=[1, 1]), follows


def _pools(name: str, prefix: str, constants: str) -> list[onnx.NodeProto]:
    """The operators that reduce one tensor."""
    zero, one = f"{constants}/zero", f"{constants}/one"
    turned = [name, f"{constants}/minus", zero, zero, one]
    return [
        helper.make_node("GlobalMaxPool", [name], [f"{prefix}/high"]),
        helper.make_node("BatchNormalization", turned, [f"{prefix}/turned"], epsilon=0.0),
        helper.make_node("GlobalMaxPool", [f"{prefix}/turned"], [f"{prefix}/low"]),
        helper.make_node("GlobalAveragePool", [name], [f"{prefix}/mean"]),
    ]


class Extremes:
    """Extremes by channel of all pooled tensors; several threads may update them.

    Args:
        channels: Of each tensor, in the order of the pooled output.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        ends = np.cumsum(list(channels.values())).tolist()
        self._parts = {name: slice(end - channels[name], end) for name, end in zip(channels, ends, strict=True)}
        self._lock = threading.Lock()
        self._found: _Floats | None = None
        self._samples = 0

    def update(self, pooled: NDArray[Any], samples: int) -> None:
        """Take in one run: ``(N, 3 * channels, 1, 1)``, of which the means say nothing about extremes."""
        found = pooled.reshape(len(pooled), 3, -1)[:, :2].max(axis=0)
        with self._lock:
            self._samples += samples
            self._found = found if self._found is None else np.maximum(self._found, found)

    def not_finite(self, pooled: NDArray[Any]) -> list[str]:
        """Tensors of which an extreme of a run is not finite, whatever their means are."""
        bad = ~np.isfinite(pooled.reshape(len(pooled), 3, -1)[:, :2]).all(axis=(0, 1))
        return [name for name, part in self._parts.items() if bad[part].any()]

    def taken(self) -> tuple[int, dict[str, tuple[_Floats, _Floats]]]:
        """Samples, and smallest and largest values ``(C,)`` by tensor, since this was last asked for."""
        with self._lock:
            found, samples = self._found, self._samples
            self._found, self._samples = None, 0
        if found is None:
            return 0, {}
        # 0.0 is added for a sign of zero that does not depend on the order of samples.
        low, high = -found[1] + np.float32(0), found[0] + np.float32(0)
        return samples, {name: (low[part], high[part]) for name, part in self._parts.items()}
