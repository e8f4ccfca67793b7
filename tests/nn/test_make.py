"""What every activation must bear, whoever made it: training, copying, compiling, exporting, being swapped in."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.export import DynamicAxis, ExampleInput, export_model  # noqa: E402
from relu_deploy.graph import all_nodes, load_model  # noqa: E402
from relu_deploy.nn.make import CHANNELWISE, EITHER, NAMES, activation  # noqa: E402
from relu_deploy.nn.swap import channelwise, replace_activations  # noqa: E402

pytestmark = pytest.mark.torch

EVERY = pytest.mark.parametrize("name", NAMES)
LAYOUTS = pytest.mark.parametrize(("axis", "shape"), [(1, (2, 4, 3, 5)), (-1, (2, 5, 4))], ids=["NCHW", "NTC"])


def trained(name: str, axis: int = 1, *, channels: int = 4) -> nn.Module:
    """In evaluation mode, with every parameter away from its start."""
    torch.manual_seed(0)
    unit = activation(name, channels, axis)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return unit.eval()


class Side(nn.Module):
    """Every activation beside the others, so that compilers and exporters are started once."""

    def __init__(self, axis: int, names=NAMES) -> None:
        super().__init__()
        self.units = nn.ModuleDict({name: trained(name, axis) for name in names})

    def forward(self, x):
        return tuple(unit(x) for unit in self.units.values())


def around(shape, dtype=torch.float64):
    """Random points, none in the stretch below 0 where HeLU's gradient is not that of its value."""
    x = 2 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(3))
    return torch.where((x < 0) & (x > -0.1), x - 0.2, x)


@EVERY
@LAYOUTS
def test_gradcheck_of_input_and_parameters(name, axis, shape):
    unit = trained(name, axis).double()
    names = [key for key, _ in unit.named_parameters()]

    def function(x, *values):
        return torch.func.functional_call(unit, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (around(shape).requires_grad_(), *unit.parameters()), fast_mode=True)


@EVERY
def test_state_and_copies(name):
    unit, x = trained(name), around((2, 4, 3, 3), torch.float32)
    with torch.no_grad():
        want = unit(x)
        fresh = activation(name, 4).eval()
        fresh.load_state_dict(unit.state_dict())
        assert torch.equal(fresh(x), want)
        assert torch.equal(copy.deepcopy(unit)(x), want)
    assert type(unit).__name__ in repr(unit)


@EVERY
@pytest.mark.filterwarnings("error")
def test_half_precision(name):
    unit, x = trained(name), around((2, 4, 3, 3), torch.float32)
    with torch.no_grad():
        want = unit(x)
        with torch.autocast("cpu", torch.bfloat16):
            low = unit(x.bfloat16())
            assert unit(x).isfinite().all()
        assert low.dtype == torch.bfloat16
        # 8 bits a number, a handful of operations.
        torch.testing.assert_close(low.float(), want, rtol=0.05, atol=0.05)
        own = copy.deepcopy(unit).bfloat16()(x.bfloat16())
        assert own.dtype == torch.bfloat16


