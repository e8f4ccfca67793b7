from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from calib.ranges import load
from relu_deploy.cli import main

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x) => (float[N, 2] y) { [root] r = Sqrt(x) y = Relu(r) }"""


@pytest.fixture
def folder(tmp_path):
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    data = np.zeros((50, 2), np.float32)
    data[:, 1] = np.arange(50)
    np.save(tmp_path / "x.npy", data)
    return tmp_path


def run(folder, *options, data="x.npy", model="m.onnx", output="r.json"):
    args = ["calibrate", str(folder / model), "--calib", str(folder / data) if ":" not in data else data]
    return CliRunner().invoke(main, [*args, "-o", str(folder / output), *options])


def test_writes_ranges_and_a_report(folder):
    result = run(folder, "--json", "-", "--batch-size", "8", "--threads", "1")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["samples"], report["tensors"], report["method"]) == (50, 3, "max")
    assert report["widest"]["x"] == 49
    assert report["dead_channels"] == [{"tensor": "y", "channels": [0], "of": 2}]
    assert report["seconds_per_sample"] > 0
    found = load(folder / "r.json")
    assert (found.model, found.data) == (report["model"], report["data"])
    assert found.tensors["y"].channel_max.tolist() == [0, 7]


def test_a_person_reads_the_same(folder):
    result = run(folder, "--samples", "3")
    assert result.exit_code == 0
    assert "max over 3 samples" in result.stdout
    assert "y: 1 of 2 channels are never above 0 (0)" in result.stdout


def test_the_file_is_the_same_whatever_the_batch_size(folder):
    files = []
    for size in ("1", "7", "64"):
        assert run(folder, "--batch-size", size).exit_code == 0
        files.append((folder / "r.json").read_bytes())
    assert files[0] == files[1] == files[2]


def _nan_data(folder):
    data = np.ones((50, 2), np.float32)
    data[37, 0] = np.nan
    np.save(folder / "bad.npy", data)


def _nan_activation(folder):
    data = np.ones((50, 2), np.float32)
    data[37, 0] = -1
    np.save(folder / "bad.npy", data)


def _cut_npy(folder):
    (folder / "bad.npy").write_bytes((folder / "x.npy").read_bytes()[:-8])


def _objects(folder):
    np.save(folder / "bad.npy", np.array([None]))


def _bytes(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def _quantized(folder):
    text = MODEL.replace("[root] r = Sqrt(x)", "q = QuantizeLinear(x, s) r = DequantizeLinear(q, s)")
    model = onnx.parser.parse_model(text.replace("(float[N, 2] y) {", "(float[N, 2] y) <float s = {0.5}> {"))
    onnx.save(model, folder / "bad.onnx")


BAD = {"data": "bad.npy"}
FAULTS = [
    pytest.param(lambda f: None, {"data": "absent.npy"}, (), "absent.npy does not exist", id="missing data"),
    pytest.param(lambda f: np.save(f / "bad.npy", np.ones((0, 2), "f4")), BAD, (), "is empty", id="empty data"),
    pytest.param(lambda f: (f / "empty").mkdir(), {"data": "empty"}, (), "is empty", id="empty folder"),
    pytest.param(lambda f: np.save(f / "bad.npy", np.ones((5, 3), "f4")), BAD, (), "takes shape (?, 2)", id="shape"),
    pytest.param(lambda f: np.save(f / "bad.npy", np.ones((5, 2), "i8")), BAD, (), "takes float32", id="dtype"),
    pytest.param(
        lambda f: np.savez(f / "b.npz", z=np.ones((5, 2))), {"data": "b.npz"}, (), "the model's inputs are x", id="name"
    ),
    pytest.param(_nan_data, BAD, (), "sample 37: input 'x' contains NaN", id="NaN in data"),
    pytest.param(
        _nan_activation, BAD, (), "NaN in tensor 'r' (made by Sqrt node 'root') at sample 37", id="NaN inside"
    ),
    pytest.param(_cut_npy, BAD, (), "is cut short", id="truncated npy"),
    pytest.param(_objects, BAD, (), "Python objects", id="objects"),
    pytest.param(_bytes("b.npz", b"PK"), {"data": "b.npz"}, (), "not a .npz file", id="damaged npz"),
    pytest.param(lambda f: None, {"data": "no_such_module:rows"}, (), "no module 'no_such_module'", id="module"),
    pytest.param(lambda f: None, {}, ("--preprocess", "scale=1"), "leave --preprocess out", id="preprocess"),
    pytest.param(lambda f: None, {"model": "absent.onnx"}, (), "does not exist", id="missing model"),
    pytest.param(
        _bytes("bad.onnx", b"\x08\x07garbage"), {"model": "bad.onnx"}, (), "not an ONNX file", id="corrupt model"
    ),
    pytest.param(_quantized, {"model": "bad.onnx"}, (), "quantised already", id="quantised model"),
    pytest.param(lambda f: None, {"output": "no/r.json"}, (), "is not a folder", id="output folder"),
    pytest.param(lambda f: None, {}, ("--samples", "0"), "is not in the range", id="samples"),
    pytest.param(lambda f: None, {}, ("--method", "magic"), "is not one of 'max'", id="method"),
]


@pytest.mark.parametrize("older", [None, b"older"])
@pytest.mark.parametrize(("make", "where", "options", "message"), FAULTS)
def test_bad_input_is_told_and_damages_nothing(folder, make, where, options, message, older):
    make(folder)
    if older:
        (folder / "r.json").write_bytes(older)
    before = sorted(folder.rglob("*"))
    result = run(folder, *options, **where)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output
    assert sorted(folder.rglob("*")) == before
    if older:
        assert (folder / "r.json").read_bytes() == older


def test_help_shows_an_example_and_every_preprocess_key():
    result = CliRunner().invoke(main, ["calibrate", "--help"])
    assert result.exit_code == 0
    assert "relu-deploy calibrate student.onnx --calib train.npy -o ranges.json" in result.stdout
    for key in ("resize=", "letterbox", "mean=", "std=", "layout=", "channels=", "dtype="):
        assert key in result.stdout


def test_in_a_process_of_its_own_with_data_from_the_current_folder(folder):
    (folder / "my_data.py").write_text("import numpy as np\ndef rows():\n    yield np.ones((4, 2), 'f4')\n")
    command = [sys.executable, "-c", "from relu_deploy.cli import main; main()", "calibrate", "m.onnx"]
    done = subprocess.run(
        [*command, "--calib", "my_data:rows", "-o", "r.json"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert load(folder / "r.json").samples == 4
    failed = subprocess.run(
        [*command, "--calib", "gone.npy", "-o", "r2.json"], cwd=folder, capture_output=True, text=True
    )
    assert failed.returncode == 2
    assert failed.stderr.startswith("Error: the data gone.npy does not exist")
    assert not (folder / "r2.json").exists()


def test_a_failing_network_prints_nothing_but_our_message(folder):
    model = onnx.parser.parse_model(
        MODEL.replace("[root] r = Sqrt(x)", "k = Constant<value_ints = [7, 2]>() [root] r = Reshape(x, k)")
    )
    onnx.save(model, folder / "m.onnx")
    command = [
        sys.executable,
        "-c",
        "from relu_deploy.cli import main; main()",
        "calibrate",
        "m.onnx",
        "--calib",
        "x.npy",
    ]
    failed = subprocess.run([*command, "-o", "r.json"], cwd=folder, capture_output=True, text=True)
    assert failed.returncode == 2
    lines = failed.stderr.strip().splitlines()
    assert lines[0].startswith("Error: the network fails on x.npy, sample 0, at Reshape node 'root': ")
    assert "cannot be reshaped" in lines[0]
    assert "onnxruntime" not in failed.stderr


@pytest.mark.models
def test_a_real_detector_on_images(common_det, photos, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'relu-deploy[images]'")
    (tmp_path / "photos").mkdir()
    for i, photo in enumerate(photos[:2]):
        image.fromarray(photo.transpose(1, 2, 0).round().astype(np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    args = [
        "calibrate",
        str(common_det),
        "--calib",
        str(tmp_path / "photos"),
        "--preprocess",
        "letterbox,scale=1,channels=bgr",
    ]
    result = CliRunner().invoke(main, [*args, "-o", str(tmp_path / "r.json")])
    assert result.exit_code == 0, result.output
    found = load(tmp_path / "r.json")
    assert found.samples == 2
    assert found.tensors["images"].max <= 255
    # blue first: the last channel of the input is the red of the photos
    assert found.tensors["images"].channel_max[2] == max(photo[0].round().max() for photo in photos[:2])
