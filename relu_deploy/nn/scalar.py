"""Activations without parameters that torch does not have: one number in, one number out.

torch has ELU, SELU, Hardswish, Softplus, LeakyReLU, Mish, SiLU and GELU: see :mod:`relu_deploy.nn.make`.

All keep shape, dtype and memory format. Those with exponentials, tanh or erf compute in at least float32: rounding each
of several steps to bfloat16 would cost more than the function's own curvature.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError
from relu_deploy.nn.channels import cast


class GoLU(nn.Module):
    """``x alpha exp(-beta exp(-gamma x))``, a gate of Gompertz's curve; elementwise.

    Constants alpha, beta, gamma > 0, all 1 in the paper's experiments. The inner exponential is held where the outer
    one is 0 in any type: past that, ``0 * inf`` would make gradients NaN.

    Source: Das et al. 2025, "Gompertz Linear Units", arXiv:2502.03654, section 2.

    >>> round(GoLU()(torch.tensor(1.0)).item(), 4)  # exp(-exp(-1))
    0.6922
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = (
            _positive(value, f"{name} of GoLU") for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma))
        )
        # beta exp(limit) = 1000, and exp(-1000) is 0 in float64.
        self._limit = math.log(1000 / self.beta)

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        wide = _wide(x)
        inner = torch.exp((-self.gamma * wide).clamp_max(self._limit))
        return cast(wide * (self.alpha * torch.exp(-self.beta * inner)), x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}, gamma={self.gamma:g}"


