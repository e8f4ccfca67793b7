from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.bench.accuracy import Accuracy, Tally, read_labels, top1
from relu_deploy.errors import DataError


def tally(reference: np.ndarray, found: np.ndarray, labels: np.ndarray | None = None, *, batch: int = 100) -> Accuracy:
    counter = Tally("y", is_original=False)
    for start in range(0, len(reference), batch):
        part = slice(start, start + batch)
        counter.add(reference[part], found[part], None if labels is None else labels[part])
    return counter.result()


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 7))
def test_agrees_with_numpy_whatever_the_batch(seed: int, count: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    reference = rng.normal(size=(count, 5)).astype(np.float32)
    found = (reference + rng.normal(0, 0.3, size=(count, 5))).astype(np.float32)
    labels = rng.integers(0, 5, count)
    result = tally(reference, found, labels, batch=batch)
    before, after = reference.argmax(1) == labels, found.argmax(1) == labels
    assert (result.samples, result.top1) == (count, after.mean())
    assert (result.lost, result.gained) == ((before & ~after).sum(), (after & ~before).sum())
    assert result.agreement == (reference.argmax(1) == found.argmax(1)).mean()
    error = reference.astype(np.float64) - found
    expected = 10 * math.log10(np.sum(reference.astype(np.float64) ** 2) / np.sum(error**2))
    assert result.sqnr_db == pytest.approx(expected, abs=1e-9)  # float64 sums in another order
    assert result.max_abs_error == np.abs(error).max()


def test_equal_outputs() -> None:
    x = np.ones((3, 4), np.float32)
    result = tally(x, x)
    assert (result.max_abs_error, result.sqnr_db, result.agreement, result.top1) == (0.0, None, 1.0, None)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted_and_never_hidden(bad: float) -> None:
    x = np.ones((3, 4), np.float32)
    broken = x.copy()
    broken[1, 2] = bad
    result = tally(x, broken, batch=1)
    assert (result.nonfinite, result.max_abs_error, result.sqnr_db) == (1, None, None)


def test_float16_outputs_do_not_overflow_in_the_squares() -> None:
    x = np.full((2, 4), 6e4, np.float16)
    assert tally(x, (x * 0.5).astype(np.float16)).sqnr_db == pytest.approx(6.02, abs=0.01)  # 20 log10 2


def test_outputs_that_are_no_scores_are_compared_but_not_judged() -> None:
    x = np.ones((2, 3, 4), np.float32)
    assert tally(x, x).agreement is None
    with pytest.raises(DataError, match=r"labels need one score a class.*\(2, 3, 4\)"):
        tally(x, x, np.zeros(2, np.int64))
    with pytest.raises(DataError, match=r"shape \(2, 3, 4\); the original's has \(2, 12\)"):
        tally(x.reshape(2, 12), x)


def test_scores_may_have_axes_of_one() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2]])
    for shape in ((2, 2), (2, 2, 1, 1), (2, 1, 2)):
        found = top1(scores.reshape(shape))
        assert found is not None
        assert found.tolist() == [1, 0]
    assert top1(np.ones(3)) is None


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_labels_of_any_integer_type_and_as_a_column(tmp_path: Path, dtype: type) -> None:
    path = tmp_path / "l.npy"
    np.save(path, np.array([[1], [2]], dtype))
    assert read_labels(path).tolist() == [1, 2]


@pytest.mark.parametrize(
    "array", [np.array([0.5]), np.zeros((2, 3), int), np.zeros(0, int), np.array([-1]), np.array(["a"])]
)
def test_labels_that_are_no_class_numbers(tmp_path: Path, array: np.ndarray) -> None:
    path = tmp_path / "l.npy"
    np.save(path, array)
    with pytest.raises(DataError, match=r"l\.npy are .* of shape") as caught:
        read_labels(path)
    assert caught.value.hint is not None


def test_labels_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the labels"):
        read_labels(tmp_path / "none.npy")
    whole = tmp_path / "l.npy"
    np.save(whole, np.arange(100))
    cut = tmp_path / "cut.npy"
    cut.write_bytes(whole.read_bytes()[:-7])
    with pytest.raises(DataError, match="cannot read the labels"):
        read_labels(cut)
    pickled = tmp_path / "p.npy"
    np.save(pickled, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot read the labels"):
        read_labels(pickled)
    archive = tmp_path / "a.npz"
    np.savez(archive, labels=np.arange(3))
    with pytest.raises(DataError, match=r"\.npz archive"):
        read_labels(archive)
