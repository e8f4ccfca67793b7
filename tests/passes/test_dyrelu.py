"""DY-ReLU in exported graphs: this project's and strangers' spellings, and what only looks like it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
import pytest

from relu_deploy.export import export_model
from relu_deploy.export.specs import DynamicAxis, ExampleInput
from relu_deploy.graph import load_model
from relu_deploy.passes import dyrelu
from relu_deploy.passes.dyrelu import DyReluSite, find_dyrelu

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.nn.dynamic import DyReLU  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("dyrelu_units", Path(__file__).with_name("dyrelu_units.py"))
units = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(units)
CHANNELS, IMAGE, TOKENS = units.CHANNELS, units.IMAGE, units.TOKENS
ByCombination, Dyhead, Hyper, Images, Permuted, Tokens = (
    units.ByCombination, units.Dyhead, units.Hyper, units.Images, units.Permuted, units.Tokens,
)  # fmt: skip
annotated, perturbed, traced = units.annotated, units.perturbed, units.traced

pytestmark = pytest.mark.torch


def exported(net: nn.Module, shape, path: Path, exporter: str, opset: int, *, dynamic: bool) -> gs.Graph:
    axes = (DynamicAxis("x", 0, 1, 4),) if dynamic else ()
    export_model(net, (ExampleInput("x", shape),), path / "net.onnx", exporter=exporter, opset=opset, dynamic=axes)
    return annotated(load_model(path / "net.onnx"))


def check(site: DyReluSite, variant: str, pieces: int, graph: gs.Graph) -> None:
    assert (site.variant, site.pieces) == (variant, pieces)
    assert all(tensor is not None for tensor in (*site.slopes, *site.offsets))
    assert len({tensor.name for tensor in (*site.slopes, *site.offsets)}) == 2 * pieces
    assert (site.attention is not None) == (variant == "C")
    inside = [node for node in graph.nodes if node.name in site.nodes]
    ops = [node.op for node in inside]
    assert ops.count("Relu") == 1
    assert ops.count("Sigmoid") == 1
    assert ops.count("Gemm") == 2
    # What surrounds the unit is not part of it.
    assert site.input.inputs[0].name not in site.nodes
    assert all(node.name not in site.nodes for node in site.output.outputs)
    assert site.output.inputs[0].name == site.name


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_own_units_of_the_older_exporter(variant, pieces, dynamic, tmp_path):
    net = perturbed(Images(DyReLU(CHANNELS, variant, pieces=pieces), DyReLU(CHANNELS, variant, pieces=pieces)))
    graph = exported(net, IMAGE, tmp_path, "torchscript", 18, dynamic=dynamic)
    sites = find_dyrelu(graph)
    assert len(sites) == 2
    for site in sites:
        check(site, variant, pieces, graph)
    assert not sites[0].nodes & sites[1].nodes


@pytest.mark.parametrize(
    ("variant", "pieces", "opset", "dynamic"), [("A", 2, 18, True), ("B", 3, 19, False), ("C", 2, 20, True)]
)
def test_own_units_of_the_newer_exporter(variant, pieces, opset, dynamic, tmp_path):
    net = perturbed(Images(DyReLU(CHANNELS, variant, pieces=pieces)))
    graph = exported(net, IMAGE, tmp_path, "dynamo", opset, dynamic=dynamic)
    (site,) = find_dyrelu(graph)
    check(site, variant, pieces, graph)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("variant", ["A", "B", "C"])
def test_own_units_with_channels_last(variant, exporter, tmp_path):
    net = perturbed(Tokens(DyReLU(16, variant, channel_axis=-1)))
    graph = exported(net, TOKENS, tmp_path, exporter, 20, dynamic=False)
    (site,) = find_dyrelu(graph)
    check(site, variant, 2, graph)


@pytest.mark.parametrize("variant", ["A", "B"])
def test_own_units_of_vectors(variant, tmp_path):
    net = perturbed(Tokens(DyReLU(16, variant)))
    graph = exported(net, (2, CHANNELS), tmp_path, "torchscript", 18, dynamic=True)
    (site,) = find_dyrelu(graph)
    check(site, variant, 2, graph)


def larger(x, a1, b1, a2, b2):
    p, q = x * a1 + b1, a2 * x + b2
    return torch.where(p > q, p, q)


def smaller_first(x, a1, b1, a2, b2):
    p, q = x * a1 + b1, a2 * x + b2
    return torch.where(p <= q, q, p)


STRANGERS = [
    pytest.param(Permuted(shared=False), "B", 2, id="permuted"),
    pytest.param(Permuted(shared=False, pieces=3), "B", 3, id="permuted three"),
    pytest.param(Permuted(shared=True), "A", 2, id="permuted shared"),
    pytest.param(Dyhead(), "B", 2, id="detection head"),
    pytest.param(units.Attended(), "C", 2, id="attention inside"),
    pytest.param(ByCombination(larger), "B", 2, id="where"),
    pytest.param(ByCombination(smaller_first), "B", 2, id="where the other way"),
    pytest.param(
        ByCombination(lambda x, a, b, c, d: c * x + d + torch.relu((a - c) * x + (b - d))), "B", 2, id="difference"
    ),
    pytest.param(
        ByCombination(lambda x, a, b, c, d: torch.stack([a * x + b, c * x + d]).amax(0)), "B", 2, id="stacked"
    ),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.max(a * x, c * x)), "B", 2, id="slopes only"),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.max(x * a - b, x * c - d)), "B", 2, id="minus"),
]


@pytest.mark.parametrize(("unit", "variant", "pieces"), STRANGERS)
def test_strangers_spellings(unit, variant, pieces):
    graph = traced(Images(unit), (1, *IMAGE[1:]))
    (site,) = find_dyrelu(graph)
    assert (site.variant, site.pieces) == (variant, pieces)
    assert [node.op for node in graph.nodes if node.name not in site.nodes and node.op != "Constant"] == [
        "Conv",
        "Conv",
    ]


class Gate(nn.Module):
    """Squeeze-excite, and what may follow it."""

    def __init__(self, after) -> None:
        super().__init__()
        self.one, self.two, self.after = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, CHANNELS, 1), after

    def forward(self, x):
        return self.after(x * torch.sigmoid(self.two(torch.relu(self.one(x.mean((2, 3), keepdim=True))))), x)


class TwoConvs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(CHANNELS, CHANNELS, 1), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        return torch.max(self.one(x), self.two(x))


class Maxout(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.max(a, b).repeat(1, 2, 1, 1)


class Normalised(nn.Module):
    """Instance norm by hand, and LeakyReLU spelled as a maximum."""

    def forward(self, x):
        y = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()
        return torch.max(y, 0.1 * y)


class Foreign(nn.Module):
    """The coefficients come from another tensor than x."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.mix = Hyper(4 * CHANNELS), nn.Conv2d(CHANNELS, CHANNELS, 1)

    def forward(self, x):
        a, b, c, d = (part[:, :, None, None] for part in self.hyper(x).chunk(4, 1))
        y = self.mix(x)
        return torch.max(a * y + b, c * y + d)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(CHANNELS, 3 * CHANNELS)

    def forward(self, x):
        t = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(t).chunk(3, -1)
        y = torch.softmax(q @ k.transpose(1, 2) / 3, -1) @ v
        return torch.max(y, 0.1 * y).transpose(1, 2).reshape(x.shape)


