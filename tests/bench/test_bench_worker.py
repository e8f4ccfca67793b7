from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from relu_deploy.bench.client import Worker, _rebuild, start_worker
from relu_deploy.bench.subject import Subject, read_subject
from relu_deploy.bench.worker import time_runs
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.errors import BackendUnavailableError, DataError, EngineError

Save = Callable[[str, onnx.ModelProto], Path]
MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) { y = Relu(x)
z = Neg(x) }"""
# Gather's indices come from the input, so that an index out of range makes the runtime itself fail.
GATHER = """<ir_version: 8, opset_import: ["": 17]>
g (int64[N] x) => (float[N] y) <float[3] table = {1, 2, 3}> { y = Gather(table, x) }"""


@pytest.fixture
def model(save: Save) -> Path:
    return save("m.onnx", onnx.parser.parse_model(MODEL))


@pytest.fixture
def worker(model: Path, tmp_path: Path) -> Iterator[Worker]:
    with start_worker(read_subject(model), timeout=60, folder=tmp_path / "w") as started:
        yield started


def ready(worker: Worker) -> Worker:
    worker.load(threads=1)
    worker.feed({"x": np.ones((2, 8), np.float32)})
    return worker


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def keep_running(worker: Worker) -> None:
    for _ in range(1000):  # a round stops after 1000 runs
        worker.round(settle=0, seconds=60, number=7)


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    assert condition()


def test_protocol_from_loading_to_outputs(worker: Worker) -> None:
    loaded = worker.load(threads=1)
    assert [(s.name, s.shape, s.dtype) for s in loaded.inputs] == [("x", ("N", 8), "float32")]
    assert ([s.name for s in loaded.outputs], loaded.clock) == (["y", "z"], "host")
    worker.feed({"x": np.ones((2, 8), np.float32)})
    assert len(worker.warm_up(seconds=0, runs=4)) == 4
    settle, samples = worker.round(settle=0.01, seconds=0.05, number=1)
    assert len(settle) >= 1
    assert 1 <= len(samples) <= 1000
    assert worker.usage() > 0
    assert worker.peak_bytes > 1 << 20
    x = np.linspace(-1, 1, 16, dtype=np.float32).reshape(2, 8)
    np.testing.assert_array_equal(worker.outputs({"x": x}, ["z"])["z"], -x)


def test_an_idle_worker_uses_no_processor(model: Path, tmp_path: Path) -> None:
    with start_worker(read_subject(model), timeout=60, folder=tmp_path / "w") as worker:
        worker.load(threads=2)
        worker.feed({"x": np.ones((4096, 8), np.float32)})
        worker.round(settle=0, seconds=0.2, number=1)

        def ticks() -> int:
            fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])  # utime and stime, proc_pid_stat(5)

        before = ticks()
        time.sleep(0.5)
        # One thread that spins would use 0.5 s. Two ticks of the clock (20 ms) are the resolution of this counter.
        assert ticks() - before <= 2 * os.sysconf("SC_CLK_TCK") // 100


@pytest.mark.parametrize(
    ("sent", "told"), [(signal.SIGKILL, "memory"), (signal.SIGSEGV, "SIGSEGV"), (signal.SIGTERM, "SIGTERM")]
)
def test_a_worker_killed_in_a_round(worker: Worker, sent: signal.Signals, told: str) -> None:
    ready(worker)
    threading.Timer(0.3, os.kill, (worker.pid, sent)).start()
    with pytest.raises(EngineError, match=r"m\.onnx.* in round 7") as caught:
        keep_running(worker)
    assert told in str(caught.value)


def test_a_dead_worker_is_reported_when_it_is_asked_again(worker: Worker) -> None:
    ready(worker)
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not alive(worker.pid))
    with pytest.raises(EngineError, match="in round 2"):
        worker.round(settle=0, seconds=0.01, number=2)


def test_a_worker_that_hangs(model: Path, tmp_path: Path) -> None:
    subject = read_subject(model)
    with start_worker(subject, timeout=60, folder=tmp_path / "slow") as worker:
        ready(worker)
        worker._timeout = 0.2
        os.kill(worker.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"m\.onnx gave no answer in round 1 within 0\.2 s") as caught:
            worker.round(settle=0, seconds=0, number=1)
        assert caught.value.hint is not None
        assert "--timeout" in caught.value.hint
    assert not alive(worker.pid)


def test_no_worker_is_left_when_the_block_fails(model: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        start_worker(read_subject(model), timeout=60, folder=tmp_path / "w") as worker,
    ):
        raise KeyboardInterrupt
    assert not alive(worker.pid)


def test_a_bad_engine_is_told_in_the_runtimes_words(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a network")
    subject, told = Subject(path, "bad", "onnx", "fp32", 1), r"onnxruntime cannot load .*bad\.onnx.*(?i:protobuf)"
    with start_worker(subject, timeout=60, folder=tmp_path / "w") as worker, pytest.raises(EngineError, match=told):
        worker.load(threads=1)


def test_a_failing_run_is_told_in_the_runtimes_words(save: Save, tmp_path: Path) -> None:
    subject = read_subject(save("g.onnx", onnx.parser.parse_model(GATHER)))
    with start_worker(subject, timeout=60, folder=tmp_path / "w") as worker:
        worker.load(threads=1)
        worker.feed({"x": np.array([7])})
        with pytest.raises(EngineError, match="out of data bounds"):
            worker.warm_up(seconds=0, runs=1)


def test_an_input_without_axes_arrives_as_one(save: Save, tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N] x, float s) => (float[N] y) { y = Mul(x, s) }'
    subject = read_subject(save("s.onnx", onnx.parser.parse_model(text)))
    with start_worker(subject, timeout=60, folder=tmp_path / "w") as worker:
        worker.load(threads=1)
        feeds = {"x": np.ones(3, np.float32), "s": np.array(2, np.float32)}
        worker.feed(feeds)
        assert len(worker.warm_up(seconds=0, runs=1)) == 1
        assert worker.outputs(feeds, ["y"])["y"].tolist() == [2, 2, 2]


def test_wrong_feeds_keep_their_kind_of_error(worker: Worker) -> None:
    worker.load(threads=1)
    worker.feed({"wrong": np.ones((2, 8), np.float32)})
    with pytest.raises(DataError, match="wrong"):
        worker.warm_up(seconds=0, runs=1)


def test_an_unknown_target_and_an_unknown_request(model: Path, tmp_path: Path) -> None:
    with start_worker(Subject(model, "m", "abacus", "fp32", 1), timeout=60, folder=tmp_path / "w") as worker:
        with pytest.raises(EngineError, match="abacus"):
            worker.load(threads=1)
        with pytest.raises(EngineError, match="'dance'"):
            worker._ask("at a party", {"do": "dance"})
        with pytest.raises(EngineError, match="before it was given an engine"):
            worker.warm_up(seconds=0, runs=1)


FAKE = """
import contextlib, os, subprocess, sys
from pathlib import Path
from relu_deploy.bench import worker
from relu_deploy.tensors import TensorSpec
from relu_deploy.errors import BackendUnavailableError

