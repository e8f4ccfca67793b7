from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st

from calib.errors import DataError, RangesError
from calib.fingerprint import SKETCH, sketch, sketch_of
from calib.inputs import InputSpec, model_inputs
from calib.merge import merge, shared_samples
from calib.run import calibrate
from calib.shards import Selection, Shard, parse_shard
from calib.sources import open_source

SPEC = InputSpec("x", np.dtype("float32"), (None, 1))


class Numbers:
    """Samples 0, 1, 2, ..., as many as it says."""

    inputs = (SPEC,)

    def __init__(self, length):
        self.length = length

    def __iter__(self):
        return iter(open_source(np.arange(self.length, dtype=np.float32)[:, None], (SPEC,)))


def values(selection):
    return [float(sample.feeds["x"][0, 0]) for sample in selection]


@given(count=st.integers(1, 30), most=st.none() | st.integers(1, 40), of=st.integers(1, 7))
def test_shards_are_all_of_the_samples_each_once(count, most, of):
    shards = [Selection(Numbers(count), most, Shard(i, of)) for i in range(1, of + 1)]
    taken = sorted(value for shard in shards for value in values(shard))
    assert taken == list(range(min(count, most or count)))
    for shard in shards:
        assert shard.length == len(values(shard))
        assert [shard.index(place) for place in range(shard.length)] == values(shard)


def test_the_length_of_a_function_is_not_known():
    made = open_source(lambda: iter([np.ones((1, 1), np.float32)] * 5), (SPEC,))
    assert Selection(made).length is None
    assert Selection(made, most=3, shard=Shard(2, 2)).length == 1


def test_images_of_other_shards_are_not_decoded(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'relu-deploy[images]'")
    for i in range(5):
        image.new("L", (2, 2), i * 10).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no image")
    specs = (InputSpec("x", np.dtype("float32"), (None, 1, 2, 2)),)
    photos = open_source(tmp_path, specs, preprocess="scale=1")
    found = [float(s.feeds["x"].max()) for s in Selection(photos, 4, Shard(1, 2))]
    assert found == [0, 20]
    with pytest.raises(DataError, match=r"1\.png"):
        list(Selection(photos, 4, Shard(2, 2)))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1/0"])
def test_shards_that_are_not_there(text):
    with pytest.raises(DataError, match=f"there is no shard {text}"):
        parse_shard(text)


@pytest.mark.parametrize("text", ["", "1", "a/b", "1/2/3", "-1/2", "1.0/2"])
def test_texts_that_are_no_shard(text):
    with pytest.raises(DataError, match="is no shard"):
        parse_shard(text)


MODEL = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 1] x) => (float[N, 1] y) { y = Relu(x) }"""


def measured(data, **options):
    model = onnx.parser.parse_model(MODEL)
    return calibrate(model, open_source(np.float32(data)[:, None], model_inputs(model)), **options)


def test_samples_in_two_shards_are_counted():
    a, b, c = measured([1, 2, 3]), measured([3, 4]), measured([5])
    assert shared_samples(a, b, c) == 1
    assert shared_samples(a, c) == shared_samples(a) == shared_samples() == 0
    assert shared_samples(a, a) == 3
    assert shared_samples(merge(a, b), c) == 0
    assert merge(a, b).sketch == measured([3, 4, 3, 2, 1]).sketch


def test_a_sample_that_the_data_holds_twice_is_in_one_shard_only_once():
    assert shared_samples(measured([1, 1, 1]), measured([2])) == 0


@given(st.lists(st.lists(st.integers(0, 2**20)), max_size=4))
def test_a_sketch_is_that_of_all_samples_together(parts):
    digits = [[sketch_of(number << 200) for number in part] for part in parts]
    assert sketch(*map(sketch, digits)) == sketch([name for part in digits for name in part])


def test_a_sketch_is_small_and_tells_large_overlaps():
    numbers = np.random.default_rng(0).integers(0, 2**62, 20_000).tolist()
    names = [sketch_of(number << 194) for number in numbers]
    first, second = sketch(names[:11_000]), sketch(names[9_000:])
    assert len(first) == SKETCH
    assert len(set(first) & set(second)) > 10


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "max"}, {"method": "mse"}),
        ({"method": "entropy"}, {"method": "mse"}),
        ({"method": "percentile"}, {"method": "percentile", "percentile": 99.0}),
        ({"method": "mse"}, {"method": "mse", "channels": True}),
    ],
)
def test_shards_of_other_settings_are_refused(one, other):
    with pytest.raises(RangesError, match="different methods"):
        merge(measured([1], **one), measured([2], **other))
