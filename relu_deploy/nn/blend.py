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


class StochasticBlend(Blend):
    """ReLU with probability ``alpha = 1 - gamma``, else ``act``: one draw for the whole layer in each forward pass.

    In evaluation mode it is the expectation, ``gamma act(x) + (1 - gamma) max(0, x)``, which at ``gamma`` 0 is ReLU.
    Draws come from torch's generator of the input's device, so that a restored random state repeats them; the processes
    of a distributed training draw on their own. Both functions are computed and one is chosen, so that
    ``torch.compile`` sees no branch on data.

    Source: "Progressive ensemble activations", equation 3, with r a scalar as printed there.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Draw in training mode, blend in evaluation mode."""
        if not self.training:
            return super().forward(x)
        smooth: Tensor = self.act(x)
        # rand() < 0 is never true and rand() < 1 always: gamma 1 and 0 are exact.
        return torch.where(torch.rand((), device=x.device) < self.gamma, smooth, F.relu(x))


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


def finish(model: nn.Module) -> list[str]:
    """Put a plain ``nn.ReLU`` in the place of every blend, in place, and return their names.

    Raises:
        TrainingError: a blend is not at ``gamma`` 0, so ReLU would compute something else; nothing was changed.

    >>> net = nn.Sequential(nn.Linear(2, 2), Blend(nn.SiLU(), gamma=0.0))
    >>> finish(net), net[1]
    (['1'], ReLU())
    """
    # A module that stands in two places has two names and one replacement.
    places = [(name, child, module) for name, module in model.named_modules(remove_duplicate=False)
              for child in module._modules if isinstance(module._modules[child], Blend)]  # noqa: SLF001  # fmt: skip
    found = {f"{name}.{child}".removeprefix("."): getattr(module, child) for name, child, module in places}
    early = [f"{name} (gamma {float(blend.gamma):g})" for name, blend in found.items() if float(blend.gamma) != 0]
    if isinstance(model, Blend):
        raise TrainingError("the model itself is a blend, and nothing holds it", hint="put it into nn.Sequential")
    if early:
        raise TrainingError(f"not ReLU yet: {', '.join(early[:3])}", hint="train to the end of the transition")
    made = {id(blend): nn.ReLU().train(blend.training) for blend in found.values()}
    for (_, child, module), blend in zip(places, found.values(), strict=True):
        setattr(module, child, made[id(blend)])
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 1  # its fast path in evaluation goes by this and not by the module
    return list(found)


def _checked(value: float, name: str) -> float:
    if not (math.isfinite(value) and 0.0 <= value <= 1.0):
        raise TrainingError(f"{name} of a blend is {value}; it must lie in [0, 1]")
    return float(value)
