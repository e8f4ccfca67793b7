"""Codes of weights chosen by what they do to a layer's output, and not each by itself.

``W x + b`` is to be met by ``S Q y + c``, where ``y`` is what the quantised network feeds the layer in place of ``x``.
Codes are rounded one input after the other, and what rounding one of them costs is made good by those not yet rounded.

Source: Frantar et al. 2023, "GPTQ", arXiv:2210.17323, algorithm 1 (rounding with the inverse Cholesky factor, columns
by falling diagonal); Nagel et al. 2019, arXiv:1906.04721, section 4.2 (the bias takes up the mean error).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
# Of the mean diagonal of the second moments: GPTQ's 1 %.
_RIDGE = 0.01
_BLOCK = 128


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a layer reads, row by row, ``(groups, n, K)`` float32.

    Attributes:
        exact: In the float network.
        read: In a quantised one, at the same places.
    """

    exact: npt.NDArray[np.float32]
    read: npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is stored of a layer, as ``(groups, R, K)`` and ``(groups, R)``.

    Attributes:
        codes: Of its weights.
        offset: To be added to its bias, output units.
        error: Mean squared error of each output channel on the rows that judge.
    """

    codes: npt.NDArray[np.int64]
    offset: Array
    error: Array


def best_choice(
    weight: Array, scale: Array, options: Sequence[npt.NDArray[np.int64]], learned: Rows, judges: Rows, room: float
) -> Choice:
    """For each output channel what leaves the least error, of codes with and without an offset of the bias.

    Args:
        weight: ``(groups, R, K)``.
        scale: Step of each row, ``(groups, R)``.
        options: Codes to choose from.
        learned: What offsets are taken from.
        judges: What decides.
        room: Largest offset, in steps of the weights; 0 where there is no bias to change.
    """
    best: Choice | None = None
    for codes in options:
        stored = codes * scale[..., None]
        for offset in (0 * scale, _mean_error(weight, stored, learned)) if room else (0 * scale,):
            error = errors_of(weight, stored, offset, judges)
            if best is None:
                best = Choice(codes, offset, error)
                continue
            wins = (error < best.error) & (np.abs(offset) <= room * scale)
            best = Choice(
                np.where(wins[..., None], codes, best.codes), np.where(wins, offset, best.offset),
                np.where(wins, error, best.error),
            )  # fmt: skip
    assert best is not None  # noqa: S101 - there is at least one option
    return best


def choose_codes(weight: Array, scale: Array, read: npt.NDArray[np.float32], limit: int) -> npt.NDArray[np.int64]:
    """Codes of a layer's weights, chosen together.

    Args:
        weight: ``(groups, R, K)``.
        scale: Step of each row, ``(groups, R)``.
        read: Rows of what it reads, ``(groups, n, K)``.
        limit: Largest code.

    Returns:
        ``(groups, R, K)``, within ``[-limit, limit]``. Inputs that are always the same get the nearest code.
    """
    count, size = read.shape[1:]
    centred = read - read.mean(axis=1, keepdims=True)
    gram = (centred.transpose(0, 2, 1) @ centred).astype(np.float64) / count
    diagonal = np.einsum("gkk->gk", gram)
    live = diagonal > 0
    # Moments of few rows are held near their diagonal, for which the nearest code is the best.
    trust = count / (count + size)
    ridge = np.maximum(_RIDGE * diagonal.mean(axis=1), np.finfo(np.float64).tiny)[:, None]
    steady = trust * gram + np.eye(size) * np.where(live, ridge + (1 - trust) * diagonal, 1.0)[:, None, :]
    order = np.argsort(-diagonal, axis=1, kind="stable")
    lines = np.take_along_axis(weight, order[:, None, :], axis=2)
    turned = np.take_along_axis(np.take_along_axis(steady, order[:, :, None], 1), order[:, None, :], 2)
    upper = np.linalg.cholesky(np.linalg.inv(turned)).transpose(0, 2, 1)
    codes = _rounded_in_turn(lines, scale, upper, limit)
    back = np.argsort(order, axis=1, kind="stable")
    return np.take_along_axis(codes, back[:, None, :], axis=2)


def _rounded_in_turn(lines: Array, scale: Array, upper: Array, limit: int) -> npt.NDArray[np.int64]:
    """Round column after column, and spread each error over the columns behind it by the inverse Cholesky factor."""
    lines, size = lines.copy(), lines.shape[-1]
    codes = np.zeros(lines.shape, np.int64)
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        errors = np.zeros((*lines.shape[:2], last - first))
        for at in range(first, last):
            codes[..., at] = np.clip(np.rint(lines[..., at] / scale), -limit, limit)
            error = (lines[..., at] - codes[..., at] * scale) / upper[:, at, at, None]
            lines[..., at:last] -= error[..., None] * upper[:, None, at, at:last]
            errors[..., at - first] = error
        lines[..., last:] -= errors @ upper[:, first:last, last:]
    return codes


def _mean_error(weight: Array, stored: Array, rows: Rows) -> Array:
    """What a bias has to make good: mean of ``W x - stored y``, ``(groups, R)``."""
    exact, read = (part.mean(axis=1, dtype=np.float64) for part in (rows.exact, rows.read))
    return np.asarray(np.einsum("grk,gk->gr", weight, exact) - np.einsum("grk,gk->gr", stored, read))


def errors_of(weight: Array, stored: Array, offset: Array, rows: Rows) -> Array:
    """Mean squared error of each output channel, ``(groups, R)``."""
    given = rows.read @ stored.astype(np.float32).transpose(0, 2, 1) + offset[:, None].astype(np.float32)
    wanted = rows.exact @ weight.astype(np.float32).transpose(0, 2, 1)
    return np.asarray(((wanted - given).astype(np.float64) ** 2).mean(axis=1))
