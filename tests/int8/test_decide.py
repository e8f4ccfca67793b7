"""Correct first; layers stay in float only where that is not enough, and the network corrected around them no worse."""

import dataclasses

import pytest

from relu_deploy.errors import QuantizationError
from relu_deploy.int8 import decide as module
from relu_deploy.int8.correct import Correction
from relu_deploy.int8.evidence import GOOD_DB, Evidence
from relu_deploy.int8.sensitivity import DOUBT_DB, Damage, Sensitivity


@dataclasses.dataclass(frozen=True)
class FakeDraft:
    """As much of a draft as deciding looks at."""

    placement: frozenset[str] = frozenset()


def decided(monkeypatch, whole, part, *, kept=("worst",), **options):
    """Decide where the corrected network has ``whole`` decibels, and ``part`` with layers in float."""
    ranked = []

    def correct(draft, _):
        after = part if draft.placement else whole
        return {"layer": after}, Correction(16, 8, 8, 5.0, after, after > 5.0, ())

    def measure(draft, _):
        ranked.append(draft)
        return Sensitivity(8, 5.0, 20.0, tuple(Damage(name, 7.0) for name in kept), tuple(kept))

    monkeypatch.setattr(module, "correct", correct)
    monkeypatch.setattr(module, "measure_sensitivity", measure)
    return module.decide(FakeDraft(), frozenset, Evidence([], **options)), bool(ranked)


def test_a_good_network_is_not_ranked(monkeypatch):
    found, ranked = decided(monkeypatch, GOOD_DB, 60.0)
    assert not ranked
    assert found.placement == frozenset()
    assert found.weights == {"layer": GOOD_DB}
    assert found.sensitivity == Sensitivity(8, 5.0, 5.0)


def test_a_good_network_is_ranked_where_somebody_asks_and_keeps_its_layers(monkeypatch):
    found, ranked = decided(monkeypatch, GOOD_DB, 60.0, rank=True)
    assert ranked
    assert found.placement == frozenset()
    assert found.sensitivity.kept == ()
    assert found.sensitivity.layers == (Damage("worst", 7.0),)


@pytest.mark.parametrize(("gain", "float_layers"), [(5.0, True), (-0.9, True), (-1.1, False)])
def test_layers_in_float_stay_unless_the_others_corrected_are_clearly_better(monkeypatch, gain, float_layers):
    whole = GOOD_DB - 10
    found, _ = decided(monkeypatch, whole, whole + gain * DOUBT_DB, kept=("worst", "second"))
    assert found.placement == (frozenset({"worst", "second"}) if float_layers else frozenset())
    assert bool(found.sensitivity.kept) == float_layers
    assert found.correction.after_db == (whole + gain * DOUBT_DB if float_layers else whole)


def test_the_number_that_was_asked_for_is_kept_whatever_it_brings(monkeypatch):
    found, _ = decided(monkeypatch, 40.0, 20.0, keep_worst=1)
    assert found.placement == frozenset({"worst"})


def test_without_correcting_the_ranking_decides(monkeypatch):
    found, _ = decided(monkeypatch, 40.0, 20.0, correct=False)
    assert found.placement == frozenset({"worst"})
    assert found.weights == {}
    assert found.correction is None


@pytest.mark.parametrize("options", [{"rank": True}, {"keep_worst": 1}, {}])
def test_a_network_that_cannot_be_ranked_says_so(monkeypatch, options):
    def refuse(*_):
        raise QuantizationError("it does not run")

    monkeypatch.setattr(module, "correct", refuse)
    monkeypatch.setattr(module, "measure_sensitivity", refuse)
    if options:
        with pytest.raises(QuantizationError, match="does not run"):
            module.decide(FakeDraft(), frozenset, Evidence([], **options))
        return
    found = module.decide(FakeDraft(), frozenset, Evidence([]))
    assert found.placement == frozenset()
    why = ("weights were not corrected on the samples", "layers were not ranked by damage")
    assert found.warnings == tuple(f"{what}: it does not run" for what in why)
