"""What the tests of faults share: good files to damage, and how a command that refuses is looked at."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from relu_deploy.cli import main


@pytest.fixture(scope="session")
def good_files(tmp_path_factory, residual_model) -> Path:
    """``m.onnx``, ``ext.onnx`` with ``weights.bin``, ``x.npy``, ``r.json``, ``int8.onnx``, ``e.onnx`` (an engine)."""
    folder: Path = tmp_path_factory.mktemp("good")
    model = residual_model(batch="N")
    onnx.save(model, folder / "m.onnx")
    onnx.save(model, folder / "ext.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.save(folder / "x.npy", np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32))
    files = {name: str(folder / name) for name in ("m.onnx", "x.npy", "r.json", "int8.onnx", "e.onnx")}
    for call in (
        ["calibrate", files["m.onnx"], "--calib", files["x.npy"], "-o", files["r.json"]],
        ["quantize", files["m.onnx"], "--ranges", files["r.json"], "-o", files["int8.onnx"]],
        ["build-engine", files["m.onnx"], "-o", files["e.onnx"]],
    ):
        result = CliRunner().invoke(main, call)
        assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def box(good_files, tmp_path, monkeypatch) -> Path:
    """The good files in a folder of their own, which is the current one; ``old.out`` is an output of an earlier run."""
    folder = tmp_path / "box"
    shutil.copytree(good_files, folder)
    (folder / "old.out").write_bytes(b"older good file")
    monkeypatch.chdir(folder)
    return folder


Refused = Callable[..., Result]


@pytest.fixture
def refused(box) -> Refused:
    """Run a command that has to refuse, and see that the folder is as it was, byte for byte."""

    def run(command: str, *, code: int = 2, says: str) -> Result:
        before = snapshot(box)
        result = CliRunner().invoke(main, command.split())
        assert isinstance(result.exception, SystemExit), result.exc_info
        assert result.exit_code == code, result.output
        told = " ".join(result.stderr.split())
        assert says in told, told
        assert "Traceback" not in result.output
        assert snapshot(box) == before
        return result

    return run


@pytest.fixture
def done(box) -> Callable[[str], str]:
    """Run a command that has to succeed; what it prints on standard output."""

    def run(command: str) -> str:
        result = CliRunner().invoke(main, command.split())
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file of a folder with its content; None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
