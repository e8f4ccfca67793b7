"""DY-ReLU made static: the bound against what really happens, on the data that the ranges come from."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.inputs import model_inputs
from calib.ranges import Ranges, TensorRange
from calib.run import calibrate
from calib.session import open_session, with_outputs
from calib.sources import open_source
from relu_deploy.errors import RangesError, ToolkitError
from relu_deploy.export import export_model
from relu_deploy.export.specs import DynamicAxis, ExampleInput
from relu_deploy.graph import check_model, export_graph, import_graph, load_model
from relu_deploy.passes.dyrelu import find_dyrelu
from relu_deploy.passes.fold_dyrelu import fold_dyrelu
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.nn.dynamic import DyReLU  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("dyrelu_units", Path(__file__).with_name("dyrelu_units.py"))
units = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(units)

pytestmark = pytest.mark.torch

# float32 arithmetic of both networks, relative to the largest output of a unit.
ROUNDING = 1e-5


def calm(net: nn.Module, scale: float, seed: int = 0) -> nn.Module:
    """Coefficients that differ from channel to channel, and by about ``scale`` from sample to sample."""
    units.perturbed(net, seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith(("excite.weight", "hyper.two.weight", "unit.two.weight", "layers.1.two.weight")):
                parameter.mul_(scale)
    return net


def exported(net, shape, path, exporter="torchscript", *, dynamic=True) -> onnx.ModelProto:
    axes = (DynamicAxis("x", 0, 1, 8),) if dynamic else ()
    export_model(net, (ExampleInput("x", shape),), path / "net.onnx", exporter=exporter, dynamic=axes)
    return load_model(path / "net.onnx")


def data(model: onnx.ModelProto, count: int = 16, seed: int = 0) -> np.ndarray:
    shape = [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    return np.random.default_rng(seed).standard_normal((count, *shape[1:])).astype(np.float32)


def measure(model: onnx.ModelProto, samples: np.ndarray) -> Ranges:
    return calibrate(model, open_source(samples, model_inputs(model)))


def folded(model: onnx.ModelProto, ranges: Ranges, tolerance: float):
    graph = import_graph(model)
    annotate(graph, model)
    report = fold_dyrelu(graph, ranges, tolerance=tolerance)
    result = export_graph(graph, model)
    check_model(result, "the folded network")
    return result, report


def unit_errors(model, result, samples, names) -> dict[str, tuple[float, float]]:
    """Largest difference at each unit, fed what the original feeds it, and the largest value."""
    errors = {}
    for name in names:
        graph = import_graph(model)
        annotate(graph, model)
        (site,) = [site for site in find_dyrelu(graph) if site.name == name]
        both = [site.output.name, site.input.name]
        before = open_session(with_outputs(model, both))
        # The folded unit gets exactly the x of the original: its other inputs are constants.
        part = import_graph(result)
        annotate(part, result)
        x = part.tensors()[site.input.name]
        x.inputs.clear()
        part.inputs, part.outputs = [x], [part.tensors()[site.output.name]]
        x.dtype = np.float32
        after = open_session(export_graph(part, result))
        worst = size = 0.0
        batch = model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or 1
        for start in range(0, len(samples), batch):
            chunk = samples[start : start + batch]
            y, seen = before.run(both, {model.graph.input[0].name: chunk})
            (new,) = after.run(None, {site.input.name: seen})
            assert new.shape == y.shape
            worst, size = max(worst, float(np.abs(new - y).max())), max(size, float(np.abs(y).max()))
        errors[name] = worst, size
    return errors


def claimed(note: str) -> float:
    return float(re.search(r"off by (?:at most|up to) (\S+?)[ ;]", note)[1])


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_the_error_is_covered_and_not_far_from_it(variant, exporter, tmp_path):
    net = calm(units.Images(DyReLU(8, variant), DyReLU(8, variant, pieces=3)), 0.05)
    model = exported(net, units.IMAGE, tmp_path, exporter)
    samples = data(model)
    result, report = folded(model, measure(model, samples), 10.0)
    assert len(report.changed) == 2
    assert report.skipped == ()
    left = [node.op_type for node in result.graph.node]
    assert "Sigmoid" not in left
    assert left.count("Softmax") == (2 if variant == "C" else 0)
    for name, (worst, size) in unit_errors(model, result, samples, report.changed).items():
        bound = claimed(report.notes[name])
        assert worst <= bound * 1.01 + ROUNDING * size  # the text has three digits
        assert worst >= bound / (200 if variant == "C" else 20)


@pytest.mark.parametrize("shape", [(2, 7, 8), (3, 8)], ids=["tokens", "vectors"])
def test_channels_last_and_vectors(shape, tmp_path):
    unit = DyReLU(16, "B", channel_axis=-1 if len(shape) == 3 else 1)
    model = exported(calm(units.Tokens(unit), 0.05), shape, tmp_path)
    samples = data(model)
    result, report = folded(model, measure(model, samples), 10.0)
    (name,) = report.changed
    worst, size = unit_errors(model, result, samples, [name])[name]
    assert ROUNDING * size < worst <= claimed(report.notes[name]) * 1.01 + ROUNDING * size


@pytest.mark.parametrize(
    "unit",
    [
        pytest.param(units.Permuted(shared=False), id="permuted"),
        pytest.param(units.Dyhead(), id="detection head"),
        pytest.param(
            units.ByCombination(lambda x, a, b, c, d: torch.relu((a - c) * x + (b - d)) + c * x + d), id="difference"
        ),
        pytest.param(
            units.ByCombination(lambda x, a, b, c, d: torch.stack([a * x + b, c * x + d]).amax(0)), id="stacked"
        ),
    ],
)
def test_strangers_units_are_folded_too(unit, tmp_path):
    net = calm(units.Images(unit), 0.05)
    graph = units.traced(net, (1, *units.IMAGE[1:]))
    model = export_graph(graph, onnx.ModelProto(ir_version=8))
    samples = data(model)
    result, report = folded(model, measure(model, samples), 10.0)
    assert len(report.changed) == 1
    for name, (worst, size) in unit_errors(model, result, samples, report.changed).items():
        assert worst <= claimed(report.notes[name]) * 1.01 + ROUNDING * size


def test_attention_inside_the_coefficients_cannot_be_frozen():
    net = calm(units.Images(units.Attended()), 0.0)
    model = export_graph(units.traced(net, (1, *units.IMAGE[1:])), onnx.ModelProto(ir_version=8))
    _, report = folded(model, measure(model, data(model)), 10.0)
    assert report.changed == ()
    assert "is not monotone in one tensor" in report.skipped[0].reason


PLAIN = """<ir_version: 8, opset_import: ["": 17]>
g (float[1,2,5] x) => (float[1,2,5] y)
<float[2,8] w = {1,0,0,1,0,0,0,0, 0,1,0,0,0,0,1,0}, float two = {2}, int64[3] shape = {1,2,1},
 int64[4] sizes = {2,2,2,2}>
{
  pooled = ReduceMean<axes = [2], keepdims = 0>(x)
  t = MatMul(pooled, w)
  a1, b1, a2, b2 = Split<axis = 1>(t, sizes)
  half = Mul(b2, two)
  A1 = Reshape(a1, shape)
  B1 = Reshape(b1, shape)
  A2 = Reshape(a2, shape)
  B2 = Reshape(half, shape)
  p = Mul(A1, x)
  q = Add(p, B1)
  r = Mul(x, A2)
  s = Add(r, B2)
  [unit] y = Max(q, s)
}"""
NUMBER = st.floats(-8, 8, width=32)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(NUMBER, NUMBER), min_size=8, max_size=8), st.lists(NUMBER, min_size=2, max_size=2), st.data())
def test_whatever_keeps_to_the_ranges_keeps_to_the_bound(spans, extents, draws):
    low, high = np.sort(np.array(spans, np.float32), axis=1).T
    reach = np.abs(np.array(extents, np.float32))
    ranges = Ranges(
        {
            "x": TensorRange(-reach.max(), reach.max(), "float32", 1, 1, -reach, reach),
            "t": TensorRange(low.min(), high.max(), "float32", 1, 1, low, high),
        }, "0" * 64, "0" * 64, "max", 1,
    )  # fmt: skip
    result, report = folded(onnx.parser.parse_model(PLAIN), ranges, np.inf)
    bound = claimed(report.notes["unit"]) * 1.01
    frozen = {t.name: onnx.numpy_helper.to_array(t)[0, :, 0] for t in result.graph.initializer if "frozen" in t.name}

    def unit(a1, b1, a2, b2, x):
        return np.maximum(a1 * x + b1, a2 * x + b2)

    parts = draws.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=10, max_size=10))
    t = low + np.array(parts[:8], np.float32) * (high - low)
    x = (2 * np.array(parts[8:], np.float32) - 1) * reach
    a1, b1, a2, b2 = t.reshape(4, 2)
    new = unit(*(frozen[f"{name}/frozen"] for name in ("A1", "B1", "A2", "B2")), x)
    old = unit(a1, b1, a2, 2 * b2, x)
    assert (np.abs(old - new) <= bound + 1e-4).all()


def test_the_bound_by_hand():
    low, high = np.zeros(8, np.float32), np.array([2, 0, 0, 4, 0, 0, 0, 6], np.float32)
    ranges = Ranges(
        {
            "x": TensorRange(-3, 5, "float32", 1, 1, np.array([-3, -1], np.float32), np.array([2, 5], np.float32)),
            "t": TensorRange(0, 6, "float32", 1, 1, low, high),
        }, "0" * 64, "0" * 64, "max", 1,
    )  # fmt: skip
    _, report = folded(onnx.parser.parse_model(PLAIN), ranges, np.inf)
    # Channel 0: a1 within 1 and |x| <= 3. Channel 1: b1 within 2; b2 within 3, doubled.
    assert claimed(report.notes["unit"]) == 6


def test_a_unit_whose_network_ends_in_zeros_is_folded_at_no_tolerance_at_all(tmp_path):
    net = calm(units.Images(DyReLU(8, "B")), 0.0)
    model = exported(net, units.IMAGE, tmp_path)
    samples = data(model)
    result, report = folded(model, measure(model, samples), 0.0)
    (name,) = report.changed
    assert claimed(report.notes[name]) == 0
    before, after = open_session(model), open_session(result)
    assert np.array_equal(*(session.run(None, {"x": samples})[0] for session in (before, after)))


def test_a_fresh_unit_becomes_relu(tmp_path):
    """Zero slopes, then the passes behind: nothing of the unit is left but one Relu."""
    model = exported(units.Images(DyReLU(8, "B")), units.IMAGE, tmp_path)
    result, _ = folded(model, measure(model, data(model)), 0.0)
    rewritten, _ = rewrite(result)
    assert [node.op_type for node in rewritten.graph.node] == ["Conv", "Relu", "Conv"]


def test_a_dynamic_unit_stays_and_says_by_how_much(tmp_path):
    model = exported(calm(units.Images(DyReLU(8, "B")), 1.0), units.IMAGE, tmp_path)
    result, report = folded(model, measure(model, data(model)), 1e-3)
    assert report.changed == ()
    (skip,) = report.skipped
    assert skip.reason.startswith("DY-ReLU-B stays: its coefficients were seen up to")
    assert skip.reason.endswith("allowed is 0.001")
    assert claimed(skip.reason) > 1e-3
    assert sorted(n.name for n in result.graph.node) == sorted(n.name for n in model.graph.node)


def test_the_tolerance_divides_units(tmp_path):
    net = calm(units.Images(DyReLU(8, "B"), DyReLU(8, "B")), 1.0)
    with torch.no_grad():
        net.layers[1].excite.weight.zero_()
    model = exported(net, units.IMAGE, tmp_path)
    _, report = folded(model, measure(model, data(model)), 1e-6)
    assert len(report.changed) == len(report.skipped) == 1


def test_a_second_run_changes_nothing(tmp_path):
    model = exported(calm(units.Images(DyReLU(8, "C")), 0.01), units.IMAGE, tmp_path)
    ranges = measure(model, data(model))
    result, _ = folded(model, ranges, 10.0)
    again, report = folded(result, ranges, 10.0)
    assert report.changed == report.skipped == ()
    assert [n.op_type for n in again.graph.node] == [n.op_type for n in result.graph.node]


def test_coefficients_that_other_layers_read_stay_for_them(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.hyper, self.head = units.Hyper(32), nn.Linear(32, 2)

        def forward(self, x):
            theta = self.hyper(x)
            a, b, c, d = (part[:, :, None, None] for part in theta.split(8, 1))
            return torch.max(a * x + b, c * x + d).mean((2, 3)) + self.head(theta).mean(1, keepdim=True)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.unit = nn.Conv2d(8, 8, 1), Shared()

        def forward(self, x):
            return self.unit(self.conv(x))

    model = exported(calm(Net(), 0.01), units.IMAGE, tmp_path)
    samples = data(model)
    result, report = folded(model, measure(model, samples), 10.0)
    assert len(report.changed) == 1
    assert [node.op_type for node in result.graph.node].count("Sigmoid") == 1
    before, after = (open_session(m).run(None, {"x": samples})[0] for m in (model, result))
    assert np.abs(before - after).max() <= claimed(report.notes[report.changed[0]]) * 1.01 + ROUNDING


def test_missing_ranges_are_named(tmp_path):
    model = exported(calm(units.Images(DyReLU(8, "B")), 0.01), units.IMAGE, tmp_path)
    ranges = measure(model, data(model))
    graph = import_graph(model)
    annotate(graph, model)
    (site,) = find_dyrelu(graph)
    for gone in (site.input.name, None):
        names = [gone] if gone else [t.name for node in site.hyper for t in node.outputs]
        tensors = {name: value for name, value in ranges.tensors.items() if name not in names}
        _, report = folded(model, dataclasses.replace(ranges, tensors=tensors), 10.0)
        assert report.changed == ()
        assert "there is no range for" in report.skipped[0].reason
        if gone:
            assert gone in report.skipped[0].reason


def test_float16(tmp_path):
    net = calm(units.Images(DyReLU(8, "B")), 0.01).half()
    export_model(net, (ExampleInput("x", units.IMAGE, "float16"),), tmp_path / "net.onnx", exporter="torchscript")
    model = load_model(tmp_path / "net.onnx")
    samples = data(model).astype(np.float16)
    result, report = folded(model, measure(model, samples), 10.0)
    (name,) = report.changed
    frozen = [t for t in result.graph.initializer if "frozen" in t.name]
    assert len(frozen) == 4
    assert {t.data_type for t in frozen} == {onnx.TensorProto.FLOAT16}
    assert claimed(report.notes[name]) > 2.0**-12  # rounding the coefficients counts


@pytest.mark.parametrize("scale", [0.0, 0.05])
def test_rewrite_folds_measures_and_cleans_up(scale, tmp_path):
    net = calm(units.Images(DyReLU(8, "B"), DyReLU(8, "C")), scale)
    model = exported(net, units.IMAGE, tmp_path)
    samples = data(model, 8)
    ranges = measure(model, samples)
    feeds = [{"x": sample[None]} for sample in samples]
    result, report = rewrite(model, domain=ranges, fold_tolerance=10.0, samples=feeds)
    folding = report.folding
    assert (folding.samples, folding.given, folding.note) == (8, True, "")
    assert [unit.variant for unit in folding.units] == ["B", "C"]
    for unit in folding.units:
        assert unit.measured <= unit.bound + ROUNDING * unit.largest
        assert (unit.bound > 0) == (scale > 0)
    assert report.exact is False
    assert report.nodes_after == len(result.graph.node) < len(model.graph.node)
    assert find_dyrelu(import_graph(result)) == []
    assert not {"Max", "Sigmoid"} & {node.op_type for node in result.graph.node}  # each is a PRelu between layers
    before, after = (open_session(m).run(None, {"x": samples})[0] for m in (model, result))
    moved = np.abs(before - after).max() / np.abs(before).max()
    assert folding.outputs[0].error == pytest.approx(moved, rel=1e-2, abs=1e-6)


def test_random_inputs_go_beyond_the_ranges_and_the_report_shows_it(tmp_path):
    model = exported(calm(units.Images(DyReLU(8, "B")), 1.0), units.IMAGE, tmp_path)
    _, report = rewrite(model, domain=measure(model, 0.01 * data(model, 4)), fold_tolerance=100.0)
    (unit,) = report.folding.units
    assert not report.folding.given
    assert unit.measured > unit.bound


def test_nothing_to_fold_is_no_change(tmp_path):
    model = exported(calm(units.Images(nn.ReLU()), 1.0), units.IMAGE, tmp_path, "dynamo")
    first, _ = rewrite(model)
    result, report = rewrite(first, domain=measure(first, data(model, 2)), fold_tolerance=1.0)
    assert result is first
    assert report.folding.units == ()
    assert not report.changed


@pytest.mark.parametrize(
    ("tolerance", "domain", "words"),
    [(-1.0, "ranges", "no sense"), (np.nan, "ranges", "no sense"), (0.1, None, "ranges"), (0.1, (-1.0, 1.0), "ranges")],
    ids=["negative", "nan", "no ranges", "a range"],
)
def test_folding_without_ranges_or_sense_is_refused(tolerance, domain, words):
    model = onnx.parser.parse_model(PLAIN)
    found = measure(model, data(model, 1)) if domain == "ranges" else domain
    with pytest.raises(ToolkitError, match=words):
        rewrite(model, domain=found, fold_tolerance=tolerance)


def test_another_networks_ranges_are_refused(tmp_path):
    model = onnx.parser.parse_model(PLAIN)
    other = exported(calm(units.Images(DyReLU(8, "B")), 1.0), units.IMAGE, tmp_path)
    with pytest.raises(RangesError):
        rewrite(model, domain=measure(other, data(other, 2)), fold_tolerance=1.0)


def test_folding_and_collapsing_go_together(tmp_path):
    """A unit that hardly leaves ReLU: static within one tolerance, Relu within another."""
    torch.manual_seed(0)
    net = units.Images(DyReLU(8, "B"))
    with torch.no_grad():
        net.layers[1].excite.weight.normal_(0, 1e-4)
    model = exported(net, units.IMAGE, tmp_path)
    ranges = measure(model, data(model))
    result, report = rewrite(model, domain=ranges, fold_tolerance=0.01, collapse_tolerance=0.05)
    assert [node.op_type for node in result.graph.node] == ["Conv", "Relu", "Conv"]
    assert len(report.folding.units) == len(report.approximation.collapses) == 1
