"""Evaluate one network on one task, in a process of its own: ``python -m benchmarks.accuracy.evaluate ...``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import onnx

from benchmarks.accuracy.layers import by_kernels, by_nodes
from benchmarks.accuracy.scores import difference
from benchmarks.accuracy.task import Task, runner
from benchmarks.accuracy.tasks import load_task
from calib.files import write_json


def main() -> None:
    """Write the result as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task")
    parser.add_argument("work", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--float-arithmetic", action="store_true")
    given = parser.parse_args()
    task = load_task(given.task, given.work)
    write_json(given.output, evaluate(task, given.model, integer_kernels=not given.float_arithmetic))


def evaluate(task: Task, model: Path, *, integer_kernels: bool) -> dict[str, Any]:
    """Metrics with their distance to the float network's, SQNR of the worst output, layers in int8."""
    run = runner(model, optimise=integer_kernels)
    found = task.evaluate(run)
    metrics = {}
    for name, score in found.scores.items():
        gap = difference(score, found.reference[name])
        metrics[name] = {
            "value": score.value, "float": found.reference[name].value, "difference": gap.value, "low": gap.low,
            "high": gap.high,
        }  # fmt: skip
    nodes = by_nodes(onnx.load(model))
    kernels = by_kernels(model) if integer_kernels else None
    worst = min(found.sqnr_db.values(), key=lambda value: -math.inf if math.isnan(value) else value)
    return {
        "samples": found.samples, "metrics": metrics, "sqnr_db": str(worst), "nodes": [nodes.int8, nodes.all],
        "kernels": kernels and [kernels.int8, kernels.all],
    }  # fmt: skip


if __name__ == "__main__":
    main()
