"""Engines against their original: one call that opens, checks, judges and measures them."""

from __future__ import annotations

import contextlib
import datetime as dt
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.progress import Progress, silent
from calib.sources import Source, open_source
from relu_deploy.bench.accuracy import Accuracy, Array, Tally, read_labels
from relu_deploy.bench.batches import input_specs, iter_batches, shapes_of_data
from relu_deploy.bench.client import Loaded, Worker, start_worker
from relu_deploy.bench.feeds import Feeds, InputPlan, Shape, cast_feeds, check_same_inputs, plan_inputs, random_feeds
from relu_deploy.bench.measure import Raw, draw_order, measure
from relu_deploy.bench.report import BenchReport, Measured, Noise, Settings, find_warnings, summarise
from relu_deploy.bench.subject import Subject, read_subject, unique_names
from relu_deploy.errors import DataError
from relu_deploy.machine import available_cpus, cpu_times, describe_machine, load_average

Opened = tuple[Worker, Loaded]


def bench(
    engines: Sequence[Path | Subject],
    *,
    against: Path | Subject,
    data: Any = None,
    preprocess: str | None = None,
    labels: Path | Array | None = None,
    output: str | None = None,
    batch: int | None = None,
    shapes: Mapping[str, Shape] | None = None,
    rounds: int = 20,
    seconds: float = 10.0,
    warmup: float = 1.0,
    threads: int | None = None,
    percentiles: Sequence[float] = (50, 90, 95, 99),
    seed: int = 0,
    timeout: float = 300.0,
    progress: Progress = silent,
) -> BenchReport:
    """Measure engines against their original: latency, throughput, ratio with its interval, accuracy.

    Every engine lives in a process of its own and the turns are interleaved, so what changes on the machine meets all
    of them; they never run at the same time. Latency is the wall time of one call that takes numpy arrays and gives
    numpy arrays, so copies to and from a device are inside it unless the engine brings its own clock.

    Args:
        engines: Built engines or ONNX files.
        against: The original, which the ratios are relative to.
        data: What ``calib.sources.open_source`` takes: a path, ``module:function``, arrays; without it inputs are
            random and there is no accuracy.
        preprocess: For folders of images.
        labels: Class numbers, (samples,), or a ``.npy`` file of them; needs ``data``.
        output: The output that accuracy is read from; the original's first by default.
        batch: Items an inference; by default what shapes or the network fix, else 1.
        shapes: Whole shapes of inputs that have dynamic axes besides the batch.
        rounds: Turns of each engine; fewer than 6 give no interval.
        seconds: Measured time an engine, all rounds together, a tenth of it to settle.
        warmup: Seconds an engine before the first round.
        threads: Of each runtime; by default all processors this process may use.
        percentiles: Which to give, where there are samples enough.
        seed: Of the order of turns, the random inputs and the resampling.
        timeout: Seconds that an engine may be late before it is given up.
        progress: Told what is done.

    Raises:
        FileError, ModelError: a file is missing or damaged.
        EngineError: an engine cannot be opened, crashes, hangs, or is killed.
        BackendUnavailableError: an engine's runtime or its GPU is not there; found before anything is measured.
        DataError: inputs of engines differ, data or labels do not fit.

    Source: Georges, Buytaert and Eeckhout, Statistically rigorous Java performance evaluation, OOPSLA 2007, for
    intervals from repeated rounds; Kalibera and Jones, Rigorous benchmarking in reasonable time, ISMM 2013, for an
    interval on the ratio.
    """
    if not engines:
        raise DataError("there is no engine to measure", hint="name one or more, and the original with --against")
    if data is None and (labels is not None or output is not None or preprocess is not None):
        raise DataError("labels, an output or preprocessing were given without data", hint="add --data")
    pinned = threads if threads is not None else available_cpus()
    # Known before any process is started: what is wrong with the rest of the call.
    Settings(batch or 1, pinned, rounds, seconds, warmup, tuple(percentiles), seed)
    truth = read_labels(labels) if isinstance(labels, Path) else labels
    subjects = unique_names([s if isinstance(s, Subject) else read_subject(s) for s in (against, *engines)])
    started = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    with _open_all(subjects, threads=pinned, timeout=timeout, progress=progress) as opened:
        original = opened[0][1]
        source = None if data is None else open_source(data, input_specs(original.inputs), preprocess=preprocess)
        given = {**(shapes_of_data(original.inputs, source, batch) if source is not None else {}), **(shapes or {})}
        settled, plans = plan_inputs(original.inputs, batch=batch, shapes=given)
        _check_all(opened, plans)
        settings = Settings(settled, pinned, rounds, seconds, warmup, tuple(percentiles), seed)
        accuracies: list[Accuracy | None] = [None] * len(opened)
        feeds = random_feeds(plans, seed=seed)
        if source is not None:
            feeds, _ = next(iter_batches(source, settled))
            accuracies = list(_judge(opened, source, truth, output=output, batch=settled, progress=progress))
        order = draw_order(len(opened), rounds, seed=seed)
        raw, noise = _measure_all(opened, feeds, order, seconds=seconds, warmup=warmup, progress=progress)
    found = [
        Measured(worker.subject, loaded.seconds, worker.peak_bytes, loaded.clock, runs, accuracy)
        for (worker, loaded), runs, accuracy in zip(opened, raw, accuracies, strict=True)
    ]
    results = [summarise(one, None if one is found[0] else found[0].raw, settings) for one in found]
    machine = describe_machine()
    return BenchReport(
        original=results[0],
        engines=tuple(results[1:]),
        unit="FPS" if plans and len(plans[0].shape) == 4 else "QPS",
        settings=settings,
        inputs=plans,
        data="random" if data is None else str(data) if isinstance(data, (str, Path)) else "arrays",
        order=order,
        machine=machine,
        noise=noise,
        started=started,
        warnings=(*_output_warnings(opened), *find_warnings(results, settings, noise, machine)),
    )


