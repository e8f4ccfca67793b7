"""Channel fusion: per-channel factors moved through what is homogeneous, so that one scale fits all channels.

``relu(s x) = s relu(x)`` for s > 0. The factors are multiplied into the producer's weights and bias and divided out of
the consumers' input channels; between the two every channel then fills the range of the tensor, and a scale for the
tensor acts like a scale for each channel. Factors that are powers of two change exponents only: the float network gives
the same bits before and after.

Source: Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction", arXiv:1906.04721,
for weights; the choice between the activations and the weights is that of :mod:`relu_deploy.int8.fuse_factors`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from calib.choose import Bounds, chosen_bounds
from calib.ranges import Ranges
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_apply import apply_edits, settle
from relu_deploy.int8.fuse_factors import choose_factors
from relu_deploy.int8.fuse_groups import Labels
from relu_deploy.int8.fuse_noise import Array, Numbers, noise
from relu_deploy.int8.fuse_ranges import Extents, followed, scaled_bounds, scaled_ranges
from relu_deploy.int8.fuse_rules import Labelling
from relu_deploy.int8.fuse_shapes import sharp_shapes
from relu_deploy.int8.fuse_terms import build_terms, free_channels
from relu_deploy.report import PassReport, Skip

MODES = ("pow2", "free", "off")
ChannelFusion = Literal["pow2", "free", "off"]
_NAME = "fuse_channels"
_UNSEEN = "its range was not measured by channel"


@dataclasses.dataclass(frozen=True)
class FusionReport:
    """What channel fusion did.

    Attributes:
        mode: ``pow2``, ``free`` or ``off``.
        channels: Output channels of layers that got a factor other than 1.
        groups: Sets of tied channels that did.
        predicted_before: Signal over noise, dB, of the noise of all layers summed up, without fusion, by the model that
            chose the factors; not a measurement. None where there is nothing to predict.
        predicted_after: The same with it.
        layers: Layers whose output channels were scaled, those that were not and why; notes say how many channels.
    """

    mode: str
    channels: int
    groups: int
    predicted_before: float | None
    predicted_after: float | None
    layers: PassReport


@dataclasses.dataclass(frozen=True)
class Fusion:
    """A network with its channels scaled.

    Attributes:
        ranges: Of the network as it is now.
        bounds: Range that each tensor's quantiser is to cover, chosen by the method of the ranges.
        report: What was done.
    """

    ranges: Ranges
    bounds: dict[str, Bounds]
    report: FusionReport


def fuse_channels(graph: gs.Graph, ranges: Ranges, number: NumberFormat, *, mode: str = "pow2") -> Fusion:
    """Scale channels so that one scale for each tensor loses less; edits the graph in place.

    Args:
        graph: Float, sorted, constants folded, tensors with types and shapes as far as they can be inferred.
        ranges: Measured on it. Tensors without a range by channel keep factor 1.
        number: The format that it will be quantised to.
        mode: ``pow2``: the float network stays bit for bit what it was. ``free``: any positive factor, equal up to
            rounding. ``off``: nothing.

    Raises:
        QuantizationError: unknown mode.
    """
    if mode not in MODES:
        raise QuantizationError(f"unknown channel fusion {mode!r}", hint=f"one of {', '.join(MODES)}")
    bounds = chosen_bounds(ranges, unsigned=number.unsigned)
    if mode == "off":
        return Fusion(ranges, bounds, FusionReport(mode, 0, 0, None, None, PassReport(_NAME)))
    with sharp_shapes(graph):
        state = Labelling(graph)
    known, same = followed(graph, state, ranges, bounds)
    _pin_unfollowed(graph, state, ranges, known, same)
    roots, why = state.channels.settle()
    distinct, numbers = np.unique(roots, return_inverse=True)
    free = free_channels(known, np.isin(distinct, list(why)), numbers)
    terms = build_terms(graph, state, ranges, known, number, numbers)
    factors = choose_factors(terms, free, powers_of_two=mode == "pow2")
    if mode == "pow2":
        factors = settle(state.edits, known, _types(graph, known), numbers, factors)
    apply_edits(graph, state.edits, numbers, factors)
    factor_of = {name: factors[numbers[extents.labels]] for name, extents in known.items()}
    factor_of = {name: each for name, each in factor_of.items() if (each != 1).any()}
    scaled = scaled_ranges(ranges, same, factor_of)
    reasons = {int(np.searchsorted(distinct, root)): reason for root, reason in why.items()}
    report = FusionReport(
        mode, sum(int((factors[numbers[layer.outputs]] != 1).sum()) for layer in state.layers),
        int((factors != 1).sum()), _decibels(noise(terms, np.ones(factors.size))), _decibels(noise(terms, factors)),
        _report(state, numbers, factors, free, reasons),
    )  # fmt: skip
    new_bounds = scaled_bounds(scaled, bounds, known, same, factor_of, unsigned=number.unsigned)
    return Fusion(scaled, new_bounds, report)


def _pin_unfollowed(
    graph: gs.Graph, state: Labelling, ranges: Ranges, known: dict[str, Extents], same: dict[str, str]
) -> None:
    """Hold the channels of tensors whose range could not be told afterwards."""
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in ranges.tensors and tensor.name not in known and tensor.name not in same:
                state.pin(tensor, f"the range of {tensor.name} was not measured by these channels")


def _types(graph: gs.Graph, known: dict[str, Extents]) -> dict[str, np.dtype[np.floating]]:
    made = {tensor.name: tensor for node in graph.nodes for tensor in node.outputs}
    return {name: np.dtype(made[name].dtype or np.float32) for name in known}


def _report(
    state: Labelling, numbers: Numbers, factors: Array, free: np.ndarray, reasons: dict[int, str]
) -> PassReport:
    changed, skipped, notes = [], [], {}
    for layer in state.layers:
        ids: Labels = numbers[layer.outputs]
        name, count = layer.node.name, int((factors[ids] != 1).sum())
        if count:
            changed.append(name)
            notes[name] = f"{count} of {ids.size} channels scaled"
        elif not free[ids].any():
            skipped.append(Skip(name, next((reasons[int(i)] for i in ids if int(i) in reasons), _UNSEEN)))
    return PassReport(_NAME, tuple(changed), tuple(skipped), notes)


def _decibels(ratio: float) -> float | None:
    return -10 * math.log10(ratio) if ratio > 0 else None