class SmeLU(nn.Module):
    """0 up to -beta, ``(x + beta)^2 / (4 beta)`` up to beta, then x: ReLU with a parabola for a corner; elementwise.

    Computed as ``clip(x + beta, 0, 2 beta)^2 / (4 beta) + max(x - beta, 0)``, which is the same without a branch. At
    most ``beta / 4`` above ReLU (at 0).

    Args:
        beta: Half the width of the parabola, > 0, in units of the input. The paper chooses it for each task.

    Source: Shamir and Lin 2022, "Real world large scale recommendation systems reproducibility and smooth activations",
    arXiv:2202.06499.

    >>> SmeLU(beta=1.0)(torch.tensor([-1.0, 0.0, 1.0, 3.0])).tolist()
    [0.0, 0.25, 1.0, 3.0]
    """

    def __init__(self, *, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = _positive(beta, "beta of SmeLU")

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        curve = (x + self.beta).clamp(0.0, 2 * self.beta)
        return curve * curve * (0.25 / self.beta) + F.relu(x - self.beta)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"beta={self.beta:g}"


class APTx(nn.Module):
    """``(alpha + tanh(beta x)) gamma x``; elementwise. At the defaults it is ``x sigmoid(2 x)``, which is near Mish.

    Source: Kumar 2022, "APTx", arXiv:2209.06119, section 3 (defaults 1, 1, 1/2).

    >>> round(APTx()(torch.tensor(1.0)).item(), 4)  # (1 + tanh 1) / 2
    0.8808
    """

    def __init__(self, *, alpha: float = 1.0, beta: float = 1.0, gamma: float = 0.5) -> None:
        super().__init__()
        self.alpha, self.beta, self.gamma = (
            _finite(value, f"{name} of APTx") for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        wide = _wide(x)
        return cast((self.alpha + torch.tanh(self.beta * wide)) * (self.gamma * wide), x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"alpha={self.alpha:g}, beta={self.beta:g}, gamma={self.gamma:g}"


class HeLU(nn.Module):
    """ReLU whose gradient starts earlier: forward ``max(x, 0)``, backward 1 where ``x > -alpha``; elementwise.

    Without gradients, and in export, it is plain ReLU.

    Args:
        alpha: How far below 0 gradients still pass, at least 0, in units of the input.

    Source: Kimhi et al. 2024, "Hysteresis activation function for efficient inference", arXiv:2411.10573.

    >>> x = torch.tensor([-1.0, -0.01, 1.0], requires_grad=True)
    >>> y = HeLU(alpha=0.05)(x)
    >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
    ([0.0, 0.0, 1.0], [0.0, 1.0, 1.0])
    """

    def __init__(self, *, alpha: float = 0.05) -> None:
        super().__init__()
        self.alpha = _finite(alpha, "alpha of HeLU")
        if alpha < 0:
            raise TrainingError(f"alpha of HeLU is {alpha}", hint="at 0 it is ReLU; below 0 live units would not learn")

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        if not torch.is_grad_enabled() or torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
            return F.relu(x)
        # x - x has the value 0 and the gradient 1; where the branch is not taken (infinities), neither counts.
        passing = (x > -self.alpha) & (x <= 0)
        return F.relu(x) + torch.where(passing, x - x.detach(), 0.0)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"alpha={self.alpha:g}"


class SquaredReLU(nn.Module):
    """``max(x, 0)^2``; elementwise. In float16 it overflows past x = 255.

    Source: So et al. 2021, "Primer", arXiv:2109.08668, section 4.

    >>> SquaredReLU()(torch.tensor([-2.0, 3.0])).tolist()
    [0.0, 9.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        positive = F.relu(x)
        return positive * positive


class RReLU(nn.RReLU):
    """torch's RReLU, which its newer exporter cannot write, written as the LeakyReLU that it is in evaluation mode.

    Source: Xu et al. 2015, "Empirical evaluation of rectified activations", arXiv:1505.00853, section 2.4.

    >>> RReLU(0.1, 0.3).eval()(torch.tensor([-1.0, 1.0])).tolist() == [-torch.tensor(0.2).item(), 1.0]
    True
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the argument's name in nn.RReLU
        """A slope drawn for every element in training mode, their mean in evaluation mode."""
        if self.training:
            return super().forward(input)
        return F.leaky_relu(input, (self.lower + self.upper) / 2)


class SAU(nn.Module):
    """LeakyReLU smoothed by a Gaussian of standard deviation ``1 / beta``; elementwise.

    ``E[leaky(x + z / beta)]`` with z standard normal, which is
    ``slope x + (1 - slope) (x Phi(beta x) + phi(beta x) / beta)`` with Phi and phi its distribution and density. As
    beta grows it becomes LeakyReLU; at 0 it is above it by ``(1 - slope) / (beta sqrt(2 pi))``.

    Args:
        slope: Of the negative side, in [0, 1).
        beta: Sharpness, > 0, in 1 / units of the input. A constant.

    Source: Biswas et al. 2021, "SAU: smooth activation function using convolution with approximate identities",
    arXiv:2109.13210; the closed form is worked out here from that definition.

    >>> round(SAU(slope=0.0, beta=1.0)(torch.tensor(0.0)).item(), 4)  # 1 / sqrt(2 pi)
    0.3989
    """

    def __init__(self, *, slope: float = 0.01, beta: float = 1.0) -> None:
        super().__init__()
        self.slope, self.beta = slope, _positive(beta, "beta of SAU")
        if not 0 <= slope < 1:
            raise TrainingError(f"slope of SAU is {slope}", hint="give one in [0, 1)")

    def forward(self, x: Tensor) -> Tensor:
        """Elementwise."""
        wide = _wide(x)
        below = 0.5 * (1 + torch.erf(wide * (self.beta / math.sqrt(2))))
        density = torch.exp(wide * wide * (-0.5 * self.beta**2)) / (self.beta * math.sqrt(2 * math.pi))
        return cast(self.slope * wide + (1 - self.slope) * (wide * below + density), x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"slope={self.slope:g}, beta={self.beta:g}"


def _wide(x: Tensor) -> Tensor:
    return cast(x, torch.promote_types(x.dtype, torch.float32))


def _finite(value: float, name: str) -> float:
    if not math.isfinite(value):
        raise TrainingError(f"{name} is {value}; it must be finite")
    return float(value)


def _positive(value: float, name: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise TrainingError(f"{name} is {value}; it must be more than 0")
    return float(value)
