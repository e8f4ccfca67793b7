from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from relu_deploy.cli import main
from relu_deploy.engines.base import BuildConfig, get_backend

MODEL = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4, 8, 8] x) => (float[1, 4, 8, 8] y) {
  [a_q] q = QuantizeLinear(x, s, z)
  [a_dq] d = DequantizeLinear(q, s, z)
  [w_dq] v = DequantizeLinear(w, s, z)
  [conv] c = Conv(d, v)
  [gate] g0 = Sigmoid(c)
  [act] y = Mul(c, g0)
}"""


@pytest.fixture
def model() -> onnx.ModelProto:
    parsed = onnx.parser.parse_model(MODEL)
    values = {"s": np.float32(0.1), "z": np.int8(0), "w": np.full((4, 4, 1, 1), 3, np.int8)}
    parsed.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), name) for name, v in values.items())
    return parsed


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.stdout, result.stderr


def test_an_ort_engine(model: onnx.ModelProto, tmp_path: Path) -> None:
    get_backend("ort").build(model, tmp_path / "e.onnx", BuildConfig())
    code, out, _ = run(tmp_path / "e.onnx", "--layers")
    assert code == 0
    assert "0 of 1 linear layers" in out
    assert "silu" in out
    assert "not as the network promised (1)" in out
    code, out, _ = run(tmp_path / "e.onnx", "--json", "-")
    report = json.loads(out)
    assert code == 0
    assert report["target"] == "ort"
    assert [layer["name"] for layer in report["audit"]["linear"]] == ["conv"]
    assert run(tmp_path / "e.onnx", "--json", tmp_path / "r.json")[0] == 0
    assert json.loads((tmp_path / "r.json").read_text()) == report


@pytest.mark.engine
def test_a_plan_with_and_without_its_manifest(model: onnx.ModelProto, tmp_path: Path) -> None:
    get_backend("tensorrt-rtx").build(model, tmp_path / "e.plan", BuildConfig(target="tensorrt-rtx"))
    code, out, _ = run(tmp_path / "e.plan", "--layers")
    assert code == 0
    assert "1 of 1 linear layers" in out
    assert "tensorrt-rtx, SM 89" in out
    assert "silu: gate" in out
    shutil.copy(tmp_path / "e.plan", tmp_path / "bare.plan")
    code, out, _ = run(tmp_path / "bare.plan")
    assert code == 0
    assert "1 of 1 linear layers" in out
    assert "bare.plan.json is not there" in out
    full, bare = (json.loads(run(tmp_path / name, "--json", "-")[1])["audit"] for name in ("e.plan", "bare.plan"))
    assert (full["kernels"], full["bytes_moved"]) == (bare["kernels"], bare["bytes_moved"])
    assert full["bytes_moved"] > 0


def test_a_plain_onnx_file(model: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(model, tmp_path / "m.onnx")
    code, out, _ = run(tmp_path / "m.onnx")
    assert code == 0
    assert "a plain ONNX file without a manifest" in out


def test_what_is_no_engine(model: onnx.ModelProto, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    for name, said in (("text", "is not an engine"), ("empty", "is not an engine"), ("none", "does not exist")):
        code, _, err = run(tmp_path / name)
        assert code == 2
        assert said in err
    get_backend("ort").build(model, tmp_path / "e.onnx", BuildConfig())
    (tmp_path / "e.onnx").write_bytes((tmp_path / "e.onnx").read_bytes()[:-3])
    code, _, err = run(tmp_path / "e.onnx")
    assert code == 2
    assert "damaged, cut short or stale" in err
