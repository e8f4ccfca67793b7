"""Channel fusion leaves the network what it was, bit for bit, and gives the ranges that calibration would."""

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

import relu_deploy.int8.fuse as fuse_module
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.fuse import fuse_channels
from relu_deploy.passes.constants import fold_constants
from relu_deploy.passes.shapes import annotate

_SPEC = importlib.util.spec_from_file_location("fuse_graph", Path(__file__).with_name("fuse_graph.py"))
fuse_graph = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(fuse_graph)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def measured(model, data, **options):
    return calibrate(model, open_source(data, model_inputs(model)), **options)


def fuse(model, ranges, *, target="ort", granularity="channel", mode="pow2"):
    """The network before and after, both written by the same code; and what fusion says of it."""
    found = []
    for each in ("off", mode):
        graph = files.import_graph(model)
        annotate(graph, model)
        fold_constants(graph)
        files.tidy(graph)
        fusion = fuse_channels(graph, ranges, number_format(target, weight_granularity=granularity), mode=each)
        found.append(files.export_graph(graph, model))
    onnx.checker.check_model(found[1], full_check=True)
    return found[0], found[1], fusion


def outputs(model, feeds, *, optimise):
    return open_session(model, optimise=optimise, threads=1).run(None, feeds)


def assert_same_bits(before, after, feeds):
    for optimise in (False, True):
        for one, other in zip(
            outputs(before, feeds, optimise=optimise), outputs(after, feeds, optimise=optimise), strict=True
        ):
            assert np.array_equal(one, other, equal_nan=True), f"optimise={optimise}"


def assert_measured_again(model, data, fusion, **options):
    """The ranges that were calculated are those that a new calibration measures, exactly."""
    again = measured(model, data, **options)
    for name, found in again.tensors.items():
        told = fusion.ranges.tensors[name]
        assert (told.min, told.max) == (found.min, found.max), name
        assert fusion.bounds[name] == (found.min, found.max), name
        if told.channel_min is not None:
            assert np.array_equal(told.channel_min, found.channel_min), name
            assert np.array_equal(told.channel_max, found.channel_max), name


def random_factors(terms, free, *, powers_of_two):
    """Factors for every channel that may have one: rules are tried, not what would be chosen today."""
    rng = np.random.default_rng(free.size)
    exponents = rng.integers(1, 7, free.size) * rng.choice([-1, 1], free.size)
    return np.where(free, 2.0**exponents, 1.0)


@pytest.fixture
def any_factors(monkeypatch):
    monkeypatch.setattr(fuse_module, "choose_factors", random_factors)


@pytest.mark.parametrize("seed", range(60))
def test_random_networks_with_any_factors(seed, any_factors):
    model = fuse_graph.FusibleGraph(seed, size=24).model()
    data = normal(4, *fuse_graph.SHAPE[1:], seed=seed)
    before, after, fusion = fuse(model, measured(model, data))
    assert_same_bits(before, after, {"x": data[:2]})
    assert_measured_again(after, data, fusion)


def test_the_networks_above_are_scaled(any_factors):
    """They would pass if nothing ever were."""
    scaled = [
        fuse(model, measured(model, normal(2, *fuse_graph.SHAPE[1:])))[2].report.channels
        for model in (fuse_graph.FusibleGraph(seed, size=24).model() for seed in range(20))
    ]
    assert sum(count > 0 for count in scaled) >= 10
    assert sum(scaled) >= 200


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
@pytest.mark.parametrize("seed", range(12))
def test_random_networks_with_chosen_factors(seed, target):
    model = fuse_graph.FusibleGraph(seed, size=24).model()
    data = normal(4, *fuse_graph.SHAPE[1:], seed=seed)
    granularity = "tensor" if seed % 2 else "channel"
    before, after, fusion = fuse(model, measured(model, data), target=target, granularity=granularity)
    assert_same_bits(before, after, {"x": data[:2]})
    assert_measured_again(after, data, fusion)
    if fusion.report.predicted_before is not None:
        assert fusion.report.predicted_after >= fusion.report.predicted_before


def test_unknown_mode_is_refused(residual_model, measure):
    model = residual_model()
    with pytest.raises(QuantizationError, match="unknown channel fusion 'on'"):
        fuse(model, measure(model), mode="on")
