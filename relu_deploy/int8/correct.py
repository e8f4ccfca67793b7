"""Weights and biases corrected for what INT8 does to their layers, on samples: layer after layer, as the data flows.

A layer is given the inputs that the quantised network really makes, with all layers before it corrected, and is to give
what the float network gives. Its codes are chosen together and its bias takes up the mean error
(:mod:`relu_deploy.int8.rounding`); for each output channel the correction is kept only where it is better on samples
that it was not chosen on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from calib.batches import batches
from calib.errors import message_of
from calib.inputs import model_inputs
from calib.progress import Progress
from calib.runtime import RUNTIME_ERRORS
from relu_deploy import graph as files
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.heads import heads
from relu_deploy.int8.outcome import Outcome
from relu_deploy.int8.rounded import bias_name, nearest, rounded_model, weight_name
from relu_deploy.int8.rounding import Choice, Rows, best_choice, choose_codes, errors_of
from relu_deploy.int8.settle import offset_error
from relu_deploy.int8.store import Stored, integer_bias, layer_operands, weight_axis
from relu_deploy.int8.walk import Walk
from relu_deploy.int8.windows import Windows, as_matrix, from_matrix, windows_of
from relu_deploy.int8.write import activation_grids

Array = npt.NDArray[Any]
# What is learned from, and what judges it. With fewer, a third judges; with very few, all do both. A comparison of
# outputs costs one run for each sample, and takes as many of those that nothing was learned from as there are.
LEARNED, JUDGED, COMPARED = 16, 8, 32
_FEWEST = 6
# Rows of a layer's input, over all samples; and the numbers they may hold.
_ROWS, _NUMBERS = 8192, 1 << 24
# Second moments of more inputs than this take more than a GiB: such a layer gets a bias, and the nearest codes.
_WIDEST = 4608
# Steps that an int32 bias may move by: far from overflow with the 30 bits that it may have before.
_BIAS_ROOM = 1 << 29
# Bytes of activations that may be held, and the networks that hold them: float, plain and three ways of correcting.
_HELD, _NETWORKS = 1 << 31, 5


@dataclasses.dataclass(frozen=True)
class Corrected:
    """One layer.

    Attributes:
        layer: Its node.
        before_db: Signal over noise of its output in the INT8 network with nearest codes, on samples that judge.
        after_db: The same with everything up to this layer corrected.
        rounded: Output channels that got other codes than the nearest.
        shifted: Output channels that got another bias.
    """

    layer: str
    before_db: float | None
    after_db: float | None
    rounded: int
    shifted: int


@dataclasses.dataclass(frozen=True)
class Correction:
    """What correcting did.

    Attributes:
        learned: Samples that corrections were chosen on.
        judged: Samples that they were judged on, layer by layer; the same ones where there are too few.
        compared: Samples that outputs were compared on.
        before_db: Signal over noise of the worst output before, on the samples compared.
        after_db: After.
        used: Whether the corrections are in the file: only where they made no output worse.
        layers: In the order of the network.
    """

    learned: int
    judged: int
    compared: int
    before_db: float
    after_db: float
    used: bool
    layers: tuple[Corrected, ...]

    @property
    def reached_db(self) -> float:
        """What is in the file, as far as it was measured."""
        return self.after_db if self.used else self.before_db


def correct(draft: Draft, evidence: Evidence) -> tuple[dict[str, Stored], Correction]:
    """Choose codes and biases of every INT8 layer.

    Args:
        draft: The network. Not changed.
        evidence: Samples; the first few are used.

    Returns:
        Layer -> what is to be stored of it; and what was done.

    Raises:
        QuantizationError: the network does not run, or there are no samples.
    """
    try:
        return _Pass(draft, evidence).run(evidence.progress)
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the network does not run in pieces: {message_of(error)}") from error


@dataclasses.dataclass
class _Way:
    """One way of correcting, on its way through the network.

    Attributes:
        walk: The network, corrected up to where it is.
        stored: Of every layer, what is stored.
        rounding: Whether codes are chosen together.
        shifting: Whether biases are changed.
        layers: What was done.
    """

    walk: Walk
    stored: dict[str, Stored]
    rounding: bool
    shifting: bool
    layers: list[Corrected] = dataclasses.field(default_factory=list)


class _Pass:
    """The networks on their way: float, INT8 as it is, and INT8 corrected in several ways."""

    def __init__(self, draft: Draft, evidence: Evidence) -> None:
        self.draft, self.heads = draft, heads(draft)
        nodes = {node.name: node for node in draft.graph.nodes}
        self.grids = activation_grids(draft.placement, draft.bounds, draft.number)
        self.plain = {name: _with_bias(nodes[name], stored) for name, stored in nearest(draft).items()}
        exact = files.export_graph(self.heads.graph, draft.source)
        rounded = rounded_model(draft, self.heads.graph, self.plain)
        specs = model_inputs(exact)
        given = [dict(one.feeds) for one in batches(evidence.first(LEARNED + COMPARED), specs, batch_size=1)]
        if not given:
            raise QuantizationError("there is no sample to correct the weights on")
        feeds = given[: LEARNED + JUDGED]
        self.layers = [node for node in self.heads.graph.nodes if node.name in draft.placement.chosen]
        feeds = feeds[: _affordable(exact, feeds[0], [node.inputs[0].name for node in self.layers])]
        held = min(JUDGED, len(feeds) // 3) if len(feeds) >= _FEWEST else 0
        self.learned = range(len(feeds) - held)
        self.judged = range(len(feeds) - held, len(feeds)) if held else self.learned
        unseen = given[len(self.learned) :][:COMPARED]
        compared = unseen if held or len(unseen) >= _FEWEST else feeds
        self.outcome = Outcome(self.heads, exact, compared, len(self.judged))
        self.exact, self.walk = Walk(exact, feeds), Walk(rounded, feeds)
        self.ways = [
            _Way(Walk(rounded, feeds), dict(self.plain), rounding, shifting)
            for rounding, shifting in ((True, True), (False, True), (True, False))
        ]
        self.reads = {node.name: node.input[0] for node in rounded.graph.node}

    def run(self, progress: Progress) -> tuple[dict[str, Stored], Correction]:
        for number, node in enumerate(self.layers):
            if (windows := windows_of(node)) is not None:
                self._layer(node, windows, number)
            progress("correct weights", number + 1, len(self.layers))
        versions = [self.plain, *(way.stored for way in self.ways)]
        reached = []
        for number, stored in enumerate(versions):
            model = rounded_model(self.draft, self.heads.graph, stored)
            reached.append(self.outcome.worst_db(model))
            progress("compare corrections", number + 1, len(versions))
        before, after = reached[0], max(reached[1:])
        best = self.ways[reached.index(after, 1) - 1]
        report = Correction(
            len(self.learned), len(self.judged), self.outcome.samples, before, after, after > before, tuple(best.layers)
        )
        return (self._changed(best) if report.used else {}), report

    def _layer(self, node: gs.Node, windows: Windows, number: int) -> None:
        plain = self.plain[node.name]
        weight = as_matrix(node, layer_operands(node)[0], windows.groups).astype(np.float64)
        codes = as_matrix(node, plain.codes, windows.groups).astype(np.int64)
        scale = np.broadcast_to(plain.scales.astype(np.float64).reshape(-1), (weight[..., 0].size,))
        scale = scale.reshape(weight.shape[:2])
        width = weight.shape[0] * weight.shape[2]
        centre = self.draft.centres.get(node.name)
        # A settled bias makes up for what was taken off the input: errors are those on the input as it was.
        moved = _by_column(centre, windows)

        def rows(walk: Walk, name: str, samples: Sequence[int]) -> tuple[npt.NDArray[np.float32], tuple[int, ...]]:
            values = walk.fetch(name)
            most = -(-min(_ROWS, max(_NUMBERS // width, 1)) // len(samples))
            read = [windows.rows(values[at], most, number) for at in samples]
            return (np.concatenate(read, axis=1) + moved).astype(np.float32), tuple(part.shape[1] for part in read)

        data, read = node.inputs[0].name, self.reads[node.name]
        (learned, counts), (judged, tallies) = (
            rows(self.exact, data, samples) for samples in (self.learned, self.judged)
        )
        options = [codes]
        if weight.shape[2] <= _WIDEST:
            seen, _ = rows(self.walk, read, self.learned)
            options.append(choose_codes(weight, scale, seen, counts, self.draft.number.weight_max))
        none = np.zeros(scale.shape)
        power = float(errors_of(weight, 0 * weight, none, Rows(judged, judged, tallies))[0].sum())
        plainly, _ = errors_of(
            weight, codes * scale[..., None], none, Rows(judged, rows(self.walk, read, self.judged)[0], tallies)
        )
        before = sqnr_db(power, float(plainly.sum()))
        for way in self.ways:
            best = best_choice(
                weight, scale, options if way.rounding else options[:1],
                Rows(learned, rows(way.walk, read, self.learned)[0] if way.shifting else learned, counts),
                Rows(judged, rows(way.walk, read, self.judged)[0], tallies),
                self._room(node) if way.shifting else 0.0,
            )  # fmt: skip
            _keep(way, node, best, centre)
            rounded, shifted = int((best.codes != codes).any(axis=2).sum()), int((best.offset != 0).sum())
            after = sqnr_db(power, float(best.error.sum()))
            way.layers.append(Corrected(node.name, before, after, rounded, shifted))

    def _room(self, node: gs.Node) -> float:
        """How far a bias may move, in steps of the weights; 0 where the layer has none of its own."""
        if self.plain[node.name].bias is None:
            return 0.0
        return self.grids[node.inputs[0].name].scale * _BIAS_ROOM if integer_bias(node, self.draft.number) else np.inf

    def _changed(self, way: _Way) -> dict[str, Stored]:
        """What to store; a layer whose bias stayed 0 where it had none gets none."""
        given = {node.name: layer_operands(node)[1] for node in self.draft.graph.nodes if node.name in way.stored}
        return {
            name: dataclasses.replace(stored, bias=None)
            if given[name] is None and stored.bias is not None and not stored.bias.any()
            else stored
            for name, stored in way.stored.items()
        }


def _affordable(exact: onnx.ModelProto, feed: Mapping[str, Array], tensors: Iterable[str]) -> int:
    """How many samples can be on their way through all networks at once."""
    walk, most = Walk(exact, [feed]), 1
    for name in tensors:
        walk.fetch(name)
        most = max(most, walk.held)
    return max(_HELD // (_NETWORKS * most), 1)


def _keep(way: _Way, node: gs.Node, best: Choice, centre: npt.NDArray[np.float64] | None) -> None:
    """Put what was chosen into the network on its way, for the layers behind."""
    plain = way.stored[node.name]
    stored = dataclasses.replace(plain, codes=from_matrix(node, best.codes, plain.codes).astype(np.int8))
    if plain.bias is not None:
        bias = plain.bias + best.offset.reshape(-1)
        if centre is not None:  # it was settled for the codes as they were
            bias = bias + offset_error(node, stored.weight, centre) - offset_error(node, plain.weight, centre)
        bias = bias.astype(plain.bias.dtype)
        stored = dataclasses.replace(stored, bias=bias)
        way.walk.replace(bias_name(node.name), bias)
    way.walk.replace(weight_name(node.name), stored.weight)
    way.stored[node.name] = stored


def _by_column(centre: npt.NDArray[np.float64] | None, windows: Windows) -> npt.NDArray[np.float64]:
    """What was taken off each column of a layer's rows, ``(groups, 1, K)``; 0 where nothing was."""
    if centre is None:
        return np.zeros((1, 1, 1))
    return centre.reshape(windows.groups, 1, -1).repeat(math.prod(windows.kernel), axis=2)


def _with_bias(node: gs.Node, stored: Stored) -> Stored:
    """The same with a bias of zeros where a layer has none but could have one."""
    free = len(node.inputs) < 3 or node.inputs[2].is_empty()
    if stored.bias is not None or node.op == "MatMul" or not free:
        return stored
    size = node.inputs[1].values.shape[weight_axis(node) or 0]
    return dataclasses.replace(stored, bias=np.zeros(size, node.inputs[1].values.dtype))
