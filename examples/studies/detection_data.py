"""A detection set made of Fashion-MNIST: 64x64 canvases with one to four items of clothing on a cluttered ground.

Items differ in size (0.8 to 1.25 of their 28 pixels), brightness, place and mirror image, and overlap little. The
ground is a slope of grey with noise, rectangles, and scraps of other items, which look like clothes and are none.
Everything follows from a seed. Training, held-out and test canvases are made of different items: the first 50,000
training images, the last 10,000 training images, and the test images.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses
from torch.utils.data import Dataset

from calib.files import atomic_path

SIZE = 64  # pixels of a canvas
ITEMS = 4  # most on one canvas
SCALES = (0.8, 1.25)
INK = 24  # a pixel of an item brighter than this belongs to it
OVERLAP = 0.1  # of the smaller of two boxes at most
MEAN, STD = 0.4, 0.25  # of the canvases' pixels, as parts of 255

Array = npt.NDArray[Any]
Split = Literal["train", "held-out", "test"]
_SPLITS: dict[Split, tuple[Literal["train", "test"], slice]] = {
    "train": ("train", slice(0, 50_000)),
    "held-out": ("train", slice(50_000, 60_000)),
    "test": ("test", slice(0, 10_000)),
}


@dataclasses.dataclass(frozen=True)
class Canvases(Dataset[Any]):
    """Samples for the distiller: a normalised image (1, 64, 64) and what is on it.

    Attributes:
        images: uint8 (N, 64, 64).
        targets: For each image ``boxes``, float32 (n, 4) as x1, y1, x2, y2 in pixels, and ``labels``, int64 (n,).
    """

    images: Array
    targets: tuple[dict[str, Tensor], ...]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        return torch.from_numpy(as_input(self.images[index])), self.targets[index]


def as_input(images: Array) -> Array:
    """uint8 (..., 64, 64) to float32 (..., 1, 64, 64) of about mean 0 and deviation 1."""
    return ((images.astype(np.float32) / 255 - MEAN) / STD)[..., None, :, :]


def canvases(split: Split, count: int, *, seed: int = 0) -> Canvases:
    """Compose canvases of one part of Fashion-MNIST.

    Raises:
        DataError: Fashion-MNIST is not installed.
    """
    from fashion import load

    source, part = _SPLITS[split]
    images, labels = load(source)
    return compose(images[part], labels[part], count, seed=seed)


def compose(images: Array, labels: Array, count: int, *, seed: int) -> Canvases:
    """Canvases from images of items, uint8 (N, 28, 28), and their labels, int64 (N,)."""
    made = [_canvas(images, labels, np.random.default_rng((seed, i))) for i in range(count)]
    return Canvases(np.stack([image for image, _ in made]), tuple(target for _, target in made))


def _canvas(images: Array, labels: Array, rng: np.random.Generator) -> tuple[Array, dict[str, Tensor]]:
    canvas = _ground(images, rng)
    boxes: list[tuple[int, int, int, int]] = []
    classes: list[int] = []
    for index in rng.integers(len(images), size=rng.integers(1, ITEMS + 1)):
        item, mask = cut_item(images[index], scale=rng.uniform(*SCALES), mirror=bool(rng.integers(2)))
        place = _free_place(item.shape, boxes, rng) if min(item.shape) >= 4 else None
        if place is None:
            continue
        x, y = place
        part = canvas[y : y + item.shape[0], x : x + item.shape[1]]
        part[mask] = (item * rng.uniform(0.7, 1.0))[mask]
        boxes.append((x, y, x + item.shape[1], y + item.shape[0]))
        classes.append(int(labels[index]))
    noisy = canvas + rng.normal(0, rng.uniform(2, 8), canvas.shape)
    target = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(classes, dtype=torch.int64),
    }
    return noisy.clip(0, 255).astype(np.uint8), target


def cut_item(image: Array, *, scale: float, mirror: bool) -> tuple[Array, Array]:
    """An item in another size, cut at its outermost pixels, and where its pixels are; empty for an empty image."""
    size = round(image.shape[0] * scale)
    pixels = torch.tensor(image[:, ::-1].copy() if mirror else image, dtype=torch.float32)[None, None]
    item = F.interpolate(pixels, (size, size), mode="bilinear", antialias=True)[0, 0].numpy()
    mask = item > INK
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return item[:0, :0], mask[:0, :0]
    inside = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return item[inside], mask[inside]


def _free_place(
    shape: tuple[int, ...], boxes: list[tuple[int, int, int, int]], rng: np.random.Generator
) -> tuple[int, int] | None:
    """Left and top of a box of this shape that covers no other box much; None after 20 tries."""
    height, width = shape
    for _ in range(20):
        x, y = int(rng.integers(SIZE - width + 1)), int(rng.integers(SIZE - height + 1))
        if all(_covered((x, y, x + width, y + height), box) <= OVERLAP for box in boxes):
            return x, y
    return None


def _covered(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Share of the smaller box that lies in the other."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / smaller


def _ground(images: Array, rng: np.random.Generator) -> Array:
    """A slope of grey, rectangles and scraps of items."""
    down, right = rng.uniform(-60, 60, 2)
    ramp = np.linspace(-0.5, 0.5, SIZE)
    ground = (rng.uniform(50, 150) + down * ramp[:, None] + right * ramp).astype(np.float32)
    for _ in range(rng.integers(1, 5)):
        y, x = rng.integers(SIZE, size=2)
        height, width = rng.integers(2, 16, size=2)
        ground[y : y + height, x : x + width] += rng.uniform(-40, 40)
    for index in rng.integers(len(images), size=rng.integers(0, 4)):
        height, width = rng.integers(5, 11, size=2)
        top, left = rng.integers(6, 12, size=2)
        y, x = rng.integers(SIZE - 11, size=2)
        ground[y : y + height, x : x + width] = images[index, top : top + height, left : left + width]
    return ground


def save_canvases(data: Canvases, path: Path) -> None:
    """Write canvases to an ``.npz`` file, whole or not at all."""
    counts = [len(target["labels"]) for target in data.targets]
    boxes = torch.cat([target["boxes"] for target in data.targets]).numpy()
    labels = torch.cat([target["labels"] for target in data.targets]).numpy()
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, images=data.images, counts=counts, boxes=boxes, labels=labels)


def load_canvases(path: Path) -> Canvases:
    """Read what :func:`save_canvases` wrote."""
    with np.load(path) as stored:
        counts = stored["counts"].tolist()
        boxes = torch.from_numpy(stored["boxes"]).split(counts)
        labels = torch.from_numpy(stored["labels"]).split(counts)
        targets = tuple({"boxes": b, "labels": c} for b, c in zip(boxes, labels, strict=True))
        return Canvases(stored["images"], targets)