NEAR_MISSES = [
    pytest.param(TwoConvs(), id="maximum of two convolutions"),
    pytest.param(Maxout(), id="maxout"),
    pytest.param(Gate(lambda y, x: y), id="squeeze-excite"),
    pytest.param(Gate(lambda y, x: torch.relu(y)), id="squeeze-excite, relu"),
    pytest.param(Gate(lambda y, x: torch.max(y, 0.1 * y)), id="squeeze-excite, leaky relu as a maximum"),
    pytest.param(Gate(lambda y, x: torch.relu(y + x)), id="squeeze-excite, shortcut, relu"),
    pytest.param(Normalised(), id="instance norm, leaky relu as a maximum"),
    pytest.param(Foreign(), id="coefficients of another tensor"),
    pytest.param(Attention(), id="attention"),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.min(a * x + b, c * x + d)), id="minimum"),
    pytest.param(ByCombination(lambda x, a, b, c, d: a * x + b), id="one dynamic line"),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.max(a * x + b, x * 0.1)), id="one of two lines is static"),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.max(x + b, x + d)), id="offsets only"),
    pytest.param(ByCombination(lambda x, a, b, c, d: torch.max(a * x * x + b, c * x + d)), id="a parabola"),
    pytest.param(ByCombination(lambda x, a, b, c, d: d - torch.relu(a * x - b) + c * x), id="a minimum by relu"),
]


