"""Blends of this package as torch exports them: how far from ReLU they are, whatever the exporter wrote."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnx
import pytest

from relu_deploy.graph import count_ops, load_model
from relu_deploy.passes.run import rewrite

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytestmark = pytest.mark.torch

# The largest distance of each from ReLU.
GAPS = {"SiLU": 0.278465, "GELU": 0.169971, "Mish": 0.308843, "ELU": 1.0, "Hardswish": 0.375}


def export(module: torch.nn.Module, path: Path, *, dynamo: bool, training: bool = False) -> onnx.ModelProto:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), module, torch.nn.Conv2d(4, 2, 1))
    options = {"external_data": False} if dynamo else {"input_names": ["x"]}
    if training:
        options["training"] = torch.onnx.TrainingMode.TRAINING
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        torch.onnx.export(
            net.train(training), (torch.randn(2, 3, 8, 8),), str(path), dynamo=dynamo, opset_version=18, verbose=False,
            **options,
        )  # fmt: skip
    return load_model(path)


@pytest.mark.parametrize(("act", "dynamo"), [*((act, False) for act in sorted(GAPS)), ("SiLU", True), ("GELU", True)])
def test_a_blend_is_bounded_as_it_was_written(tmp_path, act, dynamo):
    from relu_deploy.nn.blend import Blend

    torch.manual_seed(0)
    gamma = 0.02 if act == "GELU" else 0.01  # PEA at alpha = 0.98, SAT at gamma = 0.01
    model = export(Blend(getattr(torch.nn, act)(), gamma=gamma), tmp_path / "net.onnx", dynamo=dynamo)
    gap = gamma * GAPS[act]
    after, report = rewrite(model, collapse_tolerance=gap * 1.02)
    assert count_ops(after) == {"Conv": 2, "Relu": 1}
    assert report.approximation is not None
    (row,) = report.approximation.collapses
    assert gap * 0.999 <= row.eps <= gap * 1.01
    assert row.measured is not None
    assert row.measured <= row.eps + 1e-5
    stays, report = rewrite(model, collapse_tolerance=gap * 0.98)
    assert count_ops(stays)["Conv"] == 2
    assert len(stays.graph.node) > 3
    reasons = [skip.reason for entry in report.passes for skip in entry.skipped]
    assert any("more than the tolerance" in reason for reason in reasons), reasons


class Drawn(torch.nn.Module):
    """PEA's stochastic form as others write it: one draw an element, by ``rand_like`` or by ``bernoulli``."""

    def __init__(self, kind: str, alpha: float) -> None:
        super().__init__()
        self.kind, self.alpha = kind, alpha

    def forward(self, x):
        relu, smooth = torch.relu(x), torch.nn.functional.gelu(x)
        if self.kind == "rand_like":
            return torch.where(torch.rand_like(x) < self.alpha, relu, smooth)
        mask = torch.bernoulli(torch.full_like(x, self.alpha))
        return mask * relu + (1 - mask) * smooth


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize("kind", ["rand_like", "bernoulli", "one draw a layer"])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_stochastic_blend_that_was_exported_in_training(tmp_path, kind, dynamo, alpha):
    """At alpha = 1 nothing is left to chance, and it is ReLU; at 0.5 it stays."""
    from relu_deploy.nn.blend import StochasticBlend

    module = StochasticBlend(torch.nn.GELU(), gamma=1 - alpha) if kind == "one draw a layer" else Drawn(kind, alpha)
    model = export(module, tmp_path / "net.onnx", dynamo=dynamo, training=True)
    after, report = rewrite(model)
    if alpha == 1:
        assert count_ops(after) == {"Conv": 2, "Relu": 1}, [entry.skipped for entry in report.passes]
        assert report.verification is not None
        assert report.verification.samples > 0
    else:
        assert len(after.graph.node) > 4
