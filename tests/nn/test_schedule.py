from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

from relu_deploy.errors import TrainingError
from relu_deploy.nn.schedule import group_gamma, pea_alpha, sat_gamma, statistics_end

pytestmark = pytest.mark.torch
totals, shares = st.integers(2, 500), st.floats(0, 0.9)


@given(totals, shares, st.sampled_from([None, 1, 10]))
@example(total=2, pure=0.75, levels=None)  # rounds to two pure steps of two
def test_sat_falls_from_one_to_exactly_zero_and_stays_there(total, pure, levels):
    gammas = [sat_gamma(step, total, pure=pure, levels=levels) for step in range(total + 1)]
    assert gammas[0] == 1
    assert gammas == sorted(gammas, reverse=True)
    last = max(1, round(pure * total))
    assert all(gamma == 0 for gamma in gammas[-last - 1 :]) or total == last
    if levels:
        assert {round(gamma * levels, 9) % 1 for gamma in gammas} == {0}


@given(totals, shares, shares)
def test_pea_rises_from_zero_to_exactly_one(total, initial, pure):
    alphas = [pea_alpha(step, total, initial=initial, pure=pure) for step in range(total + 1)]
    assert alphas[0] == 0
    assert alphas == sorted(alphas)
    assert alphas[total - 1] == alphas[total] == 1  # the last step trains ReLU


@given(st.integers(1, 200), st.integers(1, 8))
def test_groups_turn_one_after_another_and_all_have_turned_at_the_end(total, groups):
    for step in range(total + 1):
        gammas = [group_gamma(step, total, group=group, groups=groups) for group in range(groups)]
        assert gammas == sorted(gammas)
        assert gammas[0] == 0
    assert gammas == [0.0] * groups


def test_phase_one_of_pwlu_leaves_steps_for_phase_two():
    assert [statistics_end(total) for total in (2, 10, 1000)] == [1, 1, 100]


@pytest.mark.parametrize("call", [lambda: sat_gamma(3, 2), lambda: sat_gamma(0, 0), lambda: sat_gamma(0, 5, pure=1.5),
                                  lambda: pea_alpha(0, 5, initial=1), lambda: group_gamma(0, 5, group=2, groups=2),
                                  lambda: statistics_end(5, statistics=0)])  # fmt: skip
def test_what_makes_no_sense_is_refused(call):
    with pytest.raises(TrainingError):
        call()
