"""Interleaved rounds: every engine runs in every round, in an order drawn anew each time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from calib.progress import Progress, silent
from relu_deploy.bench.client import Worker
from relu_deploy.errors import EngineError

# Part of a round's time that is run and kept but not counted: the other engines have just used the caches.
SETTLE = 0.1
WARMUP_RUNS = 3


@dataclasses.dataclass(frozen=True)
class Raw:
    """Every run of one engine, nanoseconds, in the order they were made.

    Attributes:
        warmup: Before the first round; not counted.
        settle: Per round, the runs at its start; not counted.
        rounds: Per round, the runs that count.
    """

    warmup: tuple[float, ...]
    settle: tuple[tuple[float, ...], ...]
    rounds: tuple[tuple[float, ...], ...]


def draw_order(engines: int, rounds: int, *, seed: int) -> tuple[tuple[int, ...], ...]:
    """Who runs when: a random permutation for each round, so that no engine always follows another.

    >>> sorted(draw_order(3, 1, seed=0)[0])
    [0, 1, 2]
    """
    rng = np.random.default_rng(seed)
    return tuple(tuple(int(index) for index in rng.permutation(engines)) for _ in range(rounds))


def measure(
    workers: Sequence[Worker],
    order: Sequence[Sequence[int]],
    *,
    seconds: float,
    warmup: float,
    progress: Progress = silent,
) -> tuple[Raw, ...]:
    """Warm every engine up, then run the rounds.

    Args:
        workers: Loaded and fed; one an engine.
        order: Per round, indices into ``workers``.
        seconds: Measured time an engine, over all rounds together.
        warmup: Seconds an engine; at least 3 runs are made.
        progress: Told after each engine's part of a round.

    Raises:
        EngineError: an engine failed, crashed, or gave no answer in time.
    """
    if not order:
        raise EngineError("there is nothing to measure: 0 rounds were asked for")
    each = seconds / len(order)
    warm = []
    for done, worker in enumerate(workers):
        progress("warm-up", done, len(workers))
        warm.append(tuple(worker.warm_up(seconds=warmup, runs=WARMUP_RUNS)))
    progress("warm-up", len(workers), len(workers))
    settled: list[list[tuple[float, ...]]] = [[] for _ in workers]
    counted: list[list[tuple[float, ...]]] = [[] for _ in workers]
    for number, turn in enumerate(order, start=1):
        for index in turn:
            settle, samples = workers[index].round(settle=each * SETTLE, seconds=each * (1 - SETTLE), number=number)
            settled[index].append(tuple(settle))
            counted[index].append(tuple(samples))
        progress("rounds", number, len(order))
    return tuple(Raw(w, tuple(s), tuple(c)) for w, s, c in zip(warm, settled, counted, strict=True))
