"""Codes chosen together, and biases that take up the mean error: better on rows that they were not chosen on."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.int8.formats import quantize_symmetric, weight_scales
from relu_deploy.int8.rounding import Rows, best_choice, choose_codes, errors_of


def layer(seed: int, groups: int = 1, rows: int = 4, size: int = 12, limit: int = 7):
    """Weights, scales and nearest codes of few bits, so that rounding matters."""
    weight = np.random.default_rng(seed).normal(size=(groups, rows, size))
    flat = weight.reshape(groups * rows, size)
    scale = weight_scales(flat, 0, limit)
    codes = quantize_symmetric(flat, scale, 0, limit).reshape(weight.shape)
    return weight, scale.reshape(groups, rows).astype(np.float64), codes


def correlated(seed: int, count: int, groups: int = 1, size: int = 12):
    """Rows that a few hidden numbers make, with a mean."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).normal(size=(groups, 3, size))
    rows = rng.normal(size=(groups, count, 3)) @ mix + 0.1 * rng.normal(size=(groups, count, size)) + 1
    return rows.astype(np.float32)


@pytest.mark.parametrize("groups", [1, 3])
def test_codes_chosen_together_lose_less_on_other_rows(groups):
    weight, scale, codes = layer(0, groups)
    together = choose_codes(weight, scale, correlated(1, 400, groups), (400,), 7)
    fresh = correlated(2, 400, groups)
    fresh -= fresh.mean(axis=1, keepdims=True)  # the mean is the bias's part
    judges, none = Rows(fresh, fresh, (400,)), np.zeros(scale.shape)
    before, after = (errors_of(weight, c * scale[..., None], none, judges)[0].sum() for c in (codes, together))
    assert after < before / 2


@given(st.integers(0, 10_000), st.integers(1, 40), st.sampled_from([1, 7, 127]))
@settings(max_examples=60, deadline=None)
def test_codes_stay_within_the_type_and_near_their_weights(seed, count, limit):
    weight, scale, _ = layer(seed, limit=limit)
    found = choose_codes(weight, scale, correlated(seed, count), (1,) * count, limit)
    assert np.abs(found).max() <= limit
    assert found.shape == weight.shape


def test_independent_inputs_get_the_nearest_codes():
    weight, scale, codes = layer(0)
    apart = (np.eye(12) * np.arange(1, 13))[None].astype(np.float32)
    rows = np.concatenate([apart, -apart], axis=1)  # no two inputs are ever on together, and the mean is 0
    assert (choose_codes(weight, scale, rows, (rows.shape[1],), 7) == codes).all()


@pytest.mark.parametrize("rows", [np.zeros((1, 8, 12), np.float32), np.full((1, 8, 12), 3.0, np.float32)])
def test_inputs_that_never_change_get_the_nearest_codes(rows):
    weight, scale, codes = layer(0)
    assert (choose_codes(weight, scale, rows, (rows.shape[1],), 7) == codes).all()


def test_a_bias_takes_up_the_mean_error():
    weight, scale, codes = layer(0)
    rows = correlated(1, 200)
    learned, judges = (
        Rows(rows[:, :100], rows[:, :100] + 0.3, (40, 60)),
        Rows(rows[:, 100:], rows[:, 100:] + 0.3, (10, 90)),
    )
    best = best_choice(weight, scale, [codes], learned, judges, room=np.inf)
    stored, none = codes * scale[..., None], np.zeros(scale.shape)
    assert (best.offset != 0).any()
    assert best.error.sum() < errors_of(weight, stored, none, judges)[0].sum() / 2


def test_what_does_not_hold_on_other_rows_is_not_taken():
    weight, scale, codes = layer(0)
    rows = correlated(1, 200)
    lying = Rows(rows, rows + 5.0, (200,))  # an error that the rows that judge do not have
    best = best_choice(weight, scale, [codes], lying, Rows(rows, rows, (200,)), room=np.inf)
    assert not best.offset.any()
    assert (best.codes == codes).all()


def test_a_bias_moves_no_further_than_there_is_room():
    weight, scale, codes = layer(0)
    rows = correlated(1, 50)
    far = Rows(rows, rows + 1000, (50,))
    assert not best_choice(weight, scale, [codes], far, far, room=1.0).offset.any()
    assert not best_choice(weight, scale, [codes], far, far, room=0.0).offset.any()
    assert best_choice(weight, scale, [codes], far, far, room=np.inf).offset.any()


def test_a_mean_error_that_may_be_chance_is_left_out():
    weight, scale, codes = layer(0)
    rows = correlated(1, 400)
    own = np.random.default_rng(3).normal(size=(1, 8, 12)).repeat(50, axis=1)  # an error for each of eight samples
    for error, least, most in ((0.5, 0.95, 1.0), (own.astype(np.float32), 0.0, 0.5)):
        seen = Rows(rows, rows + np.float32(error), (50,) * 8)
        mean = seen.exact @ weight.transpose(0, 2, 1) - seen.read @ (codes * scale[..., None]).transpose(0, 2, 1)
        taken = best_choice(weight, scale, [codes], seen, seen, room=np.inf).offset
        assert least <= np.abs(taken).sum() / np.abs(mean.mean(axis=1)).sum() <= most


def test_what_positions_of_a_sample_share_counts_more():
    _, scale, codes = layer(0)
    worse = codes.copy()
    worse[..., 0] += 1
    rows = np.zeros((1, 200, 12), np.float32)
    rows[0, :100, 0] = 1.0  # the first sample has it everywhere, the second nowhere
    swinging = rows.copy()
    swinging[0, 1:100:2, 0] = -1.0
    for read, ratio in ((rows, 1.0), (swinging, 0.0)):
        error, shared = errors_of(
            codes * scale[..., None], worse * scale[..., None], 0 * scale, Rows(read, read, (100, 100))
        )
        np.testing.assert_allclose(shared, ratio * error, atol=1e-12)
