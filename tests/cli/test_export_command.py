"""``relu-deploy export`` as a user calls it: messages, exit codes, and no file where there should be none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from relu_deploy.cli import main

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
safetensors_torch = pytest.importorskip(
    "safetensors.torch", reason="safetensors is not installed: pip install 'relu-deploy[torch]'"
)

pytestmark = pytest.mark.torch

NET = """
from torch import nn
def net(): return nn.Sequential(nn.Linear(4, 4), nn.SiLU())
class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, ["export", *map(str, arguments)])


def test_exports_with_weights_and_tells_as_json(folder):
    namespace: dict[str, object] = {}
    exec(NET, namespace)  # noqa: S102  # the text above
    safetensors_torch.save_file(namespace["net"]().state_dict(), folder / "w.safetensors")
    out = folder / "m.onnx"
    result = call(
        f"{folder}/net.py:net", "--weights", folder / "w.safetensors", "--input", "x=1x4", "--dynamic", "x:0=1..8",
        "--exporter", "torchscript", "-o", out, "--json", folder / "r.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "compared with ONNX Runtime on 5 sets of inputs" in result.output
    report = json.loads((folder / "r.json").read_text())
    assert report["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}]
    assert report["outputs"][0]["worst"] <= report["outputs"][0]["limit"]
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{}/net.py:net", "--input", "x=1by4"], 2, "cannot read the input 'x=1by4'"),
        (["{}/net.py:net", "--input", "x=1x4", "--dynamic", "y:0=1..8"], 2, "there is no input 'y'"),
        (["{}/net.py:net"], 2, "the model has no inputs to export with"),
        (["{}/net.py:net", "--input", "x=1x5"], 2, "the torch model itself fails at x=1x5"),
        (["{}/net.py:none", "--input", "x=1x4"], 2, "has no 'none'"),
        (["{}/net.py", "--input", "x=1x4"], 2, "cannot read the model"),
        (["{}/no.py:net", "--input", "x=1x4"], 2, "does not exist"),
        (["{}/no.pt2"], 2, "does not exist"),
        (["{}/net.py:net", "--input", "x=1x4", "--weights", "{}/net.py"], 2, "not a weights file"),
        (["{}/net.py:net", "--input", "x=1x4", "--opset", "5"], 2, "cannot write opset 5"),
        (
            ["{}/net.py:Branch", "--input", "x=2x4", "--exporter", "torchscript"],
            1,
            "output 'output' of the exported file differs",
        ),
    ],
)
def test_bad_calls_end_with_a_message_and_no_file(folder, arguments, code, message):
    before = sorted(folder.iterdir())
    result = call(*[argument.replace("{}", str(folder)) for argument in arguments], "-o", folder / "m.onnx")
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert [path for path in sorted(folder.iterdir()) if path.name != "__pycache__"] == before


def test_a_folder_that_is_not_there(folder):
    result = call(f"{folder}/net.py:net", "--input", "x=1x4", "-o", folder / "no" / "m.onnx")
    assert (result.exit_code, "is not a folder" in result.output) == (2, True)


def test_help_shows_an_example():
    result = call("--help")
    assert result.exit_code == 0
    assert "relu_deploy.demo.network:build_relu_network --weights demo-run/student.safetensors" in result.output


def test_the_example_of_the_help_in_a_process(tmp_path):
    """As pasted after the demo, with random weights in place of the trained ones; nothing but our lines is printed."""
    from relu_deploy.demo.network import build_relu_network
    from relu_deploy.demo.train import save_weights

    (tmp_path / "demo-run").mkdir()
    save_weights(build_relu_network(), tmp_path / "demo-run" / "student.safetensors")
    command = [sys.executable, "-c", "from relu_deploy.cli import main; main()", "export"]
    command += ["relu_deploy.demo.network:build_relu_network"]
    command += ["--weights", "demo-run/student.safetensors", "--input", "image=1x1x32x32", "--dynamic", "image:0=1..64"]
    done = subprocess.run([*command, "-o", "student.onnx"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert (tmp_path / "student.onnx").exists()
