"""``relu-deploy distill`` on a network of three layers: what it makes, what it refuses, and how it goes on."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'relu-deploy[torch]'")
import onnxruntime  # noqa: E402

from relu_deploy.cli import main  # noqa: E402
from relu_deploy.distill import log  # noqa: E402
from relu_deploy.export.weights import read_state  # noqa: E402

pytestmark = pytest.mark.torch

NET = """
import os, time
import torch
from torch import nn
from torch.utils.data import Dataset

def net(act=nn.SiLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), act(), nn.Dropout(0.2), nn.Linear(16, 3))

class Slow(Dataset):
    def __init__(self, first, size):
        generator = torch.Generator().manual_seed(first)
        self.x = torch.randn(size, 8, generator=generator)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        time.sleep(float(os.environ.get("NAP", 0)))
        if i == int(os.environ.get("BROKEN", -1)):
            raise OSError("no such file: 77.png")
        return self.x[i], self.x[i, :3].argmax()

def data():
    return Slow(0, 96), Slow(1, 32)

def one():
    return data()[0]

def wide():
    return [(torch.zeros(9), 0)] * 96, data()[1]

def no_task():
    return (*data(), "accuracy")
"""
TRAINING = "distill net.py:net --data net.py:data --epochs 4 --batch-size 16 --checkpoint-steps 2 --set log_steps=1"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(NET)
    rng = np.random.default_rng(0)
    for name, size in (("train", 96), ("test", 32)):
        x = rng.normal(size=(size, 8)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", x)
        np.save(tmp_path / f"{name}_labels.npy", x[:, :3].argmax(1))
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("net", None)  # branch.py imports it, and other tests have a net of their own


ARRAYS = "--train train.npy --train-labels train_labels.npy --test test.npy --test-labels test_labels.npy"


def call(command, *, code=0, **environment):
    result = CliRunner().invoke(main, shlex.split(command), env=environment)
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def start(command, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "relu_deploy", *shlex.split(command)], text=True, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


def wait_for(process, folder, pattern):
    until = time.monotonic() + 60
    while not list(folder.glob(pattern)) and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    assert list(folder.glob(pattern)), process.communicate()[1]


def assert_same_run(one, other):
    first, second = read_state(one / "student.safetensors"), read_state(other / "student.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()


def test_arrays_to_a_student_to_onnx(lab):
    result = call(f"distill net.py:net {ARRAYS} -o run --epochs 2 --batch-size 16 --recipe B+KD-SAT --json report.json")
    report = json.loads((lab / "report.json").read_text())
    assert report == json.loads((lab / "run" / "report.json").read_text())
    assert report["steps"] == 12
    assert report["processes"] == 1
    assert [item["old"] for item in report["swap"]["replaced"]] == ["SiLU"]
    assert report["kept"] == report["metrics"]["accuracy"] / report["teacher_metrics"]["accuracy"]
    assert "training B+KD-SAT on 1 process (cpu): 2 epochs, 12 steps" in result.stderr
    made = {"student.safetensors", "student.pt2", "config.json", "metrics.jsonl", "training.png", "report.json"}
    assert made < {path.name for path in (lab / "run").iterdir()}
    assert all(f"wrote {path}" in result.stdout for path in Path("run").iterdir() if path.name != ".lock")
    following = next(line for line in result.stdout.splitlines() if line.startswith("next: relu-deploy "))
    call(following.removeprefix("next: relu-deploy "))
    x = np.load("test.npy")
    got = onnxruntime.InferenceSession("run/student.onnx").run(None, {"input": x})[0]
    namespace: dict = {}
    exec(NET, namespace)  # noqa: S102  # the text above
    network = namespace["net"](torch.nn.ReLU)
    network.load_state_dict(read_state(lab / "run" / "student.safetensors"))
    # float32 sums of 16 terms near 1, in another order
    np.testing.assert_allclose(got, network.eval()(torch.from_numpy(x)).detach().numpy(), atol=1e-5)


def test_a_student_of_learned_units_reaches_onnx_too(lab):
    result = call("distill net.py:net --data net.py:data -o run --epochs 1 --batch-size 16 --recipe PWLU --json -")
    call(json.loads(result.stdout)["next"].removeprefix("relu-deploy "))
    assert (lab / "run" / "student.onnx").is_file()


def test_a_dry_run_tells_and_writes_nothing(lab):
    result = call(f"{TRAINING} -o run --keep 1 --dry-run", code=2)
    assert "has no smooth activation to replace (1: named in keep)" in result.stderr
    told = call(f"{TRAINING} -o run --dry-run").stdout
    assert "B+KD: 24 steps in 4 epochs on 1 process" in told
    assert "195 parameters to train" in told
    assert "│ 1     │ SiLU" in told
    assert not (lab / "run").exists()


def test_options_come_before_set_before_the_file(lab):
    (lab / "c.toml").write_text(
        'recipe = "PEA-W"\nepochs = 7\nseed = 5\nkeep = ["0"]\n[transition]\npure = 0.5\ninitial = 0.1\n'
    )
    command = f"distill net.py:net {ARRAYS} -o run --config c.toml --set transition.pure=0.4 --set seed=6 --epochs 3"
    config = json.loads(call(f"{command} --batch-size 8 --dry-run --json -").stdout)["config"]
    chosen = {name: config[name] for name in ("recipe", "epochs", "seed", "keep", "batch_size")}
    assert chosen == {"recipe": "PEA-W", "epochs": 3, "seed": 6, "keep": ["0"], "batch_size": 8}
    assert config["transition"]["pure"] == 0.4
    assert config["transition"]["initial"] == 0.1


MISTAKES = {
    "a key of the file": ("-o run --config bad.toml", "bad.toml has no option 'learning_rte'"),
    "a key of a table": ("-o run --set transition.purr=1", "did you mean pure?"),
    "a value": ("-o run --set log_steps=many", "log_steps is 'many', which is no int"),
    "a size": ("-o run --epochs 0", "cannot train with epochs = 0"),
    "no value": ("-o run --set epochs", "write NAME=VALUE"),
    "large batch": ("-o run --batch-size 97", "96 samples are fewer than one batch of 97"),
    "detection": ("-o run --task detection", "detection needs the names of layers"),
    "an occupied folder": ("-o full", "full holds a training already"),
    "a file as folder": ("-o net.py", "cannot make the folder net.py"),
    "weights": ("-o run --weights none.safetensors", "none.safetensors: it does not exist"),
    "a pattern": ("-o run --keep features.*", "matches no module"),
}


@pytest.mark.parametrize(("options", "says"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_and_nothing_is_trained(lab, options, says):
    (lab / "bad.toml").write_text("learning_rte = 1\n")
    (lab / "full" / "checkpoints").mkdir(parents=True)
    (lab / "full" / "checkpoints" / "step-000000001.pt").write_bytes(b"")
    result = call(f"distill net.py:net --data net.py:data {options}", code=2)
    assert says in " ".join(result.stderr.split())
    assert not list(lab.rglob("metrics.jsonl"))


DATA = {
    "neither": ("", "give --data, or all of"),
    "half": ("--train train.npy", "give --data, or all of"),
    "both": (f"--data net.py:data {ARRAYS}", "give --data, or all of"),
    "no function": ("--data net.py:dat", "net.py has no 'dat'"),
    "no module": ("--data nowhere:data", "there is no module 'nowhere'"),
    "one set": ("--data net.py:one", "net.py:one gave a Slow"),
    "no task": ("--data net.py:no_task", "is no task: it has no losses"),
    "wrong width": ("--data net.py:wide", "Sequential fails on the first samples of the training data: RuntimeError"),
    "labels": (ARRAYS.replace("test_labels.npy", "train_labels.npy"), "one label a sample is needed"),
    "a class too many": (
        ARRAYS.replace("test_labels.npy", "four.npy"),
        "labels from 3 to 3; the network has 3 classes",
    ),
    "real labels": (ARRAYS.replace("test_labels.npy", "test.npy"), "labels are whole numbers"),
    "NaN": (ARRAYS.replace("train.npy", "nan.npy"), "nan.npy, sample 77 contains NaN"),
    "no arrays": (ARRAYS.replace("train.npy", "net.py"), "net.py is no .npy file"),
}


@pytest.mark.parametrize(("data", "says"), DATA.values(), ids=DATA)
def test_data_that_does_not_fit(lab, data, says):
    np.save("four.npy", np.full(32, 3))
    x = np.load("train.npy")
    x[77, 3] = np.nan
    np.save("nan.npy", x)
    result = call(f"distill net.py:net {data} -o run --epochs 1 --batch-size 16", code=2)
    assert says in " ".join(result.stderr.split())


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sample_that_fails_in_the_middle_is_named(lab, workers):
    result = call(f"{TRAINING} -o run --workers {workers}", code=2, BROKEN="70")
    assert "sample 70 of train of net.py:data failed: OSError: no such file: 77.png" in result.stderr


def test_a_missing_package_names_its_extra(lab, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None)
    assert "pip install 'relu-deploy[torch]'" in call(f"{TRAINING} -o run", code=2).stderr


def test_a_loss_that_is_not_finite(lab):
    told = call(f"{TRAINING} -o run --learning-rate 1e6", code=2).stderr
    assert "at step" in told
    assert re.search(r"\(epoch 1\); the checkpoint of step [24] is kept", told)


def test_killed_and_resumed_it_ends_with_the_same_bits(lab):
    call(f"{TRAINING} --recipe B+KD-SAT -o whole")
    with start(f"{TRAINING} --recipe B+KD-SAT -o cut", NAP="0.01") as process:
        wait_for(process, lab / "cut", "checkpoints/step-00000001*.pt")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    # No option but the folder's own settings is needed to go on.
    report = json.loads(call("distill net.py:net --data net.py:data -o cut --resume --json -").stdout)
    assert 10 <= report["resumed_from"] < 24
    assert_same_run(lab / "whole", lab / "cut")


def test_terminated_it_says_what_is_kept(lab):
    with start(f"{TRAINING} -o run", NAP="0.02") as process:
        wait_for(process, lab / "run", "checkpoints/step-*.pt")
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert "is kept; the same command with --resume goes on" in told
    assert "Traceback" not in told
    assert not [path for path in (lab / "run").rglob("*") if path.name.endswith(".tmp")]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room_for_a_checkpoint(patch):
    real = Path.write_bytes
    patch.setattr(Path, "write_bytes", lambda self, data: full() if "step-000000018" in self.name else real(self, data))


def no_room_for_a_line(patch):
    calls: list[int] = []
    patch.setattr(
        log, "os", types.SimpleNamespace(fsync=lambda n: full() if len(calls) == 19 else calls.append(os.fsync(n)))
    )


def no_room_for_the_student(patch):
    real = Path.write_bytes
    patch.setattr(Path, "write_bytes", lambda self, data: full() if "student.s" in self.name else real(self, data))


@pytest.mark.parametrize("fill", [no_room_for_a_checkpoint, no_room_for_a_line, no_room_for_the_student])
def test_a_full_disk_loses_no_more_than_an_epoch_and_says_so(lab, fill):
    training = TRAINING.replace("--checkpoint-steps 2", "")
    with pytest.MonkeyPatch.context() as patch:
        fill(patch)
        told = call(f"{training} -o cut", code=2).stderr
    assert "No space left on device; the checkpoint of step" in told
    assert "resume" in told
    kept = int(told.partition("the checkpoint of step ")[2].split()[0])
    assert kept == (24 if fill is no_room_for_the_student else 12)
    call(f"{training} -o cut --resume")
    call(f"{training} -o whole")
    assert_same_run(lab / "whole", lab / "cut")


def test_a_network_that_cannot_be_exported_is_trained_all_the_same(lab):
    (lab / "branch.py").write_text(
        "from net import *\nclass Branch(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.inner = net()\n"
        "    def forward(self, x):\n        y = self.inner(x)\n        return y if y.sum() > 0 else y + 1e-9\n"
    )
    report = json.loads(call(f"{TRAINING} -o run --json -".replace("net.py:net", "branch.py:Branch")).stdout)
    assert report["program"] is None
    assert report["next"] is None
    assert report["notes"][0].startswith("no student.pt2: torch.export fails on Branch")
    assert (lab / "run" / "student.safetensors").is_file()


def test_fewer_processes_than_asked_for_are_told(lab):
    asked = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}
    report = json.loads(call(f"{TRAINING} -o run --dry-run --json -", **asked).stdout)
    assert "asked for several processes and started one" in report["notes"][0]
    assert json.loads(call(f"{TRAINING} -o run --dry-run --json -").stdout)["notes"] == []


def test_two_processes_of_accelerate_give_what_one_gives(lab):
    training = "distill net.py:net --data net.py:data --epochs 8 --batch-size 16 --learning-rate 0.01 --recipe B"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    two = subprocess.run(
        [*launch, "--main_process_port", "0", "-m", "relu_deploy", *training.split(), "-o", "two"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("8 epochs on 2 processes") == 1
    call(f"{training} -o one")
    reports = [json.loads((lab / name / "report.json").read_text()) for name in ("one", "two")]
    one, other = (report["metrics"]["accuracy"] for report in reports)
    # The samples of each step are the same, dropout draws are not: worth a few of the 32 samples.
    assert one > reports[0]["teacher_metrics"]["accuracy"] + 0.2
    assert abs(one - other) <= 0.16
