from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner

from calib.checkpoint import KIND
from calib.ranges import load, save
from relu_deploy.cli import main

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2] x) => (float[N, 3] y) <float[2, 3] w = {1, -2, 3, -4, 5, 6}, float[3] b = {0, 1, 2}>
{ h = Relu(x) [fc] y = Gemm(h, w, b) }"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    onnx.save(onnx.parser.parse_model(MODEL), "m.onnx")
    np.save("x.npy", np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32))
    return tmp_path


def run(text, code=0):
    result = CliRunner().invoke(main, text.split())
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def parts(options="", of=3):
    for i in range(1, of + 1):
        run(f"calibrate m.onnx --calib x.npy --shard {i}/{of} -o p{i}.json {options}")
    return [f"p{i}.json" for i in range(1, of + 1)]


@pytest.mark.parametrize(
    "options", ["", "--method entropy", "--method mse --channels", "--method percentile --percentile 99.5"]
)
def test_merged_shards_are_one_run_byte_for_byte(folder, options):
    run(f"calibrate m.onnx --calib x.npy -o one.json {options}")
    p1, p2, p3 = parts(options)
    result = run(f"calib merge {p3} {p1} {p2} -o all.json --json report.json")
    assert (folder / "all.json").read_bytes() == (folder / "one.json").read_bytes()
    assert "over 50 samples" in result.stdout
    report = json.loads((folder / "report.json").read_text())
    assert (report["samples"], report["tensors"], report["notes"]) == (50, 3, [])


def test_parts_that_share_samples_are_refused_unless_allowed(folder):
    p1, p2, _ = parts()
    result = run(f"calib merge {p1} {p2} {p1} -o all.json", code=2)
    assert "at least 17 are in more than one of them" in " ".join(result.stderr.split())
    assert "--allow-overlap" in result.stderr
    assert not (folder / "all.json").exists()
    result = run(f"calib merge {p1} {p2} {p1} --allow-overlap -o all.json")
    assert "17 samples are known to be in more than one part" in result.stdout
    assert load(folder / "all.json").samples == 17 + 17 + 17


def test_parts_that_do_not_belong_together(folder):
    p1, *_ = parts()
    run("calibrate m.onnx --calib x.npy --shard 2/3 --method mse -o mse.json")
    assert "different methods" in run(f"calib merge {p1} mse.json -o o.json", code=2).stderr
    onnx.save(onnx.parser.parse_model(MODEL.replace("Relu", "Tanh")), "other.onnx")
    run("calibrate other.onnx --calib x.npy --shard 2/3 -o other.json")
    assert "different networks" in run(f"calib merge {p1} other.json -o o.json", code=2).stderr
    (folder / "cut.json").write_bytes((folder / p1).read_bytes()[:-40])
    assert "not a whole ranges file" in run(f"calib merge {p1} cut.json -o o.json", code=2).stderr
    assert "is also an input" in run(f"calib merge {p1} mse.json -o {p1}", code=2).stderr
    assert not (folder / "o.json").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ("--shard 4/3", "there is no shard 4/3"),
        ("--shard one", "'one' is no shard"),
        ("--shard 51/60", "shard 51/60 holds no sample"),
        ("--percentile 99", "--percentile is for --method percentile"),
        ("--method percentile --percentile 0", "is not in the range"),
        ("--method percentile --percentile 101", "is not in the range"),
        ("--channels", "of no use to the method max"),
        ("--cluster local:2 --shard 1/2", "--cluster makes shards of its own"),
        ("--cluster nowhere", "there is no Dask scheduler at nowhere"),
    ],
)
def test_options_that_cannot_be(folder, options, says):
    if "nowhere" in options:
        pytest.importorskip("distributed", reason="Dask is not installed: pip install 'relu-deploy[cluster]'")
    before = sorted(folder.iterdir())
    assert says in " ".join(run(f"calibrate m.onnx --calib x.npy -o r.json {options}", code=2).stderr.split())
    assert sorted(folder.iterdir()) == before


def test_a_cluster_writes_the_same_file(folder):
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'relu-deploy[cluster]'")
    run("calibrate m.onnx --calib x.npy --method mse -o one.json")
    run("calibrate m.onnx --calib x.npy --method mse --cluster local:2 -o all.json")
    assert (folder / "all.json").read_bytes() == (folder / "one.json").read_bytes()


def test_the_report_names_the_percentile(folder):
    result = run("calibrate m.onnx --calib x.npy --method percentile -o r.json --json -")
    assert json.loads(result.stdout)["percentile"] == 99.99
    assert "percentile 99.99 over 50 samples" in result.stderr


