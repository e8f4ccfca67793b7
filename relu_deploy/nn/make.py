"""Make any activation by its usual name."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any, Final

from torch import nn

from relu_deploy.errors import TrainingError
from relu_deploy.nn.comparators import APL, AxisPReLU, Maxout
from relu_deploy.nn.contextual import PAU, FReLU, SEReLU
from relu_deploy.nn.dynamic import DyReLU
from relu_deploy.nn.pwlu import PWLU
from relu_deploy.nn.scalar import SAU, APTx, GoLU, HeLU, RReLU, SmeLU, SquaredReLU


def _prelu(channels: int, *, init: float = 0.25, channel_axis: int = 1) -> nn.PReLU:
    """Torch's own where it can: an exporter knows it as one node."""
    return nn.PReLU(channels, init) if channel_axis == 1 else AxisPReLU(channels, init=init, channel_axis=channel_axis)


def _prelu_shared(*, init: float = 0.25) -> nn.PReLU:
    return nn.PReLU(1, init)


def _gelu_tanh() -> nn.GELU:
    return nn.GELU(approximate="tanh")


def _dy_relu_a(channels: int, **options: Any) -> DyReLU:
    return DyReLU(channels, "A", **options)


def _dy_relu_b(channels: int, **options: Any) -> DyReLU:
    return DyReLU(channels, "B", **options)


def _dy_relu_c(channels: int, **options: Any) -> DyReLU:
    return DyReLU(channels, "C", **options)


# One function of a number: the same at every channel.
SCALAR: Final[dict[str, Callable[..., nn.Module]]] = {
    "relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "rrelu": RReLU, "prelu_shared": _prelu_shared, "elu": nn.ELU,
    "selu": nn.SELU, "hardswish": nn.Hardswish, "softplus": nn.Softplus, "silu": nn.SiLU, "swish": nn.SiLU,
    "gelu": nn.GELU, "gelu_tanh": _gelu_tanh, "mish": nn.Mish, "golu": GoLU, "smelu": SmeLU, "aptx": APTx,
    "helu": HeLU, "relu2": SquaredReLU, "sau": SAU,
}  # fmt: skip
# Parameters a channel, or one set for the whole layer without channels.
EITHER: Final[dict[str, Callable[..., nn.Module]]] = {"apl": APL, "pau": PAU, "pwlu": PWLU}
# These cannot be made without channels.
CHANNELWISE: Final[dict[str, Callable[..., nn.Module]]] = {
    "prelu": _prelu, "maxout": Maxout, "frelu": FReLU, "se_relu": SEReLU, "dy_relu_a": _dy_relu_a,
    "dy_relu_b": _dy_relu_b, "dy_relu_c": _dy_relu_c,
}  # fmt: skip
NAMES: Final = (*SCALAR, *EITHER, *CHANNELWISE)


def activation(name: str, channels: int | None = None, channel_axis: int = 1, **options: Any) -> nn.Module:
    """A fresh activation, drop-in: it has as many channels out as in, and their place stays.

    Args:
        name: One of ``NAMES``.
        channels: Of the input; ignored by functions that are the same at every channel, optional for ``apl``, ``pau``
            and ``pwlu``, which learn one function a layer without it.
        channel_axis: Where they are: 1 for (N, C, ...), -1 for (N, T, C).
        **options: Of the class, such as ``pieces=3`` for ``dy_relu_b`` or ``negative_slope=0.1`` for ``leaky_relu``.

    Raises:
        TrainingError: There is no such name or option, channels are missing, or a value is out of range.

    >>> activation("prelu", 8), activation("silu", 8)
    (PReLU(num_parameters=8), SiLU())
    """
    if name in SCALAR:
        return _call(name, SCALAR[name], (), options)
    if name not in EITHER and name not in CHANNELWISE:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.4)
        raise TrainingError(f"there is no activation {name!r}", hint=f"{', '.join(near or NAMES)}")
    if name in CHANNELWISE and channels is None:
        shared = "; prelu_shared needs none" if name == "prelu" else ""
        raise TrainingError(f"{name} needs to know its channels", hint=f"give channels={shared}")
    make = EITHER.get(name) or CHANNELWISE[name]
    return _call(name, make, (channels,), {"channel_axis": channel_axis, **options})


def _call(name: str, make: Callable[..., nn.Module], arguments: tuple[Any, ...], options: dict[str, Any]) -> nn.Module:
    signature = inspect.signature(DyReLU if name.startswith("dy_relu") else make)
    known = [p.name for p in signature.parameters.values() if p.name not in ("channels", "variant", "inplace")]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise TrainingError(f"{name} has no option {unknown[0]!r}", hint=f"it has {', '.join(known) or 'none'}")
    return make(*arguments, **options)
