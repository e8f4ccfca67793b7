"""Scikit-learn's digits as images a convolutional network can work on; no download."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from calib.errors import MissingExtraError

SIZE = 32  # pixels a side after enlarging; the originals have 8
CLASSES = 10
_TEST_SHARE = 1 / 3  # 599 test images: one standard error of an accuracy of 0.98 is then 0.6 %
_WHITE = 16.0  # the largest pixel value of the data set

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Digits:
    """The data set, split once; the test part is never trained or calibrated on.

    Attributes:
        train_images: float32, shape ``(1198, 1, 32, 32)``, normalised to mean 0 and standard deviation 1.
        train_labels: int64, shape ``(1198,)``, 0 to 9.
        test_images: float32, shape ``(599, 1, 32, 32)``, normalised with the training part's mean and deviation.
        test_labels: int64, shape ``(599,)``.
    """

    train_images: Floats
    train_labels: Ints
    test_images: Floats
    test_labels: Ints

    def calibration(self, count: int = 256) -> Floats:
        """The first ``count`` training images (the training part is shuffled, so they are of all classes)."""
        return self.train_images[:count]


def load_digits(*, seed: int = 0) -> Digits:
    """Read, enlarge, normalise and split the 1,797 digits (Alpaydin and Kaynak 1998, as scikit-learn ships them).

    Args:
        seed: Decides the split, which keeps the share of each class.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise MissingExtraError("sklearn", extra="demo", purpose="the demo's data set") from error
    raw = datasets.load_digits()
    images = enlarge(raw.images.astype(np.float32) / _WHITE)[:, None]
    labels = raw.target.astype(np.int64)
    train, test = _split(labels, np.random.default_rng(seed))
    mean, deviation = images[train].mean(), images[train].std()
    images = ((images - mean) / deviation).astype(np.float32)
    return Digits(images[train], labels[train], images[test], labels[test])


def enlarge(images: Floats, size: int = SIZE) -> Floats:
    """Bilinear resize of square images, shape ``(N, s, s)`` to ``(N, size, size)``, pixel centres aligned (half-pixel).

    >>> enlarge(np.array([[[0.0, 1.0], [0.0, 1.0]]], dtype=np.float32), size=4)[0, 0].tolist()
    [0.0, 0.25, 0.75, 1.0]
    """
    weights = _resize_matrix(images.shape[-1], size)
    resized: Floats = np.einsum("is,nst,jt->nij", weights, images, weights).astype(np.float32)
    return resized


def _resize_matrix(source: int, size: int) -> npt.NDArray[np.float64]:
    """Rows of bilinear weights, shape ``(size, source)``; each row sums to 1, edges are clamped."""
    position = np.clip((np.arange(size) + 0.5) * source / size - 0.5, 0, source - 1)
    distance = np.abs(position[:, None] - np.arange(source)[None, :])
    return np.maximum(0.0, 1.0 - distance)


def _split(labels: Ints, rng: np.random.Generator) -> tuple[Ints, Ints]:
    """Shuffled indices of the training and the test part, each class split in the same proportion."""
    train, test = [], []
    for digit in range(CLASSES):
        members = rng.permutation(np.flatnonzero(labels == digit))
        cut = round(len(members) * _TEST_SHARE)
        test.append(members[:cut])
        train.append(members[cut:])
    return rng.permutation(np.concatenate(train)), rng.permutation(np.concatenate(test))
