from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import FileError, RangesError
from calib.graph import never_negative
from calib.histogram import histogram_of
from calib.merge import merge
from calib.ranges import Ranges, TensorRange, load, save
from calib.trt_cache import Cache, from_cache, read_cache, to_cache, write_cache

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] input) => (float[N, 4] out) { a = Neg(input) r = Relu(a) out = Add(r, input) }"""
# As TensorRT 8.6 wrote it: no leading zeros, 0 for what was always zero, its own names for layers of its own.
PUBLISHED = """TRT-8601-EntropyCalibration2
input: 3c010a14
(Unnamed Layer* 64) [Shuffle]_output: 0
a: 3c010a14
r: 3b66eddc
module/conv:0: 3dc6cf6e
"""


def model():
    return onnx.parser.parse_model(MODEL)


def test_a_published_file_is_read(tmp_path):
    (tmp_path / "c").write_text(PUBLISHED)
    cache = read_cache(tmp_path / "c")
    assert cache.header == "TRT-8601-EntropyCalibration2"
    assert list(cache.scales) == ["input", "(Unnamed Layer* 64) [Shuffle]_output", "a", "r", "module/conv:0"]
    # Its entropy calibrator ends a range at the middle of one of 2048 bins: 1 became 2048.5 / 2048.
    assert cache.scales["input"] * 127 == pytest.approx(2048.5 / 2048, abs=1e-7)
    assert cache.scales["module/conv:0"] == pytest.approx(0.0970753)
    assert cache.scales["(Unnamed Layer* 64) [Shuffle]_output"] == 0
    write_cache(cache, tmp_path / "again")
    assert (tmp_path / "again").read_text() == PUBLISHED


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\n\r", exclude_categories=["Cs"]), min_size=1).filter(
    str.strip
)


@given(st.dictionaries(NAMES, st.floats(width=32, min_value=0, allow_nan=False)))
def test_any_name_and_scale_come_back(tmp_path_factory, scales):
    path = tmp_path_factory.mktemp("c") / "c"
    write_cache(Cache("TRT-10000-MinMaxCalibration", scales), path)
    assert read_cache(path) == Cache("TRT-10000-MinMaxCalibration", scales)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no calibration cache"),
        ("{}", "is no calibration cache"),
        ("a: 3c010a14\n", "is no calibration cache"),
        ("TRT-8601-EntropyCalibration2\na 3c010a14\n", "line 2: 'a 3c010a14' is no name with a scale"),
        ("TRT-8601-EntropyCalibration2\na: 3c010a14\nb: \n", "line 3"),
        ("TRT-8601-EntropyCalibration2\nb: xyz\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nb: 3c010a140\n", "line 2"),
        ("TRT-8601-EntropyCalibration2\nb: 3c\nb: 3c\n", "tensor 'b' has two scales"),
    ],
)
def test_what_is_no_cache_is_told(tmp_path, text, message):
    (tmp_path / "c").write_text(text)
    with pytest.raises(RangesError, match=message):
        read_cache(tmp_path / "c")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileError, match="cannot read"):
        read_cache(tmp_path / "absent")
    (tmp_path / "c").write_bytes(b"TRT-8601-\xff\xfe")
    with pytest.raises(RangesError, match="no text"):
        read_cache(tmp_path / "c")


def ranges(tensors, **more):
    return Ranges(tensors, "a" * 64, "b" * 64, "max", 3, **more)


def test_scales_cover_the_larger_side():
    cache, skipped = to_cache(
        ranges({"a": TensorRange(-2.54, 1, "float32", 1), "b": TensorRange(0.0, 127.0, "float32", 1)}), version="10300"
    )
    assert cache == Cache("TRT-10300-EntropyCalibration2", {"a": float(np.float32(0.02)), "b": 1.0})
    assert skipped == {}


def test_scales_follow_the_method():
    values = np.append(np.linspace(-1, 1, 100_000), 50.0).astype(np.float32)
    wide = TensorRange(-1.0, 50.0, "float32", 1, histogram=histogram_of(values))
    measured = Ranges({"a": wide}, "a" * 64, "b" * 64, "percentile", 3, percentile=99.9)
    assert to_cache(measured)[0].scales["a"] == pytest.approx(1 / 127, rel=0.01)
    assert to_cache(measured, method="max")[0].scales["a"] == pytest.approx(50 / 127)
    with pytest.raises(RangesError, match="no histogram"):
        to_cache(ranges({"a": TensorRange(-1.0, 50.0, "float32", 1)}), method="mse")


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 3.4e38])
def test_no_scale_is_zero_or_infinite(tmp_path, size):
    cache, _ = to_cache(ranges({"a": TensorRange(0.0, float(np.float32(size)), "float32", 1)}))
    write_cache(cache, tmp_path / "c")
    assert 0 < read_cache(tmp_path / "c").scales["a"] < np.inf


def test_names_that_fit_on_no_line_are_told():
    cache, skipped = to_cache(ranges({name: TensorRange(0.0, 1.0, "float32", 1) for name in ("a\nb", " ", "c")}))
    assert list(cache.scales) == ["c"]
    assert skipped == dict.fromkeys(("a\nb", " "), "its name does not fit on a line")


def test_headers_that_are_none():
    with pytest.raises(RangesError, match="no header"):
        to_cache(ranges({}), version="8.6\n")


@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_a_round_trip_moves_a_range_by_a_bit_at_most(size):
    measured = ranges({"input": TensorRange(-size, 0.0, "float32", 1)})
    back = from_cache(to_cache(measured)[0], model()).tensors["input"]
    assert back.min == -back.max
    assert abs(back.max - size) <= np.spacing(np.float32(size))


def test_ranges_of_a_cache_are_those_of_the_tensors_it_shares(tmp_path):
    (tmp_path / "c").write_text(PUBLISHED)
    found = from_cache(read_cache(tmp_path / "c"), model())
    assert list(found.tensors) == ["input", "a", "r"]
    assert (found.tensors["a"].min, found.tensors["a"].max) == pytest.approx((-2048.5 / 2048, 2048.5 / 2048), abs=1e-7)
    assert found.tensors["r"].min == 0, "behind a ReLU"
    assert found.tensors["r"].axis is None
    assert (found.samples, int(found.data, 16), found.method) == (0, 0, "max")
    assert found.versions == {"calibration cache": "TRT-8601-EntropyCalibration2"}
    save(found, tmp_path / "r.json")
    assert load(tmp_path / "r.json") == found
    with pytest.raises(RangesError, match="cannot be merged"):
        merge(found, found)


def test_scales_that_are_none_are_left_out():
    cache = Cache("TRT-7000-EntropyCalibration2", {"input": np.inf, "a": -1.0, "r": 0.5, "out": 3e38})
    found = from_cache(cache, model())
    assert list(found.tensors) == ["r"]
    assert found.skipped["input"] == "its scale in the cache is inf"
    assert set(found.skipped) == {"input", "a", "out"}


def test_a_cache_of_another_network_is_refused():
    with pytest.raises(RangesError, match="no scale for any tensor"):
        from_cache(Cache("TRT-8601-EntropyCalibration2", {"other": 1.0}), model())


def test_what_is_never_negative():
    graph = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4] x) => (float[N, 8] y)
    { r = Relu(x) s = Sigmoid(x) p = Add(r, s) q = Add(r, x) c = Concat<axis = 1>(p, s) t = Transpose(c)
      n = Neg(r) m = Mul(n, n) k = Clip(x) y = Identity(t) }""")
    assert never_negative(graph) == {"r", "s", "p", "c", "t", "y"}
    graph.graph.node[0].domain = "mine"
    assert "r" not in never_negative(graph)
