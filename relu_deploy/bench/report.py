"""What a comparison found, with everything needed to judge it or to compute it again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from relu_deploy.bench.accuracy import Accuracy
from relu_deploy.bench.feeds import InputPlan
from relu_deploy.bench.measure import Raw
from relu_deploy.bench.stats import Floats, Percentile, Ratio, coefficient_of_variation, percentile, ratio
from relu_deploy.bench.subject import Subject
from relu_deploy.errors import DataError
from relu_deploy.machine import Machine, lacks_vnni

# pyperf calls a result unstable from here on: "the standard deviation represents 10% of the mean".
HIGH_VARIATION = 0.10
# Shares of the usable processors that others took, or the hypervisor kept, from which a measurement is called noisy. A
# quiet desktop shows 1 to 3 %.
NOISY_OTHERS, NOISY_STOLEN = 0.05, 0.02


@dataclasses.dataclass(frozen=True)
class Settings:
    """How it was measured.

    Attributes:
        batch: Items an inference.
        threads: Of each engine's runtime, while it runs; the engines never run at the same time.
        rounds: How often each engine had its turn.
        seconds: Measured time an engine, over all rounds.
        warmup: Seconds an engine before the first round.
        percentiles: Asked for, in (0, 100).
        seed: Of the order of turns, the random inputs and the resampling.
    """

    batch: int
    threads: int
    rounds: int
    seconds: float
    warmup: float
    percentiles: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        for name in ("batch", "threads", "rounds"):
            if getattr(self, name) < 1:
                raise DataError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not (0 < self.seconds < float("inf") and 0 <= self.warmup < float("inf")):
            raise DataError("seconds must be above 0, and the warm-up not below 0")
        if not all(0 < percent < 100 for percent in self.percentiles):
            raise DataError("a percentile lies between 0 and 100")


@dataclasses.dataclass(frozen=True)
class Noise:
    """How busy others kept the machine.

    Attributes:
        load_before: One-minute load average before the first run; None where not told.
        load_after: After the last; the bench itself adds to it.
        others: Share of the usable processors' time that other processes took while it was measured; None where
            not told.
        stolen: Share that the hypervisor gave to other virtual machines.
    """

    load_before: float | None
    load_after: float | None
    others: float | None
    stolen: float | None


@dataclasses.dataclass(frozen=True)
class EngineResult:
    """One engine's measurement.

    Attributes:
        name: Its name in the report.
        path: Its file.
        target: ``onnx`` for a plain file run by ONNX Runtime, else the backend.
        precision: ``int8``, ``fp32``, ...
        size_bytes: On disk.
        layers: Linear layers in int8, and all of them, from the manifest; None for a plain file.
        load_seconds: Opening it, once.
        peak_bytes: Largest resident memory of its process.
        clock: ``host``: wall time of one call, in its process; ``engine``: by the engine's own clock (on a GPU: CUDA
            events around a CUDA graph, without copies).
        samples: Counted runs.
        median_ms: Of all counted runs.
        percentiles: In milliseconds; refused where there are too few samples.
        variation: Standard deviation over mean of the counted runs; None with one run.
        throughput: Items a second: batch / median latency.
        ratio: Against the original; None for the original itself.
        accuracy: On the data; None without data.
        raw: Every run.
    """

    name: str
    path: str
    target: str
    precision: str
    size_bytes: int
    layers: tuple[int, int] | None
    load_seconds: float
    peak_bytes: int
    clock: str
    samples: int
    median_ms: float
    percentiles: tuple[Percentile, ...]
    variation: float | None
    throughput: float
    ratio: Ratio | None
    accuracy: Accuracy | None
    raw: Raw


@dataclasses.dataclass(frozen=True)
class BenchReport:
    """A comparison of engines with their original.

    Attributes:
        original: What the ratios are against.
        engines: In the order they were given.
        unit: ``FPS`` where the first input is images (rank 4), else ``QPS``; both are items a second.
        settings: How it was measured.
        inputs: What was fed.
        data: Where the inputs came from: a description of the data, or ``random``.
        order: Per round, who ran when; 0 is the original.
        machine: What it was measured on.
        noise: What else ran there.
        started: UTC, ISO 8601.
        warnings: Why a reader may not trust the numbers.
    """

    original: EngineResult
    engines: tuple[EngineResult, ...]
    unit: str
    settings: Settings
    inputs: tuple[InputPlan, ...]
    data: str
    order: tuple[tuple[int, ...], ...]
    machine: Machine
    noise: Noise
    started: str
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the bench knows of one engine before its statistics."""

    subject: Subject
    load_seconds: float
    peak_bytes: int
    clock: str
    raw: Raw
    accuracy: Accuracy | None


