"""Train the demo's SiLU teacher and distil its ReLU student (B+KD: the student starts from the teacher's weights)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from calib.errors import MissingExtraError
from calib.files import atomic_path
from calib.progress import Progress, silent
from relu_deploy.demo.data import CLASSES, Digits, load_digits
from relu_deploy.demo.network import build_network
from relu_deploy.distill.config import DistillConfig
from relu_deploy.distill.distiller import Distiller, DistillReport
from relu_deploy.distill.tasks import ClassificationTask

TEACHER = DistillConfig(recipe="B", epochs=4, learning_rate=3e-3, channels_last=True, evaluate_epochs=4)
# The student starts where the teacher ended: fewer passes at a lower rate, so that it is repaired, not trained anew.
STUDENT = DistillConfig(recipe="B+KD", epochs=2, learning_rate=1e-3, channels_last=True, evaluate_epochs=2)
KEPT = ("metrics.jsonl", "training.png")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        model: In evaluation mode, on the CPU.
        accuracy: Share of the held-out test images classified right.
        training: What the training did.
    """

    model: nn.Module
    accuracy: float
    training: DistillReport


def train_teacher(
    digits: Digits, *, activation: str = "silu", config: DistillConfig = TEACHER, keep: Path | None = None,
    progress: Progress = silent,
) -> Trained:  # fmt: skip
    """Train the demo's network from random weights with cross entropy.

    Args:
        digits: Trains on the training part; the test part is only measured.
        activation: The smooth activation, as :func:`build_network` takes it.
        config: How to train; its seed also decides the first weights.
        keep: Metrics and plot are written here, as ``original.metrics.jsonl`` and ``original.training.png``.
        progress: Told after every step, as "train teacher".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_network(activation)
    return _train(model, digits, config, "train teacher", keep and keep / "original", progress)


def distil_student(
    teacher: nn.Module, digits: Digits, *, config: DistillConfig = STUDENT, keep: Path | None = None,
    progress: Progress = silent,
) -> Trained:  # fmt: skip
    """Replace the teacher's smooth activations by ReLU and repair the copy with hard-label distillation (eq. 3).

    Recipe B+KD of "ReLU for inference acceleration": the student starts from the teacher's weights.

    Args:
        teacher: Left as it is.
        digits: As for :func:`train_teacher`.
        config: How to train.
        keep: As for :func:`train_teacher`; the names begin with ``student``.
        progress: Told after every step, as "distil student".
    """
    return _train(teacher, digits, config, "distil student", keep and keep / "student", progress)


def data_sets() -> tuple[TensorDataset, TensorDataset]:
    """The demo's data for ``relu-deploy distill``: what trains, what measures."""
    return _sets(load_digits())


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state_dict as safetensors, whole or not at all.

    Raises:
        FileError: ``path`` cannot be written.
        MissingExtraError: safetensors is not installed.
    """
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise MissingExtraError("safetensors", extra="torch", purpose="saving weights") from error
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()})
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def _train(
    model: nn.Module, digits: Digits, config: DistillConfig, what: str, keep: Path | None, progress: Progress
) -> Trained:
    """Train in a folder of its own; checkpoints of a few seconds are of no use to anyone."""
    train, test = _sets(digits)
    with tempfile.TemporaryDirectory() as folder:
        distiller = Distiller(
            model, train=train, evaluate=test, config=config, out=Path(folder), task=ClassificationTask(CLASSES)
        )
        report = distiller.run(progress=lambda _, done, total: progress(what, done, total))
        if keep is not None:
            for name in KEPT:
                with atomic_path(keep.with_name(f"{keep.name}.{name}")) as temporary:
                    temporary.write_bytes((Path(folder) / name).read_bytes())
    if distiller.student is None:
        raise RuntimeError("a training that ended has a student")
    return Trained(distiller.student, report.metrics["accuracy"], report)


def _sets(digits: Digits) -> tuple[TensorDataset, TensorDataset]:
    parts = ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels))
    train, test = (TensorDataset(torch.as_tensor(images), torch.as_tensor(labels)) for images, labels in parts)
    return train, test
