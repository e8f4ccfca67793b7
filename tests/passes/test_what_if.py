"""The network as it would be with ReLU: what is replaced, what is not, and the mark that it carries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings

from relu_deploy.errors import NetworkWarning
from relu_deploy.graph import WHAT_IF, count_ops, load_model, save_model
from relu_deploy.passes.survey import survey
from relu_deploy.passes.what_if import MARK, replace_by_relu
from relu_deploy.report import PassReport


def load(name: str):
    """A module beside this one."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


networks, spellings = load("places"), load("spellings")
STEM, LAST = networks.STEM, networks.LAST


def what_if(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
    return replace_by_relu(model, survey(model))


def mark_of(model: onnx.ModelProto) -> str | None:
    return next((entry.value for entry in model.metadata_props if entry.key == WHAT_IF), None)


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, inputs)[0]


KINDS = {"silu", "gelu_erf", "gelu_tanh", "mish", "blend", "swish", "elu", "hardswish", "softplus", "tanh", "sigmoid"}
SMOOTH = [name for name, spelling in spellings.SPELLINGS.items() if spelling.kind in KINDS]


@pytest.mark.parametrize("name", SMOOTH)
def test_every_smooth_spelling_becomes_one_relu(name):
    spelling = spellings.SPELLINGS[name]
    model = spellings.model(spelling.text, opset=max(spelling.first, min(spelling.last, 20)))
    result, report = what_if(model)
    assert count_ops(result) == {"Conv": 2, "Relu": 1}
    assert len(report.changed) == 1
    assert mark_of(result) == MARK == "not trained, for speed measurement only"
    assert survey(result).counts == {"relu": 1}


def test_it_computes_what_the_network_with_relu_computes():
    body = f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}"
    result, _ = what_if(networks.network(body))
    reference = networks.network(f"{STEM} z = Relu(c) {LAST}")
    for ours, theirs in zip(result.graph.initializer, reference.graph.initializer, strict=True):
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(ours), onnx.numpy_helper.to_array(theirs))
    x = np.random.default_rng(0).normal(size=(2, 8, 16, 16)).astype(np.float32)
    np.testing.assert_array_equal(run(result, x=x), run(reference, x=x))


@pytest.mark.parametrize("name", [n for n, place in networks.PLACES.items() if not KINDS & set(place[2])])
def test_gates_heads_and_what_is_relu_already_stay(name):
    body, inputs, _, _ = networks.PLACES[name]
    model = networks.network(body, inputs=inputs, opset=13 if "axes = " in body else 17)
    result, report = what_if(model)
    assert result is model
    assert report == PassReport("what_if_relu")
    assert mark_of(result) is None


def test_a_squeeze_excite_network_keeps_its_gate():
    body, inputs, _, _ = networks.PLACES["squeeze-excite as Keras writes it"]
    result, report = what_if(networks.network(body, inputs=inputs, opset=13))
    operators = count_ops(result)
    assert len(report.changed) == 2
    assert (operators["Relu"], operators["Sigmoid"], operators["Mul"]) == (2, 1, 1)


def test_what_others_read_of_an_activation_stays():
    body = f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}"
    result, _ = what_if(networks.network(body, outputs="float y, float s"))
    assert count_ops(result) == {"Conv": 2, "Relu": 1, "Sigmoid": 1}


def test_quantisers_around_it_stay():
    model = networks.quantised_network()
    result, report = what_if(model)
    assert len(report.changed) == 1
    operators = count_ops(result)
    assert "Sigmoid" not in operators
    (relu,) = (node for node in result.graph.node if node.op_type == "Relu")
    assert (relu.input[0], relu.output[0]) == ("d", "m")
    assert operators["QuantizeLinear"] == 3  # the one inside the SiLU is gone with it


def test_what_cannot_be_replaced_is_said():
    text = "z = com.microsoft.BiasGelu(c, bias) y = MatMul(z, %[8,8])"
    model = networks.network(
        f"c = MatMul(x, %[8,8]) {text}", inputs=f"{networks.WORDS}, float[8] bias", domain="com.microsoft"
    )
    result, report = what_if(model)
    assert result is model
    assert [skip.reason for skip in report.skipped] == ["a bias is fused into it"]


def test_the_mark_is_read_again_and_kept(tmp_path):
    path, again = tmp_path / "untrained.onnx", tmp_path / "again.onnx"
    save_model(what_if(networks.network(f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}"))[0], path)
    with pytest.warns(NetworkWarning, match="not trained"):
        model = load_model(path)
    save_model(what_if(model)[0], again)
    with pytest.warns(NetworkWarning, match="not trained"):
        assert mark_of(load_model(again)) == MARK


def test_the_original_is_not_changed():
    model = networks.network(f"{STEM} s = Sigmoid(c) z = Mul(c, s) {LAST}")
    before = model.SerializeToString(deterministic=True)
    what_if(model)
    assert model.SerializeToString(deterministic=True) == before


@given(networks.networks_of_anything())
@settings(max_examples=60, deadline=None)
def test_whatever_the_network_what_it_counts_is_replaced_and_the_result_is_a_network(body):
    model = networks.network(body, inputs="float[1,8,4,4] x", outputs="float y, float z")
    before = survey(model)
    result, report = replace_by_relu(model, before)
    onnx.checker.check_model(result, full_check=True)
    wanted = [site.name for site in before.activations if site.becomes in ("needs training", "Relu with a tolerance")]
    assert sorted([*report.changed, *(skip.name for skip in report.skipped)]) == sorted(wanted)
    if report.changed:
        assert mark_of(result) == MARK
        relus = {node.name for node in result.graph.node if node.op_type == "Relu"}
        # One whose result nobody needs any more goes with what needed it.
        assert relus & set(report.changed)
