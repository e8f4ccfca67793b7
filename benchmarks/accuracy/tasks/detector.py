"""The detection study's ReLU student: residual split stages, a neck over two levels, a decoupled head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy.scores import Score, f1
from benchmarks.accuracy.task import Array, Outputs, Plan
from benchmarks.accuracy.tasks.studies import trained, write_task
from relu_deploy.distill.config import DistillConfig
from relu_deploy.distill.distiller import Distiller
from relu_deploy.export import ExampleInput

CALIBRATION, TRAIN, TEST = 128, 4000, 1000
LEAST = 0.3  # of a detection that is counted


def prepare(folder: Path, shared: Path) -> None:
    """The study's rows B and B+KD with its settings, on canvases made of Fashion-MNIST."""
    from detection_data import as_input, canvases
    from detector_network import Detector

    train, test = canvases("train", TRAIN), canvases("test", TEST)
    original = trained(Detector, shared / "detector-b.pt", lambda new: _train(new, "B", train, shared))
    student = trained(
        lambda: Detector(nn.ReLU), shared / "detector-relu.pt", lambda new: _train(new, "B+KD", train, shared, original)
    )
    write_task(
        folder, student, [ExampleInput("image", (2, 1, 64, 64))], {"image": as_input(train.images[:CALIBRATION])},
        {"image": as_input(test.images)},
    )  # fmt: skip
    placed = [
        np.column_stack([np.full(len(target["labels"]), i), target["boxes"].numpy(), target["labels"].numpy()])
        for i, target in enumerate(test.targets)
    ]
    np.savez(folder / "truth.npz", boxes=np.concatenate(placed))


def answers(outputs: Outputs) -> Sequence[Any]:
    """Boxes (N, 5) of each image, best first."""
    from detector_network import decode

    found = []
    for image in decode(outputs):
        keep = image["scores"].numpy() > LEAST
        found.append(np.column_stack([image["boxes"].numpy(), image["labels"].numpy()])[keep])
    return found


def score(found: Sequence[Array], reference: Sequence[Array], truth: Mapping[str, Array]) -> dict[str, Score]:
    """F1 of boxes at an overlap of 0.5, of the right class: against the truth and against the float network's."""
    placed = [truth["boxes"][truth["boxes"][:, 0] == i][:, 1:] for i in range(len(found))]
    return {"F1 against truth": f1(found, placed), "F1 against float": f1(found, reference)}


def _train(new: nn.Module, recipe: Any, train: Any, shared: Path, original: nn.Module | None = None) -> None:
    """Train as the study does, and take over the weights."""
    from detection import ROWS, make_task
    from detection_data import canvases
    from detector_network import Detector

    row = ROWS[recipe]
    config = DistillConfig(
        recipe=row.recipe, task="detection", epochs=row.epochs, batch_size=32, seed=0, learning_rate=row.rate,
        distill_weight=20.0, clip_norm=10.0, channels_last=True, evaluate_epochs=row.epochs,
    )  # fmt: skip
    distiller = Distiller(
        original or new, train=train, evaluate=canvases("held-out", 64), config=config, fresh=Detector,
        out=shared / f"detector-{recipe}", task=make_task(),
    )  # fmt: skip
    distiller.run(resume=True)
    assert distiller.student is not None
    with torch.no_grad():
        new.load_state_dict(distiller.student.state_dict())


PLAN = Plan(
    "detector", "ReLU student of a small YOLOX, trained here: canvases of Fashion-MNIST", prepare, answers, score
)
