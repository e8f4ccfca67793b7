"""The runtimes that a network is quantised and built for. Imports nothing, so that ``--help`` can name them at once."""

from __future__ import annotations

from typing import Literal

Target = Literal["ort", "tensorrt-rtx", "tensorrt"]
TARGETS: tuple[Target, ...] = ("ort", "tensorrt-rtx", "tensorrt")
