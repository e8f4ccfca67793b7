"""Fashion-MNIST from Debian's package: 60,000 training and 10,000 test images of clothes, 28x28, ten classes (MIT)."""

from __future__ import annotations

import functools
import gzip
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import TensorDataset

from relu_deploy.errors import DataError

CLASSES = 10
FOLDER = Path("/usr/share/datasets/fashion-mnist")
MEAN, STD = 0.286, 0.353  # of the training pixels, as parts of 255

Array = npt.NDArray[Any]
_FILES = {"train": ("train", 60_000), "test": ("t10k", 10_000)}


@functools.cache
def load(split: Literal["train", "test"], *, folder: Path = FOLDER) -> tuple[Array, Array]:
    """Images, uint8 (N, 28, 28), and labels, int64 (N,), read once a process.

    Raises:
        DataError: the package is not installed, or a file is damaged.
    """
    prefix, count = _FILES[split]
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", (count, 28, 28))
    labels = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (count,))
    return images, labels.astype(np.int64)


def as_input(images: Array) -> Array:
    """uint8 (N, 28, 28) to float32 (N, 1, 28, 28) of mean 0 and deviation 1."""
    return ((images.astype(np.float32) / 255 - MEAN) / STD)[:, None]


def dataset(split: Literal["train", "test"], count: int | None = None, *, skip: int = 0) -> TensorDataset:
    """The images from ``skip`` on (``count`` of them), normalised, with their labels."""
    images, labels = load(split)
    part = slice(skip, None if count is None else skip + count)
    return TensorDataset(torch.from_numpy(as_input(images[part])), torch.from_numpy(labels[part]))


def _read_idx(path: Path, shape: tuple[int, ...]) -> Array:
    """A file of the MNIST format: a magic number, big-endian sizes, bytes."""
    try:
        with gzip.open(path) as stream:
            head = struct.unpack(f">{1 + len(shape)}I", stream.read(4 * (1 + len(shape))))
            values = np.frombuffer(stream.read(int(np.prod(shape)) + 1), np.uint8)
    except FileNotFoundError:
        raise DataError(f"there is no {path}", hint="apt-get install dataset-fashion-mnist") from None
    except (OSError, EOFError, struct.error) as error:
        raise DataError(
            f"{path} is damaged: {error}", hint="apt-get install --reinstall dataset-fashion-mnist"
        ) from None
    if head != (0x800 + len(shape), *shape) or values.size != np.prod(shape):
        raise DataError(f"{path} holds {head[1:]} bytes, not {shape}")
    return values.reshape(shape)
