"""Configurations of Hugging Face models that name activations: ``hidden_act``, ``activation_function`` and others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from torch import nn

from relu_deploy.nn.swap_sites import Place, short

# What the names mean; a configuration with another name is not changed.
_SMOOTH_NAMES: Final = frozenset(
    [
        "gelu",
        "gelu_10",
        "gelu_fast",
        "gelu_new",
        "gelu_python",
        "gelu_pytorch_tanh",
        "gelu_python_tanh",
        "gelu_accurate",
        "quick_gelu",
        "silu",
        "swish",
        "hardswish",
        "mish",
        "elu",
        "selu",
    ]
)


def update_configs(model: nn.Module, made: Sequence[tuple[Place, nn.Module]], kept: Sequence[str]) -> tuple[str, ...]:
    """Let the configurations of a swapped model say ``relu`` where all that they name is plain ReLU now.

    A saved and reloaded model is then the ReLU network. If any activation of the modules that carry a configuration was
    kept, or replaced by something else than ReLU, the configuration stays as it is.

    Args:
        model: The copy; its configurations are changed.
        made: What was put where.
        kept: Names of the smooth activations that were left, for whatever reason.

    Returns:
        One phrase for each key: the change, or why there is none.
    """
    owners: dict[int, tuple[Any, str]] = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict") and hasattr(config, "model_type"):
            owners.setdefault(id(config), (config, name))
    return tuple(
        _update(config, key, scope, made, kept)
        for config, scope in owners.values()
        for key, value in list(vars(config).items())
        if "act" in key and isinstance(value, str) and value in _SMOOTH_NAMES
    )


def _update(config: Any, key: str, scope: str, made: Sequence[tuple[Place, nn.Module]], kept: Sequence[str]) -> str:
    mine = [(place, module) for place, module in made if _within(short(place.name), scope)]
    other = [place.name for place, module in mine if type(module) is not nn.ReLU]
    other += [name for name in kept if _within(name, scope)]
    old = getattr(config, key)
    label = f"{scope}.{key}".removeprefix(".")
    if not mine or other:
        return f"{label} stays {old!r}: " + (f"{other[0]} is not plain ReLU" if other else "nothing was replaced")
    setattr(config, key, "relu")
    return f"{label}: {old!r} -> 'relu'"


def _within(name: str, scope: str) -> bool:
    return not scope or name == scope or name.startswith(f"{scope}.")
