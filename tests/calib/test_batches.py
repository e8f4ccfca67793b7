from __future__ import annotations

import numpy as np
import pytest

from calib.batches import batches
from calib.errors import DataError
from calib.inputs import InputSpec
from calib.sources import open_source

F32 = np.dtype("float32")


def spec(*shape, name="x"):
    return InputSpec(name, F32, shape)


def groups(data, specs, batch_size=1):
    return list(batches(open_source(data, specs), specs, batch_size=batch_size))


def rows(count):
    return np.arange(count * 2, dtype=np.float32).reshape(count, 2)


def test_dynamic_batch_takes_what_is_asked_and_a_short_tail():
    found = groups(rows(5), [spec(None, 2)], batch_size=2)
    assert [len(b.feeds["x"]) for b in found] == [2, 2, 1]
    assert [b.first for b in found] == [0, 2, 4]


def test_fixed_batch_is_kept_and_the_tail_repeats_the_last_sample():
    found = groups(rows(5), [spec(4, 2)], batch_size=1)
    assert [len(b.samples) for b in found] == [4, 1]
    assert np.array_equal(found[1].feeds["x"], rows(5)[[4, 4, 4, 4]])


def test_batch_fixed_at_one_overrides_the_option():
    assert [len(b.feeds["x"]) for b in groups(rows(3), [spec(1, 2)], batch_size=8)] == [1, 1, 1]


def test_one_fixed_input_fixes_the_others():
    found = groups({"x": rows(3), "z": rows(3)}, [spec(None, 2), spec(1, 2, name="z")], batch_size=8)
    assert [len(b.feeds["x"]) for b in found] == [1, 1, 1]


def test_shapes_that_differ_do_not_share_a_batch():
    data = [np.ones((1, n), np.float32) for n in (2, 2, 3, 3, 3, 2)]
    assert [b.feeds["x"].shape for b in groups(data, [spec(None, None)], batch_size=8)] == [(2, 2), (3, 3), (1, 2)]


def test_complete_inputs_are_fed_one_by_one():
    found = groups(np.ones((3, 4, 2), np.float32), [spec(4, 2)], batch_size=8)
    assert [b.feeds["x"].shape for b in found] == [(4, 2)] * 3


def test_first_axes_that_differ_ask_for_complete_inputs():
    with pytest.raises(DataError, match="different first axes") as caught:
        groups({"x": rows(3), "z": rows(3)}, [spec(4, 2), spec(7, 2, name="z")])
    assert "complete inputs" in caught.value.hint


def test_complete_inputs_beside_a_sample_are_refused():
    with pytest.raises(DataError, match=r"takes shape \(4, 2\), the data has \(1, 2\)"):
        groups({"x": np.ones((3, 2), np.float32), "t": np.float32(1)}, [spec(4, 2), spec(name="t")])
