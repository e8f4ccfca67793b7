"""Fewest segments against planted solutions, a search over a grid, and the symmetries that an optimum has."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from relu_deploy.passes.segments import Polyline, fewest_segments, stack

INF = math.inf
# Rounding of the check itself: two evaluations in float64 of values of this size.
ULPS = 2.0**-46

SMALL = st.floats(-4, 4, allow_nan=False, width=32)


@st.composite
def polylines(draw: st.DrawFn, most: int = 20) -> Polyline:
    """Breaks as fine as 1/64 and as far as 1e6; scales of the values from 1e-6 to 1e6."""
    stretch = 10.0 ** draw(st.integers(-3, 5))
    steps = draw(st.lists(st.integers(1, 640), min_size=1, max_size=most))
    breaks = (np.cumsum(steps) / 64 - 5) * stretch
    scale = 10.0 ** draw(st.integers(-6, 6))
    values = np.array(draw(st.lists(SMALL, min_size=len(steps), max_size=len(steps)))) * scale
    left, right = draw(SMALL) * scale / stretch, draw(SMALL) * scale / stretch
    return Polyline(breaks, values, left, right)


@st.composite
def domains(draw: st.DrawFn, line: Polyline) -> tuple[float, float]:
    first, last = line.breaks[0], line.breaks[-1]
    span = max(last - first, 1e-3)
    ends = sorted(draw(st.tuples(st.floats(-0.5, 1.5), st.floats(-0.5, 1.5))))
    lo, hi = (first + end * span for end in ends)
    return draw(st.sampled_from([-INF, lo])), draw(st.sampled_from([INF, hi]))


def worst_error(found: Polyline, wanted: Polyline, lo: float, hi: float) -> float:
    """Largest difference on the domain; on an endless side, also far out."""
    near = np.concatenate([found.breaks, wanted.breaks])
    span = near.max() - near.min() + 1
    ends = [near.min() - 100 * span if lo == -INF else lo, near.max() + 100 * span if hi == INF else hi]
    spots = np.unique(np.concatenate([near, ends, np.linspace(*ends, 101)]))
    spots = spots[(spots >= ends[0]) & (spots <= ends[1])]
    return float(np.abs(found(spots) - wanted(spots)).max())


def noise_floor(line: Polyline, *lines: Polyline) -> float:
    reach = max(np.abs(part.breaks).max() for part in (line, *lines))
    return ULPS * (np.abs(line.values).max() + np.abs(line.slopes()).max() * 1000 * (reach + 1))


def turned(line: Polyline) -> Polyline:
    return Polyline(-line.breaks[::-1], line.values[::-1], -line.slope_right, -line.slope_left)


@settings(max_examples=300, deadline=None)
@given(st.data(), polylines(), st.floats(-4, 1))
def test_stays_within_eps_and_is_alike_from_both_sides(data, line, exponent):
    lo, hi = data.draw(domains(line))
    eps = float(np.abs(line.values).max() + 1e-9) * 10.0**exponent
    found = fewest_segments(line, eps, lo, hi)
    assert worst_error(found, line, lo, hi) <= eps * (1 + 1e-9) + noise_floor(line, found)
    if lo == -INF:
        assert found.slope_left == line.slope_left
    if hi == INF:
        assert found.slope_right == line.slope_right
    # Values of this size round to that; a bound that is not well above says nothing about how few bends are enough.
    if eps < 1e4 * 2.0**-49 * (np.abs(line.values).max() + np.abs(line.slopes()).max() * np.abs(line.breaks).max()):
        return
    # What goes greedily from the left is no worse than what goes from the right only if both are optimal.
    assert fewest_segments(turned(line), eps, -hi, -lo).bends == found.bends
    negative = Polyline(line.breaks, -line.values, -line.slope_left, -line.slope_right)
    assert fewest_segments(negative, eps, lo, hi).bends == found.bends
    assert fewest_segments(line, 2 * eps, lo, hi).bends <= found.bends


@settings(max_examples=300, deadline=None)
@given(st.data(), polylines(most=5), st.floats(-5, 0))
def test_finds_a_planted_approximation(data, planted, exponent):
    extra = data.draw(st.lists(st.floats(-1, 2), max_size=20))
    first, last = planted.breaks[0], planted.breaks[-1]
    span = max(last - first, abs(first) * 1e-2, 1e-2)
    breaks = np.unique(np.concatenate([planted.breaks, first + np.array(extra) * span]))
    assume((np.diff(breaks) > 1e-7 * np.abs(breaks).max()).all())
    eps = float(np.abs(planted.values).max() + 1e-9) * 10.0**exponent
    noise = data.draw(st.lists(st.floats(-1, 1), min_size=len(breaks), max_size=len(breaks)))
    line = Polyline(breaks, planted(breaks) + eps * np.array(noise), planted.slope_left, planted.slope_right)
    lo, hi = data.draw(domains(line))
    if eps > 100 * noise_floor(line):  # as above: of a bound near rounding nothing is known
        assert fewest_segments(line, eps * (1 + 1e-6) + noise_floor(line), lo, hi).bends <= planted.bends


def bends_on_grid(line: Polyline, eps: float, lo: float, hi: float, high: int = 13) -> float:
    """Fewest bends of a path whose knots lie on a grid in the tunnel: never fewer than the optimum."""
    xs = np.linspace(lo, hi, 8 * (len(line.breaks) - 1) + 1)
    wide = len(xs)
    ys = line(xs)[:, None] + np.linspace(-eps, eps, high)
    inner = line.breaks[(line.breaks > lo) & (line.breaks < hi)]
    links = np.full((wide, high), np.inf)
    links[0] = 0
    for end in range(1, wide):
        for start in range(end):
            between = inner[(inner > xs[start]) & (inner < xs[end])]
            part = ((between - xs[start]) / (xs[end] - xs[start]))[:, None, None]
            path = ys[start][:, None] * (1 - part) + ys[end] * part
            fits = (np.abs(path - line(between)[:, None, None]) <= eps).all(axis=0)
            best = np.where(fits, links[start][:, None] + 1, np.inf).min(axis=0)
            links[end] = np.minimum(links[end], best)
    return float(links[-1].min()) - 1


@settings(max_examples=25, deadline=None)
@given(st.lists(SMALL, min_size=3, max_size=9), st.floats(0.05, 3))
def test_no_path_on_a_grid_has_fewer_bends(values, eps):
    line = Polyline(np.arange(len(values)) * 4.0, np.array(values), 0.0, 0.0)
    lo, hi = 0.0, 4.0 * (len(values) - 1)
    assert fewest_segments(line, eps, lo, hi).bends <= bends_on_grid(line, eps, lo, hi)


def test_the_grid_search_finds_what_is_known():
    zigzag = Polyline(np.arange(5) * 4.0, np.array([0, 1, 0, 1, 0.0]), 0.0, 0.0)
    assert bends_on_grid(zigzag, 0.5, 0, 16) == 0
    assert bends_on_grid(zigzag, 0.1, 0, 16) == 3
    assert fewest_segments(zigzag, 0.5, 0, 16).bends == 0
    assert fewest_segments(zigzag, 0.1, 0, 16).bends == 3


def trained(values: np.ndarray, left: float = -3.0, right: float = 3.0) -> Polyline:
    """A learned unit of N intervals that continues with the slopes of its ends."""
    breaks = np.linspace(left, right, len(values))
    step = breaks[1] - breaks[0]
    return Polyline(breaks, values, (values[1] - values[0]) / step, (values[-1] - values[-2]) / step)


def test_a_relu_with_noise_has_two_segments():
    x = np.linspace(-3, 3, 17)
    values = np.maximum(x, 0) + 0.01 * np.cos(40 * x)
    line = Polyline(x, values, 0.0, 1.0)
    found = fewest_segments(line, 0.0101)
    assert found.bends == 1
    assert (found.slope_left, found.slope_right) == (0.0, 1.0)
    assert abs(found.breaks[0]) < 0.05


def test_a_prelu_between_many_breaks_has_two_segments_and_its_slopes():
    x = np.linspace(-2, 2, 17)
    line = trained(np.where(x < 0, 0.25 * x, x), -2, 2)
    found = fewest_segments(line, 0.0)
    assert found.breaks.tolist() == [0.0]
    assert (found.slope_left, found.slope_right) == (0.25, 1.0)


def test_a_silu_like_unit_needs_more_as_the_bound_shrinks():
    x = np.linspace(-8, 8, 17)
    line = Polyline(x, x / (1 + np.exp(-x)), 0.0, 1.0)
    counts = [fewest_segments(line, eps).bends for eps in (0.3, 0.1, 0.03, 0.01, 0.003, 0.0)]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == 17


def test_nothing_is_needed_where_the_bound_is_wide():
    line = Polyline(np.array([0.0, 1.0, 2.0]), np.array([0.0, 5.0, -5.0]), 1.0, 1.0)
    found = fewest_segments(line, 1e3)
    assert found.bends == 0
    assert found.slope_left == 1.0


def test_parallel_outer_slopes_too_far_apart_need_a_step():
    line = Polyline(np.array([0.0, 1.0]), np.array([0.0, 5.0]), 0.0, 0.0)
    assert fewest_segments(line, 2.4).bends == 2
    assert fewest_segments(line, 2.5).bends == 0


def test_different_outer_slopes_need_one_bend_whatever_the_bound():
    line = Polyline(np.array([0.0, 1.0, 2.0]), np.array([0.0, 5.0, -5.0]), 0.0, 1e-9)
    assert fewest_segments(line, 1e6).bends == 1


def test_eps_zero_keeps_the_function_and_drops_straight_breaks():
    line = Polyline(np.array([-1.0, 0.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 2.0]), 0.0, 1.0)
    found = fewest_segments(line, 0.0)
    assert (found.breaks.tolist(), found.values.tolist()) == ([0.0], [0.0])


@settings(max_examples=100, deadline=None)
@given(polylines())
def test_eps_zero_changes_no_value(line):
    assert worst_error(fewest_segments(line, 0.0), line, -INF, INF) <= noise_floor(line)


def test_a_long_shallow_curve_is_not_straightened_bend_by_bend():
    x = np.arange(64) / 64
    line = Polyline(x, 1e-15 * (64 * x) ** 2 * 40, 0.0, 1e-11)  # each bend of the order of the rounding
    assert worst_error(fewest_segments(line, 0.0), line, 0, 1) <= 1e-13


def test_breaks_outside_the_domain_do_not_count():
    line = Polyline(np.array([-100.0, 0.0, 100.0]), np.array([7.0, 0.0, 100.0]), 3.0, -2.0)
    assert fewest_segments(line, 0.0, -50, 50).breaks.tolist() == [0.0]
    assert fewest_segments(line, 0.0, 1, 50).bends == 0
    assert fewest_segments(line, 0.0, -INF, -200).slope_left == 3.0


@pytest.mark.parametrize("place", [-3.0, 0.0, 0.5, 9.0])
def test_a_domain_of_one_point(place):
    line = Polyline(np.array([0.0, 1.0]), np.array([2.0, 3.0]), 5.0, -1.0)
    found = fewest_segments(line, 0.1, place, place)
    assert found.bends == 0
    assert found(np.array(place)) == pytest.approx(line(np.array(place)), abs=1e-12)


def test_numbers_of_a_million_and_steps_of_a_millionth():
    x = np.array([-1e6, 0.0, 1e-6, 1e6])
    line = Polyline(x, np.maximum(x, 0), 0.0, 1.0)
    assert fewest_segments(line, 0.0).bends == 1
    assert fewest_segments(line, 1e-3).bends == 1
    assert fewest_segments(Polyline(x, np.array([0, 0, 1.0, 1e6]), 0.0, 1.0), 1e-3).bends == 3


@pytest.mark.parametrize("eps", [0.0, 1.0, 1e38])
def test_the_largest_and_smallest_float32_do_not_overflow(eps):
    huge, tiny = 3.4e38, 1.2e-38
    line = Polyline(np.array([-huge, 0.0, tiny, huge]), np.array([huge, -huge, huge, -huge]), huge, -huge)
    assert fewest_segments(line, eps).bends == 4


@pytest.mark.parametrize(
    ("breaks", "values"),
    [([0.0, 0.0], [0.0, 1.0]), ([1.0, 0.0], [0.0, 1.0]), ([], []), ([0.0], [0.0, 1.0]), ([0.0], [math.nan])],
    ids=["equal", "falling", "empty", "lengths", "nan"],
)
def test_what_is_no_polyline_is_refused(breaks, values):
    with pytest.raises(ValueError, match=r"polyline"):
        Polyline(np.array(breaks), np.array(values), 0.0, 0.0)


@pytest.mark.parametrize(
    ("eps", "lo", "hi"), [(-1, 0, 1), (math.nan, 0, 1), (0.1, 1, 0), (0.1, INF, INF), (0.1, math.nan, 1)]
)
def test_what_is_no_question_is_refused(eps, lo, hi):
    with pytest.raises(ValueError, match=r"eps"):
        fewest_segments(Polyline(np.zeros(1), np.zeros(1), 0.0, 1.0), eps, lo, hi)


@settings(max_examples=100, deadline=None)
@given(st.lists(polylines(most=6), min_size=1, max_size=5))
def test_hinges_compute_every_channel_and_the_bound_covers_float32(lines):
    hinges = stack(lines)
    assert hinges.weights.shape == (len(lines), max(line.bends for line in lines))
    for index, line in enumerate(lines):
        span = line.breaks[-1] - line.breaks[0] or 1.0
        x = np.linspace(line.breaks[0] - span, line.breaks[-1] + span, 201).astype(np.float32)
        x = x[(x >= line.breaks[0] - span) & (x <= line.breaks[-1] + span)]
        wide = np.repeat(x[None], len(lines), axis=0)
        truth = line(x.astype(np.float64))
        size = hinges.rounding[index] * 2.0**-20
        assert np.abs(hinges(wide.astype(np.float64))[index] - truth).max() <= size
        # Constants under 1e-38 are none of float32's normal numbers, and round more.
        assert np.abs(hinges(wide)[index].astype(np.float64) - truth).max() <= hinges.rounding[index] + 1e-37


def test_hinges_far_out_are_mirrored_where_that_keeps_digits():
    flat_right = Polyline(np.array([-1000.0, -999.0]), np.array([1.0, 0.0]), -1.0, 0.0)
    hinges = stack([flat_right], -1001.0, 1000.0)
    assert hinges.mirrored == 2
    assert hinges.slope.tolist() == [0.0]
    assert hinges(np.array([[1000.0]], np.float32)).tolist() == [[0.0]]
    assert stack([turned(flat_right)], -1000.0, 1001.0).mirrored == 0


def test_channels_with_fewer_bends_are_padded_with_nothing():
    relu = Polyline(np.zeros(1), np.zeros(1), 0.0, 1.0)
    line = Polyline(np.array([3.0]), np.array([1.0]), 2.0, 2.0)
    clip = Polyline(np.array([0.0, 6.0]), np.array([0.0, 6.0]), 0.0, 0.0)
    hinges = stack([relu, line, clip])
    assert [int(np.count_nonzero(row)) for row in hinges.weights] == [1, 0, 2]
    x = np.array([[-1.0, 2.0, 8.0]] * 3)
    assert hinges(x).tolist() == [[0, 2, 8], [-7, -1, 11], [0, 2, 6]]


def test_straight_lines_have_no_hinges():
    hinges = stack([Polyline(np.array([3.0]), np.array([1.0]), 2.0, 2.0)])
    assert hinges.weights.shape == (1, 0)
    assert (hinges.slope.tolist(), hinges.intercept.tolist()) == ([2.0], [-5.0])


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="no channel"):
        stack([])


def test_a_bound_near_rounding_is_alike_from_both_sides():
    """A bend at 5 between slopes of 0 and 21 is computed to some 1e-14: as much as 1e-5 of this bound."""
    line = Polyline(np.array([-4.984375, -4.96875]), np.zeros(2), 21.25, 5.352757475899387e-19)
    other = Polyline(-line.breaks[::-1], line.values[::-1], -line.slope_right, -line.slope_left)
    assert fewest_segments(line, 1e-9).bends == fewest_segments(other, 1e-9).bends == 1
