"""The blend that walks a smooth activation over to ReLU: SAT and PEA-weighted are its two sides."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError


class Blend(nn.Module):
    """``gamma act(x) + (1 - gamma) max(0, x)``, elementwise; input and output have one shape and dtype.

    ``gamma`` is a buffer: it moves with the model, is saved in its ``state_dict``, takes no gradient, and is exported
    as it stands. At 1 the module is the original activation, at 0 it is ReLU; what export leaves behind at 0 (a product
    with zero and a sum) is the residue that the graph passes collapse.

    Args:
        act: The activation to start from; kept as a submodule, so its own parameters train and are saved.
        gamma: Share of ``act``, in [0, 1].

    Raises:
        TrainingError: ``gamma`` is outside [0, 1] or not finite.

    Source: SAT, "ReLU for inference acceleration", eq. 6 (gamma 1 -> 0 in steps of 0.1); PEA, weighted form, whose
    alpha (0 -> 1) is ``1 - gamma``.

    >>> blend = Blend(nn.SiLU(), gamma=0.0)
    >>> blend(torch.tensor([-2.0, 3.0])).tolist()
    [0.0, 3.0]
    """

    gamma: Tensor

    def __init__(self, act: nn.Module, *, gamma: float = 1.0) -> None:
        super().__init__()
        self.act = act
        self.register_buffer("gamma", torch.tensor(_checked(gamma, "gamma")))

    def forward(self, x: Tensor) -> Tensor:
        """Blend; the weight is cast to the dtype of ``x``, so that half precision stays half precision."""
        gamma = self.gamma.to(x.dtype)
        smooth: Tensor = self.act(x)
        return gamma * smooth + (1 - gamma) * F.relu(x)

    @property
    def alpha(self) -> float:
        """PEA's share of ReLU, ``1 - gamma``."""
        return 1.0 - float(self.gamma)

    def set_gamma(self, gamma: float) -> None:
        """Set the share of the original activation, in [0, 1]."""
        self.gamma.fill_(_checked(gamma, "gamma"))

    def set_alpha(self, alpha: float) -> None:
        """Set the share of ReLU, in [0, 1]."""
        self.gamma.fill_(1.0 - _checked(alpha, "alpha"))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the blend."""
        return f"gamma={float(self.gamma):g}"


def set_gamma(model: nn.Module, gamma: float) -> int:
    """Set ``gamma`` of every :class:`Blend` in a model and return how many there are.

    Raises:
        TrainingError: ``gamma`` is outside [0, 1] or not finite; no blend was changed.
    """
    _checked(gamma, "gamma")
    blends = [module for module in model.modules() if isinstance(module, Blend)]
    for blend in blends:
        blend.set_gamma(gamma)
    return len(blends)


def _checked(value: float, name: str) -> float:
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise TrainingError(f"{name} of a blend is {value}; it must lie in [0, 1]")
    return float(value)
