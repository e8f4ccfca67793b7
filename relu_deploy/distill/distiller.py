"""Train a student from its original, on as many processes as ``accelerate launch`` starts, and go on after a kill."""

from __future__ import annotations

import atexit
import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.utils.data import Dataset

from calib.errors import ToolkitError, first_line
from calib.files import atomic_path, make_folder, write_json
from calib.progress import Progress, silent
from relu_deploy.distill import checkpoint, loader
from relu_deploy.distill.config import DistillConfig, to_dict
from relu_deploy.distill.log import MetricsLog, plot
from relu_deploy.distill.recipes import Student, make_student, set_progress
from relu_deploy.distill.tasks import Task, call
from relu_deploy.errors import FileError, TrainingError
from relu_deploy.nn.blend import finish
from relu_deploy.nn.schedule import one_cycle
from relu_deploy.nn.swap import SwapReport
from relu_deploy.report import to_json

_SLOW_PWLU = (
    "PWLU was computed by torch's operators; where there is a C++ compiler, transition.kernel=compiled is several "
    "times as fast (docs/pwlu-speed.md)"
)


@dataclasses.dataclass(frozen=True)
class DistillReport:
    """What a training did.

    Attributes:
        recipe: As configured.
        student: Weights of the finished student, safetensors: blends that ended at ReLU are ReLU.
        steps: Optimiser steps of the whole training.
        epochs: Mean loss and metrics of each epoch.
        metrics: Of the finished student, on the evaluation data.
        teacher_metrics: Of the original, on the same data.
        swap: Which activations were replaced; None for recipe B.
        resumed_from: Step of the checkpoint that this run went on from; None if it began at the beginning.
        seconds: Of this run.
        notes: What a user should know.
        processes: How many trained together.
        parameters: Numbers that the student learned.
    """

    recipe: str
    student: str
    steps: int
    epochs: tuple[dict[str, Any], ...]
    metrics: dict[str, float]
    teacher_metrics: dict[str, float]
    swap: SwapReport | None
    resumed_from: int | None
    seconds: float
    notes: tuple[str, ...]
    processes: int = 1
    parameters: int = 0


