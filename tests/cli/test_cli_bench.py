from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

from relu_deploy.cli import main

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] y) { y = BODY }"""
QUICK = ["--seconds", "0.2", "--rounds", "6", "--warmup", "0", "--threads", "1"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make(tmp_path / "original.onnx", "Relu(x)")


def make(path: Path, body: str) -> Path:
    onnx.save(onnx.parser.parse_model(MODEL.replace("BODY", body)), path)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *(str(argument) for argument in arguments)])


def test_prints_a_table_that_is_never_cut(model: Path, tmp_path: Path) -> None:
    engine = make(tmp_path / "an-engine-with-quite-a-long-name-that-a-person-gave-it.onnx", "Neg(x)")
    result = run(engine, "--against", model, *QUICK)
    assert result.exit_code == 0, result.output
    for word in (
        engine.name,
        "original.onnx",
        "QPS",
        "x original",
        "the original",
        "median ms",
        "p99",
        "inputs: x 1x4",
    ):
        assert word in result.output
    assert "…" not in result.output


def test_json_on_standard_output_is_alone_there(model: Path) -> None:
    result = run(model, "--against", model, *QUICK, "--json", "-")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["engines"][0]["ratio"]["rounds"] == 6
    assert "x original" in result.stderr


def test_accuracy_is_printed_next_to_speed(model: Path, tmp_path: Path) -> None:
    x = np.eye(4, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "labels.npy", np.arange(4))
    data = ["--data", tmp_path / "x.npy"]
    with_labels = run(model, "--against", model, *QUICK, *data, "--labels", tmp_path / "labels.npy")
    assert "100.00%" in with_labels.output
    other = make(tmp_path / "e.onnx", "Add(x, x)")
    without = run(other, "--against", model, *QUICK, *data)
    # |x - 2x| = |x| of ones and zeros: signal and noise are equal.
    assert ["e.onnx", "4", "0.0", "1", "100.00%"] in [line.split() for line in without.output.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "told", "fix"),
    [
        (["none.onnx", "--against", "original.onnx"], "cannot measure none.onnx: it does not exist", ""),
        (["original.onnx", "--against", "none.onnx"], "cannot measure none.onnx", ""),
        (["original.onnx"], "--against", ""),
        (["--against", "original.onnx"], "ENGINE", ""),
        (["text.onnx", "--against", "original.onnx"], "text.onnx", "copy it again"),
        (["plan.engine", "--against", "original.onnx"], "plan.engine", "build-engine"),
        (["other.onnx", "--against", "original.onnx"], "other.onnx: its inputs are 'z'", "same network"),
        (["original.onnx", "--against", "original.onnx", "--shape", "x=1by4"], "NAME=1x3x320x320", ""),
        (["original.onnx", "--against", "original.onnx", "--shape", "x=1x5"], "does not fit", ""),
        (["original.onnx", "--against", "original.onnx", "--shape", "q=1x4"], "no input 'q'", "the inputs are x"),
        (["original.onnx", "--against", "original.onnx", "--percentiles", "50,x"], "not a list of percentiles", ""),
        (["original.onnx", "--against", "original.onnx", "--percentiles", "100"], "between 0 and 100", ""),
        (["original.onnx", "--against", "original.onnx", "--labels", "l.npy"], "without data", "--data"),
        (["original.onnx", "--against", "original.onnx", "--data", "none.npy"], "none.npy does not exist", "folder"),
        (["original.onnx", "--against", "original.onnx", "--data", "wide.npy"], "wide.npy", ""),
        (["original.onnx", "--against", "original.onnx", "--data", "nan.npy"], "NaN", ""),
        (["original.onnx", "--against", "original.onnx", "--json", "no/folder.json"], "no/folder.json", "mkdir"),
    ],
)
def test_mistakes_end_with_code_2_and_what_to_do(
    model: Path, arguments: list[str], told: str, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    Path("text.onnx").write_text("this is no network")
    Path("plan.engine").write_bytes(b"ptrt")
    onnx.save(onnx.parser.parse_model(MODEL.replace("BODY", "Relu(z)").replace("] x)", "] z)")), "other.onnx")
    np.save("wide.npy", np.ones((2, 5), np.float32))
    np.save("nan.npy", np.full((2, 4), np.nan, np.float32))
    before = sorted(Path().iterdir())
    result = run(*arguments, "--seconds", "1e6")  # a mistake found only after measuring would never come back
    assert result.exit_code == 2, result.output
    assert told in result.output
    assert fix in result.output
    assert "Traceback" not in result.output
    assert sorted(Path().iterdir()) == before


def workers_of(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(model: Path, sent: signal.Signals) -> None:
    # A process started in the background by a shell ignores SIGINT, and so would what is started here.
    interruptible = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{interruptible}; from relu_deploy.cli import main; main()"
    arguments = ["bench", str(model), "--against", str(model), "--seconds", "1e6"]
    command = [sys.executable, "-c", code, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        until = time.monotonic() + 60
        while len(workers_of(process.pid)) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        workers = workers_of(process.pid)
        assert len(workers) == 2
        time.sleep(0.5)  # somewhere inside opening or the warm-up
        process.send_signal(sent)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert "Traceback" not in output
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    until = time.monotonic() + 30
    while not all(map(gone, workers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(map(gone, workers))


def test_help_shows_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "relu-deploy bench student-int8.onnx original-int8.onnx --against original.onnx" in result.output
