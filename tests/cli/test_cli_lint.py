import json

import onnx
import pytest
from click.testing import CliRunner

from relu_deploy.cli import main


def run(*call: str):
    return CliRunner().invoke(main, ["lint", *call])


def test_a_file_of_ours_has_no_faults(done):
    text = done("lint int8.onnx")
    assert "findings: none" in text


def test_a_file_for_another_target_is_named_and_mended(box):
    """What quantize writes for ONNX Runtime has the faults of ONNX Runtime's own quantiser."""
    found = run("int8.onnx", "--target", "tensorrt-rtx", "--json", "found.json")
    assert found.exit_code == 1, found.output
    report = json.loads((box / "found.json").read_text())
    assert {f["rule"] for f in report["findings"]} >= {"int32-bias", "zero-point"}
    assert "int32-bias" in found.output
    mended = run("int8.onnx", "--target", "tensorrt-rtx", "--fix", "mended.onnx", "--json", "fixed.json")
    assert mended.exit_code == 0, mended.output
    assert "SQNR" in mended.output
    assert json.loads((box / "fixed.json").read_text())["after"]["findings"] == []
    assert run("mended.onnx", "--target", "tensorrt-rtx").exit_code == 0


@pytest.mark.parametrize("each", [(), ("--each",)])
def test_nodes_are_named(box, each):
    lines = run("int8.onnx", "--target", "tensorrt-rtx", *each).output.splitlines()
    rejected = [line for line in lines if line.split()[:2] == ["rejected", "int32-bias"]]
    assert (len(rejected) > 1) == bool(each)


def test_a_file_too_new_to_run_can_still_be_judged(box):
    model = onnx.load(box / "int8.onnx")
    model.ir_version = 99
    onnx.save(model, box / "new.onnx")
    assert run("new.onnx").exit_code == 1
    assert run("new.onnx", "--fix", "old.onnx").exit_code == 0
    assert onnx.load(box / "old.onnx").ir_version == 13


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("lint nowhere.onnx", "nowhere.onnx"),
        ("lint x.npy", "not an ONNX file"),
        ("lint int8.onnx --fix int8.onnx", "it would replace"),
        ("lint int8.onnx --fix gone/out.onnx", "gone"),
    ],
)
def test_mistakes(refused, call, says):
    refused(call, says=says)
