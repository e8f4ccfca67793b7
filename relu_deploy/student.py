"""From an original and data to a student that ``export`` takes: what ``relu-deploy distill`` does, as functions."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.files import write_json
from calib.progress import Progress, silent
from relu_deploy.distill import checkpoint, loader
from relu_deploy.distill.config import DistillConfig, to_dict
from relu_deploy.distill.distiller import Distiller, DistillReport
from relu_deploy.distill.launch import Processes
from relu_deploy.distill.sets import Sets, task_for
from relu_deploy.errors import ExportError, FileError
from relu_deploy.export.save import SavedProgram, save_program
from relu_deploy.nn.swap import SwapReport
from relu_deploy.report import to_json

FILES = (
    "student.safetensors", "student.pt2", "report.json", "config.json", "metrics.jsonl", "training.png", "checkpoints",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StudentReport:
    """What a training did and made.

    Attributes:
        training: The distiller's report.
        metric: The metric of the headline.
        kept: The student's value of it over the teacher's; None where that cannot be told.
        program: ``student.pt2``; None where torch.export cannot take the network, as the notes say.
        files: What lies in the folder now.
        next: The command that goes on; None without ``program``.
    """

    training: DistillReport
    metric: str
    kept: float | None
    program: SavedProgram | None
    files: tuple[Path, ...]
    next: str | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training would do.

    Attributes:
        config: Every setting.
        processes: That would train together.
        parameters: Numbers that the student would learn.
        steps: Optimiser steps of the whole training.
        samples: Of the training and of the evaluation data.
        swap: Which activations would be replaced, which not and why; None for recipe B.
        notes: What a user should know.
    """

    config: dict[str, Any]
    processes: int
    parameters: int
    steps: int
    samples: tuple[int, int]
    swap: SwapReport | None
    notes: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """A training before it starts.

    Attributes:
        distiller: It.
        processes: That train together.
    """

    distiller: Distiller
    processes: Processes

    def plan(self) -> Plan:
        """What it would do; nothing is written."""
        d = self.distiller
        student = d.prepare()
        loader.steps_an_epoch(d.samples[0], d.config.batch_size, self.processes.count)
        parameters = sum(p.numel() for p in student.model.parameters() if p.requires_grad)
        warning = self.processes.warning
        return Plan(
            to_dict(d.config), self.processes.count, parameters, d.total, d.samples, student.swap,
            (warning,) if warning else (),
        )  # fmt: skip

    def run(self, *, resume: bool = False, progress: Progress = silent) -> StudentReport:
        """Train, then write ``student.pt2``. Raises as :meth:`Distiller.run`."""
        d = self.distiller
        training = d.run(resume=resume, progress=progress)
        program, notes = None, list(training.notes)
        notes += [self.processes.warning] if self.processes.warning else []
        if self.processes.first:
            try:
                program = _save(d)
            except (ExportError, FileError) as error:
                notes.append(f"no student.pt2: {error.message}")
        training = dataclasses.replace(training, notes=tuple(notes))
        metric = d.task.metric
        report = StudentReport(
            training, metric, _share(training, metric), program,
            tuple(path for name in FILES if (path := d.out / name).exists() or name == "report.json"),
            program.command(d.out / "student.onnx") if program else None,
        )  # fmt: skip
        if self.processes.first:
            write_json(d.out / "report.json", flat(report))
        return report


def make_job(
    teacher: nn.Module,
    sets: Sets,
    config: DistillConfig,
    out: Path,
    *,
    processes: Processes,
    fresh: Callable[[], nn.Module] | None = None,
) -> Job:
    """Hold network, data and configuration against each other. Nothing is written.

    Raises:
        DataError: the network does not run on the samples, or there are too few.
        TrainingError: the task needs more than labels.
    """
    task = task_for(teacher, sets, config.task)
    distiller = Distiller(
        teacher, train=sets.train, evaluate=sets.evaluate, config=config, out=out, task=task, fresh=fresh
    )
    return Job(distiller, processes)


def flat(report: StudentReport) -> dict[str, Any]:
    """The report as ``report.json`` has it: what the training did and what came of it in one object."""
    values: dict[str, Any] = to_json(report)
    return {**values.pop("training"), **values}


@contextlib.contextmanager
def telling_what_is_kept(folder: Path, tell: Callable[[str], None]) -> Iterator[None]:
    """Say, when a signal ends the training, where it can go on."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        tell(f"stopped; {checkpoint.newest(folder / 'checkpoints')}; the same command with --resume goes on")
        raise


def _save(distiller: Distiller) -> SavedProgram:
    if distiller.student is None:
        raise ExportError("there is no student yet")
    inputs, _ = distiller.example(2)
    return save_program(distiller.student, _doubled(inputs), distiller.out / "student.pt2")


def _doubled(inputs: Any) -> Any:
    """A single sample twice: a batch of one would be exported as a constant."""
    if isinstance(inputs, Tensor):
        return torch.cat([inputs, inputs]) if inputs.dim() and len(inputs) == 1 else inputs
    if isinstance(inputs, dict):
        return {name: _doubled(value) for name, value in inputs.items()}
    return tuple(_doubled(value) for value in inputs) if isinstance(inputs, (tuple, list)) else inputs


def _share(training: DistillReport, metric: str) -> float | None:
    """None also for metrics of 0 or below, of which there is no share (COCO says -1 for nothing to measure)."""
    mine, its = training.metrics.get(metric), training.teacher_metrics.get(metric)
    return mine / its if mine is not None and its is not None and its > 0 and mine >= 0 else None
