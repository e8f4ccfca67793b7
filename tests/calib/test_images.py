from __future__ import annotations

import numpy as np
import pytest

from calib.errors import DataError
from calib.images import Preprocess, parse_preprocess
from calib.inputs import InputSpec
from calib.sources import open_source

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'relu-deploy[images]'")

F32 = np.dtype("float32")
SPEC = InputSpec("x", F32, (1, 3, 8, 8))
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def folder(tmp_path, **images):
    path = tmp_path / "images"
    path.mkdir(exist_ok=True)
    for name, pixels in images.items():
        Image.fromarray(pixels).save(path / f"{name}.png")
    return path


def one(tmp_path, spec=SPEC, text=None, pixels=PIXELS):
    (sample,) = open_source(folder(tmp_path, a=pixels), [spec], preprocess=text)
    return sample.feeds["x"]


def refused(tmp_path, spec=SPEC, text=None, path=None):
    with pytest.raises(DataError) as caught:
        list(open_source(path or folder(tmp_path, a=PIXELS), [spec], preprocess=text))
    return str(caught.value)


def test_defaults_are_rgb_nchw_scaled_to_one(tmp_path):
    expected = (PIXELS.astype(np.float32) * np.float32(1 / 255)).transpose(2, 0, 1)[None]
    assert np.array_equal(one(tmp_path), expected)


def test_defaults_follow_the_input(tmp_path):
    nhwc = InputSpec("x", np.dtype("uint8"), (None, 8, 8, 3))
    assert np.array_equal(one(tmp_path, nhwc), PIXELS[None])
    gray = InputSpec("x", F32, (None, 1, 8, 8))
    assert one(tmp_path, gray).shape == (1, 1, 8, 8)
    free = InputSpec("x", F32, (None, 3, None, None))
    assert one(tmp_path, free, pixels=PIXELS[:5, :7]).shape == (1, 3, 5, 7)


def test_every_key(tmp_path):
    text = "scale=1/127.5,mean=1:0.5:0,std=1:2:4,channels=bgr,layout=nchw,dtype=float32,filter=nearest,resize=8x8"
    values = PIXELS[:, :, ::-1].astype(np.float32) * np.float32(1 / 127.5)
    expected = (values - np.float32([1, 0.5, 0])) / np.float32([1, 2, 4])
    assert np.array_equal(one(tmp_path, text=text), expected.transpose(2, 0, 1)[None])


def test_letterbox_keeps_the_aspect_and_pads(tmp_path):
    white = np.full((4, 8, 3), 255, np.uint8)
    value = one(tmp_path, text="letterbox,scale=1,pad=7", pixels=white)
    assert np.array_equal(value[0, 0, 2:6], np.full((4, 8), 255))
    assert np.array_equal(value[0, 0, [0, 1, 6, 7]], np.full((4, 8), 7))
    gray = one(tmp_path, InputSpec("x", F32, (1, 1, 8, 8)), "letterbox,scale=1,pad=7", white)
    assert set(np.unique(gray)) == {7, 255}


def test_crop_and_stretch_differ_from_letterbox(tmp_path):
    half = np.concatenate([np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)], axis=1)
    assert one(tmp_path, text="crop,scale=1,filter=nearest", pixels=half)[0, 0, 0].tolist() == [0] * 4 + [255] * 4
    assert one(tmp_path, text="scale=1,filter=nearest", pixels=half).shape == (1, 3, 8, 8)


def test_order_is_that_of_names(tmp_path):
    path = folder(tmp_path, b=PIXELS, a=255 - PIXELS)
    samples = list(open_source(path, [SPEC]))
    assert [s.origin.rsplit("/", 1)[1] for s in samples] == ["a.png", "b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reszie=8x8", "no key 'reszie'"),
        ("reszie=8x8", "the keys are resize, fit, pad, filter, channels, scale, mean, std, layout, dtype"),
        ("resize=8", "cannot be read"),
        ("resize=0x8", "between 1x1"),
        ("scale=1/0", "cannot be read"),
        ("scale=nan", "cannot be read"),
        ("mean=a:b:c", "cannot be read"),
        ("std=0", "divide by zero"),
        ("scale=0", "every image the same"),
        ("scale=0/255", "every image the same"),
        ("pad=300", "not in 0..255"),
        ("channels=yuv", "is not one of rgb, bgr, gray"),
        ("scale=1,scale=2", "gives scale twice"),
        ("mean=1:2", "need 1 or 3 numbers, not 2 and 1"),
        ("resize=4x4", "takes shape (1, 3, 8, 8), the data has (1, 3, 4, 4)"),
        ("dtype=uint8", "takes float32, the data is uint8"),
        ("dtype=int8,scale=1", "do not fit int8"),
    ],
)
def test_bad_specifications(tmp_path, text, message):
    assert message in refused(tmp_path, text=text)


def test_layout_that_cannot_be_told(tmp_path):
    assert "give layout=" in refused(tmp_path, InputSpec("x", F32, (1, 8, 8, 8)))
    assert "not of rank 4" in refused(tmp_path, InputSpec("x", F32, (1, 8)))


def test_files_that_are_no_images(tmp_path):
    path = folder(tmp_path, a=PIXELS)
    whole = (path / "a.png").read_bytes()
    for data in (b"", b"not an image", whole[: len(whole) // 2]):
        (path / "a.png").write_bytes(data)
        assert "a.png is not a readable image" in refused(tmp_path, path=path)


def test_sixteen_bit_and_huge_images(tmp_path, monkeypatch):
    path = folder(tmp_path, a=np.full((8, 8), 40000, np.uint16))
    assert "not 8 bits" in refused(tmp_path, path=path)
    folder(tmp_path, a=PIXELS)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert "the limit is 40" in refused(tmp_path, path=path)


def test_preprocess_is_for_images_only(tmp_path):
    np.save(tmp_path / "x.npy", np.ones((1, 3, 8, 8), np.float32))
    assert "leave --preprocess out" in refused(tmp_path, text="scale=1", path=tmp_path / "x.npy")


def test_parse_gives_the_dataclass():
    assert parse_preprocess("") == Preprocess()
    parsed = parse_preprocess("fit=letterbox, scale=1/2")
    assert parsed == parse_preprocess("letterbox,scale=0.5") == Preprocess(fit="letterbox", scale=0.5)
