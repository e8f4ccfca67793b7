"""Codes of weights chosen by what they do to a layer's output, and not each by itself.

``W x + b`` is to be met by ``S Q y + c``, where ``y`` is what the quantised network feeds the layer in place of ``x``.
Codes are rounded one input after the other, and what rounding one of them costs is made good by those not yet rounded.

An error that all positions of a sample share is worse than one that changes from position to position: windows and
means of the layers behind take the mean of the latter. So it counts :data:`SHARED` times more.

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
# Weight of a sample's squared mean error beside the mean squared error of its positions. Between 4 and 32 it makes
# little difference; without it codes chosen together lose to the nearest ones in front of a global mean.
SHARED = 8.0


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a layer reads, row by row, ``(groups, n, K)`` float32.

    Attributes:
        exact: In the float network.
        read: In a quantised one, at the same places.
        counts: Rows of each sample, one sample after the other; their sum is ``n``.
    """

    exact: npt.NDArray[np.float32]
    read: npt.NDArray[np.float32]
    counts: tuple[int, ...]


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
    least: Array = np.zeros(0)
    for codes in options:
        stored = codes * scale[..., None]
        for offset in (0 * scale, _mean_error(weight, stored, learned)) if room else (0 * scale,):
            error, shared = errors_of(weight, stored, offset, judges)
            harm = error + SHARED * shared
            if best is None:
                best, least = Choice(codes, offset, error), harm
                continue
            wins = (harm < least) & (np.abs(offset) <= room * scale)
            best = Choice(
                np.where(wins[..., None], codes, best.codes), np.where(wins, offset, best.offset),
                np.where(wins, error, best.error),
            )  # fmt: skip
            least = np.where(wins, harm, least)
    assert best is not None  # noqa: S101 - there is at least one option
    return best


def choose_codes(
    weight: Array, scale: Array, read: npt.NDArray[np.float32], counts: Sequence[int], limit: int
) -> npt.NDArray[np.int64]:
    """Codes of a layer's weights, chosen together.

    Args:
        weight: ``(groups, R, K)``.
        scale: Step of each row, ``(groups, R)``.
        read: Rows of what it reads, ``(groups, n, K)``.
        counts: Rows of each sample.
        limit: Largest code.

    Returns:
        ``(groups, R, K)``, within ``[-limit, limit]``. Inputs that are always the same get the nearest code.
    """
    count, size = read.shape[1:]
    centred = read - read.mean(axis=1, keepdims=True)
    shared = _by_sample(centred, counts)
    gram = (centred.transpose(0, 2, 1) @ centred).astype(np.float64) / count
    gram += SHARED * (shared.transpose(0, 2, 1) @ shared) / len(counts)
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
    """What a bias has to make good: mean of ``W x - stored y``, ``(groups, R)``, as far as it is more than chance.

    Of a mean over few samples a part is theirs alone. It is left out as a Wiener filter leaves out noise.
    """
    exact, read = (_by_sample(part, rows.counts) for part in (rows.exact, rows.read))
    found = exact @ weight.transpose(0, 2, 1) - read @ stored.transpose(0, 2, 1)
    mean = np.asarray(found.mean(axis=1))
    if len(rows.counts) == 1:
        return mean
    chance = found.var(axis=1, ddof=1) / len(rows.counts)
    return np.asarray(mean * np.maximum(1 - chance / np.maximum(mean**2, np.finfo(np.float64).tiny), 0))


def errors_of(weight: Array, stored: Array, offset: Array, rows: Rows) -> tuple[Array, Array]:
    """Mean squared error of each output channel, and the mean of the samples' squared mean errors; ``(groups, R)``."""
    given = rows.read @ stored.astype(np.float32).transpose(0, 2, 1) + offset[:, None].astype(np.float32)
    wanted = rows.exact @ weight.astype(np.float32).transpose(0, 2, 1)
    error = (wanted - given).astype(np.float64)
    return np.asarray((error**2).mean(axis=1)), np.asarray((_by_sample(error, rows.counts) ** 2).mean(axis=1))


def _by_sample(values: npt.NDArray[np.floating], counts: Sequence[int]) -> Array:
    """Mean of each sample's rows, ``(groups, n, K) -> (groups, samples, K)``."""
    starts = np.cumsum([0, *counts[:-1]])
    sums = np.add.reduceat(values, starts, axis=1, dtype=np.float64)
    return np.asarray(sums / np.asarray(counts, np.float64)[:, None])
