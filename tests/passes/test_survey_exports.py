"""Networks that torch's two exporters wrote: as many activations as the modules that torch calls."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from relu_deploy.graph import load_model
from relu_deploy.passes import roles
from relu_deploy.passes.survey import Survey, survey

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytestmark = pytest.mark.torch
EXPORTERS = [(True, 18), (True, 20), (False, 9), (False, 12), (False, 14), (False, 20)]


def exported(net: torch.nn.Module, example: torch.Tensor, path: Path, *, dynamo: bool, opset: int) -> Survey:
    """The survey of what an exporter writes, with a dynamic batch."""
    axes = {"dynamic_axes": {"x": {0: "n"}}, "input_names": ["x"]}
    shapes = {"dynamic_shapes": ({0: torch.export.Dim("n")},), "external_data": False}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            net.eval(), (example,), str(path), dynamo=dynamo, opset_version=opset, verbose=False,
            **(shapes if dynamo else axes),
        )  # fmt: skip
    return survey(load_model(path))


class Chain(torch.nn.Module):
    """A convolution before each activation, and one behind the last."""

    def __init__(self, activations: list[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(8, 8, 1) for _ in range(len(activations) + 1))
        self.modules_ = torch.nn.ModuleList(a for a in activations if isinstance(a, torch.nn.Module))
        self.activations = activations

    def forward(self, x):
        for layer, activation in zip(self.layers[:-1], self.activations, strict=True):
            x = activation(layer(x))
        return self.layers[-1](x)


nn, F = torch.nn, torch.nn.functional


def prelu(slopes: list[float]) -> torch.nn.PReLU:
    module = torch.nn.PReLU(len(slopes))
    with torch.no_grad():
        module.weight.copy_(torch.tensor(slopes))
    return module


ACTIVATIONS: list[tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = [
    ("relu", nn.ReLU()), ("relu", F.relu), ("relu", lambda x: torch.clamp(x, min=0)),
    ("relu", lambda x: torch.where(x > 0, x, torch.zeros_like(x))),
    ("relu6", nn.ReLU6()), ("relu6", F.relu6), ("relu6", lambda x: torch.clamp(x, 0, 6)),
    ("leaky_relu", nn.LeakyReLU(0.2)), ("prelu", nn.PReLU()), ("prelu", nn.PReLU(8)),
    ("prelu", prelu([0.1, 0.2, 0.3, 0.4, 0.5, 0.0, -0.1, 1.0])),
    ("silu", nn.SiLU()), ("silu", F.silu), ("silu", lambda x: x * torch.sigmoid(x)),
    ("silu", lambda x: x / (1 + torch.exp(-x))), ("swish", lambda x: x * torch.sigmoid(1.5 * x)),
    ("gelu_erf", nn.GELU()), ("gelu_erf", F.gelu),
    ("gelu_erf", lambda x: x * 0.5 * (1.0 + torch.erf(x / 2**0.5))),
    ("gelu_tanh", nn.GELU(approximate="tanh")),
    ("gelu_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))),
    ("gelu_sigmoid", lambda x: x * torch.sigmoid(1.702 * x)),
    ("hardswish", nn.Hardswish()), ("hardswish", lambda x: x * F.relu6(x + 3) / 6),
    ("hard_sigmoid", nn.Hardsigmoid()), ("mish", nn.Mish()), ("mish", lambda x: x * torch.tanh(F.softplus(x))),
    ("elu", nn.ELU()), ("elu", nn.ELU(0.5)), ("selu", nn.SELU()), ("celu", nn.CELU(2.0)),
    ("softplus", nn.Softplus()), ("softplus", nn.Softplus(beta=2)), ("softsign", nn.Softsign()),
    ("tanh", nn.Tanh()), ("sigmoid", nn.Sigmoid()), ("log_sigmoid", nn.LogSigmoid()),
    ("tanhshrink", nn.Tanhshrink()), ("clip", nn.Hardtanh()), ("relu_squared", lambda x: F.relu(x) ** 2),
    ("relu_squared", lambda x: torch.square(F.relu(x))),
]  # fmt: skip


@pytest.mark.parametrize(("dynamo", "opset"), EXPORTERS)
def test_every_activation_of_torch(tmp_path, dynamo, opset):
    torch.manual_seed(0)
    # torch cannot write CELU before opset 12.
    chosen = [(kind, act) for kind, act in ACTIVATIONS if kind != "celu" or opset >= 12]
    net = Chain([activation for _, activation in chosen])
    found = exported(net, torch.randn(2, 8, 5, 5), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    assert [site.kind for site in found.activations] == [kind for kind, _ in chosen]
    assert found.left_alone == {}
    assert all(site.after is not None and site.after.op == "Conv" for site in found.activations)


class Gates(torch.nn.Module):
    """Squeeze-excite, GLU, attention and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.halves, self.attention = nn.Linear(8, 16), nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        x = F.glu(self.halves(x.flatten(2).transpose(1, 2)))
        x, _ = self.attention(x, x, x)
        return torch.sigmoid(self.head(x.mean(1)))


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 14), (False, 18)])
def test_gates_of_torch(tmp_path, dynamo, opset):
    found = exported(Gates(), torch.randn(2, 3, 8, 8), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    assert found.counts == {"silu": 2}
    reasons = Counter(site.left_alone for site in found.activations if site.left_alone)
    assert reasons == {roles.SQUEEZE_EXCITE: 1, roles.GLU: 1, roles.ATTENTION: 1, roles.HEAD: 1}


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 14)])
def test_recurrent_layers_of_torch(tmp_path, dynamo, opset):
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(torch.relu(self.rnn(x)[0]))

    found = exported(Net(), torch.randn(2, 4, 6), tmp_path / "net.onnx", dynamo=dynamo, opset=opset)
    assert (found.counts, found.left_alone) == ({"relu": 1}, {"gru": 1})


