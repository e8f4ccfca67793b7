"""Outputs that cannot be written, and commands that are stopped: nothing is left, nothing that was good is damaged."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

from relu_deploy.cli import main  # noqa: F401 - imported once here, not in the first test that is timed

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="needs the extra: pip install 'relu-deploy[torch]'"
)
# Every command that writes; OUT is replaced by where it shall write.
WRITERS = {
    "rewrite": "rewrite m.onnx -o OUT",
    "calibrate": "calibrate m.onnx --calib x.npy -o OUT",
    "calib merge": "calib merge r.json -o OUT",
    "calib to-tensorrt": "calib to-tensorrt r.json -o OUT",
    "quantize": "quantize m.onnx --ranges r.json -o OUT",
    "table of quantize": "quantize m.onnx --ranges r.json -o out.onnx --multipliers OUT",
    "build ort": "build-engine m.onnx -o OUT",
    "build ort int8": "build-engine m.onnx --int8 --calib x.npy -o OUT",
    "json of rewrite": "rewrite m.onnx -o out.onnx --json OUT",
    "json of calibrate": "calibrate m.onnx --calib x.npy -o out.json --json OUT",
    "json of build": "build-engine m.onnx -o out.onnx --json OUT",
    "json of inspect": "inspect m.onnx --json OUT",
    "json of bench": "bench m.onnx --against m.onnx --seconds 0.1 --rounds 2 --json OUT",
    "log of build": "build-engine m.onnx --target tensorrt-rtx -o out.plan --log OUT",
}
EXPORT = "export relu_deploy.demo.network:build_relu_network --input image=1x1x32x32 -o OUT"
writers = pytest.mark.parametrize(
    "command",
    [*WRITERS.values(), pytest.param(EXPORT, marks=[needs_torch, pytest.mark.torch])],
    ids=[*WRITERS, "export"],
)


@writers
@pytest.mark.parametrize(
    ("out", "says"), [("none/o.onnx", "none is not a folder"), (".", "it is a folder"), ("m.onnx/o", "not a folder")]
)
def test_where_nothing_can_be_written_is_told_before_any_work(refused, command, out, says):
    result = refused(command.replace("OUT", out), says=says)
    assert "cannot write" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs a device that is always full")
@pytest.mark.parametrize("more", ["", " --json -", " --json o.json"])
def test_a_report_that_cannot_be_printed_is_an_error_and_no_traceback(box, more):
    command = [sys.executable, "-m", "relu_deploy", *f"quantize m.onnx --ranges r.json -o o.onnx{more}".split()]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, cwd=box, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 2
    assert "the report cannot be written to standard output: No space left on device" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Exception ignored" not in result.stderr
    assert (box / "o.onnx").is_file()


SAME = {
    "rewrite in place": "rewrite m.onnx -o m.onnx",
    "by another spelling": "rewrite m.onnx -o ./m.onnx",
    "by a link": "rewrite m.onnx -o link.onnx",
    "ranges over the model": "calibrate m.onnx --calib x.npy -o m.onnx",
    "ranges over the data": "calibrate m.onnx --calib x.npy -o x.npy",
    "model over its ranges": "quantize m.onnx --ranges r.json -o r.json",
    "report over the model": "quantize m.onnx --ranges r.json -o o.onnx --json m.onnx",
    "engine over the model": "build-engine m.onnx -o m.onnx",
    "bench report over an engine": "bench e.onnx --against m.onnx --json e.onnx",
    "inspect report over the engine": "inspect e.onnx --json e.onnx",
}


@pytest.mark.parametrize("command", SAME.values(), ids=SAME)
def test_an_output_never_replaces_an_input(box, refused, command):
    (box / "link.onnx").symlink_to("m.onnx")
    refused(command, says="is also an input that it would replace")


def test_two_outputs_of_one_name(refused):
    refused("rewrite m.onnx -o o.onnx --json o.onnx", says="is another output too")


BESIDE = {
    "manifest over the ranges": "build-engine m.onnx --int8 --ranges r.json -o r",
    "manifest over the report": "build-engine m.onnx -o o --json o.json",
    "kept files over the model": "build-engine rewritten.onnx -o o --keep .",
}


@pytest.mark.parametrize("command", BESIDE.values(), ids=BESIDE)
def test_files_that_are_written_beside_the_output_replace_no_input_either(box, refused, command):
    shutil.copy(box / "m.onnx", box / "rewritten.onnx")
    refused(command, says="would replace")


# A process started in the background by a shell ignores SIGINT, and so would what is started here.
INTERRUPTIBLE = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"


@contextlib.contextmanager
def start(command: str, folder: Path, *, before: str = "", **options: object) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own, after some lines of Python; gone at the end, whatever happened."""
    code = f"import sys; {INTERRUPTIBLE}\n{before}\nfrom relu_deploy.cli import main\nmain()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *command.split()], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            process.kill()


