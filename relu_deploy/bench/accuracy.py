"""Accuracy next to speed: what an engine answers on data, against labels and against its original."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_deploy.bench.stats import proportion_interval
from relu_deploy.errors import DataError
from relu_deploy.int8.drift import sqnr_db

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """How right an engine is on the data, at the batch its speed was measured at.

    Attributes:
        output: The output that was compared.
        samples: How many.
        top1: Share of samples whose largest score is the label's; None without labels.
        top1_low: Lower end of its 95 % Wilson interval.
        top1_high: Upper end.
        lost: Samples that the original had right and this engine has wrong; None for the original itself.
        gained: Samples that the original had wrong and this engine has right.
        agreement: Share of samples with the same largest score as the original's; None where the output is no vector of
            scores, and for the original itself.
        sqnr_db: 10 log10(sum ref^2 / sum (ref - out)^2) over all samples; None when equal, or not finite.
        max_abs_error: Largest difference from the original; None for the original itself, or when not finite.
        nonfinite: Values that are NaN or Inf.
    """

    output: str
    samples: int
    top1: float | None = None
    top1_low: float | None = None
    top1_high: float | None = None
    lost: int | None = None
    gained: int | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    nonfinite: int = 0


class Tally:
    """Sums up one engine's answers batch by batch, in constant memory.

    Args:
        output: Name of the output.
        is_original: Whether these are the original's own answers.
    """

    def __init__(self, output: str, *, is_original: bool) -> None:
        self._output = output
        self._original = is_original
        self._samples = self._hits = self._agreed = self._lost = self._gained = self._nonfinite = 0
        self._labelled = False
        self._scores = True
        self._signal = self._noise = self._worst = 0.0

    def add(self, reference: Array, found: Array, labels: Array | None) -> None:
        """Count one batch.

        Args:
            reference: The original's output, (B, ...).
            found: This engine's, of the same shape.
            labels: (B,) integers, or None.

        Raises:
            DataError: shapes differ, or labels are given for an output that is no vector of scores a sample.
        """
        if reference.shape != found.shape:
            raise DataError(
                f"output {self._output!r} has shape {found.shape}; the original's has {reference.shape}",
                hint="name an output that both have with --output, or leave --data out to measure speed alone",
            )
        self._samples += len(found)
        self._nonfinite += int(np.size(found) - np.count_nonzero(np.isfinite(found)))
        self._compare(reference, found)
        expected, answer = top1(reference), top1(found)
        if expected is None or answer is None:
            self._scores = False
            if labels is not None:
                raise DataError(
                    f"labels need one score a class; output {self._output!r} has shape {found.shape}",
                    hint="name the output with the scores: --output NAME; or leave --labels out",
                )
            return
        self._agreed += int(np.count_nonzero(expected == answer))
        if labels is not None:
            self._judge(expected == labels, answer == labels)

    def _compare(self, reference: Array, found: Array) -> None:
        # float64: the sums run over millions of values, and float16 would overflow in the squares.
        wide, error = np.asarray(reference, np.float64), np.asarray(found, np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = wide - error
            self._signal += float(np.sum(wide * wide))
            self._noise += float(np.sum(error * error))
        # np.maximum keeps a NaN, which max() may drop.
        self._worst = float(np.maximum(self._worst, np.max(np.abs(error), initial=0.0)))

    def _judge(self, before: Array, after: Array) -> None:
        self._labelled = True
        self._hits += int(np.count_nonzero(after))
        self._lost += int(np.count_nonzero(before & ~after))
        self._gained += int(np.count_nonzero(after & ~before))

    def result(self) -> Accuracy:
        """What was counted."""
        low, high = proportion_interval(self._hits, self._samples) if self._labelled else (None, None)
        compared = not self._original
        return Accuracy(
            output=self._output,
            samples=self._samples,
            top1=self._hits / self._samples if self._labelled else None,
            top1_low=low,
            top1_high=high,
            lost=self._lost if self._labelled and compared else None,
            gained=self._gained if self._labelled and compared else None,
            agreement=self._agreed / self._samples if self._scores and compared else None,
            sqnr_db=sqnr_db(self._signal, self._noise) if compared else None,
            max_abs_error=self._worst if compared and math.isfinite(self._worst) else None,
            nonfinite=self._nonfinite,
        )


def top1(output: Array) -> Array | None:
    """Class of the largest score of each sample; None unless the output is (B, classes), apart from axes of 1.

    >>> top1(np.array([[[0.1], [0.9]]]))
    array([1])
    """
    wide = [extent for extent in output.shape[1:] if extent != 1]
    if output.ndim < 2 or len(wide) != 1:
        return None
    return np.asarray(np.argmax(output.reshape(len(output), -1), axis=1))


def read_labels(path: Path) -> Array:
    """Labels from a ``.npy`` file: integers, one a sample.

    Raises:
        DataError: missing, damaged, not a one-dimensional array of integers, empty, or negative.
    """
    try:
        labels = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read the labels {path}: {error}", hint="save them with numpy.save") from error
    if not isinstance(labels, np.ndarray):
        labels.close()
        raise DataError(f"the labels {path} are an .npz archive", hint="give a .npy file of integers")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or labels.min() < 0:
        raise DataError(
            f"the labels {path} are {labels.dtype} of shape {labels.shape}",
            hint="they must be class numbers: integers from 0, shape (samples,)",
        )
    return np.asarray(labels)
