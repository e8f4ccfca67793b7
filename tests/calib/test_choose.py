from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib.choose import choose_channels, choose_range, chosen_bounds
from calib.clipping import least_divergence, least_error, squared_error
from calib.errors import CalibrationError, RangesError
from calib.histogram import CHANNEL_BITS, histogram_of
from calib.options import METHODS
from calib.ranges import Ranges, TensorRange

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = hnp.arrays(np.float32, st.integers(1, 80), elements=FLOATS)
BOTH = pytest.mark.parametrize("unsigned", [True, False])
KINDS = ("normal", "laplace", "relu", "silu", "outlier", "negative")


def measured(values, **more):
    values = np.asarray(values, np.float32)
    return TensorRange(
        float(values.min()), float(values.max()), "float32", 1, histogram=histogram_of(values), **more
    )  # fmt: skip


def sample(kind, count=40_000):
    rng = np.random.default_rng(7)
    x = rng.standard_normal(count)
    made = {
        "normal": x, "laplace": rng.laplace(size=count), "relu": np.maximum(x, 0), "silu": 2 * x / (1 + np.exp(-2 * x)),
        "outlier": np.append(1e-3 * x, 1e30), "negative": -np.abs(x) - 0.5,
    }[kind]  # fmt: skip
    return made.astype(np.float32)


def quantised(values, low, high, unsigned):
    """Quantise and back, as ONNX defines it, in float64."""
    values, low, high = values.astype(np.float64), min(low, 0.0), max(high, 0.0)
    if not unsigned:
        step = max(-low, high) / 127
        return step * np.clip(np.rint(values / step), -127, 127)
    step = (high - low) / 255
    zero = np.rint(-low / step)
    return step * (np.clip(np.rint(values / step) + zero, 0, 255) - zero)


def true_error(values, bounds, unsigned):
    return float(np.sum((values - quantised(values, *bounds, unsigned)) ** 2))


@given(VALUES, st.sampled_from(METHODS), st.booleans())
def test_a_choice_is_a_range_within_the_extremes(values, method, unsigned):
    low, high = choose_range(measured(values), method, unsigned=unsigned)
    assert float(values.min()) <= low <= high <= float(values.max())
    assert (np.float32(low), np.float32(high)) == (low, high)


@given(VALUES, st.booleans())
def test_max_is_the_extremes(values, unsigned):
    assert choose_range(measured(values), "max", unsigned=unsigned) == (values.min(), values.max())


@given(VALUES, st.booleans(), st.sampled_from([10.0, 50.0, 90.0, 99.0, 100.0]))
def test_a_percentile_leaves_no_more_outside_than_it_says(values, unsigned, percentile):
    low, high = choose_range(measured(values), "percentile", unsigned=unsigned, percentile=percentile)
    outside = np.abs(values) > max(-low, high) if not unsigned else (values < low) | (values > high)
    assert outside.sum() <= (100 - percentile) / 100 * len(values)
    if percentile == 100:
        assert (low, high) == (values.min(), values.max())


@BOTH
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [99.0, 99.9])
def test_a_percentile_is_that_of_numpy_to_a_bin(kind, unsigned, percentile):
    values = sample(kind)
    low, high = choose_range(measured(values), "percentile", unsigned=unsigned, percentile=percentile)
    both = values.min() < 0 < values.max()
    if both and unsigned:
        tail = (100 - percentile) / 2
        wanted = np.percentile(values, [tail, 100 - tail])
    else:
        size = np.percentile(np.abs(values), percentile)
        wanted = np.clip([-size, size], values.min(), values.max())
    # A bin is at most 1/128 of its values wide; two, because numpy interpolates between neighbours.
    assert np.allclose([low, high], wanted, rtol=2 / 128, atol=0)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_of_a_histogram_is_that_of_its_values(kind, unsigned):
    values = sample(kind)
    extremes = float(values.min()), float(values.max())
    for part in (1.0, 0.5, 0.1):
        bounds = extremes[0] * part, extremes[1] * part
        found = squared_error(histogram_of(values), bounds, unsigned=unsigned, extremes=extremes)
        # What is summed is known up to the place in a bin, 1/128 of a value that is clipped; the largest value up to
        # the last bit of a float32.
        blur = (max(-extremes[0], extremes[1]) * 2.0**-23) ** 2
        assert found == pytest.approx(true_error(values, bounds, unsigned), rel=0.03, abs=blur)


@BOTH
@pytest.mark.parametrize("kind", KINDS)
def test_mse_beats_every_other_cut(kind, unsigned):
    values = sample(kind)
    chosen = true_error(values, choose_range(measured(values), "mse", unsigned=unsigned), unsigned)
    extremes = values.min(), values.max()
    for part in np.geomspace(1, 0.01, 60):
        size = part * max(-extremes[0], extremes[1])
        cut = max(extremes[0], -size), min(extremes[1], size)
        # A 32nd of a power of two is 2.2 %, and the error is flat around its least.
        assert chosen <= true_error(values, cut, unsigned) * 1.02


