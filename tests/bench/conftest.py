from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.parser
import pytest


def _chain(nodes: int, *, shape: str = "N, 3, 16, 16", op: str = "Erf") -> onnx.ModelProto:
    """A network that does ``nodes`` times the same work."""
    steps = "\n".join(f"t{i + 1} = {op}(t{i})" for i in range(nodes))
    return onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] x) => (float[{shape}] y)\n'
        f"{{ t0 = Identity(x)\n{steps}\ny = Identity(t{nodes}) }}"
    )


CLASSIFIER = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 4] x) => (float[N, 4] scores, float[N, 1] total) <int64[1] axis = {{1}}>
{{ scores = {body}
total = ReduceSum(scores, axis) }}"""


@pytest.fixture
def save(tmp_path: Path) -> Callable[[str, onnx.ModelProto], Path]:
    """Write a model under a name in the test's folder."""

    def write(name: str, model: onnx.ModelProto) -> Path:
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return write


@pytest.fixture
def classifier(save: Callable[[str, onnx.ModelProto], Path]) -> Callable[[str, str], Path]:
    """A network whose scores are ``body`` of its four inputs."""
    return lambda name, body: save(name, onnx.parser.parse_model(CLASSIFIER.format(body=body)))


@pytest.fixture
def chain() -> Callable[..., onnx.ModelProto]:
    """Make a network that does ``nodes`` times the same work."""
    return _chain
