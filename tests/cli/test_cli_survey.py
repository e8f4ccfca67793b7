from __future__ import annotations

import json

import onnx
import pytest
from click.testing import CliRunner

from relu_deploy.cli import main
from relu_deploy.graph import count_ops


@pytest.fixture
def silu(residual_model, tmp_path):
    path = tmp_path / "silu.onnx"
    onnx.save(residual_model(activation="Silu", batch="N"), path)
    return path


def invoke(*call: object):
    return CliRunner().invoke(main, ["survey", *map(str, call)])


def test_the_table_says_what_is_where_and_what_becomes_of_it(silu):
    result = invoke(silu)
    assert result.exit_code == 0, result.output
    for words in ("silu", "Sigmoid Mul", "stem.act", "Conv", "needs training", "activations: 5 silu; left alone: none"):
        assert words in result.output


def test_each_activation_on_a_line_of_its_own(silu):
    assert "block.act2" not in invoke(silu).output
    output = invoke(silu, "--each").output
    for name in ("stem.act", "block.act1", "block.act2", "depthwise.act", "fuse.act"):
        assert name in output


def test_json(silu, tmp_path):
    path = tmp_path / "survey.json"
    assert invoke(silu, "--json", path).exit_code == 0
    report = json.loads(path.read_text())
    assert (report["counts"], report["left_alone"]) == ({"silu": 5}, {})
    first = report["activations"][0]
    assert (first["name"], first["kind"], first["spelling"]) == ("stem.act", "silu", "Sigmoid-Mul")
    assert first["after"] == {"name": "stem", "op": "Conv"}
    assert first["nodes"] == ["stem.act.sigmoid", "stem.act"]
    assert first["left_alone"] is None


def test_json_on_standard_output_is_nothing_but_json(silu):
    result = invoke(silu, "--json", "-")
    assert json.loads(result.stdout)["counts"] == {"silu": 5}


def test_what_if_writes_a_network_that_every_command_warns_of(silu, tmp_path):
    untrained, rewritten, engine = (tmp_path / name for name in ("untrained.onnx", "rewritten.onnx", "engine.onnx"))
    result = invoke(silu, "--what-if", "relu", "-o", untrained, "--json", tmp_path / "s.json")
    assert result.exit_code == 0, result.output
    assert "5 activations are ReLU; not trained, for speed measurement only" in result.output
    assert len(json.loads((tmp_path / "s.json").read_text())["what_if"]["changed"]) == 5
    assert count_ops(onnx.load(untrained))["Relu"] == 5
    assert "Sigmoid" not in count_ops(onnx.load(untrained))
    commands = (
        ["survey", untrained],
        ["rewrite", untrained, "-o", rewritten],
        ["build-engine", rewritten, "-o", engine],
        ["inspect", engine],
        ["bench", engine, "--against", silu, "--seconds", "0.1", "--rounds", "1"],
    )
    for call in commands:
        done = CliRunner().invoke(main, [str(word) for word in call])
        assert done.exit_code == 0, done.output
        warnings = [line for line in done.stderr.splitlines() if "not trained, for speed measurement only" in line]
        assert warnings, call
        assert len(set(warnings)) == len(warnings)


def test_a_network_without_the_mark_gives_no_warning(silu):
    assert invoke(silu).stderr == ""


def test_what_if_without_anything_smooth_says_so(residual_model, tmp_path):
    path, out = tmp_path / "relu.onnx", tmp_path / "out.onnx"
    onnx.save(residual_model(), path)
    result = invoke(path, "--what-if", "relu", "-o", out)
    assert result.exit_code == 0
    assert "nothing was replaced" in result.output
    assert "not trained" not in result.output
    assert out.exists()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("survey m.onnx --what-if relu", "--what-if and -o go together"),
        ("survey m.onnx -o new.onnx", "--what-if and -o go together"),
        ("survey m.onnx --what-if gelu -o new.onnx", "is not 'relu'"),
        ("survey missing.onnx", "missing.onnx"),
        ("survey x.npy", "is not an ONNX file"),
        ("survey m.onnx --what-if relu -o m.onnx", "an input that it would replace"),
        ("survey m.onnx --what-if relu -o new.onnx --json new.onnx", "another output"),
        ("survey m.onnx --json nowhere/s.json", "nowhere"),
    ],
)
def test_mistakes_end_with_code_2_and_change_nothing(refused, call, says):
    refused(call, says=says)
