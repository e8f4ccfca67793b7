# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Nets that torch exported, with what blending leaves behind in them."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from relu_deploy.graph import count_ops, load_model
from relu_deploy.passes.run import rewrite

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytestmark = pytest.mark.torch


class Blend(torch.nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("gamma", torch.tensor(0.0))

    def forward(self, x):
        relu, silu = torch.relu(x), torch.nn.functional.silu(x)
        if self.kind == "sat":
            return self.gamma * silu + (1 - self.gamma) * relu
        if self.kind == "pea":
            return (1 - self.gamma) * relu + (1 - (1 - self.gamma)) * torch.nn.functional.gelu(x)
        if self.kind == "lerp":
            return torch.lerp(silu, relu, 1 - self.gamma)
        return torch.where(x > 0, x, self.gamma * x)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        kinds = ("sat", "pea", "lerp", "where")
        self.layers = torch.nn.ModuleList(torch.nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(4))
        self.acts = torch.nn.ModuleList(Blend(kind) for kind in kinds)
        self.norm = torch.nn.BatchNorm2d(8)
        self.prelu = torch.nn.PReLU(8, init=0.0)

    def forward(self, x):
        for layer, act in zip(self.layers, self.acts, strict=True):
            x = act(self.norm(layer(x)))
        return self.prelu(x + 1).mean((2, 3))


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 11)])
def test_every_residue_of_an_exported_net_becomes_relu(tmp_path: Path, dynamo, opset):
    torch.manual_seed(0)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            Net().eval(), (torch.randn(2, 3, 8, 8),), str(path), dynamo=dynamo, opset_version=opset, verbose=False,
            optimize=False, external_data=dynamo,
            **({"dynamic_shapes": ({0: torch.export.Dim("b")},)} if dynamo else {"input_names": ["x"], "dynamic_axes": {"x": {0: "b"}}}),
        )  # fmt: skip
    after, report = rewrite(load_model(path))
    counts = count_ops(after)
    assert counts.get("Relu") == 5, report
    assert counts["Conv"] == 4
    assert not set(counts) & {"Sigmoid", "Erf", "PRelu", "Where", "BatchNormalization", "Gelu", "LeakyRelu"}
    assert report.verification is not None
    assert report.verification.samples == 3
    assert rewrite(after)[0] is after
