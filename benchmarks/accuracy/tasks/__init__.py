"""The tasks, in the order of the table."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.accuracy.task import Plan, Task, prepared

# Name -> module; published networks first, then those that are trained here.
TASKS = {
    "ocr-rec": "ocr", "orientation": "orientation", "magika": "magika_files", "common-det": "boxes",
    "minilm": "sentences", "fashion-dw": "fashion_dw", "detector": "detector", "bert-relu": "language_relu",
    "demo": "digits",
}  # fmt: skip


def plan(name: str) -> Plan:
    """What a task is. Its module is imported only now: each needs packages of its own."""
    module = importlib.import_module(f"benchmarks.accuracy.tasks.{TASKS[name]}")
    found: Plan = module.PLAN
    return found


def load_task(name: str, work: Path) -> Task:
    """A task, prepared in ``work`` where it is not there yet."""
    return prepared(plan(name), work)
