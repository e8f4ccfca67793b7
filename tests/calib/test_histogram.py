from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib.histogram import Counter, Histogram, bins_of, from_runs, histogram_of, merge_histograms, to_runs

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
VALUES = hnp.arrays(np.float32, st.integers(0, 60), elements=FLOATS)
BITS = st.sampled_from([0, 4, 7, 11])
LARGEST, SMALLEST = np.float32(3.4028235e38), np.float32(1e-45)


def counted(values, bits=7):
    """Bins and counts, one value at a time."""
    found: dict[int, int] = {}
    for value in values.tolist():
        code = int(np.float32(value).view(np.uint32))
        magnitude = (code & 0x7FFFFFFF) >> (23 - bits)
        place = -magnitude if code >> 31 else magnitude
        found[place] = found.get(place, 0) + 1
    return dict(sorted(found.items()))


@given(VALUES, BITS)
def test_counts_are_those_of_a_count_by_hand(values, bits):
    found = histogram_of(values, bits=bits)
    assert dict(zip(found.bins.tolist(), found.counts.tolist(), strict=True)) == counted(values, bits)
    assert found.total == len(values)
    assert (found.bins.dtype, found.counts.dtype) == (np.int32, np.int64)
    assert set(bins_of(values, bits).tolist()) == set(found.bins.tolist())


@given(VALUES, BITS)
def test_every_value_lies_between_the_edges_of_its_bin(values, bits):
    for value in values:
        found = histogram_of(value, bits=bits)
        (low,), (high,) = found.edges()
        exact = float(value)
        assert low <= exact < high if exact > 0 else low < exact <= high if found.bins[0] < 0 else low < exact < high
        # As wide as promised, but for subnormal numbers, which have an absolute width.
        assert high - low <= max(abs(exact) * 2.0**-bits, 2.0 ** (-125 - bits))


def test_edges_reach_from_the_smallest_to_past_the_largest_float():
    found = histogram_of(np.array([-LARGEST, -SMALLEST, 0, SMALLEST, LARGEST]))
    low, high = found.edges()
    assert found.counts.tolist() == [1, 3, 1]
    assert (low[0], high[-1]) == (-(2.0**128), 2.0**128)
    assert (low[1], high[1]) == (-(2.0**-133), 2.0**-133)


def test_a_bin_begins_where_its_neighbour_ends():
    bins = np.arange(-(255 << 7) + 1, 255 << 7, dtype=np.int32)
    low, high = Histogram(7, bins, np.ones(len(bins), np.int64)).edges()
    assert (low[1:] == high[:-1]).all()
    assert (low < high).all()


@given(VALUES, st.randoms(), st.integers(1, 5), BITS)
def test_order_and_shards_change_nothing(values, random, parts, bits):
    whole = histogram_of(values, bits=bits)
    order = random.sample(range(len(values)), len(values))
    pieces = np.array_split(values[order], parts)
    assert merge_histograms([histogram_of(piece, bits=bits) for piece in pieces]) == whole
    counter = Counter(bits)
    for piece in pieces:
        counter.add(piece)
    assert counter.result() == whole
    assert hash(counter.result()) == hash(whole)


@given(VALUES, st.integers(1, 4))
def test_times_counts_as_if_repeated(values, times):
    counter = Counter()
    counter.add(values, times)
    assert counter.result() == histogram_of(np.repeat(values, times))


def test_more_values_than_are_counted_at_once():
    values = np.random.default_rng(0).standard_normal(3 * Counter._CHUNK + 5).astype(np.float32)
    assert histogram_of(values) == merge_histograms([histogram_of(v) for v in np.array_split(values, 7)])
    assert histogram_of(values).total == len(values)


@given(VALUES)
def test_magnitudes_fold_the_sign_away(values):
    assert histogram_of(values).magnitudes() == histogram_of(np.abs(values))


def test_an_outlier_takes_no_precision_from_the_rest():
    values = np.linspace(1e-3, 2e-3, 1000)
    found = histogram_of(np.append(values, 1e30))
    assert len(found.bins) == len(histogram_of(values).bins) + 1


def test_memory_is_that_of_the_bins_in_between():
    counter = Counter()
    for _ in range(100):
        counter.add(np.float32([1, 2, -3]))
    assert len(counter._positive._counts) == 129
    assert len(counter._negative._counts) == 1


@given(VALUES, BITS)
def test_runs_are_json_and_come_back(values, bits):
    found = histogram_of(values, bits=bits)
    assert from_runs(bits, json.loads(json.dumps(to_runs(found)))) == found


def test_neighbours_share_a_run():
    assert len(to_runs(histogram_of(np.linspace(1, 2, 10_000)))) == 1


@pytest.mark.parametrize(
    ("bits", "runs"),
    [
        (7, [[3]]), (7, [[3, 0]]), (7, [[3, -1]]), (7, [[3, 1.0]]), (7, [["3", 1]]), (7, [[3, 1], [3, 1]]),
        (7, [[3, 1], [2, 1]]), (7, [[3, 1, 1], [4, 1]]), (7, [[255 << 7, 1]]), (7, [[-(255 << 7), 1]]),
        (7, [[(255 << 7) - 1, 1, 1]]), (7, [[True, 1]]), (24, [[1, 1]]), (-1, [[1, 1]]), (7.0, [[1, 1]]),
    ],
)  # fmt: skip
def test_runs_that_cannot_be_are_refused(bits, runs):
    with pytest.raises(ValueError, match="a histogram with"):
        from_runs(bits, runs)


def test_other_bins_cannot_be_added():
    with pytest.raises(ValueError, match=r"\[4, 7\] bits"):
        merge_histograms([histogram_of(np.float32([1]), bits=4), histogram_of(np.float32([1]))])
    with pytest.raises(ValueError, match=r"\[\] bits"):
        merge_histograms([])


def test_equality():
    one = histogram_of(np.float32([1, 2]))
    assert one == histogram_of(np.float32([2, 1]))
    assert one != histogram_of(np.float32([1, 2, 2]))
    assert one != histogram_of(np.float32([1, 4]))
    assert one != histogram_of(np.float32([1, 2]), bits=4)
    assert one != "x"
    assert math.isclose(one.edges()[1][0], 1 + 2**-7)
