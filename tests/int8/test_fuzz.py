"""A few of the networks that ``fuzz.py`` makes without end."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location("int8_fuzz", Path(__file__).with_name("fuzz.py"))
fuzz = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = fuzz
_SPEC.loader.exec_module(fuzz)


# 426: a table of which some readers want floats.
@pytest.mark.parametrize("seed", [*range(12), 426])
def test_a_random_network_quantises_for_both_targets(seed):
    assert fuzz.complaints(seed) == []
