from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import numpy as np
import onnx
import onnx.parser
import pytest

import calib.checkpoint
from calib.checkpoint import KIND, Checkpoint
from calib.errors import RangesError
from calib.inputs import model_inputs
from calib.ranges import load
from calib.run import calibrate
from calib.shards import Shard
from calib.sources import open_source

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 2, 3] x) => (float[N, 2, 3] y) { r = Relu(x) y = Sigmoid(r) }"""
DATA = np.random.default_rng(0).standard_normal((30, 2, 3)).astype(np.float32)


class StopError(Exception):
    pass


def measure(data=DATA, *, text=MODEL, stop_after=None, **options):
    model = onnx.parser.parse_model(text)

    def progress(what, done, total):
        if stop_after is not None and done >= stop_after:
            raise StopError

    return calibrate(model, open_source(data, model_inputs(model)), progress=progress, **options)


@pytest.mark.parametrize("options", [{}, {"method": "mse", "channels": True}, {"shard": Shard(2, 3)}])
@pytest.mark.parametrize("stops", [(1,), (4, 9), (10,)])
def test_going_on_gives_what_one_run_gives(tmp_path, options, stops):
    path = tmp_path / "c"
    for stop in stops:
        with pytest.raises(StopError):
            measure(checkpoint=Checkpoint(path, resume=True, seconds=0), stop_after=stop, batch_size=2, **options)
    kept = load(path, kind=KIND)
    assert 0 < kept.samples < 30
    resumed = measure(checkpoint=Checkpoint(path, resume=True), **options)
    assert resumed == measure(**options)


def test_progress_counts_what_was_done_before(tmp_path):
    with pytest.raises(StopError):
        measure(checkpoint=Checkpoint(tmp_path / "c", resume=True, seconds=0), stop_after=20)
    seen = []
    assert 20 <= load(tmp_path / "c", kind=KIND).samples < 30
    model = onnx.parser.parse_model(MODEL)
    np.save(tmp_path / "x.npy", DATA)
    source = open_source(tmp_path / "x.npy", model_inputs(model))
    calibrate(model, source, checkpoint=Checkpoint(tmp_path / "c", resume=True), progress=lambda *a: seen.append(a))
    assert seen[0] == ("calibrate", load(tmp_path / "c", kind=KIND).samples + 1, 30)
    assert seen[-1] == ("calibrate", 30, 30)


def test_a_finished_checkpoint_is_the_result(tmp_path):
    done = measure(checkpoint=Checkpoint(tmp_path / "c", resume=False, seconds=0))
    assert measure(checkpoint=Checkpoint(tmp_path / "c", resume=True)) == done


def test_without_resume_it_is_written_anew(tmp_path):
    measure(DATA + 100, checkpoint=Checkpoint(tmp_path / "c", resume=False, seconds=0))
    assert measure(checkpoint=Checkpoint(tmp_path / "c", resume=False, seconds=0)) == measure()
    assert load(tmp_path / "c", kind=KIND) == measure()


def test_it_is_not_written_more_often_than_asked(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(calib.checkpoint.time, "monotonic", lambda: now[0])
    written = []
    monkeypatch.setattr(calib.checkpoint, "save", lambda ranges, path, kind: written.append((now[0], ranges)))
    kept = Checkpoint(tmp_path / "c", resume=False, seconds=10)
    for second in range(35):
        now[0] = second
        if kept.due():
            kept.keep("ranges")
    assert [when for when, _ in written] == [10, 20, 30]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": MODEL.replace("Sigmoid", "Tanh")}, "of another network"),
        ({"method": "entropy"}, "of another method"),
        ({"method": "percentile", "percentile": 90.0}, "of another method"),
        ({"data": DATA[::-1]}, "of other samples"),
        ({"data": DATA[:10]}, "of other samples"),
        ({"shard": Shard(1, 2)}, "of other samples"),
    ],
)
def test_a_stale_checkpoint_is_refused(tmp_path, change, message):
    with pytest.raises(StopError):
        measure(checkpoint=Checkpoint(tmp_path / "c", resume=True, seconds=0), stop_after=15)
    with pytest.raises(RangesError, match=message) as caught:
        measure(checkpoint=Checkpoint(tmp_path / "c", resume=True), **change)
    assert "--resume" in caught.value.hint


def test_other_settings_of_one_method_are_refused(tmp_path):
    for one, other in (
        ({"method": "percentile"}, {"method": "percentile", "percentile": 99.0}),
        ({"method": "mse"}, {"method": "mse", "channels": True}),
    ):
        measure(checkpoint=Checkpoint(tmp_path / "c", resume=False, seconds=0), **one)
        with pytest.raises(RangesError, match="no going on"):
            measure(checkpoint=Checkpoint(tmp_path / "c", resume=True), **other)


def test_a_checkpoint_is_no_ranges_file(tmp_path):
    measure(checkpoint=Checkpoint(tmp_path / "c", resume=False, seconds=0))
    with pytest.raises(RangesError, match="is not a ranges file"):
        load(tmp_path / "c")
    (tmp_path / "c").write_text("{")
    with pytest.raises(RangesError, match="not a whole"):
        measure(checkpoint=Checkpoint(tmp_path / "c", resume=True))


SCRIPT = """
import sys, time, pathlib, numpy as np, onnx, onnx.parser
from calib.checkpoint import Checkpoint
from calib.inputs import model_inputs
from calib.ranges import save
from calib.run import calibrate
from calib.sources import open_source
model = onnx.load("m.onnx")
slow = sys.argv[1] == "slow"
def rows():
    for row in np.load("x.npy"):
        time.sleep(0.05 if slow else 0)
        yield row[None]
kept = Checkpoint(pathlib.Path("c"), resume=True, seconds=0.2)
found = calibrate(model, open_source(rows, model_inputs(model)), method="entropy", checkpoint=kept)
save(found, pathlib.Path("r.json"))
"""


def test_a_killed_process_goes_on(tmp_path):
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.tile(DATA, (10, 1, 1)))
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, "slow"], cwd=tmp_path, env=os.environ)
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "c").exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "r.json").exists()
    assert 0 < load(tmp_path / "c", kind=KIND).samples < 300
    subprocess.run([sys.executable, "-c", SCRIPT, "quick"], cwd=tmp_path, check=True, env=os.environ)
    assert load(tmp_path / "r.json") == measure(np.tile(DATA, (10, 1, 1)), method="entropy")
