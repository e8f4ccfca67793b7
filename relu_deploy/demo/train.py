"""Train the demo's SiLU teacher and distil its ReLU student (B+KD: the student starts from the teacher's weights)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.errors import MissingExtraError
from calib.files import atomic_path
from calib.progress import Progress, silent
from relu_deploy.demo.data import Digits
from relu_deploy.demo.network import build_network
from relu_deploy.distill.trainer import (
    Objective,
    TrainConfig,
    TrainReport,
    accuracy,
    cross_entropy,
    fit,
    hard_label_objective,
)
from relu_deploy.nn.swap import SwapReport, relu, replace_activations

TEACHER = TrainConfig(epochs=4)
# The student starts where the teacher ended: fewer passes at a lower rate, so that it is repaired, not trained anew.
STUDENT = TrainConfig(epochs=2, learning_rate=1e-3)


@dataclasses.dataclass(frozen=True)
class Trained:
    """A trained network.

    Attributes:
        model: In evaluation mode, on the CPU.
        accuracy: Share of the held-out test images classified right.
        training: What the training run did.
        swap: Which activations were replaced; None for a teacher.
    """

    model: nn.Module
    accuracy: float
    training: TrainReport
    swap: SwapReport | None = None


def train_teacher(
    digits: Digits, *, activation: str = "silu", config: TrainConfig = TEACHER, progress: Progress = silent
) -> Trained:
    """Train the demo's network from random weights with cross entropy.

    Args:
        digits: Trains on the training part; the test part is only measured.
        activation: The smooth activation, as :func:`build_network` takes it.
        config: How to train; its seed also decides the first weights.
        progress: Told after every step, as "train teacher".
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_network(activation)
    training = _fit(model, digits, cross_entropy, config, "train teacher", progress)
    return Trained(model, _test_accuracy(model, digits), training)


def distil_student(
    teacher: nn.Module, digits: Digits, *, config: TrainConfig = STUDENT, progress: Progress = silent
) -> Trained:
    """Replace the teacher's smooth activations by ReLU and repair the copy with hard-label distillation (eq. 3).

    Recipe B+KD of "ReLU for inference acceleration": the student starts from the teacher's weights.

    Args:
        teacher: Left as it is, in evaluation mode.
        digits: As for :func:`train_teacher`.
        config: How to train.
        progress: Told after every step, as "distil student".
    """
    student, swap = replace_activations(teacher, relu)
    training = _fit(student, digits, hard_label_objective(teacher), config, "distil student", progress)
    return Trained(student, _test_accuracy(student, digits), training, swap)


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


def _fit(
    model: nn.Module, digits: Digits, objective: Objective, config: TrainConfig, what: str, progress: Progress
) -> TrainReport:
    """Train on the training part, in channels-last, which is faster on CPUs; then back to the usual layout."""
    images, labels = _tensors(digits.train_images, digits.train_labels)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training = fit(model, images, labels, objective=objective, config=config, what=what, progress=progress)
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return training


def _test_accuracy(model: nn.Module, digits: Digits) -> float:
    return accuracy(model, *_tensors(digits.test_images, digits.test_labels))


def _tensors(images: object, labels: object) -> tuple[Tensor, Tensor]:
    return torch.as_tensor(images), torch.as_tensor(labels)
