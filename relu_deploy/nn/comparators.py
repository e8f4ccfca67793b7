"""Piecewise-linear units to compare with: PReLU with channels on any axis, Maxout and APL."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError
from relu_deploy.nn.channels import along, cast, check_count, find_axis, pointwise


class AxisPReLU(nn.PReLU):
    """``max(x, 0) + w min(x, 0)`` with a slope ``w`` a channel, on any axis: torch's own takes only axis 1.

    Parameters: ``weight`` (C,), named as in torch's ``PReLU``, so either loads the other's state.

    Args:
        channels: C.
        init: Slopes at the start.
        channel_axis: -1 for (N, T, C).

    Source: He et al. 2015, "Delving deep into rectifiers", arXiv:1502.01852, eq. 1.

    >>> AxisPReLU(2, init=0.5)(torch.tensor([[[-2.0, 3.0]]])).tolist()
    [[[-1.0, 3.0]]]
    """

    def __init__(self, channels: int, *, init: float = 0.25, channel_axis: int = -1) -> None:
        super().__init__(check_count(channels, "channels of PReLU"), init)
        self.channel_axis = channel_axis

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the argument's name in nn.PReLU
        """Apply the unit; shape and dtype of the input."""
        axis = find_axis(input, self.num_parameters, self.channel_axis, "PReLU")
        return F.relu(input) - cast(along(self.weight, input, axis), input.dtype) * F.relu(-input)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{super().extra_repr()}, channel_axis={self.channel_axis}"


class Maxout(nn.Module):
    """``y = max_k (W_k x + b_k)`` over the channels of each position: C channels in, C out.

    The paper's unit takes the maximum of K convolutions. As an activation has only one before it, its K maps of C to C
    channels follow here; both are one and the same where that layer is linear, and merging them gives the paper's.
    :func:`maxout` is the bare maximum, for a layer that is K times as wide.

    Starts as ReLU: W_1 = 1, W_2 = 0, b = 0; the third map and those after it start with noise of 0.01 in their
    weights, as equal maps would stay equal.

    Parameters: ``weight`` (K C, C), all rows of the first map, then of the second, ...; ``bias`` (K C,).

    Args:
        channels: C.
        pieces: K, at least 1.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C).

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: Goodfellow et al. 2013, "Maxout networks", arXiv:1302.4389, section 3.

    >>> Maxout(2)(torch.tensor([[-2.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """

    def __init__(self, channels: int, *, pieces: int = 2, channel_axis: int = 1) -> None:
        super().__init__()
        self.channels = check_count(channels, "channels of Maxout")
        self.pieces = check_count(pieces, "pieces of Maxout")
        self.channel_axis = channel_axis
        self.weight = nn.Parameter(torch.empty(pieces * channels, channels))
        self.bias = nn.Parameter(torch.empty(pieces * channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to ReLU."""
        with torch.no_grad():
            self.bias.zero_()
            nn.init.eye_(self.weight)
            self.weight[2 * self.channels :].normal_(0.0, 0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "Maxout")
        mapped = pointwise(x, self.weight, self.bias, axis)
        # Not in chunks: an exporter would compute their size at run time.
        blocks: tuple[Tensor, ...] = mapped.split(self.channels, axis)  # type: ignore[no-untyped-call]
        return functools.reduce(torch.maximum, blocks)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.channels}, pieces={self.pieces}, channel_axis={self.channel_axis}"


def maxout(x: Tensor, pieces: int, axis: int = 1) -> Tensor:
    """Maximum over ``pieces`` blocks of channels: (N, K C, ...) to (N, C, ...), ``y_c = max_k x_{k C + c}``.

    Raises:
        TrainingError: The channels do not divide.

    >>> maxout(torch.tensor([[1.0, 2.0, 5.0, 0.0]]), 2).tolist()
    [[5.0, 2.0]]
    """
    if x.shape[axis] % pieces:
        raise TrainingError(f"{x.shape[axis]} channels are not {pieces} equal blocks", hint="widen the layer before")
    return functools.reduce(torch.maximum, x.chunk(pieces, axis))


class APL(nn.Module):
    """``max(0, x) + sum_s a_s max(0, b_s - x)``, Adaptive Piecewise Linear: S learned hinges, elementwise.

    Starts as ReLU: a = 0, and b spread evenly from -1 to 1 (0 for one hinge), so that hinges differ. The paper decays
    the parameters a little (L2 penalty 0.001), or hinges grow without bound.

    Parameters (C = ``channels``, or 1): ``slopes`` a and ``hinges`` b, (S, C) each.

    Args:
        channels: Channels of the input; None learns one function for the whole layer. (The paper learns one a neuron.)
        hinges: S, at least 1.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C). Ignored without ``channels``.

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: Agostinelli et al. 2014, "Learning activation functions to improve deep neural networks", arXiv:1412.6830,
    eq. 1.

    >>> APL(2)(torch.tensor([[-2.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """

    def __init__(self, channels: int | None = None, *, hinges: int = 2, channel_axis: int = 1) -> None:
        super().__init__()
        self.channels = None if channels is None else check_count(channels, "channels of APL")
        self.channel_axis = channel_axis
        shape = (check_count(hinges, "hinges of APL"), channels or 1)
        self.slopes = nn.Parameter(torch.empty(shape))
        self.hinges = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to ReLU."""
        count = self.hinges.shape[0]
        with torch.no_grad():
            self.slopes.zero_()
            self.hinges.copy_((torch.linspace(-1, 1, count) if count > 1 else torch.zeros(1)).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape and dtype of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "APL")
        y = F.relu(x)
        for s in range(self.hinges.shape[0]):  # not unbind: exporters fold an index of a constant, but not a split
            slope, hinge = (along(cast(p[s], x.dtype), x, axis) for p in (self.slopes, self.hinges))
            y = y + slope * F.relu(hinge - x)
        return y

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        what = "layer-wise" if self.channels is None else f"{self.channels}, channel_axis={self.channel_axis}"
        return f"{what}, hinges={self.hinges.shape[0]}"