class Engine:
    inputs = outputs = (TensorSpec("x", (1,), "float32"),)
    def run(self, feeds):
        {run}
        return feeds
    {extra}

@contextlib.contextmanager
def open_engine(engine, target, threads):
    {opening}
    yield Engine()

worker.open_engine = open_engine
worker.main()
"""


def talk(
    requests: list[dict[str, object]], *, run: str = "pass", extra: str = "", opening: str = "pass"
) -> tuple[list[dict], str]:
    """Run a worker around a stand-in for an engine; its answers and its standard error."""
    code = textwrap.dedent(FAKE).format(run=run, extra=extra, opening=opening)
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


LOAD = {"do": "load", "engine": "e", "target": "t", "threads": 1}
WARM = {"do": "warmup", "seconds": 0, "runs": 2}


def test_what_engines_print_does_not_reach_the_protocol() -> None:
    noise = "print('python'); os.write(1, b'native'); subprocess.run(['echo', 'child']); sys.stdin.read()"
    answers, errors = talk([LOAD, WARM], run=noise)
    assert [set(answer) for answer in answers] == [{"ok"}, {"ok"}]
    assert all(word in errors for word in ("native", "child"))


def test_times_by_an_engines_own_clock_are_taken() -> None:
    answers, _ = talk([LOAD, WARM], extra="time = lambda self, feeds, runs: [7.0] * runs")
    assert answers[0]["ok"]["clock"] == "engine"
    assert set(answers[1]["ok"]["samples"]) == {7e6}  # milliseconds there, nanoseconds here


def test_errors_of_a_backend_keep_message_hint_and_kind() -> None:
    answers, _ = talk([LOAD], opening="raise BackendUnavailableError('no GPU', hint='run it where one is')")
    rebuilt = _rebuild(answers[0]["error"])
    assert type(rebuilt) is BackendUnavailableError
    assert (rebuilt.message, rebuilt.hint) == ("no GPU", "run it where one is")
    assert type(_rebuild({"type": "os", "message": "m", "hint": None})) is EngineError


def test_a_bug_in_an_engine_ends_the_worker_with_its_traceback() -> None:
    answers, errors = talk([LOAD, WARM, WARM], run="raise ZeroDivisionError('by an engine')")
    assert len(answers) == 1
    assert errors.strip().splitlines()[-1] == "ZeroDivisionError: by an engine"


def test_running_an_engine_loads_neither_onnx_nor_graphsurgeon(save: Save, tmp_path: Path) -> None:
    plain, engine = save("m.onnx", onnx.parser.parse_model(MODEL)), tmp_path / "e.onnx"
    get_backend("ort").build(plain, engine, BuildConfig())
    code = """import sys
from pathlib import Path
from relu_deploy.bench.worker import open_engine
for path, target in ((sys.argv[1], "onnx"), (sys.argv[2], "ort")):
    with open_engine(Path(path), target, 1) as engine:
        print([spec.name for spec in engine.inputs])
print(sorted({"onnx", "onnx_graphsurgeon", "torch"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code, plain, engine], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["['x']", "['x']", "[]"], done.stderr


def test_timing_stops_by_count_and_by_time() -> None:
    assert len(time_runs(lambda: None, seconds=1e9, most=5)) == 5
    assert len(time_runs(lambda: None, seconds=0, least=3)) == 3
    slept = time_runs(lambda: time.sleep(0.01), seconds=0.05)
    assert 1 <= len(slept) <= 5
    assert min(slept) >= 10_000_000  # sleep never returns early, and the unit is nanoseconds
