from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest

from calib import arrays
from calib.errors import DataError
from calib.inputs import InputSpec
from calib.sources import open_source

F32 = np.dtype("float32")
IMAGE = InputSpec("x", F32, (None, 3, 4, 5))
TOKENS = InputSpec("ids", np.dtype("int64"), (None, 6))
RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((7, 3, 4, 5)).astype(np.float32)


def feeds(source, name="x"):
    return [sample.feeds[name] for sample in source]


def refused(data, specs=(IMAGE,), **options):
    with pytest.raises(DataError) as caught:
        list(open_source(data, specs, **options))
    return str(caught.value)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)
    return path


def test_npy_streams_samples_in_order(tmp_path):
    source = open_source(save(tmp_path / "x.npy", DATA), [IMAGE])
    assert source.length == 7
    assert np.array_equal(np.concatenate(feeds(source)), DATA)
    assert np.array_equal(np.concatenate(feeds(source)), DATA)  # a second pass starts anew


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npz_is_read_by_input_name(tmp_path, write, order):
    ids = RNG.integers(0, 9, (7, 6))
    write(tmp_path / "d.npz", x=np.asarray(DATA, order=order), ids=ids, labels=np.arange(7))
    samples = list(source := open_source(str(tmp_path / "d.npz"), [IMAGE, TOKENS]))
    assert source.length == 7
    assert np.array_equal(np.concatenate([s.feeds["x"] for s in samples]), DATA)
    assert np.array_equal(np.concatenate([s.feeds["ids"] for s in samples]), ids)
    assert set(samples[0].feeds) == {"x", "ids"}


def test_folder_of_npy_takes_samples_and_batches_in_name_order(tmp_path):
    save(tmp_path / "d/b.npy", DATA[1:3])
    save(tmp_path / "d/a.npy", DATA[0])
    save(tmp_path / "d/sub/c.npy", DATA[3:])
    save(tmp_path / "d/.hidden.npy", DATA)
    (tmp_path / "d/README.txt").write_text("not data")
    source = open_source(tmp_path / "d", [IMAGE])
    assert source.length == 7
    assert np.array_equal(np.concatenate(feeds(source)), DATA)


def test_folder_of_npz(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=DATA[i], ids=np.arange(6))
    assert [s.feeds["ids"].shape for s in open_source(tmp_path, [IMAGE, TOKENS])] == [(1, 6)] * 3


def test_complete_inputs_have_one_axis_more(tmp_path):
    fixed = InputSpec("x", F32, (2, 3))
    samples = list(open_source(np.ones((5, 2, 3), np.float32), [fixed]))
    assert len(samples) == 5
    assert all(s.whole and s.feeds["x"].shape == (2, 3) for s in samples)


def test_a_scalar_input_is_shared_by_all_samples():
    scalar = InputSpec("threshold", F32, ())
    samples = list(open_source({"x": DATA, "threshold": np.float32(0.5)}, [IMAGE, scalar]))
    assert [float(s.feeds["threshold"]) for s in samples] == [0.5] * 7
    assert all(s.whole for s in samples)


@pytest.mark.parametrize(
    ("spec", "array", "dtype"),
    [
        (InputSpec("x", F32, (None, 2)), np.ones((1, 2)), F32),
        (InputSpec("x", np.dtype("float16"), (None, 2)), np.ones((1, 2), np.float32), np.dtype("float16")),
        (InputSpec("x", np.dtype("int64"), (None, 2)), np.ones((1, 2), np.int32), np.dtype("int64")),
        (InputSpec("x", np.dtype("int32"), (None, 2)), np.ones((1, 2), np.int64), np.dtype("int32")),
        (InputSpec("x", F32, (None, 2)), np.ones((1, 2), ">f4"), F32),
        (InputSpec("x", np.dtype("bool"), (None, 2)), np.ones((1, 2), bool), np.dtype("bool")),
    ],
)
def test_safe_casts(spec, array, dtype):
    (value,) = feeds(open_source(array, [spec]))
    assert value.dtype == dtype
    assert value.dtype.isnative


@pytest.mark.parametrize(
    ("dtype", "array", "message"),
    [
        ("float32", np.ones((1, 2), np.uint8), "takes float32, the data is uint8"),
        ("float32", np.full((1, 2), 1e300), "values too large"),
        ("float16", np.full((1, 2), 1e6, np.float32), "values too large"),
        ("int32", np.full((1, 2), 1 << 40), "out of its range"),
        ("int64", np.ones((1, 2), np.float32), "takes int64, the data is float32"),
        ("uint8", np.full((1, 2), -1), "out of its range"),
    ],
)
def test_unsafe_casts_are_refused(dtype, array, message):
    assert message in refused(array, [InputSpec("x", np.dtype(dtype), (None, 2))])


