"""Cells of the table: quantise a task's network with a tool, evaluate the file. Finished ones are kept on disk.

Each half of a cell runs in a process of its own, with a limit of time and memory, and leaves a JSON file named by a
hash of all that decides its outcome: the task's network and samples, the tool's version and settings, and the scripts'
text. A failure is kept too, as a line that says why.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.peers.tools import ENVIRONMENTS, HERE, Tool, python_of
from benchmarks.accuracy.task import Task
from benchmarks.accuracy.tasks import TASKS
from calib.files import make_folder, read_json, write_json

ROOT = Path(__file__).parents[2]
MINE = ROOT / "benchmarks" / "accuracy"
SECONDS, BYTES = 900, 16 << 30
MISSING = "not run"


def cell(task: Task, tool: Tool, work: Path, *, kept: bool = False) -> dict[str, Any]:
    """The cell's result, made now where it is not there yet; with ``kept`` the ``error`` then says that it was not run.

    Returns:
        ``error``: None, or a line that says why there is no result; else what
        :func:`benchmarks.accuracy.evaluate.evaluate` found.
    """
    made, key = _quantised(task, tool, work, kept=kept)
    if made["error"] is not None:
        return made
    sources = [MINE / name for name in ("evaluate.py", "layers.py", "scores.py", "task.py")]
    sources.append(MINE / "tasks" / f"{TASKS[task.name]}.py")
    how = [] if tool.integer_kernels else ["--float-arithmetic"]
    result = work / "results" / f"{task.name}-{_digest(key, how, texts(sources))}.json"
    if kept and not result.is_file():
        return {"error": MISSING}
    if not result.is_file():
        command = [sys.executable, "-m", "benchmarks.accuracy.evaluate", task.name, str(work), made["file"]]
        error = limited([*command, str(result), *how], result.with_suffix(".log"))
        if error is not None:
            write_json(result, {"error": f"does not run: {error}"})
    return {"error": None, **read_json(result)}


def _quantised(task: Task, tool: Tool, work: Path, *, kept: bool) -> tuple[dict[str, Any], str]:
    """The quantised file, and the key of what made it."""
    sources = [HERE / "samples.py", HERE / f"quantize_{tool.environment}.py"]
    if tool.environment == "ours":
        sources += [file for package in ("calib", "relu_deploy") for file in (ROOT / package).rglob("*.py")]
    key = _digest(task.fingerprint, ENVIRONMENTS.get(tool.environment), dict(tool.settings), texts(sources))
    folder = work / "cells" / f"{task.name}-{tool.environment}-{key}"
    make_folder(folder)
    result, output = folder / "result.json", folder / "int8.onnx"
    if kept and not result.is_file():
        return {"error": MISSING}, key
    if not result.is_file():
        python = python_of(tool.environment, work / "venvs")
        script = HERE / f"quantize_{tool.environment}.py"
        request = [str(task.model), str(task.calibration), str(output), json.dumps(dict(tool.settings))]
        error = limited([str(python), str(script), *request], folder / "log.txt")
        if error is None and not output.is_file():
            error = "wrote no file and did not say why"
        write_json(result, {"error": error, "file": str(output)})
    found: dict[str, Any] = read_json(result)
    return found, key


def limited(command: Sequence[str], log: Path) -> str | None:
    """Run a process with the limits of a cell; what it says goes to a file.

    Returns:
        None, or one line that says why it failed.
    """
    make_folder(log.parent)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2", "NO_COLOR": "1"}
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        resource.prlimit(process.pid, resource.RLIMIT_AS, (BYTES, BYTES))
        try:
            code = process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            return f"took longer than {SECONDS} s"
        finally:
            process.kill()
            process.wait()
    return None if code == 0 else last_words(log.read_text(errors="replace"), code)


def last_words(text: str, code: int) -> str:
    """The line that says why a process failed: an exception's, or else the last.

    >>> last_words("Traceback\\n  File x\\nValueError: no axis\\n\\nbye", 1)
    'ValueError: no axis'
    >>> last_words("", -9)
    'ended with -9'
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    kinds = ("Error", "Exception", "Fail", "InvalidGraph")
    # A command that another one called has said before why it failed.
    raised = [x for x in lines if x.split(":")[0].endswith(kinds) and "CalledProcessError" not in x]
    return " ".join((raised or lines or [f"ended with {code}"])[-1].split())[:200]


def texts(files: Iterable[Path]) -> str:
    """A hash of what is in some files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:12]
