"""What samples decide right before Q/DQ are written: which layers stay in float, and what is stored of the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from relu_deploy.errors import QuantizationError
from relu_deploy.int8.correct import Correction, correct
from relu_deploy.int8.draft import Draft
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.place import Placement
from relu_deploy.int8.sensitivity import DOUBT_DB, Sensitivity, aim_of, enough_floats, measure_sensitivity
from relu_deploy.int8.store import Stored


@dataclasses.dataclass(frozen=True)
class Decided:
    """What was decided.

    Attributes:
        placement: Where INT8 goes.
        weights: Layer -> what is stored of it, where that is not simply the nearest codes.
        sensitivity: Layers by damage; None where they could not be ranked.
        correction: None where weights were not to be corrected, or could not be.
        warnings: What could not be done, and why.
    """

    placement: Placement
    weights: dict[str, Stored] = dataclasses.field(default_factory=dict)
    sensitivity: Sensitivity | None = None
    correction: Correction | None = None
    warnings: tuple[str, ...] = ()


def decide(draft: Draft, place_again: Callable[[Mapping[str, str]], Placement], evidence: Evidence) -> Decided:
    """Correct the layers; where that is not enough leave the most damaged ones in float, if that helps.

    Much of the damage that a layer does by itself is a mean error, which the biases behind it take up. So layers are
    ranked only where the corrected network is not good, and stay in float only where the network corrected around them
    is not worse for it.

    Args:
        draft: With as many INT8 layers as can be. Not changed.
        place_again: The placement with more layers in float, each with its reason.
        evidence: Samples, and what is asked for.

    Raises:
        QuantizationError: the layers cannot be ranked, and that was asked for.
    """
    whole = _corrected(draft, evidence)
    good = whole.correction is not None and whole.correction.reached_db >= aim_of(evidence)
    if good and whole.correction is not None and not evidence.rank and not evidence.keep_worst:
        done = whole.correction
        return dataclasses.replace(whole, sensitivity=Sensitivity(done.compared, done.before_db, done.before_db))
    try:
        found = measure_sensitivity(draft, evidence)
    except QuantizationError as error:
        if evidence.rank or evidence.keep_worst:
            raise
        told = f"layers were not ranked by damage: {error.message}"
        return dataclasses.replace(whole, warnings=(*whole.warnings, told))
    plain = dataclasses.replace(whole, sensitivity=dataclasses.replace(found, kept=(), after_db=found.before_db))
    if found.kept and not (good and not evidence.keep_worst):
        part = _around(draft, found, place_again, evidence)
        if evidence.keep_worst or _holds(part.correction, whole.correction):
            return _saved(part, draft, place_again, evidence)
    return _saved(plain, draft, place_again, evidence)


def _around(
    draft: Draft, found: Sensitivity, place_again: Callable[[Mapping[str, str]], Placement], evidence: Evidence
) -> Decided:
    """The network corrected around the layers that are to stay in float."""
    damage = {layer.layer: layer.sqnr_db for layer in found.layers}
    reasons = {name: f"INT8 leaves {damage[name]:.1f} dB of the outputs by this layer alone" for name in found.kept}
    part = _corrected(dataclasses.replace(draft, placement=place_again(reasons)), evidence)
    return dataclasses.replace(part, sensitivity=found)


def _saved(
    decided: Decided, draft: Draft, place_again: Callable[[Mapping[str, str]], Placement], evidence: Evidence
) -> Decided:
    """More layers in float, where outputs would be refused otherwise: a file that works is worth more than none."""
    found, done = decided.sensitivity, decided.correction
    if found is None or (found.after_db if done is None else done.reached_db) >= evidence.floor_db + DOUBT_DB:
        return decided
    more = enough_floats(draft, found, evidence) if evidence.floor_db > 0 else None
    if more is None:
        return decided
    told = (
        f"INT8 destroys the outputs with fewer than {len(more.kept)} layers in float (at least {evidence.floor_db:g} "
        "dB are asked for); check that the samples are what the network is fed in use"
    )
    part = _around(draft, more, place_again, evidence)
    return dataclasses.replace(part, warnings=(*part.warnings, told))


def _corrected(draft: Draft, evidence: Evidence) -> Decided:
    if not evidence.correct:
        return Decided(draft.placement)
    try:
        weights, correction = correct(draft, evidence)
    except QuantizationError as error:
        told = f"weights were not corrected on the samples: {error.message}"
        return Decided(draft.placement, warnings=(told,))
    return Decided(draft.placement, weights, correction=correction)


def _holds(part: Correction | None, whole: Correction | None) -> bool:
    """Whether layers in float, worth it before correcting, are still no loss after it.

    What biases mend on samples holds for inputs like these, what floats compute for all; so floats stay unless the
    network without them is better by more than such measurements are off by.
    """
    return part is None or whole is None or part.reached_db > whole.reached_db - DOUBT_DB
