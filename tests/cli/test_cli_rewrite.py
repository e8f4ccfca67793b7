"""``relu-deploy rewrite`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import onnx
import pytest
from click.testing import CliRunner

from relu_deploy.cli import main
from relu_deploy.graph import count_ops, load_model

BLEND = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y, float[N, 4] w) <float z = {0}>
{ s = Sigmoid(x) a = Mul(x, s) p = Mul(a, z) r = Relu(x) y = Add(p, r) w = Tanh(y) }"""


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "in.onnx"
    onnx.save(onnx.parser.parse_model(BLEND), path)
    return path


def test_writes_the_network_and_says_what_it_did(model, tmp_path):
    out = tmp_path / "out.onnx"
    result = CliRunner(env={"COLUMNS": "250"}).invoke(main, ["rewrite", str(model), "-o", str(out)])
    assert result.exit_code == 0, result.output
    assert count_ops(load_model(out)) == {"Relu": 1, "Tanh": 1}
    for words in ("equals ReLU for every finite float32", "Tanh", "6 nodes -> 2", "equal bit for bit"):
        assert words in result.output


def test_json_on_standard_output_is_nothing_but_json(model, tmp_path):
    out = tmp_path / "out.onnx"
    code = "import sys; from relu_deploy.cli import main; main()"
    command = [sys.executable, "-c", code, "rewrite", str(model), "-o", str(out), "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    changed = {entry["name"]: entry["changed"] for entry in report["passes"]}
    assert changed["collapse_relu"] == ["Add_4"]
    assert report["verification"]["samples"] == 3


def test_a_second_run_changes_nothing(model, tmp_path):
    first, second = tmp_path / "1.onnx", tmp_path / "2.onnx"
    CliRunner().invoke(main, ["rewrite", str(model), "-o", str(first)])
    result = CliRunner().invoke(main, ["rewrite", str(first), "-o", str(second)])
    assert "nothing to change" in result.output
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut", "text"])
def test_bad_files_end_with_code_2_and_no_output(model, tmp_path, damage):
    bad, out = tmp_path / "bad.onnx", tmp_path / "out.onnx"
    out.write_text("older good file")
    if damage != "missing":
        bad.write_bytes(model.read_bytes()[:40] if damage == "cut" else b"hello, world")
    result = CliRunner().invoke(main, ["rewrite", str(bad), "-o", str(out)])
    assert result.exit_code == 2
    assert "Error:" in result.output
    assert out.read_text() == "older good file"


def test_no_verify_is_said(model, tmp_path):
    result = CliRunner().invoke(main, ["rewrite", str(model), "-o", str(tmp_path / "o.onnx"), "--no-verify"])
    assert "not compared" in result.output
