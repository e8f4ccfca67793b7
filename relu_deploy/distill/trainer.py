"""A small training loop: seeded, repeatable on one machine's CPU, stopped by the first loss that is not finite."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from calib.progress import Progress, silent
from relu_deploy.distill.losses import hard_label_distillation
from relu_deploy.errors import DataError, TrainingError

# Takes the model, a batch of inputs and a batch of labels; returns a scalar.
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        epochs: Passes over the data.
        batch_size: Samples a step; the last, smaller batch of an epoch is left out (shuffling makes it another one
            each time).
        learning_rate: Peak of the one-cycle schedule (a warm-up, then down to nearly 0).
        weight_decay: Of AdamW.
        seed: Decides the order of the samples, and whatever random numbers the model draws (dropout).
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1 or not self.learning_rate > 0 or self.weight_decay < 0:
            raise TrainingError(f"cannot train with {self}: epochs, batch size and learning rate must be positive")


@dataclasses.dataclass(frozen=True)
class TrainReport:
    """What a training run did.

    Attributes:
        steps: Optimiser steps taken.
        losses: Mean loss of each epoch.
    """

    steps: int
    losses: tuple[float, ...]


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The objective of a teacher: logits against labels."""
    return F.cross_entropy(model(inputs), labels)


def hard_label_objective(teacher: nn.Module) -> Objective:
    """The objective of a classifying student: eq. 3 against ``teacher``, which is put into evaluation mode."""
    teacher.eval()

    def objective(student: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher(inputs)
        return hard_label_distillation(student(inputs), target, labels)

    return objective


def fit(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    *,
    objective: Objective,
    config: TrainConfig,
    what: str = "train",
    progress: Progress = silent,
) -> TrainReport:
    """Train a model in place; it is left in evaluation mode.

    Args:
        model: Its parameters that require gradients are trained.
        inputs: All samples, first axis the sample, on the device of the model.
        labels: One label a sample.
        objective: What to minimise: :func:`cross_entropy`, :func:`hard_label_objective`, or any function of its form.
        config: How.
        what: Name of this run in the progress and in errors.
        progress: Told after every step.

    Raises:
        DataError: there are no samples, fewer than a batch, or not one label for each.
        TrainingError: the loss is NaN or infinite (names the step), or nothing in the model can be trained.
    """
    batches = _check_data(inputs, labels, config.batch_size)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise TrainingError(f"{what}: the model has no parameters that can be trained")
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    total = batches * config.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _one_cycle(step, total))
    losses: list[float] = []
    model.train()
    with _seeded(config.seed):
        for epoch in range(config.epochs):
            order = torch.randperm(len(inputs))
            summed = 0.0
            for batch in range(batches):
                step = epoch * batches + batch + 1
                chosen = order[batch * config.batch_size : (batch + 1) * config.batch_size].to(inputs.device)
                loss = objective(model, inputs[chosen], labels[chosen])
                summed += _finite(loss, what, step, total)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                progress(what, step, total)
            losses.append(summed / batches)
    model.eval()
    return TrainReport(total, tuple(losses))


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, *, batch_size: int = 256) -> float:
    """Share of samples whose largest logit is their label; the model is left in evaluation mode."""
    if len(inputs) == 0 or len(inputs) != len(labels):
        raise DataError(f"accuracy needs one label a sample; there are {len(inputs)} samples and {len(labels)} labels")
    model.eval()
    right = 0
    with torch.no_grad():
        for images, truth in zip(torch.split(inputs, batch_size), torch.split(labels, batch_size), strict=True):
            right += int((model(images).argmax(dim=-1) == truth).sum())
    return right / len(inputs)


def _one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first tenth, then half a cosine down to 1 %.

    >>> [round(_one_cycle(step, 100), 2) for step in (0, 9, 40, 100)]
    [0.1, 1.0, 0.75, 0.01]
    """
    warm = max(1, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def _check_data(inputs: Tensor, labels: Tensor, batch_size: int) -> int:
    """How many whole batches there are."""
    if len(inputs) != len(labels):
        raise DataError(f"there are {len(inputs)} samples and {len(labels)} labels; each sample needs one")
    if len(inputs) < batch_size:
        raise DataError(f"{len(inputs)} samples are fewer than one batch of {batch_size}", hint="lower batch_size")
    return len(inputs) // batch_size


def _finite(loss: Tensor, what: str, step: int, total: int) -> float:
    value = float(loss.detach())
    if not math.isfinite(value):
        raise TrainingError(
            f"{what}: the loss is {value} at step {step} of {total}; nothing was saved",
            hint="lower the learning rate, or look for NaN and Inf in the data",
        )
    return value


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator for a while and give it back as it was: a library does not reseed its caller."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