def summarise(found: Measured, original: Raw | None, settings: Settings) -> EngineResult:
    """Turn raw samples into a result.

    Args:
        found: One engine.
        original: Raw samples of the original; None when ``found`` is the original.
        settings: Give the batch, the percentiles and the seed.
    """
    rounds = in_ms(found.raw.rounds)
    samples = np.concatenate(rounds)
    median = float(np.median(samples))
    return EngineResult(
        name=found.subject.name,
        path=str(found.subject.path),
        target=found.subject.target,
        precision=found.subject.precision,
        size_bytes=found.subject.size_bytes,
        layers=found.subject.layers,
        load_seconds=found.load_seconds,
        peak_bytes=found.peak_bytes,
        clock=found.clock,
        samples=len(samples),
        median_ms=median,
        percentiles=tuple(percentile(samples, percent) for percent in settings.percentiles),
        variation=coefficient_of_variation(samples),
        throughput=settings.batch / median * 1e3,
        ratio=None if original is None else ratio(in_ms(original.rounds), rounds, seed=settings.seed),
        accuracy=found.accuracy,
        raw=found.raw,
    )


def in_ms(rounds: Sequence[Sequence[float]]) -> list[Floats]:
    """Nanoseconds of each round as an array of milliseconds."""
    return [np.asarray(samples, dtype=np.float64) / 1e6 for samples in rounds]


def find_warnings(
    results: Sequence[EngineResult], settings: Settings, noise: Noise, machine: Machine
) -> tuple[str, ...]:
    """Everything about a measurement that a reader should know before trusting it; the original is ``results[0]``."""
    return (*_noise_warnings(noise, machine, settings), *(w for result in results for w in _result_warnings(result)),
            *_int8_warnings(results, machine), *_clock_warnings(results))  # fmt: skip


def _noise_warnings(noise: Noise, machine: Machine, settings: Settings) -> list[str]:
    found = []
    if noise.others is not None and noise.others > NOISY_OTHERS:
        found.append(f"the machine was busy: other processes took {noise.others:.0%} of its processors meanwhile")
    if noise.stolen is not None and noise.stolen > NOISY_STOLEN:
        found.append(f"the hypervisor gave {noise.stolen:.0%} of the processors to other virtual machines meanwhile")
    if settings.threads > machine.logical_cpus:
        found.append(f"{settings.threads} threads share {machine.logical_cpus} processors: every run waits for itself")
    if machine.governor in ("powersave", "ondemand", "conservative"):
        found.append(f"the frequency governor is {machine.governor!r}: the clock changes with the load")
    return found


def _result_warnings(result: EngineResult) -> list[str]:
    found = []
    if result.variation is not None and result.variation > HIGH_VARIATION:
        found.append(
            f"{result.name}: its runs vary by {result.variation:.0%} (standard deviation over mean): "
            "use more rounds, or a quieter machine"
        )
    if result.ratio is not None and result.ratio.low is None:
        found.append(f"{result.name}: {result.ratio.rounds} rounds support no claim about the ratio: use 6 or more")
    if result.accuracy is not None and result.accuracy.nonfinite:
        found.append(f"{result.name}: {result.accuracy.nonfinite} of its output values are NaN or Inf")
    return found


def _clock_warnings(results: Sequence[EngineResult]) -> list[str]:
    return [
        f"{result.name} was timed by the {result.clock}'s clock and its original by the {results[0].clock}'s: only the "
        "host's includes the call and the copies, so their ratio mixes two things"
        for result in results[1:]
        if result.clock != results[0].clock
    ]


def _int8_warnings(results: Sequence[EngineResult], machine: Machine) -> list[str]:
    on_cpu = any(result.precision == "int8" and result.target in ("onnx", "ort") for result in results)
    if not on_cpu or not lacks_vnni(machine.flags):
        return []
    return ["this CPU has no VNNI instructions: int8 gains more on CPUs that have; how much cannot be told from this"]
