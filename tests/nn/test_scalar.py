from __future__ import annotations

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch.nn import functional as F  # noqa: E402, N812

from relu_deploy.errors import TrainingError  # noqa: E402
from relu_deploy.nn.scalar import SAU, APTx, GoLU, HeLU, RReLU, SmeLU, SquaredReLU  # noqa: E402

pytestmark = pytest.mark.torch

X = torch.linspace(-6, 6, 97, dtype=torch.float64)
E = math.e


# By hand, from the formula of each docstring.
@pytest.mark.parametrize(
    ("unit", "x", "want"),
    [
        (GoLU(), -1.0, -math.exp(-E)),
        (GoLU(), 0.0, 0.0),
        (GoLU(alpha=2.0, beta=0.5, gamma=3.0), 1.0, 2 * math.exp(-0.5 * math.exp(-3))),
        (SmeLU(beta=2.0), -2.0, 0.0),
        (SmeLU(beta=2.0), 1.0, 9 / 8),
        (SmeLU(beta=2.0), 5.0, 5.0),
        (APTx(), -1.0, -0.5 * (1 - math.tanh(1))),
        (APTx(alpha=0.0, beta=2.0, gamma=3.0), 0.5, 1.5 * math.tanh(1)),
        (HeLU(), -0.01, 0.0),
        (SquaredReLU(), 3.0, 9.0),
        (SquaredReLU(), -3.0, 0.0),
        (SAU(slope=0.25, beta=2.0), 0.0, 0.75 / (2 * math.sqrt(2 * math.pi))),
        (RReLU(0.1, 0.3).eval(), -1.0, -0.2),
    ],
)
def test_by_hand(unit, x, want):
    assert unit(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(want, abs=1e-12)


def test_sau_is_the_mean_of_leaky_relu_over_gaussian_noise():
    unit = SAU(slope=0.2, beta=1.5)
    z = np.linspace(-9, 9, 20001)
    density = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    for x in (-2.0, -0.3, 0.0, 1.1):
        moved = x + z / 1.5
        mean = np.trapezoid(np.where(moved > 0, moved, 0.2 * moved) * density, z)
        # The trapezium's error at the corner of the integrand: step^2 / 8, with step 9e-4.
        assert unit(torch.tensor(x, dtype=torch.float64)).item() == pytest.approx(mean, abs=1e-6)


@pytest.mark.parametrize(
    ("unit", "limit", "off"),
    [
        (SmeLU(beta=1e-3), torch.relu(X), 1e-3 / 4),
        (SAU(slope=0.0, beta=1e3), torch.relu(X), 4e-4),
        (SAU(slope=0.1, beta=1e3), F.leaky_relu(X, 0.1), 4e-4),
        (APTx(), X * torch.sigmoid(2 * X), 1e-15),
        (APTx(beta=1e4), torch.relu(X), 1e-12),
        (GoLU(beta=0.0101, gamma=1e3), torch.relu(X), 1e-12),
        (HeLU(alpha=0.0), torch.relu(X), 0.0),
    ],
)
def test_limits(unit, limit, off):
    assert (unit(X) - limit).abs().max().item() <= off


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.5])
def test_smelu_is_the_three_branches_of_the_paper(beta):
    want = torch.where(X.abs() < beta, (X + beta) ** 2 / (4 * beta), X.clamp_min(0))
    assert (SmeLU(beta=beta)(X) - want).abs().max().item() < 1e-14


def test_helu_passes_gradients_from_below_zero():
    x = torch.tensor([-1.0, -0.2, -0.1, 0.0, 2.0], requires_grad=True)
    y = HeLU(alpha=0.15)(x)
    (2 * y).sum().backward()
    assert y.tolist() == [0.0, 0.0, 0.0, 0.0, 2.0]
    assert x.grad.tolist() == [0.0, 0.0, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("unit", [GoLU(), APTx(), SAU(), SmeLU(), GoLU(beta=30.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_far_out_is_finite_with_its_gradient(unit, dtype):
    x = torch.tensor([-60000.0, -200.0, -90.0, 90.0, 60000.0], dtype=dtype, requires_grad=True)
    y = unit(x)
    y.sum().backward()
    assert y.dtype == dtype
    assert bool(x.grad.isfinite().all())
    assert bool(y.isfinite().all())
    right = torch.tensor([90.0, 60000.0], dtype=dtype)
    assert torch.equal(y[3:].detach(), right)


def test_rrelu_draws_in_training_only():
    torch.manual_seed(0)
    unit = RReLU(0.1, 0.3)
    drawn = unit(torch.full((50,), -1.0))
    assert drawn.unique().numel() > 10
    assert drawn.min() >= -0.3
    assert drawn.max() <= -0.1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GoLU(beta=0.0), "beta of GoLU is 0.0"),
        (lambda: GoLU(gamma=float("nan")), "gamma of GoLU is nan"),
        (lambda: SmeLU(beta=-1.0), "beta of SmeLU is -1.0"),
        (lambda: APTx(alpha=float("inf")), "alpha of APTx is inf"),
        (lambda: HeLU(alpha=-0.1), "alpha of HeLU is -0.1"),
        (lambda: SAU(beta=0.0), "beta of SAU is 0.0"),
        (lambda: SAU(slope=1.0), "slope of SAU is 1.0"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(TrainingError, match=message):
        make()
