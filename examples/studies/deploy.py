"""From a trained network to what a user gets: export, engines in FP32 and INT8, their outputs, their speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from calib.inputs import model_inputs
from calib.sources import open_source
from harness import Options, Values, job_folder
from relu_deploy.bench.compare import bench
from relu_deploy.bench.report import EngineResult
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.export import DynamicAxis, ExampleInput, export_model
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.graph import load_model

Array = npt.NDArray[Any]
FP32, INT8 = "fp32.ort.onnx", "int8.ort.onnx"
LARGEST_BATCH = 64


def deploy(
    model: nn.Module,
    folder: Path,
    *,
    inputs: Sequence[ExampleInput],
    calibration: Mapping[str, Array],
    score: Callable[[Path], float],
    int8: bool = True,
) -> Values:
    """Export a network, build both engines for ONNX Runtime, and score them on the test data.

    Args:
        model: Trained, on the CPU.
        folder: Of ``student.onnx``, the engines and their reports.
        inputs: With a batch of at least 2; axis 0 is made dynamic.
        calibration: Arrays by input name, samples on axis 0, none of them test data.
        score: An engine's file to its accuracy.
        int8: Also build and score INT8.

    Returns:
        ``fp32`` and ``int8``: scores; ``int8_layers`` and ``layers``: linear layers computed in INT8, and all;
        ``smooth``: activations left in the INT8 engine that are not ReLU.
    """
    onnx_file = folder / "student.onnx"
    dynamic = [DynamicAxis(spec.name, 0, 1, LARGEST_BATCH) for spec in inputs]
    export_model(model, inputs, onnx_file, dynamic=dynamic, source=type(model).__name__)
    network = load_model(onnx_file)
    build_engine(network, folder / FP32, BuildConfig("ort"))
    values = {"fp32": score(folder / FP32)}
    if not int8:
        return values
    source = open_source(dict(calibration), model_inputs(network))
    built = build_engine(network, folder / INT8, BuildConfig("ort"), int8=Int8Plan(source, batch_size=32))
    audit = built.engine.audit
    return {
        **values, "int8": score(folder / INT8),
        "int8_layers": audit.int8, "layers": len(audit.linear), "smooth": len(audit.left),
    }  # fmt: skip


def engine_outputs(engine: Path, feeds: Mapping[str, Array], *, batch: int = LARGEST_BATCH) -> dict[str, Array]:
    """What an engine answers on a whole data set: arrays by output name, samples on axis 0."""
    size = len(next(iter(feeds.values())))
    with get_backend("ort").open(engine, threads=1) as opened:
        parts = [
            opened.run({name: array[i : i + batch] for name, array in feeds.items()}) for i in range(0, size, batch)
        ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


@dataclasses.dataclass(frozen=True)
class Speed:
    """How fast a form of the network is.

    Attributes:
        throughput: Items a second at batch 1.
        unit: FPS or QPS.
        ratio: Against the INT8 original, with its 95 % interval; ``1`` for that itself.
    """

    throughput: float
    unit: str
    ratio: str


def measure(jobs: Mapping[str, str], options: Options, *, base: str) -> tuple[dict[str, Speed], list[str]]:
    """Time one INT8 engine of each form, interleaved, in processes of their own.

    Args:
        jobs: A form of the network (original, ReLU, ...) to the job whose engine stands for it: engines of one form
            have one graph and differ in weights only, so that one of them is enough.
        options: Folder and seconds.
        base: The form that the ratios are against.

    Returns:
        The speeds by form, and the warnings of the bench.
    """
    files = {form: job_folder(name, options) / INT8 for form, name in jobs.items()}
    others = [form for form in jobs if form != base]
    report = bench([files[form] for form in others], against=files[base], seconds=options.seconds)
    results = dict(zip([base, *others], [report.original, *report.engines], strict=True))
    names = {result.name: form for form, result in results.items()}
    warnings = [_renamed(text, names) for text in report.warnings]
    return {form: Speed(result.throughput, report.unit, _ratio(result)) for form, result in results.items()}, warnings


def warned(warnings: Sequence[str]) -> list[str]:
    """The bench's warnings as one part of a page; nothing without any."""
    return ["Warnings of the bench:", "\n".join(f"- {text}" for text in warnings)] if warnings else []


def _ratio(result: EngineResult) -> str:
    if result.ratio is None:
        return "1"
    if result.ratio.low is None or result.ratio.high is None:
        return f"{result.ratio.value:.2f}"
    return f"{result.ratio.value:.2f} [{result.ratio.low:.2f}, {result.ratio.high:.2f}]"


def _renamed(text: str, names: Mapping[str, str]) -> str:
    """A warning names files; a page names forms."""
    for name, form in names.items():
        text = text.replace(name, form)
    return text
