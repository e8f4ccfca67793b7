"""Units to compare with that are not piecewise linear in their input: PAU, and those that look around: FReLU, SE."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError
from relu_deploy.nn.channels import along, cast, check_count, find_axis, hidden_width, pool, spread

FIT_BOUND = 3.0
"""A PAU starts as its target on [-3, 3], in units of the input."""


class PAU(nn.Module):
    """``P(x) / (1 + |b_1 x + ... + b_n x^n|)``, P of degree m: a Pade Activation Unit in its safe form; elementwise.

    Starts as LeakyReLU on [-3, 3]: :func:`fit_pau` finds the coefficients, 0.04 from it at most at the defaults.
    Outside it is what a quotient of polynomials is there, about ``x (1 + slope) / 2`` far out, not LeakyReLU: normalise
    the input. Arithmetic is at least float32 (x^5 leaves float16 at 9); past 1e7 it overflows float32 as well.

    Parameters (C = ``channels``, or 1): ``numerator`` (m + 1, C), constant first; ``denominator`` (n, C), b_1 first.

    Args:
        channels: Channels of the input; None learns one function for the whole layer, as the paper does.
        degrees: m and n, at least 1.
        slope: Of the LeakyReLU at the start; 0 is ReLU.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C). Ignored without ``channels``.

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: Molina et al. 2020, "Pade activation units", arXiv:1907.06732, section 2 (safe form, degrees 5 and 4).

    >>> PAU()(torch.tensor([-2.0, 2.0])).round(decimals=1).tolist()
    [-0.0, 2.0]
    """

    def __init__(
        self,
        channels: int | None = None,
        *,
        degrees: tuple[int, int] = (5, 4),
        slope: float = 0.01,
        channel_axis: int = 1,
    ) -> None:
        super().__init__()
        self.channels = None if channels is None else check_count(channels, "channels of PAU")
        self.channel_axis, self.slope = channel_axis, slope
        top, bottom = (check_count(degree, "a degree of PAU") for degree in degrees)
        self.numerator = nn.Parameter(torch.empty(top + 1, channels or 1))
        self.denominator = nn.Parameter(torch.empty(bottom, channels or 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the LeakyReLU of the start."""
        numerator, denominator = fit_pau(self.numerator.shape[0] - 1, self.denominator.shape[0], self.slope)
        with torch.no_grad():
            self.numerator.copy_(torch.tensor(numerator).unsqueeze(1))
            self.denominator.copy_(torch.tensor(denominator).unsqueeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape and dtype of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "PAU")
        work = torch.promote_types(torch.promote_types(x.dtype, self.numerator.dtype), torch.float32)
        wide = cast(x, work)
        top = _horner(wide, cast(self.numerator, work), axis)
        bottom = 1 + (wide * _horner(wide, cast(self.denominator, work), axis)).abs()
        return cast(top / bottom, x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        what = "layer-wise" if self.channels is None else f"{self.channels}, channel_axis={self.channel_axis}"
        return f"{what}, degrees=({len(self.numerator) - 1}, {len(self.denominator)})"


@functools.cache
def fit_pau(top: int, bottom: int, slope: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Coefficients of a PAU near a LeakyReLU on [-3, 3], by least squares.

    The denominator uses even powers only: their sum has no zero to be folded at by the absolute value. The problem is
    made linear by multiplying with the denominator, and weighted with that of the round before (Sanathanan and Koerner
    1963, "Transfer function synthesis as a ratio of two complex polynomials").

    Args:
        top: Degree of the numerator.
        bottom: Degree of the denominator.
        slope: Of the negative side.

    Returns:
        ``top + 1`` coefficients, constant first, and ``bottom``, the first power first.

    Raises:
        TrainingError: ``slope`` is not finite, or the denominator that was found has a zero.
    """
    if not math.isfinite(slope):
        raise TrainingError(f"slope of PAU is {slope}; it must be finite")
    x = np.linspace(-FIT_BOUND, FIT_BOUND, 601)
    y = np.where(x > 0, x, slope * x)
    powers = x[:, None] ** np.arange(top + 1)
    even = x[:, None] ** np.arange(2, bottom + 1, 2)
    weight = np.ones_like(x)
    for _ in range(20):
        system = np.concatenate((powers, -y[:, None] * even), 1) * weight[:, None]
        found = np.linalg.lstsq(system, y * weight, rcond=None)[0]
        denominator = 1 + even @ found[top + 1 :]
        if denominator.min() <= 0:
            raise TrainingError(f"no PAU of degrees {top}, {bottom} starts at slope {slope}", hint="use degrees 5, 4")
        weight = 1 / denominator
    below = np.zeros(bottom)
    below[1::2] = found[top + 1 :]
    return tuple(found[: top + 1].tolist()), tuple(below.tolist())


class FReLU(nn.Module):
    """``max(x, T(x))``, Funnel ReLU: T is a depthwise convolution of the neighbourhood, and a batch normalisation.

    Parameters of ``condition`` (the convolution, without a bias, which the normalisation would undo) and ``norm``; both
    fold into one convolution for inference. Weights start as noise of standard deviation ``kernel ** (-spatial / 2)``,
    which keeps the input's variance; the paper says only that they are Gaussian. Not ReLU at the start.

    Args:
        channels: C.
        kernel: Window, odd (the paper: 3); zeros are padded.
        spatial: Axes that the window slides over, 1 to 3: 2 for images, 1 for sequences. None: 2, or 1 if channels are
            last.
        channel_axis: 1 for (N, C, H, W), -1 for (N, T, C) or, with ``spatial=2``, (N, H, W, C).

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels or the axes.

    Source: Ma et al. 2020, "Funnel activation for visual recognition", arXiv:2007.11824, eq. 1 and 2.

    >>> FReLU(4)(torch.zeros(2, 4, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(self, channels: int, *, kernel: int = 3, spatial: int | None = None, channel_axis: int = 1) -> None:
        super().__init__()
        self.channels = check_count(channels, "channels of FReLU")
        self.channel_axis = channel_axis
        self.spatial = spatial if spatial is not None else (1 if channel_axis == -1 else 2)
        if self.spatial not in (1, 2, 3) or check_count(kernel, "kernel of FReLU") % 2 == 0:
            raise TrainingError(f"FReLU with kernel {kernel} over {spatial} axes", hint="an odd kernel, 1 to 3 axes")
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.spatial - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[self.spatial - 1]
        self.condition = convolution(channels, channels, kernel, padding=kernel // 2, groups=channels, bias=False)
        self.norm = norm(channels)
        nn.init.normal_(self.condition.weight, 0.0, kernel ** (-self.spatial / 2))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape and dtype of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "FReLU")
        if x.ndim != self.spatial + 2:
            raise TrainingError(
                f"FReLU over {self.spatial} spatial axes got input of shape {tuple(x.shape)}",
                hint="set spatial to the number of axes besides batch and channels",
            )
        around = self.norm(self.condition(x.movedim(axis, 1))).movedim(1, axis)
        return torch.maximum(x, cast(around, x.dtype))

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"spatial={self.spatial}, channel_axis={self.channel_axis}"


class SEReLU(nn.Module):
    """``r sigmoid(FC(relu(FC(pool(r)))))`` with ``r = max(x, 0)``: squeeze-and-excitation after ReLU.

    Pools as :class:`~relu_deploy.nn.dynamic.DyReLU` does, with the same two consequences for transformers. The gate
    starts near 1/2. ``reduction`` 8 is the one of DY-ReLU's table 6 (2.1 M parameters); the paper of SE uses 16.

    Parameters (C = ``channels``, J from :func:`~relu_deploy.nn.channels.hidden_width`): ``squeeze`` (J, C) and (J,),
    ``excite`` (C, J) and (C,).

    Args:
        channels: C.
        reduction: R of the first layer.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C).

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: Hu et al. 2018, "Squeeze-and-excitation networks", arXiv:1709.01507, eq. 2 to 4; DY-ReLU, arXiv:2003.10027,
    table 6.

    >>> SEReLU(4)(torch.zeros(2, 4, 5, 5)).shape
    torch.Size([2, 4, 5, 5])
    """

    def __init__(self, channels: int, *, reduction: int = 8, channel_axis: int = 1) -> None:
        super().__init__()
        self.channels = check_count(channels, "channels of SE+ReLU")
        self.channel_axis = channel_axis
        hidden = hidden_width(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape and dtype of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "SE+ReLU")
        rectified = F.relu(x)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(pool(rectified, axis)))))
        return rectified * spread(gate, x, axis, self.channels)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"channel_axis={self.channel_axis}"


def _horner(x: Tensor, coefficients: Tensor, axis: int) -> Tensor:
    """``c_0 + c_1 x + c_2 x^2 + ...`` for coefficients (degree + 1, C)."""
    y = along(coefficients[-1], x, axis)
    for power in reversed(range(coefficients.shape[0] - 1)):
        y = y * x + along(coefficients[power], x, axis)
    return y
