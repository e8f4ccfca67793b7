"""``relu-deploy rewrite`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
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


SAT = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 4] y)
<float g = {0.01}, float r1 = {0.99}, float[4, 4] m = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{ c = MatMul(x, m) s = Sigmoid(c) a = Mul(c, s) p = Mul(a, g) r = Relu(c) q = Mul(r, r1) y = Add(p, q) }"""


@pytest.fixture
def blend(tmp_path):
    path = tmp_path / "sat.onnx"
    onnx.save(onnx.parser.parse_model(SAT), path)
    return path


def rewrite(*args):
    return CliRunner(env={"COLUMNS": "250"}).invoke(main, ["rewrite", *map(str, args)])


@pytest.mark.parametrize(("options", "words"), [
    (["--collapse-tolerance", "0.003"], "within 0.00279 of ReLU for every finite float32, plus 9.32e-09 relu(x)"),
    (["--collapse-tolerance", "0.003", "--range", "-8,8"], "within 0.00279 of ReLU for -8 <= x <= 8 (given)"),
])  # fmt: skip
def test_a_blend_collapses_within_a_tolerance_and_says_how_far_off_it_is(blend, tmp_path, options, words):
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    result = rewrite(blend, "-o", out, *options, "--json", report)
    assert result.exit_code == 0, result.output
    assert count_ops(load_model(out)) == {"MatMul": 1, "Relu": 1}
    assert words in result.output
    assert "1 region collapsed to a tolerance of 0.003, the largest bound is 0.00279" in result.output
    row = json.loads(report.read_text())["approximation"]["collapses"][0]
    assert row["measured"] <= row["eps"] < 0.003
    assert ("outside its range" in result.output) == ("--range" in options)


def test_a_tolerance_that_is_too_small_leaves_it_with_the_bound(blend, tmp_path):
    result = rewrite(blend, "-o", tmp_path / "out.onnx", "--collapse-tolerance", "0.002")
    assert result.exit_code == 0
    assert "within 0.00279 of ReLU for every finite float32, which is more than the tolerance 0.002" in result.output
    assert "nothing to change" in result.output


def test_the_domain_may_come_from_calibration(blend, tmp_path):
    data, ranges, out = tmp_path / "data.npz", tmp_path / "ranges.json", tmp_path / "out.onnx"
    np.savez(data, x=np.random.default_rng(0).uniform(3, 5, (16, 4)).astype(np.float32))
    done = CliRunner().invoke(main, ["calibrate", str(blend), "--calib", str(data), "-o", str(ranges)])
    assert done.exit_code == 0, done.output
    result = rewrite(blend, "-o", out, "--collapse-tolerance", "0.002", "--ranges", ranges)
    assert result.exit_code == 0, result.output
    assert count_ops(load_model(out)) == {"MatMul": 1, "Relu": 1}
    assert "(calibrated)" in result.output
    again = rewrite(out, "-o", tmp_path / "again.onnx", "--collapse-tolerance", "0.002", "--ranges", ranges)
    assert again.exit_code == 2
    assert "another network" in again.output


@pytest.mark.parametrize(("options", "words"), [
    (["--range", "-8,8"], "needs --collapse-tolerance"), (["--ranges", "r.json"], "needs --collapse-tolerance"),
    (["--collapse-tolerance", "-1"], "from 0 on"), (["--collapse-tolerance", "nan"], "from 0 on"),
    (["--collapse-tolerance", "x"], "not a valid float"),
    (["--collapse-tolerance", "1", "--range", "3"], "two numbers"),
    (["--collapse-tolerance", "1", "--range", "3,-3"], "the smaller one first"),
    (["--collapse-tolerance", "1", "--range", "0,inf"], "two finite numbers"),
    (["--collapse-tolerance", "1", "--range", "0,1", "--ranges", "r.json"], "give one of them"),
    (["--collapse-tolerance", "1", "--ranges", "r.json"], "does not exist"),
])  # fmt: skip
def test_senseless_tolerances_and_ranges_end_with_code_2(blend, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    result = rewrite(blend, "-o", "out.onnx", *options)
    assert result.exit_code == 2
    assert words in result.output
    assert not (tmp_path / "out.onnx").exists()
