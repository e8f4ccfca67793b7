"""Where the channels of a tensor are, for the activations that have parameters a channel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError


def find_axis(x: Tensor, channels: int | None, axis: int, name: str) -> int:
    """The channel axis of ``x``, counted from the front; 0 without channels.

    Args:
        x: Floating point, (N, ...).
        channels: Expected there; None if one function serves the whole layer.
        axis: As the unit was made with, negative ones from the back.
        name: Of the unit, for the message.

    Raises:
        TrainingError: ``x`` is not floating point, or does not have the channels on that axis.

    >>> find_axis(torch.zeros(2, 7, 3), 3, -1, "APL")
    2
    """
    if not x.is_floating_point():
        raise TrainingError(f"{name} got {x.dtype} input", hint="give it floating point")
    if channels is None:
        return 0
    found = axis % x.ndim if -x.ndim <= axis < x.ndim else None
    # A trace records every comparison of a size and warns of it; what it compares was compared before, by the example.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # torch documents it as public
    wrong = found is not None and not tracing and x.shape[found] != channels
    if found is None or found == 0 or wrong:
        raise TrainingError(
            f"{name} of {channels} channels on axis {axis} got input of shape {tuple(x.shape)}",
            hint="set channels and channel_axis to the input's; axis 0 is the batch",
        )
    return found


def along(parameter: Tensor, x: Tensor, axis: int) -> Tensor:
    """A parameter (C,), or (1,) for a whole layer, shaped to broadcast against ``x`` with channels on ``axis``."""
    shape = [1] * x.ndim
    shape[axis] = parameter.shape[0]
    return parameter.view(shape)


def pool(x: Tensor, axis: int) -> Tensor:
    """Mean over all axes but the batch and the channels, (N, C); ``x`` itself if there are none.

    >>> pool(torch.tensor([[[1.0, 2.0], [3.0, 6.0]]]), 2).tolist()  # tokens
    [[2.0, 4.0]]
    """
    rest = [i for i in range(1, x.ndim) if i != axis]
    return x.mean(rest) if rest else x


def spread(vector: Tensor, x: Tensor, axis: int, count: int) -> Tensor:
    """Values of each sample, (N, count) with count C or 1, in the dtype of ``x`` and shaped to broadcast against it."""
    shape = [1] * x.ndim
    shape[0], shape[axis] = -1, count
    return cast(vector, x.dtype).view(shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, without the Cast that an exporter writes down even where nothing changes."""
    return x if x.dtype == dtype else x.to(dtype)


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None, axis: int) -> Tensor:
    """A linear map of the channels at every position: a 1x1 convolution, or a linear layer if channels are last.

    Args:
        x: With C channels on ``axis``.
        weight: (out, C).
        bias: (out,) or None.
        axis: Not negative.

    Returns:
        ``x`` with ``out`` channels.
    """
    if axis == x.ndim - 1:
        return F.linear(x, weight, bias)
    convolve: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}.get(x.ndim) if axis == 1 else None
    if convolve is None:
        return F.linear(x.movedim(axis, -1), weight, bias).movedim(-1, axis)
    mapped: Tensor = convolve(x, weight.view(*weight.shape, *[1] * (x.ndim - 2)), bias)
    return mapped


def hidden_width(channels: int, reduction: int) -> int:
    """Width of the layer between two that squeeze and excite: ``channels // reduction``, but at least 4 if C is.

    Papers do not say what happens to narrow layers. One unit, or two, with a ReLU behind them are dead at the start for
    every input about as often as not, since means over positions are small beside a bias; then nothing is dynamic.

    Raises:
        TrainingError: ``reduction`` is less than 1.

    >>> hidden_width(64, 8), hidden_width(16, 8), hidden_width(2, 8)
    (8, 4, 2)
    """
    return max(channels // check_count(reduction, "reduction"), min(channels, 4))


def check_count(value: int, name: str, *, low: int = 1) -> int:
    """``value``, if it is a whole number of at least ``low``.

    Raises:
        TrainingError: otherwise.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise TrainingError(f"{name} is {value!r}", hint=f"give a whole number of at least {low}")
    return value
