"""What the studies share: jobs on all processors that survive a kill, their results, and the page a study leaves."""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import shutil
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from calib.files import make_folder, read_json, write_json, write_text
from relu_deploy.machine import available_cpus, describe_machine

Values = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a study was asked for.

    Attributes:
        folder: Where everything is made; a second run goes on from what is there.
        seeds: Trainings of each row, with seeds 0, 1, ...
        workers: Trainings at a time, one processor each.
        seconds: Measured time of each engine.
        smoke: A run of a minute on a sliver of the data, to see that the study works; its numbers mean nothing.
    """

    folder: Path
    seeds: int
    workers: int
    seconds: float
    smoke: bool


@dataclasses.dataclass(frozen=True)
class Job:
    """One training with everything measured on it.

    Attributes:
        name: Its folder, under ``jobs`` of the study's.
        function: Does it; at the top of a module, so that another process can find it. It is called with the job and
            its folder and returns numbers.
        settings: Of the function: plain values. A result of other settings is not taken for this one.
        smoke: As in :class:`Options`.
    """

    name: str
    function: Callable[[Job, Path], Values]
    settings: Mapping[str, Any]
    smoke: bool


def parse_options(description: str) -> Options:
    """Read a study's command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("study-run"), help="folder; what is there is kept")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each row")
    parser.add_argument("--workers", type=int, default=available_cpus(), help="trainings at a time")
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each engine")
    parser.add_argument("--smoke", action="store_true", help="only see that it works: little data, few steps")
    given = parser.parse_args()
    if min(given.seeds, given.workers) < 1:
        parser.error("--seeds and --workers are at least 1")
    return Options(given.output, given.seeds, given.workers, given.seconds, given.smoke)


def run_jobs(jobs: Sequence[Job], options: Options) -> dict[str, Values]:
    """Run jobs side by side, except those that have their result already.

    Returns:
        The numbers of each job, by name, in the order of ``jobs``.

    Raises:
        SystemExit: jobs failed; all others were run first, and each failure is named with its traceback.
    """
    found = {job.name: _stored(job, options) for job in jobs}
    missing = [job for job in jobs if found[job.name] is None]
    failed: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with (
        Progress(*columns, console=console, disable=not console.is_terminal) as bar,
        # Spawned and not forked: a fork of a process whose threads hold locks may never come back.
        ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool,
    ):
        task = bar.add_task("trainings", total=len(jobs), completed=len(jobs) - len(missing))
        waiting = {pool.submit(_run, job, _folder(job, options), options.workers): job for job in missing}
        for future in as_completed(waiting):
            job = waiting[future]
            try:
                found[job.name] = future.result()
            except Exception:  # noqa: BLE001  # whatever a job raised is told, after the others had their turn
                failed.append(f"{job.name} failed:\n{traceback.format_exc()}")
            bar.advance(task)
    if failed:
        sys.exit("\n".join(failed))
    return {name: values for name, values in found.items() if values is not None}


def job_folder(name: str, options: Options) -> Path:
    """Where a job left its files."""
    return options.folder / "jobs" / name


def over_seeds(results: Mapping[str, Values], names: Sequence[str], key: str) -> list[float]:
    """One number of each of several jobs."""
    return [results[name][key] for name in names]


def spread(values: Sequence[float], *, digits: int = 2) -> str:
    """Mean and sample standard deviation.

    >>> spread([1.0, 2.0, 3.0])
    '2.00 ± 1.00'
    """
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def paired(values: Sequence[float], base: Sequence[float], *, digits: int = 2) -> str:
    """Mean and spread of the differences, seed by seed: what the seeds have in common is not in it.

    >>> paired([2.0, 3.0], [1.5, 2.5])
    '+0.50 ± 0.00'
    """
    text = spread([value - other for value, other in zip(values, base, strict=True)], digits=digits)
    return text if text.startswith("-") else f"+{text}"


def share(values: Sequence[float], base: Sequence[float]) -> float:
    """How much of the base's mean is kept, in percent; 0 if there is nothing to keep.

    >>> share([1.0, 2.0], [2.0, 4.0])
    50.0
    """
    return 100 * sum(values) / sum(base) if sum(base) else 0.0


def claim(text: str, first: Sequence[float], second: Sequence[float], *, margin: float = 0.0) -> str:
    """Whether one row is above another by ``margin``, as a line of a list.

    What differs from the margin by no more than its own spread over the seeds is neither a yes nor a no.

    >>> claim("A over B", [2.0, 3.0], [1.0, 2.2])
    '- A over B: +0.90 ± 0.14: yes'
    """
    differences = [value - other for value, other in zip(first, second, strict=True)]
    mean = statistics.mean(differences)
    noise = statistics.stdev(differences) if len(differences) > 1 else 0.0
    answer = "not told apart by these seeds" if abs(mean - margin) <= noise else "yes" if mean > margin else "no"
    return f"- {text}: {paired(first, second)}: {answer}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its columns padded so that it reads well as text too; numbers to the right."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    numeric = [i > 0 and all(row[i][:1] in "+-0123456789" for row in rows) for i in range(len(headings))]
    shown = [
        "| " + " | ".join(c.rjust(w) if n else c.ljust(w) for c, w, n in zip(line, widths, numeric, strict=True)) + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)) + "|"
    return "\n".join([shown[0], rule, *shown[1:]])


def publish(options: Options, name: str, title: str, parts: Sequence[str]) -> None:
    """Print a study's page and write it to ``<folder>/<name>.md``, with the command and the machine."""
    machine = describe_machine()
    versions = {package: machine.packages[package] for package in ("onnxruntime", "relu-deploy")}
    versions["torch"] = _torch_version()
    flags = "with" if any("vnni" in flag for flag in machine.flags) else "without"
    command = f"python examples/studies/{name}.py{' --smoke' if options.smoke else ''}"
    software = ", ".join(f"{package} {version}" for package, version in sorted(versions.items()))
    head = [
        f"# {title}",
        f"Printed by `{command}`, {options.seeds} seeds; ± is the sample standard deviation over them.",
        f"{machine.cpu} {flags} VNNI, {machine.logical_cpus} processors, Python {machine.python}, {software}. No GPU.",
    ]
    if options.smoke:
        head.append("**A smoke run: little data, few steps. Its numbers mean nothing.**")
    text = "\n\n".join([*head, *parts]) + "\n"
    make_folder(options.folder)
    write_text(options.folder / f"{name}.md", text)
    print(text)


def _folder(job: Job, options: Options) -> Path:
    return job_folder(job.name, options)


def _stored(job: Job, options: Options) -> Values | None:
    """The result that is there, if it is this job's; what another one left is removed."""
    folder = _folder(job, options)
    if not (folder / "result.json").is_file():
        return None
    stored = read_json(folder / "result.json")
    if stored["settings"] == _plain(job):
        values: Values = stored["values"]
        return values
    shutil.rmtree(folder)
    return None


def _run(job: Job, folder: Path, workers: int) -> Values:
    """In a process of its own: the job, then its result, whole or not at all."""
    import torch

    torch.set_num_threads(max(1, available_cpus() // workers))
    make_folder(folder)
    values = job.function(job, folder)
    write_json(folder / "result.json", {"settings": _plain(job), "values": values})
    return values


def _plain(job: Job) -> dict[str, Any]:
    return {"function": job.function.__name__, "smoke": job.smoke, **job.settings}


def _torch_version() -> str:
    import torch

    return str(torch.__version__).partition("+")[0]