class Distiller:
    """One training in one folder.

    Args:
        teacher: The original; left as it is.
        train: Map-style data set of ``(inputs, target)``; inputs are a tensor, a tuple or a dict.
        evaluate: The same, for the metrics after each epoch.
        config: How.
        out: Folder of checkpoints, ``metrics.jsonl``, ``student.safetensors``, ``report.json`` and the plot.
        task: Losses and metrics.
        fresh: Makes the network with random weights, for recipes that start from them.

    Raises:
        DataError: a data set is empty or smaller than a batch.

    Several processes share each batch, see the same order of samples and average their gradients. BatchNorm normalises
    with each process's own part; its running statistics are those of the first process.
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        train: Dataset[Any],
        evaluate: Dataset[Any],
        config: DistillConfig,
        out: Path,
        task: Task,
        fresh: Callable[[], nn.Module] | None = None,
    ) -> None:
        loader.size_of(evaluate, "evaluate")
        self._steps = loader.steps_an_epoch(loader.size_of(train, "train"), config.batch_size)
        self.teacher, self.config, self.out, self.task = teacher, config, Path(out), task
        self._train, self._evaluate, self._fresh = train, evaluate, fresh
        self.student: nn.Module | None = None

    @property
    def samples(self) -> tuple[int, int]:
        """Of the training and of the evaluation data."""
        return loader.size_of(self._train, "train"), loader.size_of(self._evaluate, "evaluate")

    @property
    def total(self) -> int:
        """Optimiser steps of the whole training."""
        return self._steps * self.config.epochs

    def example(self, size: int) -> tuple[Any, Any]:
        """A batch of the evaluation data, ``size`` samples or as many as there are."""
        batch: tuple[Any, Any] = next(iter(self._batches_of_evaluation(size, 0, 1)))
        return batch

    def prepare(self) -> Student:
        """The student before its first step; what ``--dry-run`` shows."""
        example, _ = self.example(1)
        teacher = copy.deepcopy(self.teacher).cpu()
        with checkpoint.seeded(self.config.seed):
            return make_student(teacher, self.config, example=example, fresh=self._fresh)

    def run(self, *, resume: bool = False, progress: Progress = silent) -> DistillReport:
        """Train to the end.

        Args:
            resume: Go on from the newest checkpoint of ``out``, bit for bit as if nothing had happened (on a CPU).
            progress: Told after every step, by the first process.

        Raises:
            TrainingError: the loss is not finite (names step and term), or ``out`` is of another run.
            FileError: ``out`` is in use, holds a run and ``resume`` is not given, or cannot be written.
        """
        make_folder(self.out / "checkpoints")
        # Without cpu=, processes on a machine with no GPU would not know of each other.
        cpu = not torch.accelerator.is_available()
        joined = _in_group()
        run = _Run(self, Accelerator(mixed_precision=self.config.precision, cpu=cpu))
        if _in_group() and not joined:
            atexit.register(_leave_group)
        if not run.accelerator.is_main_process:
            return run.train(resume=resume, progress=silent)
        with checkpoint.locked(self.out):
            if not resume and checkpoint.existing(self.out / "checkpoints"):
                raise FileError(f"{self.out} holds a training already", hint="resume it, or choose another folder")
            return run.train(resume=resume, progress=progress)

    def _batches_of_evaluation(self, size: int, rank: int, processes: int) -> Iterator[tuple[Any, Any]]:
        yield from loader.told_plainly(
            loader.evaluation_loader(
                self._evaluate, size, rank=rank, processes=processes, workers=0, collate=self.task.collate
            )
        )


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _leave_group() -> None:
    """Leave the processes that trained together. One that just ends aborts at times, in the threads of its group."""
    if _in_group():
        torch.distributed.destroy_process_group()


class _Run:
    """The state of a training that goes on: what a checkpoint stores, and what it is put back into."""

    def __init__(self, distiller: Distiller, accelerator: Accelerator) -> None:
        self.d, self.config, self.accelerator = distiller, distiller.config, accelerator
        self.step = 0
        self.sums: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.teacher_metrics: dict[str, float] = {}
        self.notes: list[str] = []
        self.resumed_from: int | None = None

    def train(self, *, resume: bool, progress: Progress) -> DistillReport:
        started = time.monotonic()
        config, accelerator = self.config, self.accelerator
        loader.steps_an_epoch(len(self.d._train), config.batch_size, accelerator.num_processes)  # type: ignore[arg-type]  # noqa: SLF001
        prepared = self.d.prepare()
        self.swap = prepared.swap
        self.model = prepared.model.train()
        self.teacher = copy.deepcopy(self.d.teacher).eval().requires_grad_(requires_grad=False).to(accelerator.device)
        if config.recipe == "PWLU" and config.transition.kernel == "blocks" and accelerator.device.type == "cpu":
            self.notes.append(_SLOW_PWLU)
        if config.channels_last:
            for network in (self.model, self.teacher):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(_groups(self.model, config.weight_decay), lr=config.learning_rate)
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        with checkpoint.seeded(config.seed + accelerator.process_index):
            self._begin(resume)
            with self._saying_what_is_kept():
                for epoch in range(self.step // self.d._steps, config.epochs):  # noqa: SLF001
                    self._epoch(epoch, progress)
                return self._end(time.monotonic() - started)

    @contextlib.contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except FileError as error:
            kept = checkpoint.newest(self.d.out / "checkpoints")
            raise FileError(f"{error.message}; {kept}", hint=error.hint or "make room, then resume") from error

    def _begin(self, resume: bool) -> None:
        folder = self.d.out / "checkpoints"
        self.identity = {
            **to_dict(self.config), "processes": self.accelerator.num_processes,
            "model fingerprint": loader.fingerprint_state(self.d.teacher.state_dict()),
            "training data fingerprint": loader.fingerprint(self.d._train),  # noqa: SLF001
        }  # fmt: skip
        found = checkpoint.load_newest(folder) if resume else None
        if found is None:
            self.log = MetricsLog(self.d.out / "metrics.jsonl") if self.accelerator.is_main_process else None
            if self.accelerator.is_main_process:
                write_json(self.d.out / "config.json", to_dict(self.config))
            self.teacher_metrics = self._measure(self.teacher)
            return
        state, path, notes = found
        checkpoint.check_same_run(state["identity"], self.identity, path)
        self.notes += notes
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = self.resumed_from = state["step"]
        self.sums, self.history = dict(state["sums"]), list(state["history"])
        self.teacher_metrics = dict(state["teacher_metrics"])
        checkpoint.set_random_state(state["random"][self.accelerator.process_index])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        main = self.accelerator.is_main_process
        self.log = MetricsLog(self.d.out / "metrics.jsonl", length=state["log_bytes"]) if main else None

    def _epoch(self, epoch: int, progress: Progress) -> None:
        config, steps = self.config, self.d._steps  # noqa: SLF001
        batches = loader.EpochBatches(
            len(self.d._train), config.batch_size, seed=config.seed, epoch=epoch, first=self.step - epoch * steps,  # type: ignore[arg-type]  # noqa: SLF001
            rank=self.accelerator.process_index, processes=self.accelerator.num_processes,
        )  # fmt: skip
        self.wrapped.train()
        data = loader.train_loader(self.d._train, batches, workers=config.workers, collate=self.d.task.collate)  # noqa: SLF001
        for inputs, target in loader.told_plainly(data):
            self._one_step(_to(inputs, self.accelerator.device), _to(target, self.accelerator.device), epoch)
            progress("distil", self.step, self.d.total)
            if config.checkpoint_steps and self.step % config.checkpoint_steps == 0 and self.step % steps:
                self._save()
        line: dict[str, Any] = {
            "kind": "epoch", "epoch": epoch + 1, "step": self.step,
            "losses": {name: value / steps for name, value in self.sums.items()},
        }  # fmt: skip
        if (epoch + 1) % config.evaluate_epochs == 0 or epoch + 1 == config.epochs:
            line["metrics"] = self._measure(self.model)
        self.sums = {}
        self.history.append(line)
        if self.log:
            self.log.write(line)
        self._save()

    def _one_step(self, inputs: Any, target: Any, epoch: int) -> None:
        config = self.config
        share = set_progress(self.model, config, self.swap.sites if self.swap else (), self.step, self.d.total)
        rate = config.learning_rate * one_cycle(self.step, self.d.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        teacher = self.teacher if config.distils else None
        with self.accelerator.autocast(), _user_code(f"step {self.step + 1} of {self.d.total} (epoch {epoch + 1})"):
            terms = self.d.task.losses(self.wrapped, teacher, inputs, target, weight=config.distill_weight)
        values = self._finite(terms, epoch)
        self.optimizer.zero_grad()
        self.accelerator.backward(torch.stack(list(terms.values())).sum())
        if config.clip_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.step += 1
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        if self.log and (self.step % config.log_steps == 0 or self.step == self.d.total):
            self.log.write({"kind": "step", "step": self.step, "epoch": epoch + 1, "losses": values,
                            "smooth_share": share, "learning_rate": rate})  # fmt: skip

    def _finite(self, terms: dict[str, Tensor], epoch: int) -> dict[str, float]:
        """The mean of each term over the processes; all of them stop at a loss that is not finite in one."""
        means = self.accelerator.reduce(torch.stack([t.detach().float() for t in terms.values()]), "mean").tolist()
        values = dict(zip(terms, means, strict=True))
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            raise TrainingError(
                f"the loss {bad[0]!r} is {values[bad[0]]} at step {self.step + 1} of {self.d.total} "
                f"(epoch {epoch + 1}); {checkpoint.newest(self.d.out / 'checkpoints')}",
                hint="lower the learning rate, or look for NaN and Inf in the data",
            )
        return values

    def _measure(self, model: nn.Module) -> dict[str, float]:
        """Metrics over all processes; drawing nothing from the training's generators."""
        training = model.training
        model.eval()
        measures: Any = self.d.task.measures().to(self.accelerator.device)
        parts = self.accelerator.num_processes
        with torch.no_grad():
            for inputs, target in self.d._batches_of_evaluation(  # noqa: SLF001
                max(1, self.config.batch_size // parts), self.accelerator.process_index, parts
            ):
                with _user_code("the evaluation"):
                    output = call(model, _to(inputs, self.accelerator.device))
                    self.d.task.update(measures, output, _to(target, self.accelerator.device))
        model.train(training)
        found = {name: float(value) for name, value in measures.compute().items() if value.numel() == 1}
        unknown = [name for name, value in found.items() if not math.isfinite(value)]
        self.notes += [f"{name} was {found[name]} in an evaluation and is left out there" for name in unknown]
        return {name: value for name, value in found.items() if name not in unknown}

    def _save(self) -> None:
        # Weights are the same in every process, so all of them stop here, and no checkpoint holds what cannot go on.
        if not all(bool(p.isfinite().all()) for p in self.model.parameters()):
            raise TrainingError(
                f"weights are not finite after step {self.step} of {self.d.total}; "
                f"{checkpoint.newest(self.d.out / 'checkpoints')}",
                hint="lower the learning rate, or look for NaN and Inf in the data",
            )
        states = gather_object([checkpoint.random_state()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            checkpoint.save(self.d.out / "checkpoints", self.step, {
                "format": 1, "step": self.step, "identity": self.identity, "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "random": states, "sums": self.sums, "history": self.history,
                "teacher_metrics": self.teacher_metrics, "scaler": scaler.state_dict() if scaler else None,
                "log_bytes": self.log.length if self.log else 0,
            })  # fmt: skip
        self.accelerator.wait_for_everyone()

    def _end(self, seconds: float) -> DistillReport:
        student = copy.deepcopy(self.model).cpu()
        if self.config.channels_last:
            student.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        set_progress(student, self.config, self.swap.sites if self.swap else (), self.d.total, self.d.total)
        finish(student)
        self.d.student = student.eval()
        target = self.d.out / "student.safetensors"
        metrics = self.history[-1]["metrics"]
        if self.accelerator.is_main_process:
            from safetensors.torch import save

            with atomic_path(target) as temporary:
                temporary.write_bytes(
                    save({k: v.detach().contiguous().clone() for k, v in student.state_dict().items()})
                )
            metric = self.d.task.metric
            lines = self.log.lines() if self.log else []
            note = plot(lines, self.d.out / "training.png", metric=metric, teacher=self.teacher_metrics.get(metric))
            self.notes += [note] if note else []
        report = DistillReport(
            self.config.recipe, str(target), self.step, tuple(self.history), metrics, self.teacher_metrics, self.swap,
            self.resumed_from, seconds, tuple(dict.fromkeys(self.notes)), self.accelerator.num_processes,
            sum(p.numel() for p in student.parameters() if p.requires_grad),
        )  # fmt: skip
        if self.accelerator.is_main_process:
            write_json(self.d.out / "report.json", to_json(report))
        return report


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Matrices and kernels decay; biases, norms and the shapes of learned activations do not."""
    from relu_deploy.nn.comparators import APL
    from relu_deploy.nn.contextual import PAU
    from relu_deploy.nn.pwlu import PWLU

    learned = (APL, PAU, PWLU)
    units = {p for module in model.modules() if isinstance(module, learned) for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise TrainingError(f"{type(model).__name__} has no parameters that can be trained")
    heavy = [p for p in trained if p.dim() > 1 and p not in units]
    light = [p for p in trained if p.dim() <= 1 or p in units]
    return [{"params": heavy, "weight_decay": decay}, {"params": light, "weight_decay": 0.0}]


@contextlib.contextmanager
def _user_code(where: str) -> Iterator[None]:
    """Network, loss and metrics are the user's; what they raise is told with its place, and stays the cause."""
    try:
        yield
    except (ToolkitError, MemoryError):
        raise
    except Exception as error:
        raise TrainingError(
            f"{where} failed: {type(error).__name__}: {first_line(error)}",
            hint="smaller batches need less memory" if isinstance(error, torch.OutOfMemoryError) else None,
        ) from error


def _to(value: Any, device: torch.device) -> Any:
    """Tensors of a batch on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device) for item in value)
    return value
