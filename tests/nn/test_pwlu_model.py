from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.pwlu import PWLU, StaticPWLU  # noqa: E402
from relu_deploy.nn.pwlu_model import (  # noqa: E402
    alignment,
    collect_statistics,
    input_statistics,
    realign,
    to_static,
    use_kernel,
)

pytestmark = pytest.mark.torch


class Twice(nn.Module):
    """One unit under two names, and another in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = PWLU(4)
        self.more = nn.ModuleList([PWLU()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more[0](self.second(2 * self.first(x)))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), PWLU(4), nn.Sequential(nn.Linear(4, 4), PWLU()))


def test_phases_of_all_units_are_idempotent():
    model = network()
    assert realign(model) == []  # nothing collects
    assert collect_statistics(model) == ["1", "2.1"]
    model(torch.randn(8, 4))
    assert collect_statistics(model) == []
    assert model[1].batches.tolist() == [1] * 4  # and was not started afresh
    model[1].realign()
    assert realign(model) == ["2.1"]
    assert not any(unit.collecting for unit in (model[1], model[2][1]))
    assert collect_statistics(nn.Linear(2, 2)) == realign(nn.Linear(2, 2)) == []
    assert collect_statistics(PWLU(2)) == [""]


def test_alignment_of_collected_statistics():
    model = nn.Sequential(PWLU(2), PWLU(1))
    assert all(math.isnan(value) for value in alignment(model).values())  # nothing seen
    collect_statistics(model)
    # Means 0 and 1, stds 1 and 1: [-3, 3] with [-3, 3] and with [-2, 4].
    model[0](torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
    found = alignment(model)
    assert found["0"] == pytest.approx((1 + 5 / 7) / 2)
    assert math.isnan(found["1"])
    realign(model)
    assert alignment(model)["0"] == pytest.approx(1.0, rel=1e-6)


def test_alignment_of_a_trained_model_with_what_reaches_its_units_now():
    model = network()
    batches = [torch.randn(n, 4) + 1 for n in (8, 3, 0, 21)]
    statistics = input_statistics(model, lambda: [model(batch) for batch in batches])
    everything = model[0](torch.cat(batches)).detach().double()
    np.testing.assert_allclose(statistics["1"][0], everything.mean(0), rtol=1e-6)
    np.testing.assert_allclose(statistics["1"][1], everything.std(0, correction=0), rtol=1e-6)
    inner = model[2][0](model[1](model[0](torch.cat(batches)))).detach().double()
    np.testing.assert_allclose(statistics["2.1"][0], inner.mean().reshape(1), rtol=1e-5)
    found = alignment(model, statistics)
    assert list(found) == ["1", "2.1"]
    assert found["1"] == pytest.approx(model[1].iou(*statistics["1"]).mean().item())
    assert not model[1]._forward_pre_hooks
    with pytest.raises(TrainingError, match=r"no statistics of 2\.1"):
        alignment(model, {"1": statistics["1"]})


def test_hooks_are_taken_away_when_the_model_fails():
    model = network()
    with pytest.raises(TrainingError, match="got input of shape"):
        input_statistics(model[1], lambda: model[1](torch.zeros(2, 5)))
    assert not model[1]._forward_pre_hooks


@pytest.mark.parametrize("training", [True, False])
def test_to_static_copies_and_computes_the_same(training):
    model = Twice().train(training)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    static = to_static(model)
    assert isinstance(static, Twice)
    assert isinstance(model.first, PWLU)
    assert isinstance(static.first, StaticPWLU)
    assert static.first is static.second
    assert isinstance(static.more[0], StaticPWLU)
    assert not list(static.parameters())
    assert static.training is static.first.training is training
    x = 3 * torch.randn(16, 4)
    assert torch.equal(static(x), model(x))


def test_to_static_of_a_unit_and_of_a_model_without():
    unit = PWLU(2).eval()
    alone = to_static(unit)
    assert isinstance(alone, StaticPWLU)
    assert not alone.training
    plain = nn.Sequential(nn.ReLU())
    copied = to_static(plain)
    assert copied is not plain
    assert isinstance(copied[0], nn.ReLU)


def test_use_kernel_counts_units_once():
    model = Twice()
    assert use_kernel(model, "blocks") == 2
    assert use_kernel(to_static(model), "blocks") == 2
    assert use_kernel(nn.ReLU(), "blocks") == 0
