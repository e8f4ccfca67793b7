"""Replace the smooth activations of a model, and say which were replaced and which were left."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

from relu_deploy.errors import TrainingError
from relu_deploy.report import Skip

# Smooth functions that stand where ReLU could stand: after a linear layer, with an identity-like positive side.
SMOOTH: tuple[type[nn.Module], ...] = (
    nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.CELU, nn.SELU,
)  # fmt: skip

# What else torch calls an activation, with the reason why it is left where it is.
_LEFT: dict[type[nn.Module], str] = {
    nn.Sigmoid: "a gate or a head, not an activation after a linear layer",
    nn.Hardsigmoid: "a gate or a head, not an activation after a linear layer",
    nn.Tanh: "a gate or a head: bounded on both sides, so ReLU does not stand in for it",
    nn.Hardtanh: "bounded on both sides, so ReLU does not stand in for it",
    nn.GLU: "a gate with two live inputs",
    nn.Softmax: "a normalisation, not elementwise",
    nn.LogSoftmax: "a normalisation, not elementwise",
    nn.LogSigmoid: "a head, not an activation after a linear layer",
    nn.Softplus: "often keeps a quantity positive; name it in kinds to replace it",
    nn.LeakyReLU: "piecewise linear already; name it in kinds to replace it",
    nn.PReLU: "piecewise linear already, with trained slopes; name it in kinds to replace it",
    nn.RReLU: "piecewise linear already; name it in kinds to replace it",
    nn.ReLU6: "a clipped ReLU, which INT8 takes as it is",
    nn.ReLU: "already ReLU",
}


@dataclasses.dataclass(frozen=True)
class Replacement:
    """One activation that was replaced.

    Attributes:
        name: Where it stands in the model, as in ``named_modules``; ``""`` is the model itself.
        old: Class that stood there.
        new: Class that stands there now.
    """

    name: str
    old: str
    new: str


@dataclasses.dataclass(frozen=True)
class SwapReport:
    """What :func:`replace_activations` did.

    Attributes:
        replaced: Every place where a new activation stands.
        left: Activation modules that were looked at and left, with reasons. Functional calls (``F.gelu(x)``) inside a
            ``forward`` are not modules, so they are neither replaced nor listed.
    """

    replaced: tuple[Replacement, ...]
    left: tuple[Skip, ...]


def replace_activations(
    model: nn.Module,
    new: Callable[[nn.Module], nn.Module],
    *,
    kinds: Sequence[type[nn.Module]] = SMOOTH,
    keep: Sequence[str] = (),
) -> tuple[nn.Module, SwapReport]:
    """Copy a model with its smooth activation modules replaced; the weights of the copy have the same values.

    Args:
        model: Left as it is.
        new: Called with each activation (of the copy) and returns what takes its place: :func:`relu`, ``Blend``, or any
            function. One module that stands in several places is replaced by one module, as it was shared before.
        kinds: Classes to replace. A subclass with a ``forward`` of its own is another function and is left.
        keep: Shell patterns over module names to leave (``"*.se.*"``).

    Returns:
        The copy, in the training mode of ``model``, and the report.

    Raises:
        TrainingError: a pattern of ``keep`` matches no module, so it is probably misspelled; or ``new`` is a class of
            torch that would take the old activation for one of its options.

    >>> student, report = replace_activations(nn.Sequential(nn.Linear(2, 2), nn.SiLU(), nn.Sigmoid()), relu)
    >>> student[1], [skip.name for skip in report.left]
    (ReLU(), ['2'])
    """
    _check_arguments(model, new, keep)
    root = nn.ModuleDict({"model": copy.deepcopy(model)})  # so that the model itself may be the activation
    made: dict[nn.Module, nn.Module] = {}
    replaced: list[Replacement] = []
    left: list[Skip] = []
    for parent_name, parent in list(root.named_modules()):
        # named_children would show a module that stands in two places only once.
        for child_name, child in list(parent._modules.items()):  # noqa: SLF001
            name = f"{parent_name}.{child_name}".removeprefix(".").removeprefix("model").removeprefix(".")
            reason = "" if child is None else _reason_to_leave(child, name, kinds, keep)
            if child is None or reason == "":
                continue
            if reason is not None:
                left.append(Skip(name, reason))
                continue
            if child not in made:
                made[child] = new(child).train(child.training)
            parent._modules[child_name] = made[child]  # noqa: SLF001
            replaced.append(Replacement(name, type(child).__name__, type(made[child]).__name__))
    return root["model"], SwapReport(tuple(replaced), tuple(left))


def relu(old: nn.Module) -> nn.ReLU:  # noqa: ARG001
    """A plain ReLU in place of any activation; not in place, since a residual branch may still need its input."""
    return nn.ReLU()


def _check_arguments(model: nn.Module, new: Callable[[nn.Module], nn.Module], keep: Sequence[str]) -> None:
    if isinstance(new, type) and new.__module__.startswith("torch.nn"):
        # nn.ReLU(old) would take the old module for inplace=True, and nobody would see it.
        raise TrainingError(
            f"{new.__name__} cannot be handed to replace_activations: it would take the old activation for an option",
            hint=f"lambda old: nn.{new.__name__}()",
        )
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in keep:
        if not fnmatch.filter(names, pattern):
            raise TrainingError(f"the pattern {pattern!r} of keep matches no module of {type(model).__name__}")


def _reason_to_leave(module: nn.Module, name: str, kinds: Sequence[type[nn.Module]], keep: Sequence[str]) -> str | None:
    """None: replace it. A reason: leave it and say so. Empty: it is no activation."""
    for kind in kinds:
        if isinstance(module, kind):
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in keep):
                return "named in keep"
            same = type(module).forward is kind.forward
            return None if same else f"a subclass of {kind.__name__} with a forward of its own"
    return next((reason for kind, reason in _LEFT.items() if isinstance(module, kind)), "")
