"""Models above protobuf's limit go to the compilers as files; here the limit is lowered instead of the models grown."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.targets import Target


@pytest.mark.parametrize(
    "target",
    [
        "ort",
        pytest.param(
            "tensorrt-rtx",
            marks=pytest.mark.engine,
        ),
    ],
)
def test_a_model_that_is_too_large_for_one_message(
    stack: Callable[..., onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Target
) -> None:
    model = stack(target=target)
    expected = get_backend(target).build(model, tmp_path / "small", BuildConfig(target=target))
    written: list[Path] = []
    save = importlib.import_module("relu_deploy.engines.build").save_model

    def saving(large: onnx.ModelProto, path: Path) -> None:
        save(large, path)
        written.extend(path.parent.iterdir())

    # 16 MiB of room stay below the limit for what a message holds besides tensors.
    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", 1 << 24)
    monkeypatch.setattr("relu_deploy.engines.build.save_model", saving)
    report = get_backend(target).build(model, tmp_path / "large", BuildConfig(target=target))
    assert sorted(path.name for path in written) == ["model.onnx", "model.onnx.data"]
    assert report.audit.int8 == expected.audit.int8
    assert report.model_sha256 == expected.model_sha256
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