@pytest.mark.parametrize(("bad", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")])
def test_non_finite_data_names_file_and_sample(tmp_path, bad, word):
    data = DATA.copy()
    data[4, 1, 2, 3] = bad
    message = refused(save(tmp_path / "x.npy", data))
    assert f"x.npy, sample 4: input 'x' contains {word}" in message


def test_shape_and_rank_messages_say_expected_and_found(tmp_path):
    assert "takes shape (?, 3, 4, 5), the data has (7, 3, 5, 4)" in refused(DATA.transpose(0, 1, 3, 2))
    assert "takes shape (?, 3, 4, 5), the data has (3, 4)" in refused(DATA[0, :, :, 0])
    assert "transpose(0, 3, 1, 2)" in refused(DATA.transpose(0, 2, 3, 1))
    assert "has (7, 3, 0, 5)" in refused(np.ones((7, 3, 0, 5), np.float32), [InputSpec("x", F32, (None, 3, None, 5))])


def test_wrong_names_list_the_models(tmp_path):
    np.savez(tmp_path / "d.npz", image=DATA)
    message = refused(tmp_path / "d.npz", [IMAGE, TOKENS])
    assert "no array for input 'x'" in message
    assert "holds 'image'" in message
    assert "x float32(?, 3, 4, 5); ids int64(?, 6)" in message


def test_different_sample_counts_are_refused():
    message = refused({"x": DATA, "ids": np.zeros((6, 6), np.int64)}, [IMAGE, TOKENS])
    assert "different numbers of samples" in message


STATE = InputSpec("state", F32, (2, None, 8))
RATE = InputSpec("rate", np.dtype("int64"), ())


@pytest.mark.parametrize(("batch", "chunk"), [(1, (None, 16)), (3, (None, 16)), (3, (3, 16))])
def test_the_state_of_a_recurrent_network_makes_a_file_one_feed(tmp_path, batch, chunk):
    specs = [InputSpec("x", F32, chunk), STATE, RATE]
    for number in range(4):
        x, state = RNG.standard_normal((batch, 16), np.float32), RNG.standard_normal((2, batch, 8), np.float32)
        np.savez(tmp_path / f"{number}.npz", x=x, state=state, rate=np.array(16000))
    source = open_source(tmp_path, specs)
    samples = list(source)
    assert source.length == len(samples) == 4
    assert all(sample.whole for sample in samples)
    with np.load(tmp_path / "3.npz") as stored:
        assert all(np.array_equal(stored[name], samples[3].feeds[name]) for name in ("x", "state", "rate"))


@pytest.mark.parametrize(
    ("x", "state"),
    [((2, 16), (2, 2, 8)), ((5, 16), (3, 1, 8)), ((5, 16), (2, 1, 9)), ((5, 16), (2, 0, 8))],
)
def test_what_is_no_feed_of_one_state_is_not_taken_for_one(x, state):
    """Equal lengths are samples side by side as ever; an extent that the network does not take is an error."""
    data = {"x": np.ones(x, np.float32), "state": np.ones(state, np.float32)}
    specs = [InputSpec("x", F32, (None, 16)), STATE]
    if x[0] == state[0] == 2:
        assert [sample.whole for sample in open_source(data, specs)] == [False, False]
    else:
        refused(data, specs)


def test_open_axes_of_different_lengths_are_no_feed():
    specs = [InputSpec("x", F32, (None, 16)), InputSpec("y", F32, (None, 4)), STATE]
    data = {
        "x": np.ones((5, 16), np.float32),
        "y": np.ones((4, 4), np.float32),
        "state": np.ones((2, 5, 8), np.float32),
    }
    assert "different numbers of samples" in refused(data, specs)


def test_nan_in_a_state_is_named():
    state = np.ones((2, 1, 8), np.float32)
    state[1, 0, 3] = np.nan
    assert "input 'state' contains NaN" in refused(
        {"x": np.ones((1, 16), np.float32), "state": state},
        [
            InputSpec("x", F32, (None, 16)),
            STATE,
        ],
    )


def test_unnamed_data_for_two_inputs_is_refused(tmp_path):
    assert "the model has 2 inputs: x, ids" in refused(save(tmp_path / "x.npy", DATA), [IMAGE, TOKENS])


def test_empty_data_is_refused(tmp_path):
    assert "is empty" in refused(save(tmp_path / "x.npy", DATA[:0]))
    (tmp_path / "none").mkdir()
    assert "is empty" in refused(tmp_path / "none")
    np.savez(tmp_path / "e.npz")
    assert "is empty" in refused(tmp_path / "e.npz")
    assert "is empty" in refused(lambda: iter(()))


def test_missing_and_unknown_paths(tmp_path):
    assert "does not exist" in refused(tmp_path / "absent.npy")
    (tmp_path / "a.txt").write_text("x")
    assert "neither a .npy nor a .npz" in refused(tmp_path / "a.txt")
    save(tmp_path / "two/a.npy", DATA)
    np.savez(tmp_path / "two/b.npz", x=DATA)
    assert "several kinds: .npy, .npz" in refused(tmp_path / "two")


@pytest.mark.parametrize("keep", [3, 40, 100, -1])
def test_truncated_npy(tmp_path, keep):
    path = save(tmp_path / "x.npy", DATA)
    path.write_bytes(path.read_bytes()[:keep])
    assert "x.npy" in refused(path)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_truncated_npz(tmp_path, fraction):
    path = tmp_path / "x.npz"
    np.savez(path, x=DATA)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    assert "is not a .npz file, or is cut short" in refused(path)


def test_a_damaged_npz_member(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=DATA)
    data = bytearray(path.read_bytes())
    data[600] ^= 0xFF  # inside the array, so its checksum no longer fits
    path.write_bytes(data)
    assert "array 'x' is damaged" in refused(path)


def test_object_arrays_are_never_unpickled(tmp_path):
    np.save(tmp_path / "o.npy", np.array([{"a": 1}, None], object))
    np.savez(tmp_path / "o.npz", x=np.array([{"a": 1}], object))
    for name in ("o.npy", "o.npz"):
        assert "Python objects, which are never loaded" in refused(tmp_path / name)
    np.save(tmp_path / "s.npy", np.array(["a", "b"]))
    assert "not numbers" in refused(tmp_path / "s.npy")


def _member(shape, data=b""):
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


def test_a_header_that_claims_too_much(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", _member((1 << 40, 3, 4, 5)))
    assert "is cut short" in refused(tmp_path / "x.npz")
    (tmp_path / "x.npy").write_bytes(_member((1 << 40, 3, 4, 5)))
    assert "is cut short" in refused(tmp_path / "x.npy")


def test_zip_bombs_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "MAX_UNPACKED_BYTES", 1 << 20)
    np.savez_compressed(tmp_path / "x.npz", x=np.zeros((5000, 3, 4, 5), np.float32))
    assert "claims to unpack" in refused(tmp_path / "x.npz")
    monkeypatch.setattr(arrays, "MAX_SAMPLE_BYTES", 100)
    np.savez(tmp_path / "y.npz", x=DATA)
    assert "at once; the limit is" in refused(tmp_path / "y.npz")


@pytest.mark.parametrize(
    "give",
    [
        lambda: DATA,
        lambda: {"x": DATA},
        lambda: iter(DATA),
        lambda: [DATA[:3], DATA[3:]],
        lambda: ({"x": row} for row in DATA),
        lambda: (row[None].astype(np.float64) for row in DATA),
    ],
)
def test_functions_may_return_or_yield(give):
    # float32 to float64 and back is exact
    assert np.array_equal(np.concatenate(feeds(open_source(give, [IMAGE]))), DATA)


MODULE = """import numpy as np
def rows():
    yield np.ones((3, 4, 5), 'f4')
def broken():
    yield np.ones((3, 4, 5), 'f4')
    raise KeyError('no photo')
number = 3
"""


def test_a_script_that_ends_the_program_is_named(tmp_path):
    (tmp_path / "script.py").write_text("import sys\ndef rows():\n    sys.exit(3)\n")
    (tmp_path / "parses.py").write_text("import argparse\nargparse.ArgumentParser().parse_args(['--unknown'])\n")
    assert "failed with SystemExit: 3" in refused(f"{tmp_path}/script.py:rows")
    assert "failed with SystemExit: 2" in refused(f"{tmp_path}/parses.py:rows")


def test_module_function_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "calib_test_module.py").write_text(MODULE)
    (tmp_path / "calib_test_wrong.py").write_text("x = undefined\n")
    for name in ("calib_test_module:rows", "calib_test_module.py:rows", f"{tmp_path}/calib_test_module.py:rows"):
        assert len(feeds(open_source(name, [IMAGE]))) == 1
    message = refused("calib_test_module:broken")
    assert "failed with KeyError: 'no photo'" in message
    assert "calib_test_module.py, line 6" in message
    assert "has no function 'absent'" in refused("calib_test_module:absent")
    assert "has no function 'number'" in refused("calib_test_module:number")
    assert "there is no module 'calib_test_absent'" in refused("calib_test_absent:rows")
    assert "NameError" in refused("calib_test_wrong:rows")


@pytest.mark.parametrize(
    ("give", "message"),
    [
        (lambda: 3, "gives int"),
        (lambda: "text", "gives str"),
        (lambda: [(DATA[0], 1)], "leave labels out"),
        (lambda: [np.array([None])], "Python objects"),
        (lambda: [{"y": DATA}], "no array for input 'x'"),
    ],
)
def test_what_functions_may_not_give(give, message):
    assert message in refused(give)


def test_unknown_rank_takes_samples_on_axis_0():
    assert [a.shape for a in feeds(open_source(DATA, [InputSpec("x", F32, None)]))] == [(1, 3, 4, 5)] * 7