def files(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


# No file may grow past this: every good file here is larger, and so is the model; a report of JSON too.
FULL = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"


@pytest.mark.parametrize(
    "command",
    [
        WRITERS["rewrite"],
        WRITERS["calibrate"],
        WRITERS["build ort"],
        WRITERS["json of inspect"],
        pytest.param(
            "build-engine m.onnx --target tensorrt-rtx --shape x=1x3x16x16 -o OUT",
            marks=pytest.mark.engine,
        ),
    ],
)
def test_a_full_disk(box, command):
    before = files(box)
    with start(command.replace("OUT", "old.out"), box, before=FULL) as process:
        _, told = process.communicate(timeout=120)
    assert process.returncode == 2, told
    assert "cannot write" in told
    assert "Traceback" not in told
    assert files(box) == before


# The engine fits on the disk, its manifest does not.
NO_SPACE_FOR_TEXT = """
import errno, pathlib
def write_text(self, *a, **k):
    raise OSError(errno.ENOSPC, "No space left on device")
pathlib.Path.write_text = write_text
"""


def test_a_manifest_that_finds_the_disk_full_leaves_the_older_engine(box):
    before = files(box)
    with start("build-engine m.onnx -o e.onnx", box, before=NO_SPACE_FOR_TEXT) as process:
        _, told = process.communicate(timeout=60)
    assert (process.returncode, "No space left" in told) == (2, True), told
    assert files(box) == before


# Imports first, click's own late one among them: nobody may be unable to read the packages.
NOBODY = """
import difflib, os
import relu_deploy.engines.base
from relu_deploy.cli import COMMANDS, main
for name in COMMANDS: main.get_command(None, name)
os.setuid(65534)
"""


@writers
def test_no_permission(box, refused, command):
    if os.geteuid() != 0:
        (box / "closed").mkdir(mode=0o555)
        refused(command.replace("OUT", "closed/out"), says="no permission to write")
        return
    # Root may write everywhere, so another user has to try.
    closed = [folder for folder in Path(sys.prefix).parents if not folder.stat().st_mode & 0o001]
    if closed:
        pytest.skip(f"another user cannot read this environment: {closed[0]} is closed to it")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shared"
        shutil.copytree(box, folder)
        for path in (Path(name), folder):
            path.chmod(0o755)
        before = files(folder)
        with start(command.replace("OUT", "old.out"), folder, before=NOBODY) as process:
            _, told = process.communicate(timeout=60)
        assert process.returncode == 2, told
        assert "no permission to write" in told
        assert files(folder) == before


# Slow enough that a signal meets it at work: data comes one sample a fiftieth of a second.
SLOW = """
import numpy as np, time
def rows():
    while True:
        time.sleep(0.02)
        open("going", "w").close()
        yield np.ones((1, 3, 16, 16), "f4")
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize(
    "command",
    ["calibrate m.onnx --calib slow:rows -o r.json", "build-engine m.onnx --int8 --calib slow:rows -o e.onnx"],
)
def test_a_signal_while_data_is_read(box, command, sent, code):
    (box / "slow.py").write_text(SLOW)
    before = {**files(box), "going": b""}
    with start(command, box, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}) as process:
        stop_when(process, box / "going", sent)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    assert "Traceback" not in told
    assert files(box) == before


# The last moment: everything is computed, and the temporary file is half written.
HALF = """
import calib.files, time, pathlib, contextlib
real = pathlib.Path.write_bytes
def write_bytes(self, data):
    real(self, data[: len(data) // 2]); open('going', 'w').close(); time.sleep(60)
pathlib.Path.write_bytes = write_bytes
text = pathlib.Path.write_text
pathlib.Path.write_text = lambda self, data, **k: write_bytes(self, data.encode())
"""


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
@pytest.mark.parametrize("command", ["rewrite m.onnx -o old.out", "build-engine m.onnx -o e.onnx"])
def test_a_signal_while_the_output_is_half_written(box, command, sent, code):
    before = {**files(box), "going": b""}
    with start(command, box, before=HALF) as process:
        stop_when(process, box / "going", sent)
        _, told = process.communicate(timeout=60)
    assert process.returncode == code, told
    after = files(box)
    assert {name: after[name] for name in before} == before
    # Nobody can tidy up after a SIGKILL; what it leaves is hidden and carries the name of its output.
    litter = sorted(set(after) - set(before))
    assert all(name.startswith(f".{command.split()[-1]}.") for name in litter)
    assert bool(litter) == (sent == signal.SIGKILL)


def stop_when(process: subprocess.Popen[str], mark: Path, sent: signal.Signals) -> None:
    """Send a signal as soon as the process has set its mark."""
    until = time.monotonic() + 60
    while not mark.exists() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    assert mark.exists(), process.communicate()[1]
    time.sleep(0.05)  # an interrupt that is raised while a file is being closed is lost in the closing
    process.send_signal(sent)


def test_external_data_beside_the_output_is_not_touched(box, done):
    """The file of another model's weights has a name that a large model's weights would get."""
    model = onnx.load(box / "m.onnx")
    onnx.save(model, box / "big.onnx", save_as_external_data=True, location="big.onnx.data", size_threshold=0)
    before = (box / "big.onnx.data").read_bytes()
    done("rewrite big.onnx -o small.onnx")
    assert (box / "big.onnx.data").read_bytes() == before
    assert not np.any([tensor.external_data for tensor in onnx.load(box / "small.onnx").graph.initializer])
