"""The statistics of a comparison: percentiles that refuse, and an interval on the ratio of two latencies.

What is independent in a measurement is the *round*, not the run: runs next to each other share cache, clock and
neighbours. So the interval resamples rounds, and it pairs: each round holds a ratio of its own, in which whatever
slowed the whole machine during that round cancels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from relu_deploy.errors import DataError

CONFIDENCE = 0.95
# Two-sided sign test: with 5 rounds, all pointing one way, p = 2 / 2**5 = 0.0625 > 0.05; with 6 it is 0.031. So fewer
# than 6 rounds cannot support a claim at 95 %, whatever they show.
MIN_ROUNDS = 6
RESAMPLES = 4000

Floats = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Percentile:
    """One percentile of the latencies, or the reason why there is none.

    Attributes:
        percent: Which one, in (0, 100).
        value: In the unit of the samples; None when there are too few of them.
        low: Lower end of its 95 % confidence interval (an order statistic); None as ``value``.
        high: Upper end; None as ``value``.
        needed: Samples without which it is refused.
    """

    percent: float
    value: float | None
    low: float | None
    high: float | None
    needed: int


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times faster than the original.

    Attributes:
        value: Median over rounds of (original's median / this engine's median); above 1 is faster.
        low: Lower end of the 95 % interval; None with fewer than 6 rounds.
        high: Upper end; None with fewer than 6 rounds.
        rounds: How many there were.
        verdict: ``faster``, ``slower``, ``not distinguishable`` or ``too few rounds``.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int
    verdict: str

    @property
    def significant(self) -> bool:
        """Whether the interval exists and excludes 1."""
        return self.verdict in ("faster", "slower")


def samples_needed(percent: float, *, confidence: float = CONFIDENCE) -> int:
    """Fewest samples for which a percentile has a distribution-free confidence interval.

    The number of samples below the true quantile q is binomial(n, q), so sample number k (sorted) lies above it with a
    known probability. Even the whole sample, minimum to maximum, brackets the quantile with both tails under
    ``(1 - confidence) / 2`` only if ``q**n`` and ``(1 - q)**n`` are both that small; with fewer samples no order
    statistic bounds the quantile, and the printed value would be little more than the maximum.

    Args:
        percent: In (0, 100).
        confidence: In (0, 1), two-sided, equal tails.

    Returns:
        6 for the median, 36 for p90, 72 for p95, 368 for p99 at 95 %.

    Raises:
        DataError: ``percent`` is not inside (0, 100).

    Source: David and Nagaraja, Order Statistics, 3rd ed., section 7.1. MLPerf asks for more (23,886 for p90) because it
    also bounds the width; here the width is shown as the interval.

    >>> [samples_needed(p) for p in (50, 90, 95, 99)]
    [6, 36, 72, 368]
    """
    if not 0 < percent < 100:
        raise DataError(f"a percentile lies between 0 and 100, not {percent:g}")
    extreme = max(percent, 100 - percent) / 100
    return math.ceil(math.log((1 - confidence) / 2) / math.log(extreme))


def percentile(samples: Floats, percent: float, *, confidence: float = CONFIDENCE) -> Percentile:
    """Nearest-rank percentile with its confidence interval, or None where the sample cannot support one.

    Args:
        samples: Shape (n,), any unit. Order does not matter.
        percent: In (0, 100).
        confidence: Two-sided, equal tails.

    Returns:
        The value is one of the samples (rank ``ceil(n * percent / 100)``), and so are both ends.

    Raises:
        DataError: ``percent`` is not inside (0, 100).

    >>> percentile(np.arange(100.0), 99).value is None
    True
    """
    count, needed = len(samples), samples_needed(percent, confidence=confidence)
    if count < needed:
        return Percentile(percent, None, None, None, needed)
    ordered = np.sort(samples)
    rank = max(math.ceil(count * percent / 100 - 1e-9), 1)
    low, high = _interval_ranks(count, percent / 100, (1 - confidence) / 2)
    return Percentile(percent, float(ordered[rank - 1]), float(ordered[low - 1]), float(ordered[high - 1]), needed)


def _interval_ranks(count: int, q: float, tail: float) -> tuple[int, int]:
    """Ranks (from 1) of the order statistics that bracket quantile ``q``; each misses it with at most ``tail``."""
    below = np.arange(count + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    log_pmf = log_factorial[count] - log_factorial - log_factorial[::-1]
    cumulative = np.cumsum(np.exp(log_pmf + below * math.log(q) + (count - below) * math.log1p(-q)))
    # B = samples below the quantile. Sample k lies above it when B < k, and sample m below it when B >= m.
    # samples_needed allowed the ends of the range, so rounding of the sum may not push the ranks outside.
    low = int(np.searchsorted(cumulative, tail, side="right"))
    high = int(np.searchsorted(cumulative, 1 - tail, side="left")) + 1
    return max(low, 1), min(high, count)


def coefficient_of_variation(samples: Floats) -> float | None:
    """Sample standard deviation over mean; None for fewer than two samples.

    >>> coefficient_of_variation(np.array([1.0, 1.0, 1.0]))
    0.0
    """
    if len(samples) < 2:
        return None
    return float(np.std(samples, ddof=1) / np.mean(samples))


def ratio(original: Sequence[Floats], engine: Sequence[Floats], *, seed: int = 0) -> Ratio:
    """Speed of an engine over its original, with a 95 % bootstrap interval.

    Each round gives one ratio of medians; the estimate is the median of those, so a few disturbed rounds do not move
    it. The interval is the percentile bootstrap over rounds. (A mean of log-ratios was tried in its place: narrower by
    a fifth on clean data, but its interval covers too seldom with few rounds, and one bad round in ten moves its
    centre.)

    Args:
        original: One array of latencies a round, each of shape (n_r,), any unit.
        engine: The same rounds for the engine.
        seed: Of the resampling, so that a report can be made again from its raw samples.

    Returns:
        Above 1 means the engine is faster. It is called so only if the interval excludes 1.

    Raises:
        DataError: the two have different numbers of rounds, or a round is empty.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    if len(original) != len(engine) or not original or not all(len(r) for r in (*original, *engine)):
        raise DataError("a ratio needs the same rounds of both engines, with samples in each of them")
    ratios = np.array([np.median(a) / np.median(b) for a, b in zip(original, engine, strict=True)])
    value, rounds = float(np.median(ratios)), len(ratios)
    if rounds < MIN_ROUNDS:
        return Ratio(value, None, None, rounds, "too few rounds")
    drawn = np.random.default_rng(seed).integers(0, rounds, (RESAMPLES, rounds))
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(end) for end in np.quantile(np.median(ratios[drawn], axis=1), [tail, 1 - tail]))
    verdict = "faster" if low > 1 else "slower" if high < 1 else "not distinguishable"
    return Ratio(value, low, high, rounds, verdict)


def proportion_interval(hits: int, count: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson interval of a proportion such as an accuracy: what a test set of this size can tell.

    Source: Wilson 1927, doi:10.1080/01621459.1927.10502953.

    >>> [round(end, 3) for end in proportion_interval(97, 100)]
    [0.915, 0.99]
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p, scale = hits / count, 1 + z * z / count
    centre = p + z * z / (2 * count)
    half = z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return max((centre - half) / scale, 0.0), min((centre + half) / scale, 1.0)
