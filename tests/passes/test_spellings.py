"""Every activation in every spelling and opset: named without a miss, and nothing else named so."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from relu_deploy.passes.survey import survey

_SPEC = importlib.util.spec_from_file_location("spellings", Path(__file__).with_name("spellings.py"))
spellings = importlib.util.module_from_spec(_SPEC)
sys.modules["spellings"] = spellings  # dataclasses look their module up
_SPEC.loader.exec_module(spellings)
SPELLINGS = spellings.SPELLINGS
POINTS = np.linspace(-8, 8, 25).reshape(1, 1, 5, 5).repeat(spellings.CHANNELS, axis=1)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_corpus_itself_is_right(name):
    """ONNX Runtime computes from the nodes what the formula says: a wrong spelling would test nothing."""
    spelling = SPELLINGS[name]
    opset = min(spelling.last, max(spelling.first, 20))
    model = spellings.model(spelling.text, opset=opset, wrapped=False)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": POINTS.astype(np.float32)})
    if spelling.kind == "mixed" or spelling.function or spelling.kind in spellings.FORMULAS:
        expected = np.stack([spelling.values(c, POINTS[0, c]) for c in range(spellings.CHANNELS)])[None]
        # Constants of the graphs have four digits at least, values here are at most 64.
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_named(name):
    spelling = SPELLINGS[name]
    for opset in spelling.opsets():
        found = survey(spellings.model(spelling.text, opset=opset))
        assert found.counts == {spelling.kind: 1}, (opset, found.activations)
        assert found.left_alone == {}


def holds(name: str, kind: str) -> bool:
    """Whether a spelling means the same in another type: 8 bits do not hold every constant, nor fold every root."""
    spelling = SPELLINGS[name]
    if kind == "bfloat16" and ("not folded" in name or "tables" in name or spelling.kind in ("blend", "unknown")):
        return False
    return "to = 1>" not in spelling.text  # it casts to float32 by its own words


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in SPELLINGS for k in ("float16", "bfloat16", "double") if holds(n, k)]
)
def test_every_spelling_is_named_in_other_types(name, kind):
    spelling = SPELLINGS[name]
    found = survey(spellings.model(spelling.text, opset=max(spelling.first, min(spelling.last, 20)), kind=kind))
    assert found.counts == {spelling.kind: 1}, found.activations


CHANNELWISE, SHARED = ("#[1.7,0.3,-2,1]", "#[0.1,-0.2,0,3]"), ("#1.7", "#0.3")


@pytest.mark.parametrize(("before", "behind"), [(CHANNELWISE, SHARED), (SHARED, CHANNELWISE)], ids=["channels", "all"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_scales_and_shifts_around_it_are_no_part_of_it(name, before, behind):
    """BatchNorm written out, and a scale that a layer behind it could take."""
    spelling = SPELLINGS[name]
    text = re.sub(r"\by\b", "inner", re.sub(r"\bx\b", "outer", spelling.text))
    text = (
        f"scaled = Mul(x, {before[0]}) outer = Add(scaled, {before[1]}) {text} "
        f"last = Mul(inner, {behind[0]}) y = Add(last, {behind[1]})"
    )
    found = survey(spellings.model(text, opset=max(spelling.first, min(spelling.last, 20))))
    assert found.counts == {spelling.kind: 1}, found.activations
