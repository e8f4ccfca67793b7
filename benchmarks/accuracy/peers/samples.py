"""What the scripts of this folder share. They run in the peers' environments: numpy and onnx are all there is."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx


@dataclasses.dataclass(frozen=True)
class Request:
    """A command line: what to quantise, with which samples, how, and where to."""

    model: Path
    calibration: Path
    output: Path
    settings: dict[str, Any]


def parse() -> Request:
    """Read it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("settings", type=json.loads)
    return Request(**vars(parser.parse_args()))


def feeds(folder: Path) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
    """The samples one by one, with a batch axis of 1."""
    for file in sorted(folder.glob("*.npz")):
        with np.load(file) as stored:
            yield {name: stored[name] for name in stored.files}


class Reader:
    """The samples as ONNX Runtime's and modelopt's calibrators ask for them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rewind()

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """The next sample, None at the end."""
        return next(self._left, None)

    def rewind(self) -> None:
        """Begin again."""
        self._left = feeds(self._folder)

    def get_first(self) -> dict[str, np.ndarray[Any, Any]]:
        """The first sample; does not move."""
        return next(feeds(self._folder))

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        return feeds(self._folder)


def lifted(model: Path, output: Path, opset: int = 17) -> Path:
    """The network at a newer opset, which per-channel Q/DQ needs; as it is where it has that."""
    loaded = onnx.load(model)
    if max(entry.version for entry in loaded.opset_import if entry.domain in ("", "ai.onnx")) < opset:
        loaded = onnx.version_converter.convert_version(loaded, opset)
    onnx.save(loaded, output)
    return output
