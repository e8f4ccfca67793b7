"""``relu-deploy rewrite --fold-dynamic`` as a user runs it."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from relu_deploy.cli import main
from relu_deploy.graph import count_ops, load_model

UNIT = """<ir_version: 8, opset_import: ["": 17]> g (float[N,2,5] x) => (float[N,2,5] y)
<float[2,8] w = {0.001,0,0,0.001,0,0,0,0, 0,0.001,0,0,0,0,0.001,0}, float[8] b = {1,1,0,0,0,0,0,0},
 int64[3] shape = {-1,2,1}, int64[4] sizes = {2,2,2,2}>
{ pooled = ReduceMean<axes = [2], keepdims = 0>(x) t = Gemm(pooled, w, b) a1, b1, a2, b2 = Split<axis = 1>(t, sizes)
  A1 = Reshape(a1, shape) B1 = Reshape(b1, shape) A2 = Reshape(a2, shape) B2 = Reshape(b2, shape)
  p = Mul(A1, x) q = Add(p, B1) r = Mul(x, A2) s = Add(r, B2) [unit] y = Max(q, s) }"""


@pytest.fixture
def files(tmp_path):
    onnx.save(onnx.parser.parse_model(UNIT), tmp_path / "in.onnx")
    np.save(tmp_path / "data.npy", np.random.default_rng(0).standard_normal((12, 2, 5)).astype(np.float32))
    run("calibrate", tmp_path / "in.onnx", "--calib", tmp_path / "data.npy", "-o", tmp_path / "ranges.json")
    return tmp_path


def run(*arguments, code=0):
    result = CliRunner(env={"COLUMNS": "250"}).invoke(main, [str(part) for part in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_folds_and_says_how_far_off_it_is(files):
    text = run(
        "rewrite", files / "in.onnx", "-o", files / "out.onnx", "--fold-dynamic", 0.1, "--ranges",
        files / "ranges.json", "--data", files / "data.npy", "--json", files / "report.json",
    )  # fmt: skip
    assert "1 dynamic unit made static" in text
    assert "the largest error seen on 12 samples" in text
    assert "beyond the ranges" not in text
    assert "MatMul" not in count_ops(load_model(files / "out.onnx"))
    assert "Gemm" not in count_ops(load_model(files / "out.onnx"))
    report = json.loads((files / "report.json").read_text())["folding"]
    (unit,) = report["units"]
    assert 0 < unit["measured"] <= unit["bound"] <= 0.1
    assert report["samples"] == 12


def test_random_inputs_without_data(files):
    text = run(
        "rewrite", files / "in.onnx", "-o", files / "out.onnx", "--fold-dynamic", 0.1, "--ranges", files / "ranges.json"
    )
    assert "random inputs is" in text
    assert "beyond the ranges that were measured" in text


def test_a_unit_that_moves_more_stays_with_its_figures(files):
    text = run(
        "rewrite", files / "in.onnx", "-o", files / "out.onnx", "--fold-dynamic", 1e-6, "--ranges",
        files / "ranges.json",
    )  # fmt: skip
    assert "DY-ReLU-B stays: its coefficients were seen up to" in text
    assert "allowed is 1e-06" in text
    assert "Max" in count_ops(load_model(files / "out.onnx"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--fold-dynamic", "0.1"], "--fold-dynamic needs --ranges"),
        (["--fold-dynamic", "-1", "--ranges", "ranges.json"], "--fold-dynamic takes"),
        (["--fold-dynamic", "nan", "--ranges", "ranges.json"], "--fold-dynamic takes"),
        (["--ranges", "ranges.json"], "--ranges needs"),
        (["--fold-dynamic", "0.1", "--ranges", "other.json"], "another network"),
        (["--fold-dynamic", "0.1", "--ranges", "ranges.json", "--data", "none.npy"], "does not exist"),
    ],
    ids=["no ranges", "negative", "nan", "ranges alone", "stale", "no data"],
)
def test_mistakes_end_with_code_2_and_no_file(files, options, words, monkeypatch):
    monkeypatch.chdir(files)
    text = (files / "ranges.json").read_text()
    model = json.loads(text)["model"]
    (files / "other.json").write_text(text.replace(model, "0" * 64))
    assert words in run("rewrite", "in.onnx", "-o", "out.onnx", *options, code=2)
    assert not (files / "out.onnx").exists()