@pytest.mark.parametrize("unit", NEAR_MISSES)
def test_near_misses(unit):
    assert find_dyrelu(traced(Images(unit), (1, *IMAGE[1:]))) == []


def test_tensors_are_named_only_where_a_line_is_just_them():
    def lines(x, a, b, c, d):
        return torch.max(a * x - b, (d - c * x) * 2)

    (site,) = find_dyrelu(traced(Images(ByCombination(lines)), (1, *IMAGE[1:])))
    assert (site.slopes, site.offsets) == ((None, None), (None, None))
    assert len(site.entries) == 4


def test_what_is_behind_a_unit_is_not_part_of_it():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.unit = Permuted(shared=False)

        def forward(self, x):
            y = self.unit(x)
            return torch.relu(y + x) * 2 + y.flatten(1).mean(1)[:, None, None, None]

    graph = traced(Images(Block()), (1, *IMAGE[1:]))
    (site,) = find_dyrelu(graph)
    assert {node.op for node in site.output.outputs} == {"Add", "Flatten"}


def test_two_units_of_one_input_are_two():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Dyhead(), Dyhead()

        def forward(self, x):
            return self.one(x) + self.two(x)

    sites = find_dyrelu(traced(Images(Pair()), (1, *IMAGE[1:])))
    assert [site.input.name for site in sites] == [sites[0].input.name] * 2
    assert len(sites) == 2


def test_a_unit_between_quantisers_is_found():
    """Q/DQ before the unit and inside its hyper function change no line."""
    graph = traced(Images(Dyhead()), (1, *IMAGE[1:]))
    (site,) = find_dyrelu(graph)
    scale = gs.Constant("s", onnx.numpy_helper.to_array(onnx.helper.make_tensor("s", 1, [], [0.1])))
    zero = gs.Constant("z", onnx.numpy_helper.to_array(onnx.helper.make_tensor("z", 3, [], [0])))
    hidden = next(node for node in site.hyper if node.op == "Relu").outputs[0]
    for number, tensor in enumerate((site.input, hidden)):
        codes, back = gs.Variable(f"q{number}"), gs.Variable(f"dq{number}")
        for reader in list(tensor.outputs):
            reader.inputs = [back if t is tensor else t for t in reader.inputs]
        graph.nodes.append(gs.Node("QuantizeLinear", f"Q{number}", inputs=[tensor, scale, zero], outputs=[codes]))
        graph.nodes.append(gs.Node("DequantizeLinear", f"DQ{number}", inputs=[codes, scale, zero], outputs=[back]))
    (found,) = find_dyrelu(graph.toposort())
    assert (found.variant, found.pieces, found.input.name) == ("B", 2, site.input.name)


def chain(length: int) -> gs.Graph:
    """Linear layers of vectors, each of which may start a hyper function."""
    x = onnx.helper.make_tensor_value_info("t0", 1, [1, 2])
    nodes = [onnx.helper.make_node("Gemm", [f"t{i}", "w"], [f"t{i + 1}"]) for i in range(length)]
    y = onnx.helper.make_tensor_value_info(f"t{length}", 1, [1, 2])
    weight = onnx.helper.make_tensor("w", 1, [2, 2], [1.0] * 4)
    return annotated(onnx.helper.make_model(onnx.helper.make_graph(nodes, "chain", [x], [y], [weight])))


def test_the_time_it_takes_is_in_proportion_to_the_graph(monkeypatch):
    reads = []
    original = dyrelu._Reader._read
    monkeypatch.setattr(dyrelu._Reader, "_read", lambda self, node: reads.append(node) or original(self, node))
    monkeypatch.setattr(dyrelu, "MAX_NODES", 32)
    counts = []
    for length in (200, 400):
        reads.clear()
        assert find_dyrelu(chain(length)) == []
        counts.append(len(reads))
    assert counts[1] <= 2.2 * counts[0]
    assert counts[1] > 400  # it was looked at
