"""``build-engine`` on files, as a user calls it; the flow's parts have tests of their own."""

import json

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from relu_deploy.cli import main
from relu_deploy.engines.base import get_backend


@pytest.fixture
def folder(tmp_path, residual_model):
    onnx.save(residual_model(batch="N"), tmp_path / "model.onnx")
    data = np.random.default_rng(3).normal(size=(6, 3, 16, 16)).astype(np.float32)
    np.save(tmp_path / "data.npy", data)
    np.save(tmp_path / "constant.npy", np.full_like(data, 1e-4))
    return tmp_path


def invoke(*words):
    return CliRunner().invoke(main, ["build-engine", *map(str, words)])


def test_int8_for_ort_keeps_what_lies_between_and_reports_every_step(folder):
    result = invoke(
        folder / "model.onnx", "--int8", "--calib", folder / "data.npy", "--weight-bits", "7",
        "--keep", folder / "kept", "-o", folder / "engine.onnx", "--json", folder / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "6 of 6 linear layers int8" in result.output
    assert "SQNR" in result.output
    report = json.loads((folder / "report.json").read_text())
    assert report["calibration"]["samples"] == 6
    assert report["drift"][0]["sqnr_db"] > 25  # measured 38 dB
    assert report["engine"]["disagreements"] == []
    kept = sorted(path.name for path in (folder / "kept").iterdir())
    assert kept == ["int8.onnx", "ranges.json", "rewritten.onnx", "steps.json"]
    with get_backend("ort").open(folder / "engine.onnx") as engine:
        assert engine.run({"x": np.zeros((2, 3, 16, 16), np.float32)})["y"].shape == (2, 10)


def test_the_method_of_calibration_decides_the_scales(folder):
    scales = {}
    for method, more in (("max", ()), ("entropy", ()), ("percentile", ("--calib-percentile", 90))):
        result = invoke(
            folder / "model.onnx", "--int8", "--calib", folder / "data.npy", "--calib-method", method, *more,
            "-o", folder / "engine.onnx", "--json", folder / "report.json",
            "--allow-collapse",  # a tenth of all values cut off is more than this network bears
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        report = json.loads((folder / "report.json").read_text())
        assert report["calibration"]["method"] == method
        scales[method] = report["quantize"]["activations"]["x"]["scale"]
    assert scales["percentile"] < 0.7 * scales["max"]
    assert scales["percentile"] < scales["entropy"] <= scales["max"]


def test_ranges_of_the_model_as_given_and_as_rewritten_both_serve(folder, residual_model):
    silu_then_collapsed = residual_model(activation="Silu", batch="N")
    onnx.save(silu_then_collapsed, folder / "silu.onnx")
    run = CliRunner().invoke
    for name in ("model", "silu"):
        source = folder / f"{name}.onnx"
        assert run(main, ["rewrite", str(source), "-o", str(folder / "r.onnx")]).exit_code == 0
        for measured in (source, folder / "r.onnx"):
            words = ["calibrate", str(measured), "--calib", str(folder / "data.npy"), "-o", str(folder / "ranges.json")]
            assert run(main, words).exit_code == 0
            result = invoke(source, "--int8", "--ranges", folder / "ranges.json", "-o", folder / "engine.onnx")
            assert result.exit_code == 0, result.output
            assert "SQNR" not in result.output, "there is no data to compare on"


def test_float_build(folder):
    result = invoke(folder / "model.onnx", "-o", folder / "float.onnx")
    assert result.exit_code == 0, result.output
    assert (folder / "float.onnx.json").is_file()
    assert "calibration" not in result.output


def test_collapse_is_said_loudly(folder):
    result = invoke(
        folder / "model.onnx", "--int8", "--calib", folder / "constant.npy", "--keep", folder / "kept", "-o",
        folder / "a.onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "COLLAPSED" not in result.output
    # Ranges of tiny inputs, used for inputs a thousand times larger: every activation is clipped.
    words = [
        "--int8",
        "--ranges",
        folder / "kept" / "ranges.json",
        "-o",
        folder / "b.onnx",
        "--keep",
        folder / "clipped",
    ]
    assert invoke(folder / "model.onnx", *words).exit_code == 0
    bench = CliRunner().invoke(
        main,
        ["bench", str(folder / "b.onnx"), "--against", str(folder / "model.onnx"), "--data", str(folder / "data.npy"),
         "--seconds", "0.2", "--rounds", "2", "--warmup", "0", "--json", str(folder / "bench.json")],
    )  # fmt: skip
    assert bench.exit_code == 0, bench.output
    found = json.loads((folder / "bench.json").read_text())["engines"][0]["accuracy"]
    assert found["sqnr_db"] < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--int8"], "needs calibration data or a ranges file"),
        (["--int8", "--calib", "data.npy", "--ranges", "r.json"], "only one of them can decide"),
        (["--calib", "data.npy"], "add --int8"),
        (["--int8", "--ranges", "r.json", "--calib-method", "mse"], "a ranges file has its own method"),
        (["--int8", "--calib", "data.npy", "--calib-percentile", "9"], "is for --calib-method percentile"),
        (["--int8", "--calib", "data.npy", "--keep-float", "nothing"], "no linear layer named 'nothing'"),
        (["--int8", "--calib", "data.npy", "--shape", "x=1x3"], "does not fit"),
        (["--shape", "x"], "is not of the form"),
        (["--target", "openvino"], "openvino"),
        (["--sm", "banana"], "not a list of compute capabilities"),
    ],
)
def test_mistakes_in_the_call(folder, monkeypatch, words, message):
    monkeypatch.chdir(folder)
    target = ["--target", "tensorrt-rtx"] if "--shape" in words and "--int8" in words else []
    if target:
        pytest.importorskip(
            "tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'relu-deploy[tensorrt-rtx]'"
        )
    result = invoke("model.onnx", *words, *target, "-o", "engine.onnx")
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["constant.npy", "data.npy", "model.onnx"]


def test_a_layer_kept_in_float_on_request_is_no_broken_promise(folder):
    result = invoke(
        folder / "model.onnx", "--int8", "--calib", folder / "data.npy", "--require-int8", "--keep-float", "fuse", "-o",
        folder / "engine.onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "kept in float on request" in result.output
