"""The distiller on a network of three layers: every recipe, and a process that is killed and goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

from relu_deploy.distill.config import RECIPE_NAMES, DistillConfig, TransitionConfig, from_dict, to_dict  # noqa: E402
from relu_deploy.distill.distiller import Distiller  # noqa: E402
from relu_deploy.distill.tasks import ClassificationTask  # noqa: E402
from relu_deploy.errors import FileError, TrainingError  # noqa: E402
from relu_deploy.export.weights import read_state  # noqa: E402

pytestmark = pytest.mark.torch

SCRIPT = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, {folder!r})
from test_distiller import distiller
distiller(Path(sys.argv[1]), sys.argv[2], checkpoint_steps=3).run(
    resume="resume" in sys.argv, progress=lambda *_: time.sleep(float(sys.argv[3])))
"""


def distiller(out, recipe, *, poison=False, **options):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 8, generator=generator)
    if poison:
        x[77] = float("nan")
    data = TensorDataset(x, x[:, :3].nan_to_num().argmax(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(8, 16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 3)
        )
    config = DistillConfig(recipe=recipe, epochs=3, batch_size=16, log_steps=2, **options)
    return Distiller(net, train=data, evaluate=data, config=config, out=out, task=ClassificationTask(3))


@pytest.mark.parametrize("recipe", RECIPE_NAMES)
def test_every_recipe_ends_at_its_student(tmp_path, recipe):
    d = distiller(tmp_path, recipe)
    report = d.run()
    kinds = {type(module).__name__ for module in d.student.modules()}
    wanted = {"B": "SiLU", "PWLU": "PWLU"}.get(recipe, "ReLU")
    assert wanted in kinds
    assert not kinds & {"Blend", "StochasticBlend"}
    assert report.steps == d.total == 24
    state = read_state(tmp_path / "student.safetensors")
    assert all(torch.equal(state[name], value) for name, value in d.student.state_dict().items())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == list(range(2, 25, 2))
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2, 3]
    shares = [line["smooth_share"] for line in lines if line["kind"] == "step"]
    if recipe in {"B+KD-SAT", "PEA-W", "PEA-S", "iterative"}:
        assert shares == sorted(shares, reverse=True)
        assert shares[-1] == 0


@pytest.mark.parametrize("recipe", ["B+KD", "PEA-S", "PWLU"])
def test_killed_and_resumed_it_ends_with_the_same_bits(tmp_path, recipe):
    command = [sys.executable, "-c", SCRIPT.format(folder=os.path.dirname(__file__))]  # noqa: PTH120
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distiller(whole, recipe, checkpoint_steps=3).run()
    process = subprocess.Popen([*command, str(cut), recipe, "0.1"])
    deadline = time.monotonic() + 60
    while not list((cut / "checkpoints").glob("step-0000000*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.35)  # somewhere between two checkpoints
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    report = distiller(cut, recipe, checkpoint_steps=3).run(resume=True)
    assert 0 < report.resumed_from < report.steps
    one, other = (read_state(folder / "student.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "metrics.jsonl").read_bytes() == (cut / "metrics.jsonl").read_bytes()


def test_a_loss_that_is_not_finite_is_named_with_its_step(tmp_path):
    with pytest.raises(TrainingError, match=r"'distill' is nan at step \d+ of 24 \(epoch 1\)"):
        distiller(tmp_path, "B+KD", poison=True).run()


def test_a_folder_with_a_training_is_not_overwritten_and_another_run_is_not_resumed(tmp_path):
    distiller(tmp_path, "B+KD").run()
    with pytest.raises(FileError, match="holds a training already"):
        distiller(tmp_path, "B+KD").run()
    with pytest.raises(TrainingError, match=r"learning_rate differs: 0\.001 there, 0\.01 here"):
        distiller(tmp_path, "B+KD", learning_rate=0.01).run(resume=True)


def test_a_configuration_survives_json_and_refuses_unknown_keys():
    config = DistillConfig(recipe="PEA-W", keep=("*.se.*",))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    with pytest.raises(TrainingError, match="did you mean learning_rate"):
        from_dict({"learning_rte": 1e-3})
    with pytest.raises(TrainingError, match="epochs = 0"):
        DistillConfig(epochs=0)


def test_the_documentation_has_every_setting_with_its_default():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    text = (Path(__file__).parents[2] / "docs" / "students.md").read_text()
    told = tomllib.loads(text.partition("```toml\n")[2].partition("```")[0])
    config = to_dict(DistillConfig())
    assert told.pop("clip_norm") == 1.0  # TOML has no null, which is the default
    config.pop("clip_norm")
    assert told.pop("transition") == pytest.approx(config.pop("transition"), abs=1e-6)
    assert told == config


def test_two_processes_train_what_one_does(tmp_path):
    script = tmp_path / "train.py"
    body = SCRIPT.format(folder=os.path.dirname(__file__))  # noqa: PTH120
    # Gloo's threads abort a process at times while it ends, after everything is done.
    script.write_text(body + "\nassert torch.distributed.get_world_size() == 2\nimport os\nos._exit(0)\n")
    # accelerate 1.15's own "launch --cpu --num_processes 2" starts one process where there is no MPI.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(script), str(tmp_path / "two"), "B", "0"], check=True, timeout=120)
    distiller(tmp_path / "one", "B", checkpoint_steps=3).run()
    one, two = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert two["steps"] == one["steps"]
    # The samples of every step are the same; dropout draws differ in each process, worth a few of the 128 samples.
    assert abs(two["metrics"]["accuracy"] - one["metrics"]["accuracy"]) <= 0.1


def test_learned_shapes_do_not_decay():
    from relu_deploy.distill.distiller import _groups
    from relu_deploy.nn.make import activation

    units = [activation(name, 4) for name in ("apl", "pau", "pwlu", "prelu")]
    heavy, light = _groups(nn.Sequential(nn.Linear(4, 4), *units), 0.1)
    assert [tuple(p.shape) for p in heavy["params"]] == [(4, 4)]
    assert len(light["params"]) == 1 + sum(len(list(unit.parameters())) for unit in units)


@pytest.mark.parametrize("kernel", ["blocks", "compiled"])
def test_the_kernel_of_pwlu_is_chosen(kernel):
    from relu_deploy.distill.recipes import make_student
    from relu_deploy.nn.pwlu import PWLU
    from relu_deploy.nn.pwlu_kernel import COMPILERS

    if kernel == "compiled" and not any(map(shutil.which, COMPILERS)):
        pytest.skip("there is no C++ compiler")
    config = DistillConfig(recipe="PWLU", transition=TransitionConfig(kernel=kernel))
    student = make_student(
        nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 2)), config, example=torch.zeros(1, 4)
    ).model
    assert [unit.kernel for unit in student.modules() if isinstance(unit, PWLU)] == [kernel]


def test_an_unknown_kernel_is_refused():
    with pytest.raises(TrainingError, match="kernel = fast"):
        TransitionConfig(kernel="fast")
