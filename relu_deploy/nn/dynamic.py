"""DY-ReLU, the rectifier whose slopes and intercepts are computed from its whole input."""

from __future__ import annotations

import functools
import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError
from relu_deploy.nn.channels import cast, check_count, find_axis, hidden_width, pointwise, pool, spread

Variant = Literal["A", "B", "C"]

TEMPERATURE = 10.0
"""tau of the spatial attention (DY-ReLU, eq. 5): keeps it flat early in training."""
MEAN_ATTENTION = 1 / 3
"""gamma over the number of positions (DY-ReLU, eq. 5): the mean of the attention before it is cut at 1."""
NOISE = 0.01
"""Standard deviation of the last layer's weights for the third linear function and those after it."""


class DyReLU(nn.Module):
    """``y = max_k (a_k x + b_k)``, with ``a`` and ``b`` computed from the input by a small network.

    ``a_k = alpha_k + lambda_a da_k`` and ``b_k = lambda_b db_k`` with alpha = (1, 0, ...), and the residuals da and db,
    each in (-1, 1), are ``2 sigmoid(FC(relu(FC(pool(x))))) - 1``. Variants:

    - A: one function for all channels and positions of a sample: 2 K outputs of the network.
    - B: one a channel: 2 K C outputs.
    - C: B, times an attention in [0, 1] a position, ``min(n/3 softmax(z / 10), 1)``, with z a 1x1 convolution of the
      input and n the number of positions. The paper multiplies a and b by it; being no less than 0, it may as well
      multiply the maximum, which is what is computed.

    Pooled are all axes but the batch and the channels: (H, W) of (N, C, H, W), the tokens of (N, T, C) with
    ``channel_axis=-1``, and none of (N, C). Two consequences for transformers. Padding tokens are pooled like any
    other, so the padding of a batch changes a sample's output. And every token sees the mean of all, so the unit is not
    causal: do not put it into a decoder.

    Start: the paper says that ``a = alpha`` and ``b = 0`` are the initial values, not how. Here the last layer starts
    at zero, so A and B start as ReLU exactly and C as ReLU times about 1/3 (the paper trains from scratch; behind a
    trained ReLU network, A and B take over without a step). The first layer therefore learns from the second step on.
    The third function and those after it start with noise of 0.01 in their weights: two equal functions would get equal
    gradients and stay one.

    The output has the shape and dtype of ``x``. Half-precision input, as under ``torch.autocast``, gets ``a`` and ``b``
    rounded to its precision.

    Parameters (C = ``channels``, K = ``pieces``, J from :func:`hidden_width`): ``squeeze`` (J, C) and (J,);
    ``excite`` (2 K, J) or (2 K C, J) and its bias, rows in the order of the paper's eq. 2: a of the first function for
    every channel, of the second, ..., then b; ``attention`` (1, C), of C only and without a bias, which a softmax would
    not feel.

    Args:
        channels: Channels of the input.
        variant: ``A``, ``B`` or ``C``. The paper uses B for classification, C for keypoints.
        pieces: K, linear functions, at least 1 (the paper: 2 or 3; with 1 the unit is not a rectifier).
        reduction: R of the first layer.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C).
        lambda_a: Range of the slopes' residual, at least 0.
        lambda_b: Range of the intercepts' residual, at least 0, in units of the input.

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: Chen et al. 2020, "Dynamic ReLU", arXiv:2003.10027, eq. 1, 2, 4 (A, B) and 5 (C).

    >>> DyReLU(2)(torch.tensor([[-2.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """

    def __init__(
        self,
        channels: int,
        variant: Variant = "B",
        *,
        pieces: int = 2,
        reduction: int = 8,
        channel_axis: int = 1,
        lambda_a: float = 1.0,
        lambda_b: float = 0.5,
    ) -> None:
        super().__init__()
        if variant not in get_args(Variant):
            raise TrainingError(f"there is no DY-ReLU {variant!r}", hint="A, B or C")
        check_count(channels, "channels of DY-ReLU")
        check_count(pieces, "pieces of DY-ReLU")
        if not (math.isfinite(lambda_a) and math.isfinite(lambda_b) and min(lambda_a, lambda_b) >= 0):
            raise TrainingError(f"ranges of DY-ReLU are {lambda_a} and {lambda_b}", hint="the paper uses 1.0 and 0.5")
        self.channels, self.variant, self.pieces, self.channel_axis = channels, variant, pieces, channel_axis
        self.lambda_a, self.lambda_b = lambda_a, lambda_b
        hidden = hidden_width(channels, reduction)
        self.squeeze = nn.Linear(channels, hidden)
        # How many functions a sample has.
        self._sets = 1 if variant == "A" else channels
        self.excite = nn.Linear(hidden, 2 * pieces * self._sets)
        self.attention = nn.Linear(channels, 1, bias=False) if variant == "C" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to a fresh start: ReLU, for C times an attention of about 1/3."""
        self.squeeze.reset_parameters()
        if self.attention is not None:
            self.attention.reset_parameters()
        with torch.no_grad():
            self.excite.bias.zero_()
            weight = self.excite.weight.zero_().view(2, self.pieces, -1)
            weight[:, 2:].normal_(0.0, NOISE)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; shape and dtype of ``x``."""
        axis = find_axis(x, self.channels, self.channel_axis, "DY-ReLU")
        slopes, offsets = self._lines(x, axis)
        lines = [
            spread(slope, x, axis, self._sets) * x + spread(offset, x, axis, self._sets)
            for slope, offset in zip(slopes, offsets, strict=True)
        ]
        y = functools.reduce(torch.maximum, lines)
        return y if self.attention is None else y * self.attend(x)

    def coefficients(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes a and intercepts b for an input, (N, K, C) each; (N, K, 1) for A, and without attention for C."""
        slopes, offsets = self._lines(x, find_axis(x, self.channels, self.channel_axis, "DY-ReLU"))
        return torch.stack(slopes, 1), torch.stack(offsets, 1)

    def _lines(self, x: Tensor, axis: int) -> tuple[list[Tensor], list[Tensor]]:
        """Slope and intercept of each linear function, (N, C) or (N, 1)."""
        residual = 2 * torch.sigmoid(self.excite(F.relu(self.squeeze(pool(x, axis))))) - 1
        parts = residual.split(self._sets, 1)  # type: ignore[no-untyped-call]  # torch's own signature
        slopes = [self.lambda_a * part for part in parts[: self.pieces]]
        slopes[0] = 1 + slopes[0]
        return slopes, [self.lambda_b * part for part in parts[self.pieces :]]

    def attend(self, x: Tensor) -> Tensor:
        """Attention pi of variant C, in [0, 1]: shape of ``x`` with 1 on the channel axis.

        Raises:
            TrainingError: The variant has none, or ``x`` does not have the channels.
        """
        if self.attention is None:
            raise TrainingError(f"DY-ReLU {self.variant} has no attention", hint="variant C has")
        axis = find_axis(x, self.channels, self.channel_axis, "DY-ReLU")
        logits = pointwise(x, self.attention.weight, None, axis)
        flat = torch.softmax(logits.flatten(1) / TEMPERATURE, 1)
        attention = (flat * (flat.shape[1] * MEAN_ATTENTION)).clamp_max(1.0).view_as(logits)
        return cast(attention, x.dtype)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of the unit."""
        return f"{self.channels}, variant={self.variant}, pieces={self.pieces}, channel_axis={self.channel_axis}"
