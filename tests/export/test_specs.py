from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.errors import ExportError
from relu_deploy.export.samples import make_samples
from relu_deploy.export.specs import DTYPES, DynamicAxis, ExampleInput, check_specs, parse_dynamic, parse_input


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("image=1x3x32x32", ExampleInput("image", (1, 3, 32, 32))),
        ("a.b=7:float16", ExampleInput("a.b", (7,), "float16")),
        ("t=scalar:int64:5..5", ExampleInput("t", (), "int64", 5, 5)),
        ("x=2x2:float32:-1.5..1e2", ExampleInput("x", (2, 2), "float32", -1.5, 100.0)),
    ],
)
def test_reads_inputs(text, spec):
    assert parse_input(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image", "cannot read the input 'image'"),
        ("image=1,3", "cannot read the input"),
        ("image=1x-3", "cannot read the input"),
        ("image=1x3:int64:0..", "cannot read the input"),
        ("image=0x3", "cannot have the shape 0x3"),
        ("image=100000x100000", "cannot have the shape"),
        ("image=1x3:complex64", "no dtype 'complex64'"),
        ("ids=4:int64:9..3", "ends are not in order"),
        ("ids=4:int8:0..300", "cannot be drawn from 0..300 as int8"),
        ("ids=4:int64:0.5..2", "as int64"),
        ("m=4:bool:0..1", "takes no range"),
    ],
)
def test_refuses_inputs(text, message):
    with pytest.raises(ExportError, match=message):
        parse_input(text)


@pytest.mark.parametrize("text", ["image", "image=1..2", "image:0=1-2", "image:x=1..2", "image:0=0..2", "image:0=3..3"])
def test_refuses_dynamic_axes(text):
    with pytest.raises(ExportError):
        parse_dynamic(text)


@pytest.mark.parametrize(
    ("dynamic", "message"),
    [
        ([DynamicAxis("y", 0, 1, 2)], "no input 'y'"),
        ([DynamicAxis("x", 2, 1, 2)], "no axis 2"),
        ([DynamicAxis("x", 0, 1, 4)] * 2, "made dynamic twice"),
        ([DynamicAxis("x", 1, 4, 8)], "is 3 in the example, outside 4..8"),
    ],
)
def test_holds_axes_against_inputs(dynamic, message):
    with pytest.raises(ExportError, match=message):
        check_specs([ExampleInput("x", (1, 3))], dynamic)


def test_needs_inputs_of_different_names():
    with pytest.raises(ExportError, match="no inputs"):
        check_specs([], [])
    with pytest.raises(ExportError, match="one name"):
        check_specs([ExampleInput("x", (1,)), ExampleInput("x", (2,))], [])


@given(
    dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(1, 4), max_size=3), seed=st.integers(0, 99),
    ends=st.none() | st.tuples(st.integers(-3, 3), st.integers(0, 5)),
)  # fmt: skip
def test_samples_have_shape_dtype_and_range(dtype, shape, seed, ends):
    if dtype in ("bool", "uint8") or ends is None:
        low = high = None
    else:
        low, high = float(ends[0]), float(ends[0] + ends[1])
    spec = ExampleInput("x", tuple(shape), dtype, low, high)
    samples, _ = make_samples([spec], [], {}, seed=seed)
    assert len(samples) == 3
    for sample in samples:
        value = sample.feeds["x"]
        assert (value.dtype, value.shape) == (np.dtype(dtype), tuple(shape))
        if low is not None:
            # float16 cannot hold every number: the largest end may round up by half a unit, which is below 0.01 here.
            assert low - 0.01 <= float(value.min()) <= float(value.max()) <= high + 0.01
        elif "int" in dtype:
            assert set(np.unique(value)) <= {0, 1}


def test_dynamic_axes_are_tried_at_both_ends_and_between_and_tied_ones_together():
    inputs = [ExampleInput("a", (1, 8)), ExampleInput("b", (1, 8))]
    axes = [DynamicAxis("a", 0, 1, 9), DynamicAxis("b", 0, 1, 5), DynamicAxis("b", 1, 8, 16)]
    samples, notes = make_samples(inputs, axes, {("a", 0): "n", ("b", 0): "n", ("b", 1): "w"}, seed=0)
    shapes = [(s.feeds["a"].shape, s.feeds["b"].shape) for s in samples]
    assert shapes == [((1, 8), (1, 8))] * 3 + [((3, 8), (3, 12)), ((5, 8), (5, 16))]
    assert notes == []


def test_sizes_that_would_fill_the_memory_are_made_smaller_and_told(monkeypatch):
    monkeypatch.setattr("relu_deploy.export.samples._MAX_ELEMENTS", 3 * 64 * 10)
    inputs = [ExampleInput("x", (1, 3, 8, 8))]
    samples, notes = make_samples(inputs, [DynamicAxis("x", 0, 1, 64)], {("x", 0): "batch"}, seed=0)
    assert max(s.feeds["x"].shape[0] for s in samples) == 8
    assert "batch=8 were not compared" in notes[-1]