SLOW = """
import time, numpy as np
def rows():
    for row in np.load("x.npy"):
        time.sleep(0.02)
        yield row[None]
"""
# As the command, but with checkpoints every tenth of a second.
COMMAND = """import functools, calib.checkpoint as c
c.Checkpoint.__init__.__kwdefaults__["seconds"] = 0.1
from relu_deploy.cli import main
main()"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_was_stopped_goes_on(folder, how):
    (folder / "data.py").write_text(SLOW)
    run("calibrate m.onnx --calib x.npy --method entropy -o one.json")
    call = ["calibrate", "m.onnx", "--calib", "data.py:rows", "--method", "entropy", "-o", "r.json", "--resume"]
    process = subprocess.Popen([sys.executable, "-c", COMMAND, *call], env=os.environ, stderr=subprocess.DEVNULL)
    try:
        limit = time.monotonic() + 60
        while not (folder / "r.json.partial").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(how)
        process.wait(30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode != 0
    assert not (folder / "r.json").exists()
    kept = load(folder / "r.json.partial", kind=KIND).samples
    assert 0 < kept < 50
    result = run("calibrate m.onnx --calib x.npy --method entropy -o r.json --resume --json report.json")
    assert f"over 50 samples ({kept} of them in an earlier run)" in result.stdout
    assert json.loads((folder / "report.json").read_text())["resumed"] == kept
    assert (folder / "r.json").read_bytes() == (folder / "one.json").read_bytes()
    assert not (folder / "r.json.partial").exists()


def test_a_checkpoint_of_other_data_is_refused(folder):
    run("calibrate m.onnx --calib x.npy -o r.json")
    save(load(folder / "r.json"), folder / "r.json.partial", kind=KIND)
    np.save("x.npy", np.load("x.npy") + 1)
    result = run("calibrate m.onnx --calib x.npy -o r.json --resume", code=2)
    assert "r.json.partial is of other samples" in result.stderr
    assert "leave --resume out" in result.stderr
    run("calibrate m.onnx --calib x.npy -o r.json")
    assert not (folder / "r.json.partial").exists()


def test_to_tensorrt_and_back_into_a_quantised_network(folder):
    run("calibrate m.onnx --calib x.npy -o r.json")
    result = run("calib to-tensorrt r.json --version 10300 --algorithm MinMaxCalibration -o c.cache")
    assert "note: TRT-10300-MinMaxCalibration" in result.stdout
    lines = (folder / "c.cache").read_text().splitlines()
    assert lines[0] == "TRT-10300-MinMaxCalibration"
    assert [line.split(": ")[0] for line in lines[1:]] == ["x", "h", "y"]
    with (folder / "c.cache").open("a") as stream:
        stream.write("(Unnamed Layer* 3) [Shuffle]_output: 3c010a14\n")
    result = run("calib from-tensorrt c.cache m.onnx -o back.json")
    assert "over samples that are not known" in result.stdout
    assert "1 names in the cache are not in the network" in result.stdout
    back, there = load(folder / "back.json"), load(folder / "r.json")
    assert back.tensors["h"].min == 0
    for name, r in there.tensors.items():
        assert back.tensors[name].absmax == pytest.approx(r.absmax, rel=2e-7)
    run("quantize m.onnx --ranges back.json --target tensorrt-rtx -o q.onnx")
    run("quantize m.onnx --ranges back.json --target ort -o q.onnx")
    onnx.save(onnx.parser.parse_model(MODEL.replace("Relu", "Tanh")), "other.onnx")
    assert "another network" in run("quantize other.onnx --ranges back.json -o q2.onnx", code=2).stderr


def test_to_tensorrt_by_another_method(folder):
    run("calibrate m.onnx --calib x.npy --method percentile --percentile 80 -o r.json")
    run("calib to-tensorrt r.json -o own.cache")
    run("calib to-tensorrt r.json --method max -o max.cache")
    assert (folder / "own.cache").read_text() != (folder / "max.cache").read_text()
    run("calibrate m.onnx --calib x.npy -o bare.json")
    result = run("calib to-tensorrt bare.json --method mse -o no.cache", code=2)
    assert "calibrate again with: --method mse" in result.stderr
    result = run("calib to-tensorrt r.json --version no/version -o no.cache", code=2)
    assert "no header" in result.stderr
    assert not (folder / "no.cache").exists()


def test_a_file_that_is_no_cache(folder):
    (folder / "c.cache").write_text("nonsense")
    assert "is no calibration cache" in run("calib from-tensorrt c.cache m.onnx -o r.json", code=2).stderr
    assert "cannot read" in run("calib from-tensorrt gone.cache m.onnx -o r.json", code=2).stderr


@pytest.mark.parametrize("name", ["merge", "to-tensorrt", "from-tensorrt"])
def test_help_shows_an_example(name):
    result = run(f"calib {name} --help")
    assert f"relu-deploy calib {name} " in result.stdout
    assert "\\b" not in result.stdout
