"""The networks and data of ``examples/studies``, whose scripts import each other by plain name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from benchmarks.accuracy.task import batches, write_samples
from benchmarks.accuracy.tasks.packages import pip_download
from relu_deploy.export import DynamicAxis, ExampleInput, export_model

STUDIES = Path(__file__).parents[3] / "examples" / "studies"
if str(STUDIES) not in sys.path:
    sys.path.append(str(STUDIES))

Array = npt.NDArray[Any]


def sentences_of_vader(shared: Path, split: str) -> list[tuple[str, int]]:
    """Rated sentences of one part and whether their rating is positive; downloads the package that has them."""
    import language_data

    archive = shared / language_data.ARCHIVE
    if not archive.is_file():
        shared.mkdir(parents=True, exist_ok=True)
        pip_download("vaderSentiment==3.3.2", shared, "--no-binary", ":all:")
    return [(s.text, s.label) for s in language_data.load_sentences(archive) if s.split == split]


def trained(make: Callable[[], nn.Module], file: Path, train: Callable[[nn.Module], None]) -> nn.Module:
    """A network with the weights in a file, trained first where there is none.

    On one thread: the sums of a step are then added up in one order everywhere, and on a busy machine two threads that
    wait for each other at every layer are several times slower than one.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = make()
    if file.is_file():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model)
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
    return model.eval()


def write_task(
    folder: Path, model: nn.Module, inputs: Sequence[ExampleInput], calibration: dict[str, Array],
    test: dict[str, Array],
) -> None:  # fmt: skip
    """Export with a dynamic batch, and write the samples: one a file to calibrate, 100 a file to test."""
    axes = [DynamicAxis(spec.name, 0, 1, 128) for spec in inputs]
    export_model(model, inputs, folder / "model.onnx", dynamic=axes, source=type(model).__name__)
    for name, arrays, size in (("calibration", calibration, 1), ("test", test, 100)):
        columns = {key: batches(values, size) for key, values in arrays.items()}
        write_samples(
            folder / name, (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        )


def fit(
    model: nn.Module, inputs: Array, labels: Array, *, epochs: int, rate: float, batch: int = 128, seed: int = 0
) -> None:
    """Cross entropy, AdamW, a rate that rises and falls once."""
    images, targets = torch.from_numpy(inputs), torch.from_numpy(labels)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    order = torch.Generator().manual_seed(seed)
    model.train().to(memory_format=torch.channels_last)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order)[: len(images) // batch * batch].split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), targets[chosen]).backward()
            optimizer.step()
            schedule.step()
    model.eval().to(memory_format=torch.contiguous_format)
