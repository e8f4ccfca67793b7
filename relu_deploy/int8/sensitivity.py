"""Which layers lose the most by INT8: each alone is switched to INT8, and the outputs are compared.

The network is built once, with a switch at every place that is rounded (:mod:`relu_deploy.int8.switched`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import onnx_graphsurgeon as gs

from calib.errors import message_of
from calib.progress import Progress
from calib.runtime import RUNTIME_ERRORS
from relu_deploy.errors import CheckFailedError, QuantizationError
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.drift import COLLAPSE_DB, OutputDrift
from relu_deploy.int8.evidence import GOOD_DB, Evidence
from relu_deploy.int8.switched import Switched

# Samples that layers are ranked by, few enough for minutes at most; and those that decide how many stay in float.
RANKING, DECIDING = 4, 8
# At most this part of the linear layers with weights is left in float without being asked to.
MOST_FLOAT = 0.1
# And this part where outputs would have less than the floor otherwise, which is refused.
MOST_TO_SAVE = 0.5
# Layers named by an error.
_NAMED = 3
# Few samples and no integer kernels: predictions were seen to be up to 3.4 dB better than the file that was written.
DOUBT_DB = 4.0
# Decibels that a layer left in float is to bring: it computes slower.
_WORTH_DB = 0.25
_SWITCHES = "relu_deploy/switches"


@dataclasses.dataclass(frozen=True)
class Damage:
    """What INT8 does to the outputs where only one layer has it.

    Attributes:
        layer: Its node.
        sqnr_db: Signal over noise of the worst output, the layer's weights and the tensors it reads and makes rounded.
    """

    layer: str
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """Layers by the damage that INT8 does to them.

    Attributes:
        samples: How many were compared.
        before_db: Signal over noise of the worst output with all layers INT8.
        after_db: The same with those in ``kept`` in float.
        layers: Worst first; empty where the outputs are good and nobody asked.
        kept: Layers to leave in float.
    """

    samples: int
    before_db: float
    after_db: float
    layers: tuple[Damage, ...] = ()
    kept: tuple[str, ...] = ()


def aim_of(evidence: Evidence) -> float:
    """Signal over noise, decibels, from which on outputs need no help."""
    return max(GOOD_DB, evidence.floor_db + DOUBT_DB)


def measure_sensitivity(draft: Draft, evidence: Evidence) -> Sensitivity:
    """Measure what INT8 does to the outputs; where it does harm, rank the layers and choose those to leave in float.

    Harm is less than ``GOOD_DB`` at an output. Layers are then left in float, a tenth of them at most, worst first:
    those that do such harm alone, and others as long as each is worth its time.

    Args:
        draft: The network. Not changed.
        evidence: Samples, of which the first few are used; and what is asked for.

    Raises:
        QuantizationError: the network does not run.
    """
    aim = aim_of(evidence)
    try:
        switched = Switched(draft, evidence.first(DECIDING))
        before = switched.sqnr(switched.without(()), DECIDING)
        if before >= aim and not evidence.rank and not evidence.keep_worst:
            return Sensitivity(switched.samples, before, before)
        found = _ranked(switched, draft, evidence.progress)
        kept, after = _kept(switched, found, before, aim, draft, evidence.keep_worst)
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the network does not run with switches: {message_of(error)}") from error
    return Sensitivity(switched.samples, before, after, tuple(found), tuple(kept))


def enough_floats(draft: Draft, found: Sensitivity, evidence: Evidence) -> Sensitivity | None:
    """The fewest layers in float, worst first, with which the outputs are clear of the floor; None: half are too few.

    Some networks have a few layers that no 8-bit code bears, such as a spectrum of sound computed by convolutions.

    Args:
        draft: The network. Not changed.
        found: Its layers by damage.
        evidence: Samples, and the floor.
    """
    ranked, weighted = [damage.layer for damage in found.layers], _with_weights(draft)
    most = int(MOST_TO_SAVE * weighted) - (weighted - len(ranked))
    try:
        switched = Switched(draft, evidence.first(DECIDING))
        for count in range(len(found.kept) + 1, most + 1):
            after = switched.sqnr(switched.without(ranked[:count]), DECIDING)
            if after >= evidence.floor_db + DOUBT_DB:
                return dataclasses.replace(found, kept=tuple(ranked[:count]), after_db=after)
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the network does not run with switches: {message_of(error)}") from error
    return None


def _ranked(switched: Switched, draft: Draft, progress: Progress) -> list[Damage]:
    """Every INT8 layer by what it does alone, worst first."""
    layers = [layer.name for layer in draft.placement.layers if layer.name in draft.placement.chosen]
    found = []
    for index, name in enumerate(layers):
        found.append(Damage(name, switched.sqnr(switched.of_layer(name), RANKING)))
        progress("rank layers", index + 1, len(layers))
    return sorted(found, key=lambda damage: damage.sqnr_db)


def _kept(
    switched: Switched, found: Sequence[Damage], before: float, aim: float, draft: Draft, least: int
) -> tuple[list[str], float]:
    """Layers to leave in float, at least ``least``, and signal over noise of the worst output then.

    Those that alone leave less than what is aimed at, as many as are allowed: with them it cannot be reached, and
    errors that large do not add up but cover each other, so that nothing is told by taking a few of them away. From
    there on, of all numbers that are allowed, that with the most decibels, less what each layer is to be worth.
    """
    ranked, weighted = [damage.layer for damage in found], _with_weights(draft)
    most = min(max(least, int(MOST_FLOAT * weighted) - (weighted - len(ranked))), len(ranked))
    if before < aim:
        least = max(least, min(most, sum(damage.sqnr_db < aim for damage in found)))
    after = switched.sqnr(switched.without(ranked[:least]), DECIDING) if least else before
    best, reached, value = least, after, after - _WORTH_DB * least
    for count in range(least + 1, most + 1):
        if after >= aim:
            break
        after = switched.sqnr(switched.without(ranked[:count]), DECIDING)
        if after - _WORTH_DB * count > value:
            best, reached, value = count, after, after - _WORTH_DB * count
    return ranked[:best], reached


def refuse_collapse(drift: Iterable[OutputDrift], found: Sensitivity | None, floor_db: float = COLLAPSE_DB) -> None:
    """Raise where an output is worse than it may be.

    Raises:
        CheckFailedError: names the outputs, the worst layers, and what to do.
    """
    bad = [out for out in drift if out.max_abs_error is None or (out.sqnr_db is not None and out.sqnr_db < floor_db)]
    if not bad:
        return
    outputs = ", ".join(f"{o.name} ({'not finite' if o.sqnr_db is None else f'{o.sqnr_db:.1f} dB'})" for o in bad)
    ranked = () if found is None else found.layers[:_NAMED]
    layers = ", ".join(f"{layer.layer} ({layer.sqnr_db:.1f} dB alone)" for layer in ranked)
    raise CheckFailedError(
        f"INT8 destroys the outputs: {outputs}; at least {floor_db:g} dB are asked for"
        + (f". The worst layers: {layers}" if layers else ""),
        hint="check that the calibration data is what the network is fed in use; then keep the worst layers in float "
        "(--keep-float; 'quantize --keep-float N' finds them), or write the file as it is (--allow-collapse)",
    )


def _with_weights(draft: Draft) -> int:
    """How many linear layers have weights: products of two live tensors are float by nature and use up no share."""
    nodes = {node.name: node for node in draft.graph.nodes}
    layers = [nodes[layer.name] for layer in draft.placement.layers if layer.name in nodes]
    return sum(isinstance(node.inputs[1], gs.Constant) for node in layers)
