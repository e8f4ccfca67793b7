"""What the studies share: jobs keep their results, failures are told, pages say what was measured."""

from __future__ import annotations

import gzip
import importlib
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from relu_deploy.errors import DataError

pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

STUDIES = Path(__file__).parents[2] / "examples" / "studies"
JOBS = """
import os
def work(job, folder):
    (folder / "runs").open("a").write("x")
    if job.settings.get("fail"):
        raise ValueError("no luck")
    return {"value": 2.0 * job.settings["x"]}
"""


@pytest.fixture
def study(monkeypatch):
    """Import a script of the studies, which import each other by plain name."""
    monkeypatch.syspath_prepend(str(STUDIES))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == STUDIES:
            del sys.modules[name]


@pytest.fixture
def harness(study) -> ModuleType:
    return study("harness")


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A function that worker processes can import."""
    (tmp_path / "made_up_jobs.py").write_text(JOBS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("made_up_jobs").work
    del sys.modules["made_up_jobs"]


def options(harness, folder):
    return harness.Options(folder=folder, seeds=2, workers=2, seconds=1.0, smoke=False)


def test_jobs_keep_their_results_and_run_again_for_other_settings(harness, work, tmp_path):
    given = options(harness, tmp_path / "run")
    jobs = [harness.Job(f"j{x}", work, {"x": x}, smoke=False) for x in (1, 2)]
    assert harness.run_jobs(jobs, given) == {"j1": {"value": 2.0}, "j2": {"value": 4.0}}
    assert harness.run_jobs(jobs, given) == {"j1": {"value": 2.0}, "j2": {"value": 4.0}}
    changed = [harness.Job("j1", work, {"x": 5}, smoke=False), jobs[1]]
    assert harness.run_jobs(changed, given) == {"j1": {"value": 10.0}, "j2": {"value": 4.0}}
    runs = [(harness.job_folder(name, given) / "runs").read_text() for name in ("j1", "j2")]
    assert runs == ["x", "x"]  # j1's folder was made anew, j2 ran once


def test_a_failed_job_is_told_after_the_others_ran(harness, work, tmp_path):
    given = options(harness, tmp_path / "run")
    jobs = [harness.Job("bad", work, {"fail": True}, smoke=False), harness.Job("good", work, {"x": 1}, smoke=False)]
    with pytest.raises(SystemExit, match=r"bad failed:[\s\S]*ValueError: no luck"):
        harness.run_jobs(jobs, given)
    assert (harness.job_folder("good", given) / "result.json").is_file()
    assert not (harness.job_folder("bad", given) / "result.json").exists()


@pytest.mark.parametrize(
    ("first", "second", "answer"),
    [
        ([3.0, 3.0], [2.0, 2.0], "+1.00 ± 0.00: yes"),
        ([1.0, 1.0], [2.0, 2.0], "-1.00 ± 0.00: no"),
        ([1.0, 3.0], [2.0, 2.1], "-0.05 ± 1.34: not told apart by these seeds"),
        ([2.0, 2.1], [1.0, 3.0], "+0.05 ± 1.34: not told apart by these seeds"),
        ([1.0], [2.0], "-1.00: no"),
        ([2.0], [2.0], "+0.00: not told apart by these seeds"),
    ],
)
def test_claims(harness, first, second, answer):
    assert harness.claim("A over B", first, second) == f"- A over B: {answer}"


def test_a_table_is_aligned_markdown(harness):
    assert harness.table(["row", "n"], [["a", "1"], ["bb", "-2.5"]]).splitlines() == [
        "| row |    n |", "|-----|-----:|", "| a   |    1 |", "| bb  | -2.5 |",
    ]  # fmt: skip


def test_a_page_names_command_machine_and_smoke(harness, tmp_path, capsys):
    given = harness.Options(folder=tmp_path, seeds=3, workers=1, seconds=1.0, smoke=True)
    harness.publish(given, "name", "Title", ["text"])
    page = (tmp_path / "name.md").read_text()
    assert page.startswith("# Title\n\nPrinted by `python examples/studies/name.py --smoke`, 3 seeds;")
    assert "processors, Python" in page
    assert "Its numbers mean nothing" in page
    assert capsys.readouterr().out == page + "\n"


def write_idx(path, array):
    head = struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.tobytes()))


def test_fashion_mnist_missing_or_damaged(study, tmp_path):
    fashion = study("fashion")
    with pytest.raises(DataError, match="there is no") as missing:
        fashion.load("test", folder=tmp_path)
    assert missing.value.hint == "apt-get install dataset-fashion-mnist"
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(DataError, match="not \\(10000, 28, 28\\)"):
        fashion.load("test", folder=tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match="is damaged"):
        fashion.load("test", folder=tmp_path)


def test_fashion_mnist_is_read(study, tmp_path):
    fashion = study("fashion")
    images = np.arange(10_000 * 784, dtype=np.uint32).astype(np.uint8).reshape(10_000, 28, 28)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", (np.arange(10_000) % 10).astype(np.uint8))
    read, labels = fashion.load("test", folder=tmp_path)
    assert np.array_equal(read, images)
    assert labels.tolist()[:12] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert fashion.as_input(read[:2]).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("name", ["cnn", "deit"])
def test_networks_take_images_and_have_activations_to_replace(study, name):
    import torch
    from torch import nn

    from relu_deploy.nn.swap import relu, replace_activations

    network = study("networks").make_network(name, nn.SiLU)
    images = torch.randn(3, 1, 28, 28)
    assert network(images).shape == (3, 10)
    student, report = replace_activations(network, relu, example=images)
    assert len(report.replaced) == {"cnn": 6, "deit": 4}[name]
    assert not any(isinstance(module, nn.SiLU) for module in student.modules())


def test_a_training_is_deployed_and_scored(study, monkeypatch, tmp_path):
    for package in ("accelerate", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'relu-deploy[torch]'")
    vision, fashion, harness = study("vision"), study("fashion"), study("harness")
    rng = np.random.default_rng(0)

    def made_up(split):
        count = {"train": vision.HELD_OUT + vision.SMOKE, "test": 200}[split]
        return rng.integers(0, 256, (count, 28, 28), dtype=np.uint8), rng.integers(0, 10, count)

    for module in (vision, fashion):
        monkeypatch.setattr(module, "load", made_up)
    given = harness.Options(folder=tmp_path, seeds=1, workers=1, seconds=1.0, smoke=True)
    row = vision.from_scratch("PWLU", epochs=1, transition={"intervals": 4})
    (job,) = vision.jobs_of("name", row, given)
    values = vision.train(job, harness.job_folder(job.name, given))
    assert 0 <= values["int8"] <= 100
    assert 0 < values["iou"] <= 1
    assert (values["layers"], values["int8_layers"]) == (7, 7)
    assert values["parameters"] == 28410 + (16 * 3 + 32 * 3) * (4 + 5)
