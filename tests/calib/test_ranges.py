from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import FileError, RangesError
from calib.fingerprint import model_fingerprint
from calib.histogram import CHANNEL_BITS, histogram_of
from calib.merge import merge
from calib.ranges import EMPTY, Ranges, TensorRange, check_fresh, load, save

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
A, B = "a" * 64, "b" * 64


def tensor(*rows, count=1):
    values = np.array(rows, np.float32)
    low, high = values.min(1), values.max(1)
    return TensorRange(float(low.min()), float(high.max()), "float32", count, 1, low, high)


def ranges(tensors=None, *, data=1, samples=1, skipped=None, model=A):
    tensors = {"x": tensor([0, 1], [-2, 3])} if tensors is None else tensors
    return Ranges(tensors, model, f"{data:064x}", "max", samples, skipped or {}, {"onnxruntime": "1"})


@given(rows=st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=20))
def test_round_trip_is_exact(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "r.json"
    before = ranges({'t/é "q"': tensor(*rows), "s": TensorRange(-1.5, 0.125, "float16", 3)})
    save(before, path)
    after = load(path)
    assert after == before
    assert after.tensors['t/é "q"'].channel_max.dtype == np.float32


def counted(rows, **more):
    values = np.array(rows, np.float32)
    channels = tuple(histogram_of(row, bits=CHANNEL_BITS) for row in values)
    return dataclasses.replace(tensor(*rows), histogram=histogram_of(values), channel_histograms=channels, **more)


@given(rows=st.lists(st.tuples(FLOATS, FLOATS, FLOATS), min_size=1, max_size=9))
def test_round_trip_of_histograms_and_settings_is_exact(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("r") / "r.json"
    bare = dataclasses.replace(counted(rows), axis=None, channel_min=None, channel_max=None, channel_histograms=None)
    before = dataclasses.replace(
        ranges({"x": counted(rows), "s": bare}),
        method="percentile",
        percentile=99.5,
        channels=True,
        sketch=("0a", "f1"),
    )
    save(before, path)
    assert load(path) == before


VERSION_1 = """{
  "format": "calib-ranges",
  "version": 1,
  "model": "%s",
  "data": "%s",
  "settings": {"method": "max", "samples": 3},
  "versions": {"onnx": "1.23.2", "onnxruntime": "1.31.1"},
  "skipped": {"m": "it holds -inf as an attention mask"},
  "tensors": {
    "x": {"min": -0.1, "max": 3.0, "dtype": "float32", "count": 3, "axis": 1,
          "channel_min": [-0.1, 0.0], "channel_max": [1.0, 3.0]},
    "s": {"min": 0.0, "max": 1.0, "dtype": "float16", "count": 3}
  }
}
"""


def test_files_of_version_1_are_read(tmp_path):
    (tmp_path / "r.json").write_text(VERSION_1 % (A, B))
    found = load(tmp_path / "r.json")
    assert found.tensors["x"] == tensor([-0.1, 1], [0, 3], count=3)
    assert (found.method, found.samples, found.percentile, found.channels, found.sketch) == ("max", 3, None, False, ())
    assert found.skipped == {"m": "it holds -inf as an attention mask"}


def test_the_file_has_a_line_a_tensor_and_short_numbers(tmp_path):
    save(ranges({"x": tensor([0, 0.1]), "y": tensor([1, 2])}), tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"channel_max": ' in line for line in lines) == 2
    assert any('"max": 0.1,' in line for line in lines)


def test_every_cut_is_noticed(tmp_path):
    path = tmp_path / "r.json"
    save(ranges(), path)
    whole = path.read_bytes().rstrip()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(RangesError) as caught:
            load(path)
        assert str(path) in str(caught.value)


def _edit(*path, to=None, drop=False):
    def change(value):
        for step in path[:-1]:
            value = value[step]
        if drop:
            del value[path[-1]]
        else:
            value[path[-1]] = to

    return change


X = ("tensors", "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit("format", to="other"), "is not a ranges file"),
        (_edit("version", to=99), "format version 99; this program reads 1 to 2"),
        (_edit("model", to="abc"), "model fingerprint"),
        (_edit("data", to=5), "data fingerprint"),
        (_edit("model", drop=True), "'model' is missing"),
        (_edit("settings", "method", to="magic"), "unknown method 'magic'"),
        (_edit("settings", "samples", to=0), "samples is 0"),
        (_edit("tensors", to=[1]), "is damaged"),
        (_edit("skipped", to=None), "is damaged"),
        (_edit(*X, to=None), "is damaged"),
        (_edit(*X, "min", drop=True), "'min' is missing"),
        (_edit(*X, "min", to=float("nan")), "'x' has nan"),
        (_edit(*X, "max", to=float("inf")), "'x' has inf"),
        (_edit(*X, "max", to=1e39), "'x' has 1e+39"),
        (_edit(*X, "max", to="3"), "'x' has '3'"),
        (_edit(*X, "max", to=True), "'x' has True"),
        (_edit(*X, "min", to=4), "min 4.0 above max 3.0"),
        (_edit(*X, "count", to=-1), "count -1"),
        (_edit(*X, "dtype", to="int8"), "dtype 'int8'"),
        (_edit(*X, "axis", to=-1), "axis -1"),
        (_edit(*X, "channel_max", to=[1]), "2 channel minima and 1 maxima"),
        (_edit(*X, "channel_max", to=[]), "2 channel minima and 0 maxima"),
        (_edit(*X, "channel_max", 0, to=9), "contradict"),
        (_edit(*X, "channel_min", 0, to=2), "contradict"),
        (_edit(*X, "channel_min", 1, to=None), "'x' has None"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = tmp_path / "r.json"
    save(ranges(), path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(RangesError) as caught:
        load(path)
    assert message in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit(*X, "histogram", to=[]), "histogram that contradicts its min and max"),
        (_edit(*X, "histogram", to=[[1]]), "a run that is no list of whole numbers"),
        (_edit(*X, "histogram", to=[[1, 1]]), "contradicts its min and max"),
        (_edit(*X, "histogram", to=[[0, -1]]), "bins or counts that cannot be"),
        (_edit(*X, "histogram", to=5), "is damaged"),
        (_edit(*X, "channel_histograms", to=[]), "is damaged"),
        (_edit(*X, "channel_histograms", 0, to=[[0, 1]]), "contradicts its min and max"),
        (_edit("settings", "percentile", to=101), "percentile is 101"),
        (_edit("settings", "percentile", to="99"), "percentile is '99'"),
        (_edit("settings", "percentile", drop=True), "'percentile' is missing"),
        (_edit("settings", "samples", to=0), "samples is 0"),
        (_edit("version", to=3), "format version 3; this program reads 1 to 2"),
        (_edit("version", to=True), "format version True"),
        (_edit("sketch", to=7), "is damaged"),
    ],
)
def test_damage_of_histograms_is_named(tmp_path, change, message):
    path = tmp_path / "r.json"
    whole = dataclasses.replace(ranges({"x": counted([[0, 1], [-2, 3]])}), method="percentile", percentile=99.5)
    save(whole, path)
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(RangesError) as caught:
        load(path)
    assert message in str(caught.value)


def test_what_is_no_ranges_file_at_all(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        load(tmp_path / "absent.json")
    for content in (b"", b"[]", b"\x80\xff", b"3", b"{}", b"[" * 100_000):
        (tmp_path / "r.json").write_bytes(content)
        with pytest.raises(RangesError):
            load(tmp_path / "r.json")


def test_a_failed_save_leaves_the_older_file(tmp_path):
    path = tmp_path / "r.json"
    save(ranges(), path)
    before = path.read_bytes()
    broken = ranges({"x": TensorRange(float("nan"), 1.0, "float32", 1)})
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_check_fresh():
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["":17]> g (float[1] x) => (float[1] y) {y=Relu(x)}')
    mine = ranges(model=model_fingerprint(model))
    check_fresh(mine, model)
    model.graph.node[0].op_type = "Abs"
    with pytest.raises(RangesError, match="measured on another network"):
        check_fresh(mine, model, source="r.json")


def test_merge_takes_extremes_and_adds_up():
    a = ranges({"x": tensor([0, 1], [-2, 3])}, data=3, samples=2)
    b = ranges({"x": tensor([-5, 0], [1, 9])}, data=4, samples=5)
    expected = ranges({"x": tensor([-5, 1], [-2, 9], count=2)}, data=7, samples=7)
    assert merge(a, b) == merge(b, a) == expected
    assert merge(a) == a


def test_merge_keeps_what_only_one_shard_saw_in_order():
    a = ranges({"p": tensor([0]), "r": tensor([0])}, skipped={"q": EMPTY})
    b = ranges({"p": tensor([0]), "q": tensor([1]), "r": tensor([0])})
    assert list(merge(a, b).tensors) == list(merge(b, a).tensors) == ["p", "q", "r"]
    assert merge(a, b).skipped == {}


def test_merge_drops_what_one_shard_could_not_measure():
    a = ranges({"p": tensor([0])}, skipped={"q": "it holds -inf"})
    b = ranges({"p": tensor([0]), "q": tensor([1])})
    assert list(merge(b, a).tensors) == ["p"]
    assert merge(b, a).skipped == {"q": "it holds -inf"}


def test_merge_drops_channels_that_disagree():
    joined = merge(ranges({"x": tensor([0, 1], [2, 3])}), ranges({"x": tensor([4, 5])})).tensors["x"]
    assert (joined.min, joined.max, joined.axis, joined.channel_min) == (0, 5, None, None)


@given(st.lists(st.lists(st.tuples(FLOATS, FLOATS), min_size=2, max_size=2), min_size=1, max_size=4))
def test_merged_counts_are_those_of_all_values(shards):
    joined = merge(*(ranges({"x": counted(rows)}) for rows in shards)).tensors["x"]
    together = np.concatenate([np.array(rows, np.float32) for rows in shards], axis=1)
    assert joined == counted(together, count=len(shards))


def test_merge_refuses_other_networks():
    with pytest.raises(RangesError, match="different networks"):
        merge(ranges(), ranges(model=B))
    with pytest.raises(RangesError, match="no ranges"):
        merge()


def test_equality_and_absmax():
    one = tensor([0, 1], [-2, 1])
    assert one == tensor([0, 1], [-2, 1])
    assert hash(one) == hash(tensor([0, 1], [-2, 1]))
    assert one != dataclasses.replace(one, channel_max=None)
    assert one != tensor([0, 1], [-2, 0.5])
    assert one != "x"
    assert one.absmax == 2