def test_mse_cuts_each_side_alone_where_codes_allow():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.standard_normal(1_000_000), [-20.0], rng.uniform(0, 9, 500_000)]).astype(np.float32)
    low, high = choose_range(measured(values), "mse", unsigned=True)
    assert -10 < low < -2
    assert high == pytest.approx(9, rel=0.05)


def tensorrt_threshold(values):
    """The published algorithm: 2048 bins over |x|, 128 levels, from the values themselves."""
    sizes = np.abs(values)
    counts, edges = np.histogram(sizes, 2048, (0, float(sizes.max())))
    best = np.inf, 0.0
    for i in range(128, 2049):
        inside = counts[:i].astype(np.float64)
        p = inside.copy()
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        for level in np.array_split(np.arange(i), 128):
            filled = inside[level] > 0
            q[level[filled]] = inside[level].sum() / max(filled.sum(), 1)
        hit = p > 0
        if (q[hit] > 0).all():
            a, b = p[hit] / p.sum(), q[hit] / q.sum()
            best = min(best, (float(np.sum(a * np.log(a / b))), edges[i]))
    return best[1]


@pytest.mark.parametrize("kind", ["normal", "laplace"])
def test_entropy_is_near_what_tensorrt_published(kind):
    values = sample(kind, 300_000)
    low, high = choose_range(measured(values), "entropy", unsigned=False)
    # Its own choice jumps by about this much between two draws of the same distribution.
    assert high == pytest.approx(tensorrt_threshold(values), rel=0.25)
    assert high < 0.95 * np.abs(values).max()
    assert low == -high


@BOTH
def test_entropy_is_not_fooled_by_one_outlier(unsigned):
    values = sample("outlier")
    assert choose_range(measured(values), "entropy", unsigned=unsigned)[1] < 0.01
    # The squared error of clipping 1e30 outweighs all else, and max is max.
    assert choose_range(measured(values), "mse", unsigned=unsigned)[1] > 1e29
    assert choose_range(measured(values), "percentile", unsigned=unsigned)[1] < 0.01


@BOTH
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "values", [[0, 0], [3, 3], [-2, -2], [1e-44, 2e-44], [0, 1e-45], [-1e-40, 1e-40], [3e38, -3e38]]
)
def test_values_at_the_ends_of_floats(method, values, unsigned):
    values = np.float32(values)
    low, high = choose_range(measured(values), method, unsigned=unsigned)
    assert min(values) <= low <= high
    assert high >= 0 or max(values) < 0
    if values[0] == values[1]:
        assert (low, high) == (np.float32(values[0]), np.float32(values[1]))


def test_channels_are_chosen_one_by_one():
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((3, 5000)) * [[1], [10], [0]]).astype(np.float32)
    low, high = values.min(1), values.max(1)
    counts = tuple(histogram_of(row, bits=CHANNEL_BITS) for row in values)
    r = TensorRange(
        float(low.min()), float(high.max()), "float32", 1, 1, low, high, histogram_of(values), counts
    )  # fmt: skip
    assert np.array_equal(choose_channels(r, "max", unsigned=False), [low, high])
    for method in METHODS[1:]:
        lows, highs = choose_channels(r, method, unsigned=False, percentile=99.0)
        assert (lows >= low).all()
        assert (highs <= high).all()
        assert highs[1] / highs[0] == pytest.approx(10, rel=0.2)
        assert (lows[2], highs[2]) == (0, 0)
    with pytest.raises(RangesError, match="has no channels"):
        choose_channels(measured([1, 2]), "max", unsigned=False)
    with pytest.raises(RangesError, match="no histograms of the channels of t") as caught:
        choose_channels(TensorRange(0, 1, "float32", 1, 1, low, high), "mse", unsigned=False, name="t")
    assert "--channels" in caught.value.hint


def test_bounds_of_a_file_follow_its_method():
    values = sample("laplace")
    ranges = Ranges({"t": measured(values)}, "a" * 64, "b" * 64, "percentile", 1, percentile=90.0)
    assert chosen_bounds(ranges, unsigned=False)["t"][1] == pytest.approx(np.log(10), rel=0.03)
    assert chosen_bounds(ranges, unsigned=False, method="max")["t"] == (values.min(), values.max())
    bare = Ranges({"t": TensorRange(0, 1, "float32", 1)}, "a" * 64, "b" * 64, "max", 1)
    assert chosen_bounds(bare, unsigned=True) == {"t": (0, 1)}
    with pytest.raises(RangesError, match="no histogram of t, which the method mse needs"):
        chosen_bounds(bare, unsigned=True, method="mse")


def test_what_cannot_be_chosen_by():
    for percentile in (0, -1, 101, float("nan")):
        with pytest.raises(CalibrationError, match="percentile"):
            choose_range(measured([1, 2]), "percentile", unsigned=True, percentile=percentile)
    with pytest.raises(CalibrationError, match="no calibration method 'magic'"):
        choose_range(measured([1, 2]), "magic", unsigned=True)


@BOTH
def test_searches_take_a_histogram_of_zeros(unsigned):
    counts = histogram_of(np.zeros(9))
    for search in (least_error, least_divergence):
        assert search(counts, (0.0, 1e-44), unsigned=unsigned)[0] == 0
