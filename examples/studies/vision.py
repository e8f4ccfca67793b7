"""One training of an image classifier and all that is measured on it: the job that studies (a) to (d) repeat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from deploy import deploy, engine_outputs
from fashion import CLASSES, as_input, dataset, load
from harness import Job, Options, Values, job_folder, run_jobs
from networks import make_network
from relu_deploy.distill.config import DistillConfig, from_dict
from relu_deploy.distill.distiller import Distiller
from relu_deploy.distill.tasks import ClassificationTask
from relu_deploy.export import ExampleInput
from relu_deploy.nn.make import activation
from relu_deploy.nn.pwlu_model import alignment, input_statistics
from relu_deploy.nn.swap import channelwise, replace_activations

TRAINING, CALIBRATION, WATCHED = 25_000, 256, 2_000
HELD_OUT = 50_000
"""Training images from here on are never trained on: calibration data is taken from there, and what was chosen by
trying (learning rates, lengths) was tried on them. The test images only gave the numbers of the pages."""
SMOKE = 512
ORIGINAL = {"cnn": "silu", "deit": "gelu"}
LEARNING_RATE = {"cnn": 1e-2, "deit": 3e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """What is trained in one row of a table.

    Attributes:
        network: ``cnn`` or ``deit``.
        recipe: Of the distiller.
        units: Activations put in the place of the network's own before the training, by the name that
            :func:`activation` knows; None leaves them.
        options: Of those units.
        epochs: Over ``TRAINING`` images.
        teacher: The job whose student is this one's original, without its seed; None trains from random weights.
        config: Further settings of the distiller.
        int8: Whether the network is deployed in INT8.
    """

    network: str = "cnn"
    recipe: str = "B"
    units: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    epochs: int = 2
    teacher: str | None = None
    config: tuple[tuple[str, Any], ...] = ()
    int8: bool = True


def train_rows(rows: Mapping[str, Row], options: Options) -> dict[str, Values]:
    """Train every row with every seed; results by name of the job."""
    return run_jobs([job for name, row in rows.items() for job in jobs_of(name, row, options)], options)


def jobs_of(name: str, row: Row, options: Options) -> list[Job]:
    """A row's trainings."""
    return [
        Job(
            job_name(name, seed), train,
            {**_plain(row), "seed": seed, "teacher": _teacher(row, seed, options)}, options.smoke,
        )
        for seed in range(options.seeds)
    ]  # fmt: skip


def job_name(name: str, seed: int) -> str:
    """The name of a row's training."""
    return f"{name}-s{seed}"


def job_names(name: str, options: Options) -> list[str]:
    """Names of all its trainings."""
    return [job_name(name, seed) for seed in range(options.seeds)]


def train(job: Job, folder: Path) -> Values:
    """Train, deploy and score one network; runs in a process of its own."""
    settings = job.settings
    seed, network = settings["seed"], settings["network"]
    original = _original(settings)
    distiller = Distiller(
        original,
        train=dataset("train", SMOKE if job.smoke else TRAINING),
        evaluate=dataset("train", SMOKE if job.smoke else WATCHED, skip=HELD_OUT),
        config=_config(settings, seed),
        out=folder / "training",
        task=ClassificationTask(CLASSES),
        fresh=lambda: _fresh(network, settings["seed"]),
    )
    report = distiller.run(resume=True)
    assert distiller.student is not None
    images, labels = load("test")
    values = deploy(
        distiller.student,
        folder,
        inputs=[ExampleInput("image", (2, 1, 28, 28))],
        calibration={"image": as_input(load("train")[0][HELD_OUT : HELD_OUT + CALIBRATION])},
        score=lambda engine: _accuracy(engine, as_input(images), labels),
        int8=settings["int8"],
    )
    return {
        **values, **_alignment(distiller.student, images), "held_out": 100 * report.metrics["accuracy"],
        "parameters": sum(p.numel() for p in distiller.student.parameters()), "seconds": report.seconds,
    }  # fmt: skip


def _original(settings: Any) -> nn.Module:
    """The network that the recipe starts from: its teacher, or one with random weights."""
    network = _fresh(settings["network"], settings["seed"])
    if settings["teacher"] is not None:
        network.load_state_dict(load_file(Path(settings["teacher"]) / "training" / "student.safetensors"))
    if settings["units"] is None:
        return network
    options = dict(settings["options"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        swapped, _ = replace_activations(
            network,
            channelwise(lambda c, axis: activation(settings["units"], c, axis, **options)),
            example=torch.zeros(2, 1, 28, 28),
        )
    return swapped


def _fresh(network: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_network(network, {"silu": nn.SiLU, "gelu": nn.GELU}[ORIGINAL[network]])


def _config(settings: Any, seed: int) -> DistillConfig:
    network = settings["network"]
    return from_dict({
        "recipe": settings["recipe"], "epochs": settings["epochs"], "batch_size": 64, "seed": seed,
        "learning_rate": LEARNING_RATE[network], "channels_last": network == "cnn",
        "evaluate_epochs": settings["epochs"], **dict(settings["config"]),
    })  # fmt: skip


def _alignment(model: nn.Module, images: Any) -> Values:
    """``iou``: mean over the units of a PWLU network; nothing for others. Source: PWLU, eq. 7."""
    batch = torch.from_numpy(as_input(images[:1024]))
    with torch.no_grad():
        found = alignment(model, input_statistics(model, lambda: model(batch)))
    return {"iou": sum(found.values()) / len(found)} if found else {}


def _accuracy(engine: Path, images: Any, labels: Any) -> float:
    (scores,) = engine_outputs(engine, {"image": images}).values()
    return 100 * float(np.mean(scores.argmax(axis=-1) == labels))


def _teacher(row: Row, seed: int, options: Options) -> str | None:
    return None if row.teacher is None else str(job_folder(job_name(row.teacher, seed), options))


def _plain(row: Row) -> dict[str, Any]:
    """As JSON gives it back: a stored result is compared with it."""
    values = dataclasses.asdict(row)
    return {**values, "options": [list(pair) for pair in row.options], "config": [list(pair) for pair in row.config]}


def from_scratch(recipe: str = "B", **values: Any) -> Row:
    """A row that trains the convolutional network from random weights with labels alone.

    Args:
        recipe: Of the distiller.
        **values: Of :class:`Row`; ``transition`` is a mapping for the distiller's configuration.
    """
    transition = values.pop("transition", None)
    config = [("weights", "random"), ("loss", "task")] if recipe != "B" else []
    config += [("transition", transition)] if transition else []
    return Row(recipe=recipe, config=tuple(config), **values)
