"""The demo's ReLU student on the 599 held-out digits of scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from benchmarks.accuracy.task import Plan
from benchmarks.accuracy.tasks.classes import answers, score
from benchmarks.accuracy.tasks.studies import trained, write_task
from relu_deploy.demo.data import load_digits
from relu_deploy.demo.network import build_network
from relu_deploy.demo.train import distil_student, train_teacher
from relu_deploy.export import ExampleInput

CALIBRATION = 128


def prepare(folder: Path, shared: Path) -> None:
    """The demo's own training: a SiLU teacher, then its ReLU student."""
    digits = load_digits()

    def train(model: nn.Module) -> None:
        student = distil_student(train_teacher(digits).model, digits).model
        model.load_state_dict(student.state_dict())

    model = trained(lambda: build_network("relu"), shared / "demo.pt", train)
    write_task(
        folder, model, [ExampleInput("image", (2, 1, 32, 32))], {"image": digits.calibration(CALIBRATION)},
        {"image": digits.test_images},
    )  # fmt: skip
    np.savez(folder / "truth.npz", label=digits.test_labels)


PLAN = Plan("demo", "The demo's ReLU student (residual, split stages), trained here: digits", prepare, answers, score)