@EVERY
def test_memory_format_does_not_change_values(name):
    unit, x = trained(name).double(), around((2, 4, 3, 5))
    with torch.no_grad():
        other = unit(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(other, unit(x), rtol=0, atol=1e-13)


# What is made of plain operators here; torch's own activations are the exporters' business. The newer exporter takes a
# second or two for each of them, so it gets those that ask most of it.
UNITS = {
    ("torchscript", 18, 1): ("rrelu", "golu", "smelu", "aptx", "helu", "relu2", "sau", "apl", "pau", "maxout", "frelu",
                             "se_relu", "dy_relu_a", "dy_relu_b", "dy_relu_c"),
    ("torchscript", 18, -1): ("prelu", "apl", "maxout", "frelu", "se_relu", "dy_relu_a", "dy_relu_b", "dy_relu_c"),
    ("dynamo", 20, 1): ("smelu", "maxout", "frelu", "dy_relu_c"),
    ("dynamo", 18, -1): ("prelu", "dy_relu_a", "dy_relu_c"),
}  # fmt: skip


@LAYOUTS
def test_compiled_whole_with_the_same_gradients(axis, shape):
    names = UNITS["torchscript", 18, 1] if axis == 1 else UNITS["dynamo", 18, -1]
    side, x = Side(axis, names), around(shape, torch.float32)
    twin = copy.deepcopy(side)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for module in (side, compiled):
        sum(y.square().sum() for y in module(x)).backward()
    for (name, mine), theirs in zip(side.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(theirs.grad, mine.grad, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    exported = torch.export.export(side, (x,), strict=False).module()
    for name, mine, *others in zip(names, side(x), compiled(x), exported(x), strict=True):
        for theirs in others:
            torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("exporter", "opset", "axis"), UNITS)
def test_onnx_runtime_agrees_at_every_size(exporter, opset, axis, tmp_path):
    names, shape = UNITS[exporter, opset, axis], (2, 4, 6, 5) if axis == 1 else (2, 5, 4)
    free = (0, 2, 3) if axis == 1 else (0, 1)
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'relu-deploy[torch]'")
    given = [ExampleInput("x", shape, low=-4.0, high=4.0)]
    dynamic = [DynamicAxis("x", place, 2 if place else 1, 9) for place in free]
    path = tmp_path / "side.onnx"
    report = export_model(Side(axis, names), given, path, dynamic=dynamic, opset=opset, exporter=exporter)
    assert not [note for note in report.notes if "trace" in note], report.notes
    nodes = list(all_nodes(load_model(path).graph))
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    assert not {"If", "Loop", "Scan"} & {node.op_type for node in nodes}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.act, self.down = nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.down(self.act(self.up(x)))


MODELS = {
    "cnn": lambda: (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 3), nn.GELU(),
                                  nn.Conv2d(4, 2, 1)), torch.randn(2, 3, 8, 8)),
    "transformer": lambda: (nn.Sequential(Block(), Block()), torch.randn(2, 5, 6)),
}  # fmt: skip


@EVERY
@pytest.mark.parametrize("kind", MODELS)
def test_takes_the_place_of_an_activation_and_trains(name, kind):
    torch.manual_seed(0)
    model, x = MODELS[kind]()
    units = channelwise(lambda channels, axis: activation(name, channels, axis))
    student, report = replace_activations(model, units, example=x)
    assert len(report.replaced) == 2
    assert report.verified
    student.train()
    for _ in range(2):
        student(x).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in student.parameters())


def test_pieces_and_other_options_arrive():
    assert activation("dy_relu_b", 8, pieces=3).pieces == 3
    assert activation("leaky_relu", negative_slope=0.3).negative_slope == 0.3
    assert activation("pwlu", 8, -1, intervals=6).intervals == 6
    assert activation("prelu", 8, -1, init=0.5).weight.shape == (8,)
    assert type(activation("prelu", 8)) is nn.PReLU
    assert activation("prelu_shared", 8).weight.shape == (1,)
    assert activation("gelu_tanh").approximate == "tanh"


@pytest.mark.parametrize("name", EITHER)
def test_a_layer_may_share_one_function(name):
    unit = activation(name)
    assert unit(torch.randn(2, 7)).shape == (2, 7)
    assert unit(torch.randn(2, 3, 5)).shape == (2, 3, 5)


@pytest.mark.parametrize("name", CHANNELWISE)
def test_missing_channels_are_said(name):
    with pytest.raises(TrainingError, match=f"{name} needs to know its channels"):
        activation(name)


def test_an_unknown_name_is_answered_with_near_ones():
    with pytest.raises(TrainingError, match="no activation 'leakyrelu'") as caught:
        activation("leakyrelu")
    assert "leaky_relu" in str(caught.value.hint)
    with pytest.raises(TrainingError, match="no activation 'GELU'") as caught:
        activation("GELU")
    assert str(caught.value.hint).startswith("gelu")


def test_an_unknown_option_is_answered_with_the_known_ones():
    with pytest.raises(TrainingError, match="dy_relu_b has no option 'peices'") as caught:
        activation("dy_relu_b", 8, peices=3)
    assert "pieces" in str(caught.value.hint)
    with pytest.raises(TrainingError, match="silu has no option 'beta'"):
        activation("silu", beta=1.0)