@contextlib.contextmanager
def _open_all(
    subjects: Sequence[Subject], *, threads: int, timeout: float, progress: Progress
) -> Iterator[list[Opened]]:
    """One worker a subject, all of them gone when the block ends."""
    with tempfile.TemporaryDirectory(prefix="relu-deploy-bench-") as folder, contextlib.ExitStack() as stack:
        opened: list[Opened] = []
        for index, subject in enumerate(subjects):
            progress("opening", index, len(subjects))
            worker = stack.enter_context(start_worker(subject, timeout=timeout, folder=Path(folder) / str(index)))
            opened.append((worker, worker.load(threads=threads)))
        progress("opening", len(subjects), len(subjects))
        yield opened


@contextlib.contextmanager
def _naming(worker: Worker) -> Iterator[None]:
    """Put the engine's file in front of what is wrong with its data."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{worker.subject.path}: {error.message}", hint=error.hint) from error


def _check_all(opened: Sequence[Opened], plans: Sequence[InputPlan]) -> None:
    """Every engine takes what the original takes; the file is named where one does not."""
    original = opened[0][1].inputs
    for worker, loaded in opened:
        with _naming(worker):
            check_same_inputs(original, loaded.inputs, plans)


def _measure_all(
    opened: Sequence[Opened],
    feeds: Feeds,
    order: Sequence[Sequence[int]],
    *,
    seconds: float,
    warmup: float,
    progress: Progress,
) -> tuple[tuple[Raw, ...], Noise]:
    """Feed and measure, and watch the machine meanwhile."""
    workers = [worker for worker, _ in opened]
    load_before = load_average()
    for worker, loaded in opened:
        worker.feed(cast_feeds(feeds, loaded.inputs))
    before, own_before = cpu_times(), own_cpu(workers)
    start = time.monotonic()
    raw = measure(workers, order, seconds=seconds, warmup=warmup, progress=progress)
    available = max(time.monotonic() - start, 1e-9) * available_cpus()
    after, own = cpu_times(), own_cpu(workers) - own_before
    if before is None or after is None:
        return raw, Noise(load_before, load_average(), None, None)
    others = max(after.busy - before.busy - own, 0.0) / available
    return raw, Noise(load_before, load_average(), others, (after.stolen - before.stolen) / available)


def own_cpu(workers: Sequence[Worker]) -> float:
    """Processor seconds of the bench and its workers, so far."""
    return time.process_time() + sum(worker.usage() for worker in workers)


def _judge(
    opened: Sequence[Opened], source: Source, truth: Array | None, *, output: str | None, batch: int, progress: Progress
) -> Iterator[Accuracy]:
    """Accuracy of each engine on all the data, at the batch that is measured."""
    name = _common_output(opened, output)
    tallies = [Tally(name, is_original=index == 0) for index in range(len(opened))]
    done, total = 0, source.length
    if truth is not None and total is not None and total != len(truth):
        raise DataError(f"there are {len(truth)} labels for {total} samples", hint="they must be in the same order")
    for feeds, count in iter_batches(source, batch):
        known = None if truth is None else truth[done : done + count]
        if known is not None and len(known) != count:
            raise DataError(f"there are only {len(known) + done} labels; the data goes on", hint="give one a sample")
        _add_batch(opened, tallies, feeds, name, known, count)
        done += count
        progress("accuracy", done, total)
    if truth is not None and done != len(truth):
        raise DataError(f"there are {len(truth)} labels for {done} samples", hint="they must be in the same order")
    return (tally.result() for tally in tallies)


def _add_batch(
    opened: Sequence[Opened], tallies: Sequence[Tally], feeds: Feeds, name: str, known: Array | None, count: int
) -> None:
    """Run one batch on every engine, and count the part of it that is no padding."""
    reference = None
    for (worker, loaded), tally in zip(opened, tallies, strict=True):
        found = worker.outputs(cast_feeds(feeds, loaded.inputs), [name])[name]
        rows = found[:count] if found.ndim and len(found) >= count else found
        reference = rows if reference is None else reference
        with _naming(worker):
            tally.add(reference, rows, known)


def _common_output(opened: Sequence[Opened], output: str | None) -> str:
    """The output accuracy is read from; every engine must have it."""
    name = output if output is not None else opened[0][1].outputs[0].name
    for worker, loaded in opened:
        names = [spec.name for spec in loaded.outputs]
        if name not in names:
            raise DataError(
                f"{worker.subject.path} has no output {name!r}, which accuracy is read from; it has {', '.join(names)}",
                hint="name one that all engines have with --output",
            )
    return name


def _output_warnings(opened: Sequence[Opened]) -> list[str]:
    """Engines that give something else than the original: their times are not of the same work."""
    expected = {spec.name for spec in opened[0][1].outputs}
    return [
        f"{worker.subject.name}: its outputs are not those of the original, so their times may not be of the same work"
        for worker, loaded in opened[1:]
        if {spec.name for spec in loaded.outputs} != expected
    ]
