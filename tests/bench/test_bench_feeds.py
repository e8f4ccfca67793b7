from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.inputs import Sample
from relu_deploy.bench.batches import iter_batches, shapes_of_data
from relu_deploy.bench.feeds import InputPlan, cast_feeds, check_same_inputs, plan_inputs, random_feeds
from relu_deploy.errors import DataError
from relu_deploy.tensors import TensorSpec

IMAGE = TensorSpec("image", ("N", 3, 8, 8), "float32")
TOKENS = TensorSpec("ids", ("N", "T"), "int64")
FIXED = TensorSpec("image", (4, 3, 8, 8), "float32")


def test_a_dynamic_batch_is_one_unless_asked() -> None:
    assert plan_inputs([IMAGE], batch=None, shapes={}) == (1, (InputPlan("image", (1, 3, 8, 8), "float32"),))
    assert plan_inputs([IMAGE], batch=5, shapes={})[1][0].shape == (5, 3, 8, 8)


def test_a_fixed_batch_is_kept_and_a_given_shape_sets_it() -> None:
    assert plan_inputs([FIXED], batch=None, shapes={})[0] == 4
    batch, plans = plan_inputs([IMAGE, TOKENS], batch=None, shapes={"ids": (2, 16)})
    assert (batch, [plan.shape for plan in plans]) == (2, [(2, 3, 8, 8), (2, 16)])


def test_inputs_without_a_batch_axis_are_left_alone() -> None:
    extra = [TensorSpec("threshold", (), "float32"), TensorSpec("sizes", (2,), "int64")]
    assert [plan.shape for plan in plan_inputs([IMAGE, *extra], batch=3, shapes={})[1]] == [(3, 3, 8, 8), (), (2,)]


@pytest.mark.parametrize(
    ("spec", "batch", "shapes", "told"),
    [
        (FIXED, 8, {}, "fixed batch of 4; 8 was asked for"),
        (TOKENS, 1, {}, "dynamic axes besides the batch"),
        (IMAGE, 1, {"picture": (1,)}, "no input 'picture'"),
        (IMAGE, None, {"image": (1, 3, 8, 9)}, "1x3x8x9 does not fit"),
        (IMAGE, None, {"image": (1, 3, 8)}, "1x3x8 does not fit"),
        (IMAGE, None, {"image": (0, 3, 8, 8)}, "does not fit"),
        (IMAGE, 2, {"image": (1, 3, 8, 8)}, "batch of 1, not the 2"),
    ],
)
def test_what_cannot_be_settled(
    spec: TensorSpec, batch: int | None, shapes: dict[str, tuple[int, ...]], told: str
) -> None:
    with pytest.raises(DataError, match=told) as caught:
        plan_inputs([spec], batch=batch, shapes=shapes)
    assert spec.name in str(caught.value)


def test_the_hint_for_a_dynamic_axis_can_be_copied() -> None:
    with pytest.raises(DataError) as caught:
        plan_inputs([TOKENS], batch=2, shapes={})
    assert caught.value.hint == "give the shape: --shape ids=2xN with numbers for N"


@given(
    st.sampled_from(["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool", "uint16"]),
    st.lists(st.integers(1, 5), max_size=4).map(tuple),
)
def test_random_inputs_are_finite_seeded_and_of_the_type(dtype: str, shape: tuple[int, ...]) -> None:
    plans = [InputPlan("x", shape, dtype)]
    x = random_feeds(plans, seed=3)["x"]
    assert (x.dtype.name, x.shape) == (dtype, shape)
    assert np.isfinite(x).all()
    np.testing.assert_array_equal(x, random_feeds(plans, seed=3)["x"])
    if dtype in ("int64", "int32", "bool"):
        assert set(np.unique(x)) <= {0, 1}  # valid as an index into any table of two rows


