from __future__ import annotations

import sys

import numpy as np
import onnx
import onnx.parser
import pytest

from calib.cluster import Job, calibrate_on, connect
from calib.errors import CalibrationError, DataError, MissingExtraError
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3] x) => (float[N, 3] y) { [root] r = Sqrt(x) y = Relu(r) }"""


@pytest.fixture(scope="module")
def client():
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'relu-deploy[cluster]'")
    with connect("local:2") as found:
        yield found


@pytest.fixture
def folder(tmp_path):
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.random.default_rng(0).uniform(0, 9, (23, 3)).astype(np.float32))
    return tmp_path


def job(folder, **options):
    return Job(folder / "m.onnx", str(folder / "x.npy"), options=options)


@pytest.mark.parametrize("options", [{}, {"method": "mse", "channels": True}, {"max_samples": 7, "batch_size": 2}])
@pytest.mark.parametrize("shards", [None, 5])
def test_a_cluster_measures_what_one_machine_does(client, folder, options, shards):
    model = onnx.load(folder / "m.onnx")
    one = calibrate(model, open_source(folder / "x.npy", model_inputs(model)), **options)
    seen = []
    found = calibrate_on(client, job(folder, **options), shards=shards, progress=lambda *a: seen.append(a))
    assert found == one
    assert seen[-1] == ("calibrate", shards or 2, shards or 2)


def test_more_shards_than_samples(client, folder):
    assert calibrate_on(client, job(folder, max_samples=3), shards=6).samples == 3


def test_what_fails_on_a_worker_is_told_as_here(client, folder):
    data = np.load(folder / "x.npy")
    data[17, 1] = -1
    np.save(folder / "x.npy", data)
    with pytest.raises(CalibrationError, match=r"NaN in tensor 'r' \(made by Sqrt node 'root'\) at sample 17 "):
        calibrate_on(client, job(folder), shards=4)
    with pytest.raises(CalibrationError, match="does not exist"):
        calibrate_on(client, Job(folder / "m.onnx", str(folder / "absent.npy")))
    with pytest.raises(CalibrationError, match=r"a worker cannot read .*gone\.onnx"):
        calibrate_on(client, Job(folder / "gone.onnx", str(folder / "x.npy")))


def test_no_sample_at_all(client, folder):
    (folder / "none.py").write_text("def rows():\n    return iter(())\n")
    with pytest.raises((CalibrationError, DataError), match="is empty"):
        calibrate_on(client, Job(folder / "m.onnx", f"{folder}/none.py:rows"), shards=2)


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match="distributed") as caught, connect("local:1"):
        pass
    assert "relu-deploy[cluster]" in caught.value.hint


def test_a_scheduler_that_is_not_there(monkeypatch):
    distributed = pytest.importorskip("distributed", reason="Dask is not installed: pip install 'relu-deploy[cluster]'")

    def refuse(address, timeout):
        raise OSError("Timed out")

    monkeypatch.setattr(distributed, "Client", refuse)
    with (
        pytest.raises(CalibrationError, match="no Dask scheduler at tcp://nowhere:1: Timed out"),
        connect("tcp://nowhere:1"),
    ):
        pass
