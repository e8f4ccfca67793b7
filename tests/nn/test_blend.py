from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.blend import Blend, StochasticBlend, finish, set_gamma  # noqa: E402
from relu_deploy.nn.swap import relu, replace_activations  # noqa: E402

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


@pytest.mark.parametrize(("gamma", "function"), [(1.0, nn.functional.silu), (0.0, torch.relu)])
def test_a_stochastic_blend_is_exact_at_both_ends(gamma, function):
    blend = StochasticBlend(nn.SiLU(), gamma=gamma)
    for _ in range(20):
        assert torch.equal(blend(X), function(X))
    assert torch.equal(blend.eval()(X), function(X))


def test_a_stochastic_blend_draws_once_a_call_with_probability_gamma():
    blend = StochasticBlend(nn.SiLU(), gamma=0.3)
    ends = nn.functional.silu(X), torch.relu(X)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [blend(X) for _ in range(2000)]
    assert all(torch.equal(y, ends[0]) or torch.equal(y, ends[1]) for y in drawn)
    smooth = sum(torch.equal(y, ends[0]) for y in drawn) / len(drawn)
    assert abs(smooth - 0.3) < 0.04  # four standard deviations of 2000 draws


def test_a_stochastic_blend_in_evaluation_is_the_expectation_and_draws_nothing():
    blend = StochasticBlend(nn.SiLU(), gamma=0.3).eval()
    before = torch.get_rng_state()
    assert torch.equal(blend(X), Blend(nn.SiLU(), gamma=0.3)(X))
    assert torch.equal(torch.get_rng_state(), before)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = Blend(nn.SiLU(), gamma=0.0)
        self.layers = nn.ModuleList([nn.Linear(4, 4), self.act, nn.ModuleList([Blend(nn.GELU(), gamma=0.0)])])

    def forward(self, x):
        return self.layers[2][0](self.layers[0](self.act(x)))


def test_finish_reaches_lists_and_keeps_shared_modules_shared():
    model = Shared().eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    assert sorted(finish(model)) == ["act", "layers.1", "layers.2.0"]
    assert model.act is model.layers[1]
    assert type(model.layers[2][0]) is nn.ReLU
    assert not model.act.training
    assert torch.equal(model(x), expected)


def test_finish_changes_nothing_if_one_blend_is_not_relu_yet():
    model = nn.Sequential(Blend(nn.SiLU(), gamma=0.0), Blend(nn.SiLU(), gamma=0.1))
    with pytest.raises(TrainingError, match=r"not ReLU yet: 1 \(gamma 0\.1\)"):
        finish(model)
    assert type(model[0]) is Blend
    with pytest.raises(TrainingError, match="nothing holds it"):
        finish(Blend(nn.SiLU(), gamma=0.0))


@pytest.mark.parametrize("unit", [Blend, relu])
def test_the_fast_path_of_a_transformer_layer_computes_what_stands_there(unit):
    """In evaluation without gradients it goes by a flag, ``activation_relu_or_gelu``, and not by the module."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu").eval()
    x = torch.randn(2, 5, 8)
    student, _ = replace_activations(nn.Sequential(layer), unit, example=x)
    set_gamma(student, 0.0)
    finish(student)
    assert type(student[0].activation) is nn.ReLU
    slow = student(x.requires_grad_())  # gradients keep it off the fast path
    with torch.no_grad():
        fast = student(x)
    assert student[0].activation_relu_or_gelu == 1
    torch.testing.assert_close(fast, slow.detach(), rtol=1e-5, atol=1e-5)  # fused kernels round differently
    assert not torch.allclose(fast, layer(x), atol=1e-3)
