"""DY-ReLU as this project and as strangers write it in torch, in small networks."""

from __future__ import annotations

import io
import warnings

import onnx
import onnx_graphsurgeon as gs
import torch
from torch import nn

from relu_deploy.graph import import_graph, name_nodes
from relu_deploy.passes.shapes import annotate

CHANNELS = 8


def perturbed(model: nn.Module, seed: int = 0) -> nn.Module:
    """A unit starts as ReLU; this one has left its start, and so has what surrounds it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def annotated(model: onnx.ModelProto) -> gs.Graph:
    name_nodes(model.graph)
    graph = import_graph(model)
    annotate(graph, model)
    return graph


def traced(model: nn.Module, shape: tuple[int, ...], opset: int = 17) -> gs.Graph:
    """As torch's older exporter writes it, with nothing of this project in between."""
    stream = io.BytesIO()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter's age
        torch.onnx.export(model.eval(), (torch.randn(shape),), stream, opset_version=opset, dynamo=False)
    return annotated(onnx.load_from_string(stream.getvalue()))


class Images(nn.Module):
    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[m for u in units for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), u)])
        self.head = nn.Conv2d(CHANNELS, 2, 1)

    def forward(self, x):
        return self.head(self.layers(x))


class Tokens(nn.Module):
    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.up, self.unit, self.down = nn.Linear(CHANNELS, 16), unit, nn.Linear(16, CHANNELS)

    def forward(self, x):
        return self.down(self.unit(self.up(x)))


IMAGE, TOKENS = (2, CHANNELS, 6, 5), (2, 7, CHANNELS)


class Hyper(nn.Module):
    """Pool and two layers; what strangers' units share."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(CHANNELS, 4), nn.Linear(4, outputs)

    def forward(self, x):
        return 2 * torch.sigmoid(self.two(torch.relu(self.one(x.mean((2, 3)))))) - 1


class Permuted(nn.Module):
    """The widespread torch port: channels moved last, coefficients stacked, a maximum over the stack."""

    def __init__(self, shared: bool, pieces: int = 2) -> None:
        super().__init__()
        self.shared, self.pieces = shared, pieces
        self.hyper = Hyper(2 * pieces * (1 if shared else CHANNELS))
        self.register_buffer("lambdas", torch.tensor([1.0] * pieces + [0.5] * pieces))
        self.register_buffer("init", torch.tensor([1.0] + [0.0] * (2 * pieces - 1)))

    def forward(self, x):
        k = self.pieces
        theta = self.hyper(x)
        if self.shared:
            c = theta.view(-1, 2 * k) * self.lambdas + self.init
            moved = x.transpose(0, -1).unsqueeze(-1)
            return torch.max(moved * c[:, :k] + c[:, k:], dim=-1)[0].transpose(0, -1)
        c = theta.view(-1, CHANNELS, 2 * k) * self.lambdas + self.init
        moved = x.permute(2, 3, 0, 1).unsqueeze(-1)
        return torch.max(moved * c[:, :, :k] + c[:, :, k:], dim=-1)[0].permute(2, 3, 0, 1)


class Dyhead(nn.Module):
    """As detection heads have it: convolutions on the pooled map, a hard sigmoid, four maps split off."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.one, self.two = nn.Conv2d(CHANNELS, 4, 1), nn.Conv2d(4, 4 * CHANNELS, 1)

    def forward(self, x):
        y = nn.functional.hardsigmoid(self.two(torch.relu(self.one(self.pool(x)))))
        a1, b1, a2, b2 = torch.split(y, CHANNELS, dim=1)
        return torch.max(x * ((a1 - 0.5) * 2 + 1) + (b1 - 0.5), x * ((a2 - 0.5) * 2) + (b2 - 0.5))


class ByCombination(nn.Module):
    """One hyper function, and a way to put two lines together."""

    def __init__(self, combine) -> None:
        super().__init__()
        self.hyper, self.combine = Hyper(4 * CHANNELS), combine

    def forward(self, x):
        return self.combine(x, *(part[:, :, None, None] for part in self.hyper(x).split(CHANNELS, 1)))


class Attended(nn.Module):
    """Variant C as the paper writes it: the attention inside every coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.hyper, self.map = Hyper(4 * CHANNELS), nn.Conv2d(CHANNELS, 1, 1)

    def forward(self, x):
        a1, b1, a2, b2 = (part[:, :, None, None] for part in self.hyper(x).chunk(4, 1))
        z = self.map(x)
        pi = (torch.softmax(z.flatten(1) / 10, 1) * (z.shape[2] * z.shape[3] / 3)).clamp(max=1).view_as(z)
        return torch.max(pi * a1 * x + pi * b1, pi * a2 * x + pi * b2)
