"""Where the samples of a training come from: a function that returns data sets, or ``.npy`` files."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from calib.arrays import open_npy
from calib.errors import ToolkitError, first_line
from calib.files import require_file
from relu_deploy.distill import loader
from relu_deploy.distill.tasks import Task, call, logits, make_task
from relu_deploy.errors import DataError
from relu_deploy.user_code import call_named

_TASK_PARTS = ("losses", "measures", "update", "metric", "collate")


@dataclasses.dataclass(frozen=True)
class Sets:
    """What a student is trained on and measured on.

    Attributes:
        train: Map-style data set of ``(inputs, target)``.
        evaluate: The same, for the metrics.
        task: Losses and metrics that came with the data; None: the configuration names a task that needs only labels.
    """

    train: Dataset[Any]
    evaluate: Dataset[Any]
    task: Task | None = None


def sets_of_function(spec: str) -> Sets:
    """Call ``module:function`` or ``file.py:function``; it returns (train, evaluate) or (train, evaluate, task).

    Raises:
        DataError: there is no such function, it fails, or returns something else.
    """
    forms = "module:function or path/to/file.py:function"
    made = call_named(spec, what="data", wanted=tuple, forms=forms, error=DataError)
    if not isinstance(made, (tuple, list)) or len(made) not in (2, 3):
        raise DataError(f"{spec} gave a {type(made).__name__}", hint="return (train, evaluate), or a Task as a third")
    for name, part in zip(("train", "evaluate"), made, strict=False):
        loader.size_of(part, name)
    task = made[2] if len(made) > 2 else None
    missing = [part for part in _TASK_PARTS if task is not None and not hasattr(task, part)]
    if missing:
        raise DataError(
            f"the third value of {spec}, a {type(task).__name__}, is no task: it has no {', '.join(missing)}",
            hint="see relu_deploy.distill.tasks.Task",
        )
    guarded = [Guarded(part, f"{name} of {spec}") for name, part in zip(("train", "evaluate"), made, strict=False)]
    return Sets(guarded[0], guarded[1], task)


def sets_of_arrays(train: Path, train_labels: Path, test: Path, test_labels: Path) -> Sets:
    """Four ``.npy`` files: inputs with the samples on axis 0, and whole numbers as labels.

    Raises:
        DataError: one is damaged, empty, holds no numbers, or there is not one label for each sample.
    """
    return Sets(ArraySet(train, train_labels), ArraySet(test, test_labels))


class ArraySet(Dataset[tuple[Tensor, Tensor]]):
    """Inputs mapped from a file, labels in memory. Real numbers become float32, whole ones int64.

    Args:
        inputs: ``(samples, ...)``.
        labels: ``(samples,)``, or ``(samples, tokens)`` with -100 where a token does not count.
    """

    def __init__(self, inputs: Path, labels: Path) -> None:
        self.path, self._inputs, self.labels = inputs, _mapped(inputs), np.array(_mapped(labels))
        if not np.issubdtype(self.labels.dtype, np.integer):
            raise DataError(f"{labels} holds {self.labels.dtype}; labels are whole numbers")
        if self._inputs.ndim < 2 or len(self._inputs) != len(self.labels):
            raise DataError(
                f"{inputs} has shape {self._inputs.shape} and {labels} {self.labels.shape}: one label a sample is "
                "needed, with the samples on axis 0"
            )
        self._float = np.issubdtype(self._inputs.dtype, np.floating)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        values = np.array(self._inputs[index], np.float32 if self._float else np.int64)
        if self._float and not np.isfinite(values).all():
            raise DataError(f"{self.path}, sample {index} contains NaN or Inf")
        return torch.from_numpy(values), torch.tensor(self.labels[index], dtype=torch.int64)


class Guarded(Dataset[Any]):
    """A user's data set, whose failures name the sample.

    Args:
        data: Map-style.
        name: How a message calls it.
    """

    def __init__(self, data: Dataset[Any], name: str) -> None:
        self.data, self.name = data, name

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]  # its length was asked for before

    def __getitem__(self, index: int) -> Any:
        try:
            return self.data[index]
        except ToolkitError:
            raise
        except Exception as error:  # the user's code may raise anything; it is theirs to mend
            raise DataError(f"sample {index} of {self.name} failed: {type(error).__name__}: {error}") from error


def task_for(teacher: nn.Module, sets: Sets, name: str) -> Task:
    """The task that came with the data, or the named one with as many classes as the teacher has logits.

    The teacher runs on the first samples of both sets, so that what does not fit is told before the training.

    Raises:
        DataError: the teacher does not run on the samples, or a label is no class of its.
        TrainingError: the task needs more than labels.
    """
    if sets.task is None and name == "detection":
        return make_task(name, None)
    collate = sets.task.collate if sets.task is not None else None
    for part, data in (("training", sets.train), ("evaluation", sets.evaluate)):
        output = _try(teacher, part, data, collate or default_collate)
    if sets.task is not None:
        return sets.task
    classes = logits(output).shape[-1]
    for data in (sets.train, sets.evaluate):
        if isinstance(data, ArraySet):
            _check_labels(data, classes)
    return make_task(name, classes)


def _try(teacher: nn.Module, part: str, data: Dataset[Any], collate: Any) -> Any:
    samples = [data[i] for i in range(min(2, loader.size_of(data, part)))]
    before = teacher.training
    teacher.eval()
    try:
        with torch.no_grad():
            inputs, _ = collate(samples)
            return call(teacher, inputs)
    except ToolkitError:
        raise
    except Exception as error:  # whatever the user's network raises on the user's data
        raise DataError(
            f"{type(teacher).__name__} fails on the first samples of the {part} data: "
            f"{type(error).__name__}: {first_line(error)}",
            hint="samples are (inputs, target); inputs are a tensor, a tuple of them, or a dict of keywords",
        ) from error
    finally:
        teacher.train(before)


def _check_labels(data: ArraySet, classes: int) -> None:
    counted = data.labels[data.labels != -100]
    if counted.size == 0 or counted.min() < 0 or counted.max() >= classes:
        found = f"labels from {counted.min()} to {counted.max()}" if counted.size else "no label that counts"
        raise DataError(f"{data.path} has {found}; the network has {classes} classes, from 0 to {classes - 1}")


def _mapped(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    require_file(path, to="read the data")
    if path.suffix != ".npy":
        raise DataError(f"{path} is no .npy file", hint="np.save writes one; other data comes by --data")
    with contextlib.ExitStack() as stack:
        array: np.ndarray[Any, np.dtype[Any]] = np.asarray(stack.enter_context(open_npy(path)).read())
    if array.size == 0:
        raise DataError(f"{path} is empty")
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path} holds {array.dtype}, not real numbers")
    return array
