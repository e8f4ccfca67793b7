"""``relu-deploy build-engine --int8`` on a trained SiLU detector, photographs in, engines for two targets out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from click.testing import CliRunner

from calib.inputs import model_inputs
from calib.sources import open_source
from relu_deploy.cli import main
from relu_deploy.engines.base import get_backend
from relu_deploy.graph import load_model

pytestmark = pytest.mark.models
# As ddddocr feeds it (core/detection_engine.py, preproc): BGR as OpenCV reads it, letterbox on grey 114, 0 to 255. It
# puts the picture in the corner and we in the middle, which is the same to ranges.
PREPROCESS = "letterbox,channels=bgr,scale=1"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of photographs as files: to calibrate with, and held out."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed: pip install 'relu-deploy[dev]'")
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'relu-deploy[dev]'")
    folders = tmp_path_factory.mktemp("calibrate"), tmp_path_factory.mktemp("held")
    for folder, names in zip(folders, (("astronaut", "chelsea", "coffee"), ("rocket", "camera")), strict=True):
        for name in names:
            image.fromarray(getattr(data, name)()).save(folder / f"{name}.png")
    return folders


def build(common_det: Path, calibration: Path, folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """The JSON report and the text of one build."""
    arguments = ["build-engine", str(common_det), "--int8", "--calib", str(calibration), "--preprocess", PREPROCESS,
                 "-o", str(folder / "detector.engine"), "--json", str(folder / "report.json"), *options]  # fmt: skip
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return json.loads((folder / "report.json").read_text()), result.output


def test_ort(common_det: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    calibration, held_out = pictures
    report, text = build(common_det, calibration, tmp_path, "--weight-bits", "7")
    assert report["calibration"]["samples"] == 3
    promised = report["quantize"]["layers"]
    left = [layer for layer in promised if not layer["int8"]]
    assert len(promised) == 83
    assert len(left) <= 8, "a tenth at most"
    assert f"{83 - len(left)} of 83 linear layers" in text
    assert all("dB of the outputs by this layer alone" in layer["reason"] for layer in left)
    audit = report["engine"]["audit"]
    found = {layer["name"]: layer["precision"] == "int8" for layer in audit["linear"]}
    assert found == {layer["name"]: layer["int8"] for layer in promised}
    assert len(audit["activations"]) == 80, (
        "74 SiLUs and 6 sigmoids of the heads are still there: nothing was distilled"
    )
    assert report["engine"]["disagreements"] == []

    session = ort.InferenceSession(str(common_det), providers=["CPUExecutionProvider"])
    samples = open_source(str(held_out), model_inputs(load_model(common_det)), preprocess=PREPROCESS)
    with get_backend("ort").open(tmp_path / "detector.engine") as engine:
        for sample in samples:
            wanted, got = session.run(None, sample.feeds)[0], engine.run(sample.feeds)["output"]
            assert got.shape == (1, 3549, 6)
            # Measured 22.5 dB (rocket) and 14.1 dB (camera) with 7-bit weights and the extremes of 3 pictures; when
            # calibration takes pixels for 0 to 1 it is 9.5 and 1.6.
            assert 10 * np.log10(np.sum(wanted**2) / np.sum((wanted - got) ** 2)) > 11


@pytest.mark.engine
def test_tensorrt_rtx(common_det: Path, pictures: tuple[Path, Path], tmp_path: Path) -> None:
    report, text = build(
        common_det, pictures[0], tmp_path, "--target", "tensorrt-rtx", "--sm", "89", "--samples", "1", "--require-int8"
    )
    # Two convolutions are merged with a sibling, and a tenth of the layers, the first, move less in float16.
    assert "73 of 81 linear layers" in text
    layers = {layer["name"]: "int8" if layer["int8"] else "fp16" for layer in report["quantize"]["layers"]}
    assert sorted(layers.values()) == ["fp16"] * 8 + ["int8"] * 73
    audit = report["engine"]["audit"]
    assert {layer["name"]: layer["precision"] for layer in audit["linear"]} == layers
    kinds = [activation["kind"] for activation in audit["activations"]]
    assert (kinds.count("silu"), kinds.count("sigmoid"), len(kinds)) == (74, 6, 80)
    assert report["engine"]["disagreements"] == audit["conflicts"] == []
    assert report["engine"]["sm"] == ["89"]