def called(net: torch.nn.Module, example: torch.Tensor) -> Counter[str]:
    """Leaf modules that torch calls, by the name of their class."""
    counts: Counter[str] = Counter()
    leaves = [module for module in net.modules() if not list(module.children())]
    handles = [m.register_forward_hook(lambda module, *_: counts.update([type(module).__name__])) for m in leaves]
    with torch.no_grad():
        net(example)
    for handle in handles:
        handle.remove()
    return counts


class Logits(torch.nn.Module):
    """One tensor out of a model of transformers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


TEXT = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
IMAGE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
         "image_size": 32, "patch_size": 8}  # fmt: skip
WINDOWS = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2]}
SMALL = {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.5, "hidden_dim": 320}
GELU = {"GELUActivation": "gelu_erf"}
# Model and configuration, its options, modules of torch that are counted, those that are squeeze-excite gates.
MODELS: dict[str, tuple[str, dict[str, object], dict[str, str], str]] = {
    "BertForSequenceClassification": ("BertConfig", TEXT, {**GELU, "Tanh": "tanh"}, ""),
    "ElectraForSequenceClassification": ("ElectraConfig", TEXT, GELU, ""),
    "DeiTForImageClassification": ("DeiTConfig", IMAGE, GELU, ""),
    "ViTForImageClassification": ("ViTConfig", IMAGE, GELU, ""),
    "SwinForImageClassification": ("SwinConfig", WINDOWS, GELU, ""),
    "ConvNextForImageClassification": ("ConvNextConfig", {**STAGES, "num_stages": 2}, GELU, ""),
    "ResNetForImageClassification": ("ResNetConfig", {**STAGES, "embedding_size": 8}, {"ReLU": "relu"}, ""),
    "MobileNetV2ForImageClassification": (
        "MobileNetV2Config", {"depth_multiplier": 0.35, "image_size": 32}, {"ReLU6": "relu6"}, "",
    ),
    "EfficientNetForImageClassification": ("EfficientNetConfig", SMALL, {"SiLU": "silu"}, "Sigmoid"),
}  # fmt: skip
# torch's newer exporter takes seconds a model, and does not write Swin.
NEWER = ("BertForSequenceClassification", "ConvNextForImageClassification", "EfficientNetForImageClassification")


@pytest.mark.parametrize(("name", "dynamo"), [*((name, False) for name in MODELS), *((name, True) for name in NEWER)])
def test_models_of_transformers(tmp_path, name, dynamo, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: 'relu-deploy[dev]'")
    config, options, kinds, gate = MODELS[name]
    torch.manual_seed(0)
    net = Logits(getattr(transformers, name)(getattr(transformers, config)(**options)).eval())
    example = torch.arange(14).reshape(2, 7) if "vocab_size" in options else torch.randn(2, 3, 32, 32)
    modules = called(net, example)
    assert modules.keys() >= kinds.keys()
    with contextlib.redirect_stderr(io.StringIO()):
        found = exported(net, example, tmp_path / "net.onnx", dynamo=dynamo, opset=18 if dynamo else 14)
    assert found.counts == {kind: modules[module] for module, kind in kinds.items()}
    assert sum(site.left_alone == roles.SQUEEZE_EXCITE for site in found.activations) == modules[gate]


class Units(torch.nn.Module):
    """Learned and dynamic activations of this project, each behind a convolution."""

    def __init__(self) -> None:
        from relu_deploy.nn.make import activation

        super().__init__()
        names = ("dy_relu_a", "dy_relu_b", "dy_relu_c", "pwlu", "apl", "se_relu", "smelu", "golu", "sau")
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(len(names) + 1))
        self.units = nn.ModuleList(activation(name, 8) for name in names)
        with torch.no_grad():
            for parameter in self.units.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x):
        for layer, unit in zip(self.layers[:-1], self.units, strict=True):
            x = unit(layer(x))
        return self.layers[-1](x)


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_units_of_this_project(tmp_path, exporter):
    from relu_deploy.export import export_model
    from relu_deploy.export.specs import ExampleInput

    path = tmp_path / "net.onnx"
    export_model(Units().eval(), (ExampleInput("x", (2, 8, 6, 6)),), path, exporter=exporter, opset=18)
    found = survey(load_model(path))
    # se_relu has a ReLU before the squeeze and one inside it; DY-ReLU C weighs places by a softmax.
    kinds = {"dy_relu": 3, "relu": 2, "pwlu": 1, "piecewise_linear": 1, "smelu": 1, "golu": 1, "sau": 1}
    assert found.counts == kinds, found.activations
    assert found.left_alone == {"sigmoid": 1, "softmax": 1}
