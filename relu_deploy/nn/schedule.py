"""Learning rate, and how far a student is on its way to ReLU: pure functions of the number of optimiser steps taken.

``step`` counts the steps that were taken, 0 before the first, and ``total`` those of the whole training, so that a
resumed training needs nothing but its step to go on.
"""

from __future__ import annotations

import math

from relu_deploy.errors import TrainingError

# PEA compared final phases of 5 and 30 of 120 epochs, and the longer one did better in most rows of its tables 2 and 3.
PURE_SHARE = 0.25
SAT_LEVELS = 10


def one_cycle(step: int, total: int) -> float:
    """Share of the peak learning rate: linear warm-up over the first tenth, then half a cosine down to 1 %.

    >>> [round(one_cycle(step, 100), 2) for step in (0, 9, 40, 100)]
    [0.1, 1.0, 0.75, 0.01]
    """
    warm = max(1, total // 10)
    if step < warm:
        return (step + 1) / warm
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))


def sat_gamma(step: int, total: int, *, pure: float = PURE_SHARE, levels: int | None = SAT_LEVELS) -> float:
    """Share of the smooth activation in SAT: 1 at the start, exactly 0 for the last ``pure`` of the steps.

    Args:
        step: Steps taken, 0..total.
        total: Steps of the training.
        pure: Share of the steps at the end that train the ReLU network itself. A student that met plain ReLU only in
            its last step would be shipped untrained.
        levels: Equal steps from 1 to 0; 10 is the paper's interval of 0.1, None falls at every step.

    Source: "ReLU for inference acceleration", section 3.2.4 and table 1 ("from 1 to 0 with the interval of 0.1").

    >>> [sat_gamma(step, 40) for step in (0, 2, 3, 15, 29, 30, 40)]
    [1.0, 1.0, 0.9, 0.5, 0.1, 0.0, 0.0]
    >>> sat_gamma(15, 40, levels=None)
    0.5
    """
    end = _end(step, total, pure)
    if step >= end:
        return 0.0
    if levels is None:
        return 1.0 - step / end
    return (levels - step * levels // end) / levels


def pea_alpha(step: int, total: int, *, initial: float = 5 / 120, pure: float = PURE_SHARE) -> float:
    """Share (or probability) of ReLU in PEA: 0 in the initial phase, t / T_trans in the transition, 1 in the final one.

    Args:
        step: Steps taken, 0..total.
        total: Steps of the training.
        initial: Share of the steps in the initial phase; the paper has 5 of 120 epochs.
        pure: Share of the steps in the final phase; the paper has 5 and 30 of 120 epochs.

    Source: "Progressive ensemble activations", section 3.1, equation 2 and figure 1.

    >>> [round(pea_alpha(step, 120), 3) for step in (0, 5, 6, 90, 120)]
    [0.0, 0.0, 0.012, 1.0, 1.0]
    """
    end = _end(step, total, pure)
    start = min(round(initial * total), end)
    if not 0 <= initial < 1:
        raise TrainingError(f"the initial phase is {initial} of the training; it must lie in [0, 1)")
    if step >= end:
        return 1.0
    return max(0, step - start) / (end - start) if end > start else 0.0


def group_gamma(step: int, total: int, *, group: int, groups: int) -> float:
    """Share of the smooth activation in one group of an iterative training: 1 until its turn, 0 from then on.

    Every group has an equal part of the training; the first one turns to ReLU before the first step.

    Source: the iterative replacement of "Faster inference of integer Swin", which replaces and distils in turns.

    >>> [[group_gamma(step, 30, group=g, groups=3) for g in range(3)] for step in (0, 10, 20)]
    [[0.0, 1.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]
    """
    if not 0 <= group < groups:
        raise TrainingError(f"there is no group {group} of {groups}")
    return 0.0 if step * groups >= group * total else 1.0


def statistics_end(total: int, *, statistics: float = 0.1) -> int:
    """The step at which PWLU's phase I (collecting statistics) ends and phase II (training the units) begins.

    Args:
        total: Steps of the training.
        statistics: Share of the steps in phase I. The paper has 5 epochs. At least one step, so that there is something
            to realign to, and one less than all.

    >>> statistics_end(120), statistics_end(2)
    (12, 1)
    """
    if not 0 < statistics < 1:
        raise TrainingError(f"phase I is {statistics} of the training; it must lie in (0, 1)")
    return max(1, min(total - 1, round(statistics * total)))


def _end(step: int, total: int, pure: float) -> int:
    """The step at which the pure phase begins: at least one step is pure, and unless all are to be, one is not."""
    if total < 1 or not 0 <= step <= total:
        raise TrainingError(f"there is no step {step} of {total}")
    if not 0 <= pure <= 1:
        raise TrainingError(f"the pure share is {pure}; it must lie in [0, 1]")
    return max(1 if pure < 1 < total else 0, total - max(1, round(pure * total)))
