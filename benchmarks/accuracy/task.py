"""A task: a trained network, samples to calibrate it with, other samples to test it on, and what is counted on them.

A prepared task is a folder:

====================  ==================================================================================================
``model.onnx``        the float network as published or as exported
``calibration/``      one sample a ``.npz`` file, arrays by input name with their batch axis: what ``--calib`` takes
``test/``             the same, or several samples a file
``float.npz``         the float network's outputs on each test file, ``<file>/<output>``
``truth.npz``         what is known of the test samples
``ready.json``        written last: the fingerprints of all of it
====================  ==================================================================================================
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from benchmarks.accuracy.scores import Score
from calib.files import read_json, write_json

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Outputs = Mapping[str, Array]
Run = Callable[[Feeds], Outputs]
Scorer = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Array]], dict[str, Score]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a task is made and scored; each task's module has one.

    Attributes:
        name: Of its folder, and in the table.
        about: A line for the reader of the table.
        prepare: Writes ``model.onnx``, ``calibration``, ``test`` and ``truth.npz`` into a folder; it is also given a
            folder for downloads and trainings that tasks share.
        answers: Outputs of one test file to what is scored, a sample each: a text, a class, boxes.
        score: (answers, the float network's answers, truth) to metrics; the first is the one that is compared.
    """

    name: str
    about: str
    prepare: Callable[[Path, Path], None]
    answers: Callable[[Outputs], Sequence[Any]]
    score: Scorer


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a network reached on a task.

    Attributes:
        samples: Test samples.
        scores: Metric -> its score; the first is the one that is compared.
        reference: The same of the float network.
        sqnr_db: Output -> 10 log10(sum ref^2 / sum (ref - out)^2) over all test samples; inf where equal, nan where an
            output is not finite.
    """

    samples: int
    scores: dict[str, Score]
    reference: dict[str, Score]
    sqnr_db: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Task:
    """A prepared task."""

    plan: Plan
    folder: Path

    @property
    def name(self) -> str:
        """Of the task."""
        return self.plan.name

    @property
    def model(self) -> Path:
        """The float network."""
        return self.folder / "model.onnx"

    @property
    def calibration(self) -> Path:
        """A folder of samples, as ``relu-deploy --calib`` takes it."""
        return self.folder / "calibration"

    def calibration_feeds(self) -> Iterator[dict[str, Array]]:
        """The samples one by one, with a batch axis of 1."""
        for file in sorted(self.calibration.glob("*.npz")):
            yield read_arrays(file)

    @property
    def fingerprint(self) -> str:
        """Of network and calibration data."""
        return str(read_json(self.folder / "ready.json")["fingerprint"])

    def evaluate(self, run: Run) -> Evaluation:
        """Run a network on all test samples and score its answers."""
        files = sorted((self.folder / "test").glob("*.npz"))
        answers: list[Any] = []
        reference: list[Any] = []
        signal: dict[str, float] = {}
        noise: dict[str, float] = {}
        with np.load(self.folder / "float.npz") as stored:
            for file in files:
                wanted = {k.partition("/")[2]: stored[k] for k in stored.files if k.startswith(f"{file.stem}/")}
                got = run(read_arrays(file))
                answers.extend(self.plan.answers(got))
                reference.extend(self.plan.answers(wanted))
                for name, value in wanted.items():
                    exact = value.astype(np.float64)
                    signal[name] = signal.get(name, 0.0) + float(np.sum(exact**2))
                    noise[name] = noise.get(name, 0.0) + float(np.sum((exact - got[name]) ** 2))
        truth = read_arrays(self.folder / "truth.npz")
        return Evaluation(
            len(answers), self.plan.score(answers, reference, truth), self.plan.score(reference, reference, truth),
            {name: decibels(signal[name], noise[name]) for name in signal},
        )  # fmt: skip


def decibels(signal: float, noise: float) -> float:
    """Signal over noise.

    >>> decibels(100.0, 1.0), decibels(1.0, 0.0)
    (20.0, inf)
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / np.float64(noise)))


def prepared(plan: Plan, work: Path) -> Task:
    """The task, made now where it is not there yet."""
    folder = work / "tasks" / plan.name
    if not (folder / "ready.json").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        for name in ("calibration", "test"):
            (folder / name).mkdir(parents=True)
        plan.prepare(folder, work / "shared")
        _keep_float_outputs(folder)
        write_json(folder / "ready.json", {"fingerprint": _fingerprint(folder)})
    return Task(plan, folder)


def write_samples(folder: Path, samples: Iterable[Feeds]) -> None:
    """One file for each item, in an order that sorting by name keeps."""
    for number, feeds in enumerate(samples):
        np.savez(folder / f"{number:05}.npz", **dict(feeds))  # type: ignore[arg-type]


def batches(samples: Sequence[Array] | Array, size: int = 100) -> Iterator[Array]:
    """Samples stacked on axis 0, in their order."""
    for first in range(0, len(samples), size):
        yield np.stack(samples[first : first + size])


def read_arrays(file: Path) -> dict[str, Array]:
    """All arrays of a ``.npz`` file."""
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def runner(model: Path, *, optimise: bool = True) -> Run:
    """ONNX Runtime on one thread of the CPU.

    Args:
        model: Float or quantised.
        optimise: All optimisations, so that Q/DQ become integer kernels. Without them Q/DQ are computed as ONNX defines
            them, in float arithmetic.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))


def _keep_float_outputs(folder: Path) -> None:
    run = runner(folder / "model.onnx")
    kept = {}
    for file in sorted((folder / "test").glob("*.npz")):
        kept |= {f"{file.stem}/{name}": value for name, value in run(read_arrays(file)).items()}
    np.savez(folder / "float.npz", **kept)


def _fingerprint(folder: Path) -> str:
    """Of everything but the float outputs: arrays by value, since ``.npz`` files hold the time they were written at."""
    digest = hashlib.sha256((folder / "model.onnx").read_bytes())
    for file in sorted(folder.rglob("*.npz")):
        if file.name == "float.npz":
            continue
        for name, value in read_arrays(file).items():
            digest.update(f"{file.relative_to(folder)}/{name}{value.dtype}{value.shape}".encode() + value.tobytes())
    return digest.hexdigest()[:16]
