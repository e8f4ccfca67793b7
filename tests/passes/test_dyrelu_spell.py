"""The spelling of DY-ReLU for ONNX Runtime against the one it came with, in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.export import export_model
from relu_deploy.export.specs import DynamicAxis, ExampleInput
from relu_deploy.graph import check_model, count_ops, export_graph, import_graph, load_model
from relu_deploy.int8.drift import measure_drift
from relu_deploy.int8.run import quantize
from relu_deploy.passes.dyrelu import find_dyrelu
from relu_deploy.passes.dyrelu_spell import spell_dyrelu
from relu_deploy.passes.run import rewrite, spell
from relu_deploy.passes.shapes import annotate

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

from relu_deploy.nn.dynamic import DyReLU  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("dyrelu_units", Path(__file__).with_name("dyrelu_units.py"))
units = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(units)

pytestmark = pytest.mark.torch

# Coefficients are rounded in another order; each output of the network is a sum of some hundred products.
ROUNDING = 1e-5


def exported(net, shape, path, exporter="torchscript", dynamic=(0,), opset=18) -> onnx.ModelProto:
    axes = tuple(DynamicAxis("x", axis, 1 if axis == 0 else 3, 16) for axis in dynamic)
    spec = ExampleInput("x", shape)
    export_model(units.perturbed(net), (spec,), path / "net.onnx", exporter=exporter, dynamic=axes, opset=opset)
    return load_model(path / "net.onnx")


def spelled(model: onnx.ModelProto):
    graph = import_graph(model)
    annotate(graph, model)
    report = spell_dyrelu(graph)
    graph.cleanup().toposort()
    result = export_graph(graph, model)
    check_model(result, "the spelled network")
    return result, report


def found(model: onnx.ModelProto):
    graph = import_graph(model)
    annotate(graph, model)
    return find_dyrelu(graph)


def same(before: onnx.ModelProto, after: onnx.ModelProto, *shapes: tuple[int, ...]) -> None:
    old, new = open_session(before), open_session(after)
    for shape in shapes:
        x = 3 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        (want,), (got,) = old.run(None, {"x": x}), new.run(None, {"x": x})
        np.testing.assert_allclose(got, want, rtol=0, atol=ROUNDING * np.abs(want).max())


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize(("variant", "pieces"), [("A", 2), ("B", 2), ("C", 2), ("B", 3)])
def test_own_units(variant, pieces, exporter, tmp_path):
    net = units.Images(DyReLU(8, variant, pieces=pieces), DyReLU(8, variant, pieces=pieces))
    model = exported(net, units.IMAGE, tmp_path, exporter)
    result, report = spelled(model)
    assert len(report.changed) == 2
    assert report.skipped == ()
    same(model, result, (1, 8, 6, 5), (3, 8, 6, 5))
    counts = count_ops(result)
    assert counts["BatchNormalization"] == 2 * pieces
    if variant != "C":  # scale and shift of the coefficients, once a unit; the attention has more
        assert (counts["Mul"], counts["Add"]) == (2, 2)
    assert [(site.variant, site.pieces) for site in found(result)] == [(variant, pieces)] * 2
    again, report = spelled(result)
    assert report.changed == ()
    assert [node.name for node in again.graph.node] == [node.name for node in result.graph.node]


@pytest.mark.parametrize("dynamic", [(), (0,), (2, 3), (0, 2, 3)], ids=["fixed", "batch", "positions", "all"])
@pytest.mark.parametrize("variant", ["A", "B"])
def test_whatever_is_open(variant, dynamic, tmp_path):
    model = exported(units.Images(DyReLU(8, variant)), units.IMAGE, tmp_path, "torchscript", dynamic)
    result, report = spelled(model)
    assert len(report.changed) == 1
    batch = 5 if 0 in dynamic else units.IMAGE[0]
    rest = (9, 7) if 2 in dynamic else units.IMAGE[2:]
    same(model, result, units.IMAGE, (batch, 8, *rest))


def test_float_networks_for_onnx_runtime_get_it_too(tmp_path):
    model = exported(units.Images(DyReLU(8, "B")), units.IMAGE, tmp_path)
    for target, lines in (("ort", 2), ("tensorrt-rtx", 0)):
        result, _ = spell(model, target)
        assert count_ops(result).get("BatchNormalization", 0) == lines
        same(model, result, (3, 8, 6, 5))


def test_one_channel(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unit, self.head = torch.nn.Conv2d(8, 1, 1), DyReLU(1, "B"), torch.nn.Conv2d(1, 2, 1)

        def forward(self, x):
            return self.head(self.unit(self.conv(x)))

    model = exported(Net(), units.IMAGE, tmp_path)
    result, report = spelled(model)
    assert len(report.changed) == 1
    same(model, result, (3, 8, 6, 5))


@pytest.mark.parametrize("opset", [11, 13])
def test_older_opsets(opset, tmp_path):
    model = exported(units.Images(DyReLU(8, "C", pieces=3)), units.IMAGE, tmp_path, opset=opset)
    result, report = spelled(model)
    assert len(report.changed) == 1
    same(model, result, (3, 8, 6, 5))


def test_coefficients_that_are_no_slices_of_one_vector_stay_as_they_are():
    class Two(torch.nn.Module):
        """Slopes from one network, offsets from another."""

        def __init__(self):
            super().__init__()
            self.one, self.two = units.Hyper(16), units.Hyper(16)

        def forward(self, x):
            (a, c), (b, d) = (part(x)[:, :, None, None].split(8, 1) for part in (self.one, self.two))
            return torch.max(a * x + b, c * x + d)

    torch.manual_seed(0)
    graph = units.traced(units.perturbed(units.Images(Two())), units.IMAGE)
    graph.inputs[0].name = "x"
    model = export_graph(graph, onnx.ModelProto(ir_version=8))
    result, report = spelled(model)
    assert len(report.changed) == 1
    same(model, result, units.IMAGE)


def test_slices_in_another_order_are_not_mixed_up():
    def crossed(x, a, b, c, d):
        return torch.max(c * x + a, d * x + b)

    graph = units.traced(units.perturbed(units.Images(units.ByCombination(crossed))), units.IMAGE)
    graph.inputs[0].name = "x"
    model = export_graph(graph, onnx.ModelProto(ir_version=8))
    result, report = spelled(model)
    assert len(report.changed) == 1
    same(model, result, units.IMAGE)


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (units.Permuted(shared=False), "not spelled as a_k x + b_k"),
        (units.ByCombination(lambda x, a, b, c, d: torch.max(a * x, c * x)), "not spelled as a_k x + b_k"),
    ],
    ids=["permuted", "no offsets"],
)
def test_other_spellings_stay(unit, words):
    graph = units.traced(units.perturbed(units.Images(unit)), units.IMAGE)
    report = spell_dyrelu(graph)
    assert report.changed == ()
    assert words in report.skipped[0].reason


def test_channels_last_and_float16_stay(tmp_path):
    model = exported(units.Tokens(DyReLU(16, "B", channel_axis=-1)), units.TOKENS, tmp_path)
    result, report = spelled(model)
    assert "its channels are not on axis 1" in report.skipped[0].reason
    same(model, result, units.TOKENS)
    net = units.perturbed(units.Images(DyReLU(8, "B"))).half()
    export_model(net, (ExampleInput("x", units.IMAGE, "float16"),), tmp_path / "half.onnx", exporter="torchscript")
    _, report = spelled(load_model(tmp_path / "half.onnx"))
    assert "not float32" in report.skipped[0].reason


def slightly_dynamic(variant: str, pieces: int, shape: tuple[int, ...], path: Path) -> onnx.ModelProto:
    """A network as torch initialises it, whose units have left their start."""
    torch.manual_seed(0)
    net = units.Images(DyReLU(8, variant, pieces=pieces), DyReLU(8, variant, pieces=pieces))
    with torch.no_grad():
        for unit in net.layers[1::2]:
            unit.excite.weight.add_(0.3 * torch.randn_like(unit.excite.weight))
    axes = (DynamicAxis("x", 0, 1, 16),)
    export_model(net, (ExampleInput("x", shape),), path / "net.onnx", exporter="torchscript", dynamic=axes)
    return rewrite(load_model(path / "net.onnx"))[0]


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_an_attention_over_a_thousand_positions_survives_int8(target, tmp_path):
    """Each of its probabilities is about 0.001, nothing in steps of 1/255: the softmax has to stay in float."""
    model = slightly_dynamic("C", 2, (2, 8, 32, 32), tmp_path)
    samples = np.random.default_rng(0).standard_normal((8, 8, 32, 32)).astype(np.float32)
    source = open_source(samples, model_inputs(model))
    quantized, _ = quantize(model, calibrate(model, source), target=target, weight_bits=8)
    (drift,) = measure_drift(model, quantized, source, integer_kernels=target == "ort")
    assert drift.sqnr_db > 25  # without attention every unit would give 0, and the output would be a constant


@pytest.mark.parametrize(("variant", "pieces"), [("A", 2), ("B", 2), ("B", 3), ("C", 2)])
@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_quantised_networks_keep_their_outputs(variant, pieces, target, tmp_path):
    """All linear layers are INT8, those of the hyper function among them, and little is lost."""
    model = slightly_dynamic(variant, pieces, units.IMAGE, tmp_path)
    samples = np.random.default_rng(0).standard_normal((32, *units.IMAGE[1:])).astype(np.float32)
    source = open_source(samples, model_inputs(model))
    quantized, report = quantize(model, calibrate(model, source), target=target, weight_bits=8)
    assert [layer.name for layer in report.layers if not layer.int8] == []
    (drift,) = measure_drift(model, quantized, source, integer_kernels=False)
    # 8 bits a layer give some 40 dB; a hyper function that lost its signal would leave under 20.
    assert drift.sqnr_db > 30
    assert count_ops(quantized).get("BatchNormalization", 0) == (2 * pieces if target == "ort" else 0)
    sites = found(quantized)
    assert [site.pieces for site in sites] == [pieces] * 2
    if target == "ort":  # for TensorRT-RTX a factor in front of a quantiser may stand inside the attention's product
        assert [site.variant for site in sites] == [variant] * 2
        assert sum("BatchNormalization" in what for what in report.folded.values()) == 2
