"""The process that runs one engine: ``python -m relu_deploy.bench.worker``, started by ``relu_deploy.bench.client``.

One process an engine, because engines in one process share thread pools, allocators and caches. It waits for requests
on a pipe and uses no processor time meanwhile.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from calib.errors import ToolkitError
from relu_deploy.bench.protocol import MAX_RUNS, PLAIN_ONNX, Runnable
from relu_deploy.errors import EngineError

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# An engine with a clock of its own is asked for a few runs at a time, so that the seconds asked for are kept.
_ENGINE_CLOCK_RUNS = 20


def open_engine(engine: Path, target: str, threads: int) -> AbstractContextManager[Runnable]:
    """Open a plain ONNX file or a built engine.

    Raises:
        EngineError, BackendUnavailableError: what the backend says about the file or the machine.
    """
    if target == PLAIN_ONNX:
        from relu_deploy.bench.onnx_engine import open_onnx

        return open_onnx(engine, threads=threads)
    from relu_deploy.engines.base import get_backend

    return get_backend(target).open(engine, threads=threads)


def time_runs(run: Callable[[], object], *, seconds: float, least: int = 1, most: int = MAX_RUNS) -> list[int]:
    """Nanoseconds of single runs, one after the other, for some seconds.

    Args:
        run: What is timed.
        seconds: No run starts later than this.
        least: Runs made even when the seconds are over.
        most: Runs after which it stops early.
    """
    samples: list[int] = []
    clock = time.perf_counter_ns
    gc.collect()
    gc.disable()  # a collection inside a run would be measured as the engine's
    try:
        until = clock() + int(seconds * 1e9)
        while len(samples) < most and (len(samples) < least or clock() < until):
            start = clock()
            run()
            samples.append(clock() - start)
    finally:
        gc.enable()
    return samples


class Session:
    """Holds the engine of a worker and answers its requests."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        self._stack = stack
        self._engine: Runnable | None = None
        self._feeds: dict[str, npt.NDArray[Any]] = {}

    @property
    def engine(self) -> Runnable:
        """The open engine."""
        if self._engine is None:
            raise EngineError("a worker was asked to run before it was given an engine")
        return self._engine

    def answer(self, request: dict[str, Any]) -> Any:
        """Do what one request asks."""
        arguments = {key: value for key, value in request.items() if key != "do"}
        match request["do"]:
            case "load":
                return self._load(**arguments)
            case "feed":
                return self._feed(**arguments)
            case "warmup":
                return self._warmup(**arguments)
            case "round":
                return self._round(**arguments)
            case "usage":
                return _usage()
            case "outputs":
                return self._outputs(**arguments)
            case unknown:
                raise EngineError(f"a worker was asked for {unknown!r}, which it cannot do")

    def _load(self, engine: str, target: str, threads: int) -> dict[str, Any]:
        start = time.perf_counter()
        self._engine = self._stack.enter_context(open_engine(Path(engine), target, threads))
        return {
            "inputs": [dataclasses.asdict(spec) for spec in self.engine.inputs],
            "outputs": [dataclasses.asdict(spec) for spec in self.engine.outputs],
            "seconds": time.perf_counter() - start,
            "clock": "engine" if callable(getattr(self.engine, "time", None)) else "host",
        }

    def _feed(self, feed: str) -> None:
        self._feeds = _read_arrays(feed)

    def _warmup(self, seconds: float, runs: int) -> dict[str, Any]:
        return {"samples": self._time(seconds, least=runs)}

    def _round(self, settle: float, seconds: float) -> dict[str, Any]:
        settled = self._time(settle)
        return {"settle": settled, "samples": self._time(seconds)}

    def _time(self, seconds: float, *, least: int = 1) -> list[float]:
        engine_clock = getattr(self.engine, "time", None)
        if not callable(engine_clock):
            return list(time_runs(lambda: self.engine.run(self._feeds), seconds=seconds, least=least))
        samples: list[float] = []
        until = time.perf_counter() + seconds
        while len(samples) < MAX_RUNS and (len(samples) < least or time.perf_counter() < until):
            samples.extend(value * 1e6 for value in engine_clock(self._feeds, _ENGINE_CLOCK_RUNS))
        return samples

    def _outputs(self, feed: str, names: list[str], out: str) -> None:
        results = self.engine.run(_read_arrays(feed))
        with Path(out).open("wb") as stream:
            np.savez(stream, **{name: np.asarray(results[name]) for name in names})  # type: ignore[arg-type]


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until the pipe ends."""
    with contextlib.ExitStack() as stack:
        session = Session(stack)
        for line in requests:
            try:
                reply = {"ok": session.answer(json.loads(line))}
            except ToolkitError as error:
                kind = type(error).__name__
                reply = {"error": {"type": kind, "message": error.message, "hint": error.hint}}
            print(json.dumps(reply), file=answers, flush=True)


def main() -> None:
    """Keep the pipes for the protocol alone, then serve.

    Libraries print to descriptor 1, also from C++: it becomes standard error, and the answers keep a copy of the pipe.
    """
    if sys.platform == "linux":
        # A parent that was killed outright cannot stop a worker that hangs in native code.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    requests = os.fdopen(os.dup(0), "r", encoding="utf-8")
    os.dup2(2, 1)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    # The bench has gone away: nobody is left to be told.
    with contextlib.suppress(BrokenPipeError):
        serve(requests, answers)


def _read_arrays(path: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name], order="C") for name in arrays.files}


def _usage() -> dict[str, float]:
    """Processor time and peak memory of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    unit = 1024 if sys.platform == "linux" else 1
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * unit}


if __name__ == "__main__":
    main()
