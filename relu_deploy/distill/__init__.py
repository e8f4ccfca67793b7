"""Distillation: losses, recipes, tasks, and a training that goes on after a kill. Needs the ``torch`` extra."""

from __future__ import annotations

import importlib.util

from calib.errors import MissingExtraError

NEEDED = ("torch", "accelerate", "torchmetrics", "safetensors")


def require_packages() -> None:
    """Refuse before anything is loaded.

    Raises:
        MissingExtraError: one of ``NEEDED`` is not installed.
    """
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(package, extra="torch", purpose="distilling a student")
