from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.blend import Blend, set_gamma  # noqa: E402

pytestmark = pytest.mark.torch

X = torch.linspace(-6, 6, 97)


@pytest.mark.parametrize("act", [nn.SiLU(), nn.GELU(), nn.Mish(), nn.ELU(), nn.Hardswish()])
def test_ends_are_the_activation_and_relu(act):
    assert torch.equal(Blend(act, gamma=1.0)(X), act(X))
    assert torch.equal(Blend(act, gamma=0.0)(X), torch.relu(X))


def test_is_linear_in_gamma():
    blend = Blend(nn.SiLU(), gamma=0.3)
    # By hand at x = -1: silu = -1 / (1 + e) = -0.26894; 0.3 of it, and nothing of relu.
    assert blend(torch.tensor([-1.0])).item() == pytest.approx(-0.0806824, abs=1e-6)
    assert blend(torch.tensor([1.0])).item() == pytest.approx(0.3 * 0.7310586 + 0.7, abs=1e-6)
    assert blend.alpha == pytest.approx(0.7)


def test_alpha_is_the_other_side_of_gamma():
    blend = Blend(nn.SiLU())
    blend.set_alpha(0.25)
    assert float(blend.gamma) == 0.75
    assert blend.alpha == 0.25


def test_gamma_is_saved_and_takes_no_gradient():
    blend = Blend(nn.PReLU(), gamma=0.5)
    assert dict(blend.named_parameters()).keys() == {"act.weight"}
    other = Blend(nn.PReLU())
    other.load_state_dict(blend.state_dict())
    assert float(other.gamma) == 0.5
    assert float(copy.deepcopy(blend).gamma) == 0.5
    assert "gamma=0.5" in repr(blend)


def test_gradient_is_the_blend_of_gradients():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True) + 0.1
    assert torch.autograd.gradcheck(Blend(nn.SiLU(), gamma=0.4).double(), (x,))


def test_half_precision_stays_half_precision():
    assert Blend(nn.SiLU(), gamma=0.5)(X.to(torch.bfloat16)).dtype == torch.bfloat16


def test_set_gamma_reaches_every_blend():
    model = nn.Sequential(Blend(nn.SiLU()), nn.Sequential(Blend(nn.GELU()), nn.ReLU()))
    assert set_gamma(model, 0.2) == 2
    assert [round(float(m.gamma), 6) for m in model.modules() if isinstance(m, Blend)] == [0.2, 0.2]


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan"), float("inf")])
def test_gamma_outside_the_unit_interval_is_refused(gamma):
    blend = Blend(nn.SiLU(), gamma=0.5)
    for call in (
        lambda: Blend(nn.SiLU(), gamma=gamma),
        lambda: set_gamma(blend, gamma),
        lambda: blend.set_alpha(gamma),
    ):
        with pytest.raises(TrainingError, match=r"must lie in \[0, 1\]"):
            call()
    assert float(blend.gamma) == 0.5
