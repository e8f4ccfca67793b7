"""The whole flow in one call: train, distil, export, rewrite, calibrate, quantise, build and measure."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from calib.errors import MissingExtraError
from calib.files import atomic_path, make_folder
from calib.inputs import model_inputs
from calib.progress import Progress, silent
from calib.sources import open_source
from relu_deploy.bench.compare import bench
from relu_deploy.bench.report import BenchReport, in_ms
from relu_deploy.bench.stats import Ratio, ratio
from relu_deploy.demo.data import Digits, load_digits
from relu_deploy.engines.base import BuildConfig, ShapeRange
from relu_deploy.flow import EngineBuilt, Int8Plan, build_engine
from relu_deploy.graph import load_model
from relu_deploy.machine import Machine, describe_machine

if TYPE_CHECKING:
    from relu_deploy.demo.train import Trained
    from relu_deploy.export import ExportReport

INPUT = "image"
SM = "89"  # an RTX 4090, the card of the paper's tables
# Bytes are read off the plan at the shape the engine is made fastest for.
SHAPES = {INPUT: ShapeRange((1, 1, 32, 32), (1, 1, 32, 32), (64, 1, 32, 32))}
CALIBRATION_IMAGES = 256
NEEDED = ("torch", "accelerate", "torchmetrics", "onnxscript", "safetensors", "sklearn", "jinja2", "matplotlib")


@dataclasses.dataclass(frozen=True)
class Network:
    """One of the two networks.

    Attributes:
        name: ``original`` or ``student``; its files begin with it.
        recipe: The paper's name for how it was trained: B, B+KD.
        activation: SiLU or ReLU.
        torch_accuracy: Share of the test images that torch classifies right.
    """

    name: str
    recipe: str
    activation: str
    torch_accuracy: float


@dataclasses.dataclass(frozen=True)
class DemoReport:
    """What the demo did and found.

    Attributes:
        folder: Where everything lies.
        seed: Of split, training and measuring.
        networks: The original and the student.
        builds: Engine file name -> what its build did.
        speed: All ``ort`` engines against the original in FP32, with accuracy on the test images.
        student_over_original: Speed of the student in INT8 over the original in INT8: what ReLU itself gives.
        without_rtx: Why no TensorRT-RTX engine was built; None where they were.
        machine: What it ran on.
    """

    folder: Path
    seed: int
    networks: tuple[Network, Network]
    builds: dict[str, EngineBuilt]
    speed: BenchReport
    student_over_original: Ratio
    without_rtx: str | None
    machine: Machine


def run_demo(folder: Path, *, seed: int = 0, bench_seconds: float = 5.0, progress: Progress = silent) -> DemoReport:
    """Run the flow on scikit-learn's digits; nothing is downloaded.

    Args:
        folder: Everything is written here; files of an earlier demo are replaced one by one, each whole.
        seed: Of the split of the data, of both trainings and of the measurement.
        bench_seconds: Measured time of each engine.
        progress: Told of every step.

    Raises:
        MissingExtraError: one of ``NEEDED`` is not installed.
        ToolkitError: any step's own errors.
    """
    for package in NEEDED:  # told now, not after the training
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra="demo", purpose="the demo")
    make_folder(folder)
    make_folder(folder / "data")
    digits = load_digits(seed=seed)
    _save_data(folder / "data", digits)
    networks = _train_and_export(folder, digits, seed=seed, progress=progress)
    builds, without_rtx = _build_all(folder, progress)
    speed = bench(
        [folder / name for name in ("original.int8.ort.onnx", "student.fp32.ort.onnx", "student.int8.ort.onnx")],
        against=folder / "original.fp32.ort.onnx", data=folder / "data" / "test.npy",
        labels=folder / "data" / "test_labels.npy", seconds=bench_seconds, seed=seed, progress=progress,
    )  # fmt: skip
    original_int8, _, student_int8 = speed.engines
    gain = ratio(in_ms(original_int8.raw.rounds), in_ms(student_int8.raw.rounds), seed=seed)
    return DemoReport(folder, seed, networks, builds, speed, gain, without_rtx, describe_machine())


def _save_data(folder: Path, digits: Digits) -> None:
    _save_array(folder / "calibration.npy", digits.calibration(CALIBRATION_IMAGES))
    _save_array(folder / "test.npy", digits.test_images)
    _save_array(folder / "test_labels.npy", digits.test_labels)


def _save_array(path: Path, values: npt.NDArray[np.generic]) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, values, allow_pickle=False)


def _train_and_export(folder: Path, digits: Digits, *, seed: int, progress: Progress) -> tuple[Network, Network]:
    """Train the original, distil the student, and write weights and ONNX of both."""
    from relu_deploy.demo import train

    teacher_config = dataclasses.replace(train.TEACHER, seed=seed)
    student_config = dataclasses.replace(train.STUDENT, seed=seed)
    original = train.train_teacher(digits, config=teacher_config, keep=folder, progress=progress)
    student = train.distil_student(original.model, digits, config=student_config, keep=folder, progress=progress)
    for name, trained in (("original", original), ("student", student)):
        train.save_weights(trained.model, folder / f"{name}.safetensors")
        _export(trained, folder / f"{name}.onnx", progress)
    return (
        Network("original", "B", "SiLU", original.accuracy),
        Network("student", "B+KD", "ReLU", student.accuracy),
    )


def _export(trained: Trained, path: Path, progress: Progress) -> ExportReport:
    from relu_deploy.export import DynamicAxis, ExampleInput, export_model

    image, batch = ExampleInput(INPUT, (1, 1, 32, 32)), DynamicAxis(INPUT, 0, 1, 64)
    return export_model(trained.model, [image], path, dynamic=[batch], source="relu_deploy.demo", progress=progress)


def _build_all(folder: Path, progress: Progress) -> tuple[dict[str, EngineBuilt], str | None]:
    """Every engine, by file name; and why there is none for TensorRT-RTX, where there is none."""
    builds: dict[str, EngineBuilt] = {}
    for name in ("original", "student"):
        builds[f"{name}.fp32.ort.onnx"] = _build(folder, name, "fp32.ort.onnx", BuildConfig("ort"), progress)
        builds[f"{name}.int8.ort.onnx"] = _build(folder, name, "int8.ort.onnx", BuildConfig("ort"), progress)
    if importlib.util.find_spec("tensorrt_rtx") is None:
        hint = MissingExtraError("tensorrt_rtx", extra="tensorrt-rtx", purpose="building for TensorRT-RTX")
        return builds, str(hint)
    config = BuildConfig("tensorrt-rtx", sm=(SM,), shapes=SHAPES)
    for name in ("original", "student"):
        suffix = f"int8.sm{SM}.engine"
        builds[f"{name}.{suffix}"] = _build(folder, name, suffix, config, progress)
    return builds, None


def _build(folder: Path, name: str, suffix: str, config: BuildConfig, progress: Progress) -> EngineBuilt:
    """One engine; what lies between is kept under ``steps``."""
    model, plan = load_model(folder / f"{name}.onnx"), None
    if "int8" in suffix:
        source = open_source(folder / "data" / "calibration.npy", model_inputs(model))
        plan = Int8Plan(source, batch_size=32)
    what = f"build {name}.{suffix}"
    progress(what, 0, 1)
    keep = folder / "steps" / f"{name}.{suffix}"
    built = build_engine(model, folder / f"{name}.{suffix}", config, int8=plan, keep=keep, progress=progress)
    progress(what, 1, 1)
    return built