def test_engines_of_another_float_width_are_fed_by_a_cast() -> None:
    half = TensorSpec("image", ("N", 3, 8, 8), "float16")
    plans = plan_inputs([IMAGE], batch=1, shapes={})[1]
    check_same_inputs([IMAGE], [half], plans)
    assert cast_feeds(random_feeds(plans, seed=0), [half])["image"].dtype == np.float16


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        (
            TensorSpec("pixels", ("N", 3, 8, 8), "float32"),
            "its inputs are 'pixels'; those of the original are 'image'",
        ),
        (TensorSpec("image", ("N", 3, 8, 8), "uint8"), "takes uint8; the original takes float32"),
        (TensorSpec("image", (2, 3, 8, 8), "float32"), "cannot take the shape 1x3x8x8"),
        (TensorSpec("image", ("N", 3, 8), "float32"), "cannot take the shape 1x3x8x8"),
    ],
)
def test_engines_that_cannot_be_fed_the_same(engine: TensorSpec, told: str) -> None:
    with pytest.raises(DataError, match=told):
        check_same_inputs([IMAGE], [engine], plan_inputs([IMAGE], batch=1, shapes={})[1])


def sample(value: float, shape: tuple[int, ...] = (1, 2), *, whole: bool = False) -> Sample:
    return Sample({"x": np.full(shape, value, np.float32)}, f"sample {value}", whole)


@given(st.integers(1, 9), st.integers(1, 4))
def test_every_sample_is_in_one_batch_and_the_last_is_filled(count: int, batch: int) -> None:
    batches = list(iter_batches([sample(i) for i in range(count)], batch))
    assert all(feeds["x"].shape == (batch, 2) for feeds, _ in batches)
    kept = np.concatenate([feeds["x"][:real] for feeds, real in batches])
    np.testing.assert_array_equal(kept[:, 0], np.arange(count))


def test_samples_that_cannot_share_a_batch() -> None:
    with pytest.raises(DataError, match=r"sample 1: .*\(1, 3\), sample 0 has \(1, 2\)"):
        list(iter_batches([sample(0), sample(1, (1, 3))], 2))
    assert len(list(iter_batches([sample(0), sample(1, (1, 3))], 1))) == 2
    with pytest.raises(DataError, match=r"holds a batch of 3, and 2 is measured"):
        list(iter_batches([sample(0, (3, 2), whole=True)], 2))


CHUNK, STATE = TensorSpec("x", ("N", 16), "float32"), TensorSpec("state", (2, "N", 8), "float32")


@pytest.mark.parametrize("order", [(CHUNK, STATE), (STATE, CHUNK)])
def test_a_state_has_its_layers_on_the_first_axis(order: tuple[TensorSpec, ...]) -> None:
    given = {"state": (2, 3, 8)}
    assert plan_inputs(order, batch=None, shapes={**given, "x": (3, 16)})[0] == 3
    settled, plans = plan_inputs(order, batch=3, shapes=given)
    assert settled == 3
    assert {plan.name: plan.shape for plan in plans} == {"x": (3, 16), "state": (2, 3, 8)}
    feeds = {"x": np.zeros((3, 16), np.float32), "state": np.zeros((2, 3, 8), np.float32)}
    for named in (feeds, dict(reversed(feeds.items()))):
        assert [count for _, count in iter_batches([Sample(named, "s", True)], 3)] == [3]
        with pytest.raises(DataError, match="and 4 is measured"):
            list(iter_batches([Sample(named, "s", True)], 4))


def test_first_axes_that_are_fixed_and_differ_are_no_batch() -> None:
    fixed = [TensorSpec("x", (1, 16), "float32"), TensorSpec("state", (2, 1, 8), "float32")]
    assert plan_inputs(fixed, batch=None, shapes={}) == (
        1,
        (InputPlan("x", (1, 16), "float32"), InputPlan("state", (2, 1, 8), "float32")),
    )


def test_dynamic_axes_come_from_the_data() -> None:
    specs = [TensorSpec("x", ("N", "T"), "float32")]
    assert shapes_of_data(specs, [sample(0, (1, 7))], None) == {"x": (1, 7)}
    assert shapes_of_data(specs, [sample(0, (1, 7))], 4) == {"x": (4, 7)}
    assert shapes_of_data(specs, [sample(0, (3, 7), whole=True)], None) == {"x": (3, 7)}
    assert shapes_of_data([TensorSpec("x", (1, 2), "float32")], [sample(0)], None) == {}
    with pytest.raises(DataError, match="empty"):
        shapes_of_data(specs, [], None)
