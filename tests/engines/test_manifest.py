from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from calib.fingerprint import model_fingerprint
from relu_deploy.engines.base import BuildConfig, ShapeRange, get_backend
from relu_deploy.engines.manifest import manifest_path, read_manifest
from relu_deploy.errors import BackendUnavailableError, EngineError, FileError, MissingExtraError

Stack = Callable[..., onnx.ModelProto]


@pytest.fixture
def engine(stack: Stack, tmp_path: Path) -> Path:
    get_backend("ort").build(stack(target="ort"), tmp_path / "e.onnx", BuildConfig())
    return tmp_path / "e.onnx"


def test_round_trip(stack: Stack, tmp_path: Path) -> None:
    shapes = {"x": ShapeRange((1, 8, 16, 16), (2, 8, 16, 16), (4, 8, 16, 16))}
    report = get_backend("ort").build(stack(target="ort", batch="N"), tmp_path / "e.onnx", BuildConfig(shapes=shapes))
    assert read_manifest(tmp_path / "e.onnx") == report


def test_a_changed_engine_is_refused(engine: Path) -> None:
    engine.write_bytes(engine.read_bytes() + b"\0")
    with pytest.raises(EngineError, match=r"damaged, cut short or stale"), get_backend("ort").open(engine):
        pass


def test_an_engine_without_a_manifest_is_refused_with_the_way_out(engine: Path) -> None:
    manifest_path(engine).unlink()
    with pytest.raises(FileError, match="has no manifest") as caught, get_backend("ort").open(engine):
        pass
    assert "copy both files" in str(caught.value.hint)
    with pytest.raises(FileError, match="does not exist"):
        read_manifest(engine.with_name("nothing"))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"format": 1}', "null"])
def test_a_damaged_manifest_is_refused(engine: Path, text: str) -> None:
    manifest_path(engine).write_text(text)
    with pytest.raises((FileError, EngineError), match=r"e\.onnx\.json is not"):
        read_manifest(engine)


@pytest.mark.parametrize(
    ("key", "value"), [("format", 99), ("target", "abacus"), ("inputs", [{}]), ("audit", {"linear": 3})]
)
def test_a_manifest_of_another_kind_is_refused(engine: Path, key: str, value: object) -> None:
    stored = json.loads(manifest_path(engine).read_text())
    manifest_path(engine).write_text(json.dumps({**stored, key: value}))
    with pytest.raises(EngineError, match="is not the manifest of an engine"):
        read_manifest(engine)


def test_fingerprints_follow_weights_and_nodes_only(stack: Stack) -> None:
    model, other = stack(target="ort"), stack(target="ort")
    other.doc_string = "another time"
    assert model_fingerprint(model) == model_fingerprint(other)
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    assert model_fingerprint(model) != model_fingerprint(other)
    assert model_fingerprint(model) != model_fingerprint(stack(target="ort", activation="Tanh"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": "abacus"}, "unknown target 'abacus'"),
        ({"sm": ()}, "not a list of compute capabilities"),
        ({"sm": ("8.9",)}, "not a list of compute capabilities"),
        ({"sm": ("89", "89")}, "not a list of compute capabilities"),
        ({"optimization_level": 6}, "not between 0 and 5"),
        ({"workspace_mib": 0}, "not positive"),
    ],
)
def test_a_wrong_configuration_is_refused_at_once(fields: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        BuildConfig(**fields)


@pytest.mark.parametrize("shapes", [((4,), (2,), (8,)), ((1, 1), (2,), (4,)), ((-1,), (1,), (1,))])
def test_a_shape_range_that_is_not_ordered_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(EngineError, match="min <= opt <= max"):
        ShapeRange(*shapes)


def test_a_target_whose_package_is_missing_says_what_to_install(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(MissingExtraError, match=r"relu-deploy\[tensorrt-rtx\]"):
        get_backend("tensorrt-rtx").build(stack(), tmp_path / "e", BuildConfig(target="tensorrt-rtx"))
    with pytest.raises(BackendUnavailableError, match="NVIDIA's own package host"):
        get_backend("tensorrt").build(stack(), tmp_path / "e", BuildConfig(target="tensorrt"))
    with pytest.raises(EngineError, match="unknown target"):
        get_backend("abacus")
    assert list(tmp_path.iterdir()) == []
