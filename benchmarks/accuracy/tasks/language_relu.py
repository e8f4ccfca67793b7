"""The language study's ReLU student: a BERT-like encoder that says whether a sentence is positive."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from benchmarks.accuracy.task import Plan
from benchmarks.accuracy.tasks.classes import answers, score
from benchmarks.accuracy.tasks.studies import sentences_of_vader, trained, write_task
from relu_deploy.distill.config import DistillConfig
from relu_deploy.distill.distiller import Distiller
from relu_deploy.distill.tasks import LanguageTask
from relu_deploy.export import ExampleInput

CALIBRATION = 128


def prepare(folder: Path, shared: Path) -> None:
    """The study's rows B and B+KD with its settings."""
    import language

    sentences_of_vader(shared, "train")  # downloads the archive
    data, _ = language.prepare(shared)
    with np.load(data) as stored:
        parts = {
            split: language.Encoded({name: stored[f"{split}.{name}"] for name in (*language.INPUTS, "label")})
            for split in language.SPLITS
        }
    original = trained(
        lambda: language.make_network(0), shared / "bert-b.pt", lambda new: _train(new, "B", parts, shared)
    )
    student = trained(
        lambda: _with_relu(language.make_network(0)), shared / "bert-relu.pt",
        lambda new: _train(new, "B+KD", parts, shared, original),
    )  # fmt: skip
    test = parts["test"].arrays()
    write_task(
        folder,
        student,
        [
            ExampleInput("input_ids", (2, language.LENGTH), "int64", len(language.SPECIAL), language.VOCABULARY - 1),
            ExampleInput("attention_mask", (2, language.LENGTH), "int64", 1, 1),
        ],
        {name: values[:CALIBRATION] for name, values in parts["train"].arrays().items()},
        test,
    )
    np.savez(folder / "truth.npz", label=parts["test"].labels.numpy())


def _with_relu(model: nn.Module) -> nn.Module:
    """GELU out, ReLU in."""
    for layer in model.bert.encoder.layer:  # type: ignore[union-attr]
        layer.intermediate.intermediate_act_fn = nn.ReLU()
    return model


def _train(new: nn.Module, row: str, parts: Any, shared: Path, original: nn.Module | None = None) -> None:
    """Train as the study does, and take over the weights."""
    import language

    recipe, _, weights, loss = language.ROWS[row]
    config = DistillConfig(
        recipe=recipe, weights=weights, loss=loss, task="language", epochs=language.EPOCHS,
        batch_size=language.BATCH, learning_rate=language.LEARNING_RATE, seed=0, evaluate_epochs=language.EPOCHS,
    )  # fmt: skip
    distiller = Distiller(
        original or new, train=parts["train"], evaluate=parts["validation"], config=config, out=shared / f"bert-{row}",
        task=LanguageTask(2), fresh=lambda: language.make_network(0),
    )  # fmt: skip
    distiller.run(resume=True)
    assert distiller.student is not None
    new.load_state_dict(distiller.student.state_dict())


PLAN = Plan("bert-relu", "BERT-like ReLU encoder, trained here: the sign of rated sentences", prepare, answers, score)
