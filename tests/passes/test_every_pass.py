"""Every pass of the pipeline on every model: onnx's checker passes, outputs are equal, a second run changes nothing.

Here every eleventh of onnx's single-operator models; ``sweep.py`` beside this file runs all.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from relu_deploy.passes import PIPELINE

_SPEC = importlib.util.spec_from_file_location("sweep", Path(__file__).with_name("sweep.py"))
sweep = importlib.util.module_from_spec(_SPEC)
sys.modules["sweep"] = sweep
_SPEC.loader.exec_module(sweep)


@pytest.fixture(scope="module")
def small():
    return {case.name: case for case in sweep.small()}


@pytest.mark.parametrize("name", sweep.SMALL)
@pytest.mark.parametrize("function", PIPELINE, ids=lambda function: function.__name__)
def test_small_graphs(small, name, function):
    sweep.check(small[name], function)


@pytest.mark.parametrize("function", PIPELINE, ids=lambda function: function.__name__)
def test_the_small_graphs_give_every_pass_something_to_do(small, function):
    assert any(sweep.check(case, function) == "equal" for case in small.values())


def test_single_operators():
    fates = [sweep.check(case, function) for case in sweep.operators(step=11) for function in PIPELINE]
    assert fates.count("equal") > 80  # most of them where operands are constant: fold_constants
    assert len(fates) > 350 * len(PIPELINE)


@pytest.mark.models
@pytest.mark.parametrize("file", ["common_det.onnx", "common.onnx", "common_old.onnx"])
def test_published_networks(common_det, file):
    case = sweep.from_file(common_det.with_name(file))
    assert {sweep.check(case, function) for function in PIPELINE} <= {"equal", "unchanged"}
