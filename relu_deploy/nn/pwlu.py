"""PWLU, the activation whose shape is learned: a piecewise linear function per channel or per layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import TrainingError
from relu_deploy.nn.pwlu_export import NodeForm, pwlu_node
from relu_deploy.nn.pwlu_function import (
    MIN_INTERVAL,
    Parameters,
    Tables,
    evaluate,
    forward_blocks,
    plain_wanted,
    pwlu,
    tables_of,
)
from relu_deploy.nn.pwlu_kernel import CompiledPWLU, forward_compiled

SPREAD = 3.0
"""Boundaries lie this many standard deviations from the mean (PWLU, section 3.3)."""
MOMENTUM = 0.9
"""Share of the old value in a running statistic (PWLU, section 3.3)."""

Kernel = Literal["blocks", "compiled"]
"""How eager PyTorch computes the unit on a CPU: by operators of torch, or by C++ compiled on request."""


class PWLU(nn.Module):
    """Piecewise Linear Unit: N equal intervals between learned boundaries, learned heights, learned outer slopes.

    Starts as ReLU. With an even ``intervals`` a demarcation point lies at 0 and the start is ReLU exactly; with an odd
    one the interval around 0 cuts the corner, and the start is at most ``bound / (2 intervals)`` above ReLU (at 0).

    Training may go through the statistic-based realignment: :meth:`collect` (phase I: the unit *is* ReLU, parameters
    take zero gradients, so that data-parallel training finds every parameter used), then :meth:`realign` (phase II).

    The output has the shape, dtype and memory format of the input; arithmetic is at least float32, so half-precision
    inputs and ``torch.autocast`` need nothing special. Empty batches pass. NaN gives NaN. Boundaries that training
    drives across each other act as if ``right`` were ``intervals * 0.001`` beyond ``left``; gradients still reach both,
    so they can part again, and ``print(model)`` counts such channels.

    Parameters (C = ``channels``, or 1): ``left`` and ``right`` (C,), the boundaries B_L and B_R, in units of the input;
    ``values`` (C, N + 1), the heights Y_i; ``slope_left`` and ``slope_right`` (C,), K_L and K_R.
    Buffers: ``mean`` and ``std`` (C,), running statistics; ``batches`` (C,), how many made them; ``phase`` (), 1 while
    collecting, else 0.
    Attribute ``kernel``: set it with :func:`relu_deploy.nn.pwlu_model.use_kernel`; not part of the state.

    Args:
        channels: Channels of the input; None learns one function for the whole layer, of any input shape.
        intervals: N, at least 1 (the paper: 16).
        bound: ``B_R = -B_L`` at the start, in units of the input.
        channel_axis: Where the channels are: 1 for (N, C, ...), -1 for (N, T, C). Ignored without ``channels``.

    Raises:
        TrainingError: An argument is out of range, or an input does not have the channels.

    Source: PWLU (Zhou et al. 2021, "Learning specialized activation functions with the Piecewise Linear Unit").

    >>> PWLU(2)(torch.tensor([[-2.0, 3.0]])).tolist()
    [[0.0, 3.0]]
    """

    left: nn.Parameter
    right: nn.Parameter
    values: nn.Parameter
    slope_left: nn.Parameter
    slope_right: nn.Parameter
    mean: Tensor
    std: Tensor
    batches: Tensor
    phase: Tensor
    kernel: Kernel = "blocks"
    # Set by relu_deploy.nn.pwlu_export.pwlu_nodes alone.
    node_form: NodeForm | None = None

    def __init__(
        self, channels: int | None = None, *, intervals: int = 16, bound: float = 3.0, channel_axis: int = 1
    ) -> None:
        super().__init__()
        if channels is not None and channels < 1:
            raise TrainingError(f"PWLU over {channels} channels", hint="give at least 1, or None for a whole layer")
        if intervals < 1:
            raise TrainingError(f"PWLU with {intervals} intervals", hint="give at least 1; the paper uses 16")
        if not (math.isfinite(bound) and 2 * bound >= intervals * MIN_INTERVAL):
            raise TrainingError(
                f"PWLU with boundaries at -+{bound}",
                hint=f"{intervals} intervals need a bound of at least {intervals * MIN_INTERVAL / 2:g}",
            )
        self.channels, self.intervals, self.bound, self.channel_axis = channels, intervals, bound, channel_axis
        count = channels or 1
        for name in ("left", "right", "slope_left", "slope_right"):
            setattr(self, name, nn.Parameter(torch.empty(count)))
        self.values = nn.Parameter(torch.empty(count, intervals + 1))
        self.register_buffer("mean", torch.zeros(count))
        self.register_buffer("std", torch.zeros(count))
        self.register_buffer("batches", torch.zeros(count, dtype=torch.int64))
        self.register_buffer("phase", torch.zeros((), dtype=torch.int64))
        # The phase as Python sees it: a branch on a tensor would break torch.compile and torch.export.
        self._collecting = False
        self.reset_parameters()

    @classmethod
    def from_function(
        cls,
        function: Callable[[Tensor], Tensor],
        low: float,
        high: float,
        *,
        channels: int | None = None,
        intervals: int = 16,
        channel_axis: int = 1,
    ) -> PWLU:
        """A unit that starts at another activation: it meets it at N + 1 points of [low, high].

        Outer slopes continue those of the function over one more interval. Elementwise functions only.

        Raises:
            TrainingError: ``high`` is not beyond ``low`` by N ``MIN_INTERVAL``, or a value is not finite.

        >>> unit = PWLU.from_function(torch.nn.functional.gelu, -4.0, 4.0, intervals=8)
        >>> unit(torch.tensor([1.0])).item() == torch.nn.functional.gelu(torch.tensor(1.0)).item()
        True
        """
        if not (math.isfinite(low) and math.isfinite(high) and high - low >= intervals * MIN_INTERVAL):
            raise TrainingError(f"a PWLU cannot span [{low}, {high}] with {intervals} intervals", hint="widen it")
        unit = cls(channels, intervals=intervals, bound=max(high - low, 1.0), channel_axis=channel_axis)
        step = (high - low) / intervals
        points = low + step * torch.arange(-1, intervals + 2, dtype=torch.float64)
        heights = function(points.to(torch.float32)).detach().to(torch.float64)
        if heights.shape != points.shape or not bool(heights.isfinite().all()):
            raise TrainingError(f"the function is not elementwise and finite on [{low - step}, {high + step}]")
        with torch.no_grad():
            unit.left.fill_(low)
            unit.right.fill_(high)
            unit.values.copy_(heights[1:-1])
            unit.slope_left.fill_(float(heights[1] - heights[0]) / step)
            unit.slope_right.fill_(float(heights[-1] - heights[-2]) / step)
        return unit

    def reset_parameters(self) -> None:
        """Back to ReLU between ``-bound`` and ``bound``."""
        with torch.no_grad():
            self._set_relu(torch.full_like(self.left, -self.bound), torch.full_like(self.right, self.bound))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the unit; in phase I, apply ReLU and (in training mode) take statistics."""
        axis = self._axis(x)
        if not self._collecting:
            if self.node_form is not None:
                return pwlu_node(x, self.parameters_in_order(), axis, self.node_form)
            return self._apply_kernel(x, axis)
        if self.training and x.numel():
            self._observe(x, axis)
        y: Tensor = _ReluFrozen.apply(x, *self.parameters_in_order())  # type: ignore[no-untyped-call]  # torch's own
        return y

    def collect(self) -> None:
        """Start phase I: the unit becomes ReLU, statistics start afresh."""
        self.reset_parameters()
        with torch.no_grad():
            for statistic in (self.mean, self.std, self.batches):
                statistic.zero_()
            self.phase.fill_(1)
        self._collecting = True

    def realign(self) -> None:
        """Start phase II: boundaries at ``mean -+ 3 std``, heights and slopes of ReLU, everything trains.

        A channel whose input never varied (std about 0) gets ``mean -+ bound``; one that saw no batch keeps its
        boundaries. Under ``torch.distributed`` every process must call this: their statistics are pooled first, so that
        all of them start phase II from the same parameters.
        """
        with torch.no_grad():
            self._pool()
            half = SPREAD * self.std
            flat = 2 * half < self.intervals * MIN_INTERVAL
            half = torch.where(flat, torch.full_like(half, self.bound), half)
            seen = self.batches > 0
            left = torch.where(seen, self.mean - half, self.left)
            right = torch.where(seen, self.mean + half, self.right)
            self._set_relu(left, right)
            self.phase.zero_()
        self._collecting = False

    @property
    def collecting(self) -> bool:
        """True in phase I."""
        return self._collecting

    def crossed(self) -> Tensor:
        """Bool (C,): channels whose boundaries crossed or nearly so, which act at the smallest width instead."""
        return (self.right - self.left).detach() < self.intervals * MIN_INTERVAL

    def iou(self, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        """Intersection over union, (C,), of [B_L, B_R] with [mean - 3 std, mean + 3 std]; 1 is full alignment.

        Args:
            mean: Of the inputs, (C,); the collected one by default.
            std: Likewise.

        Source: PWLU, eq. 7.
        """
        centre = self.mean if mean is None else mean
        half = SPREAD * (self.std if std is None else std)
        work = self.parameters_in_order().as_work(torch.float64)
        left, right = work.left.detach(), work.right.detach()
        low, high = (centre - half).to(left.dtype), (centre + half).to(left.dtype)
        overlap = (torch.minimum(right, high) - torch.maximum(left, low)).clamp_min(0)
        return overlap / ((right - left) + (high - low) - overlap)

    def tables(self) -> tuple[Tensor, Tensor]:
        """K' and Z' of ``y = K'[j] x + Z'[j]``, (C, N + 2) each; 0 is left of B_L, N + 1 from B_R on."""
        t = self._tables()
        return t.slopes, t.offsets

    def to_static(self) -> StaticPWLU:
        """The same function with nothing left to train: bit-identical in eager PyTorch. In phase I that is ReLU."""
        static = StaticPWLU(self._tables(), channels=self.channels, channel_axis=self.channel_axis)
        static.kernel = self.kernel
        return static

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        what = "layer-wise" if self.channels is None else f"{self.channels}, channel_axis={self.channel_axis}"
        crossed = int(self.crossed().sum())
        what += "" if self.kernel == "blocks" else f", kernel={self.kernel}"
        notes = [", collecting"] if self._collecting else []
        notes += [f", {crossed} with crossed boundaries"] if crossed else []
        return f"{what}, intervals={self.intervals}{''.join(notes)}"

    def parameters_in_order(self) -> Parameters:
        """The five parameters, named and in the order that :mod:`relu_deploy.nn.pwlu_function` takes them."""
        return Parameters(self.left, self.right, self.values, self.slope_left, self.slope_right)

    def _apply_kernel(self, x: Tensor, axis: int) -> Tensor:
        if self.kernel == "compiled" and not plain_wanted(x):
            y: Tensor = CompiledPWLU.apply(x, *self.parameters_in_order(), axis)  # type: ignore[no-untyped-call]
            return y
        return pwlu(x, self.parameters_in_order(), axis)

    def _tables(self) -> Tables:
        with torch.no_grad():
            return tables_of(self.parameters_in_order().as_work(torch.promote_types(self.values.dtype, torch.float32)))

    def _set_relu(self, left: Tensor, right: Tensor) -> None:
        """ReLU between boundaries (PWLU, sections 3.2 and 3.3)."""
        index = torch.arange(self.intervals + 1, device=left.device, dtype=torch.float64)
        low, high = left.to(torch.float64).unsqueeze(1), right.to(torch.float64).unsqueeze(1)
        self.values.copy_((low + (high - low) * (index / self.intervals)).clamp_min(0))
        self.left.copy_(left)
        self.right.copy_(right)
        self.slope_left.zero_()
        self.slope_right.fill_(1.0)

    def _axis(self, x: Tensor) -> int:
        return _channel_axis(x, self.channels, self.channel_axis)

    @torch.no_grad()
    def _observe(self, x: Tensor, axis: int) -> None:
        """Running mean and population std (a channel of one element has std 0, not NaN).

        Started by the first batch: started at 0, both would be too small by 0.9^batches, and the boundaries with them.
        A batch that is not finite is left out, since one NaN would stay for ever.
        """
        wide = x.detach().to(self.mean.dtype)
        if self.channels is None:
            std, mean = torch.std_mean(wide.reshape(1, -1), dim=1, correction=0)
        else:
            std, mean = torch.std_mean(wide.movedim(axis, 0).flatten(1), dim=1, correction=0)
        good = mean.isfinite() & std.isfinite()
        keep = torch.where(self.batches == 0, 0.0, MOMENTUM)
        for running, new in ((self.mean, mean), (self.std, std)):
            running.copy_(torch.where(good, keep * running + (1 - keep) * new, running))
        self.batches += good

    def _pool(self) -> None:
        """Statistics of all processes: mean of means, and the variance of the mixture."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        seen = (self.batches > 0).to(torch.float64)
        mean, std = self.mean.to(torch.float64), self.std.to(torch.float64)
        sums = torch.stack((seen, seen * mean, seen * (std**2 + mean**2), self.batches.to(torch.float64)))
        torch.distributed.all_reduce(sums)
        count = sums[0].clamp_min(1)
        pooled = sums[1] / count
        self.mean.copy_(pooled)
        self.std.copy_((sums[2] / count - pooled**2).clamp_min(0).sqrt())
        self.batches.copy_(sums[3].to(torch.int64))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._collecting = bool(self.phase)


class StaticPWLU(nn.Module):
    """A trained PWLU as constants: ``y = K'[c, j] x + Z'[c, j]``, ``j = clip(floor((x - B_L) / d) + 1, 0, N + 1)``.

    Buffers ``left`` and ``width`` (C,), ``slopes`` and ``offsets`` (C, N + 2). Gradients reach the input only.
    ``|Z'|`` grows with the distance of a segment from 0, but not beyond ``|Y| + |K' B|`` with B the segment's own
    boundary: the rounding error is at most about ``4 eps (|K'| max(|x|, |B|) + |Y|)``, which is what rounding the input
    and the boundary costs in any form, so float32 tables lose nothing that ``(x - B_i) K_i + Y_i`` would keep.

    Source: PWLU, section 3.4.
    """

    left: Tensor
    width: Tensor
    slopes: Tensor
    offsets: Tensor
    kernel: Kernel = "blocks"
    # As in PWLU; while it is set, so are the other parameters of one.
    node_form: NodeForm | None = None
    right: Tensor
    values: Tensor
    slope_left: Tensor
    slope_right: Tensor

    def __init__(self, tables: Tables, *, channels: int | None, channel_axis: int = 1) -> None:
        super().__init__()
        self.channels, self.channel_axis = channels, channel_axis
        for name, tensor in tables._asdict().items():
            self.register_buffer(name, tensor.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Apply the function; shape and dtype of ``x``."""
        axis = _channel_axis(x, self.channels, self.channel_axis)
        if self.node_form is not None:
            whole = Parameters(self.left, self.right, self.values, self.slope_left, self.slope_right)
            return pwlu_node(x, whole, axis, self.node_form)
        tables = Tables(self.left, self.width, self.slopes, self.offsets)
        tables = Tables(*(t.to(torch.promote_types(x.dtype, t.dtype)) for t in tables))
        if plain_wanted(x) or x.requires_grad:
            return evaluate(x, tables, axis)
        return (forward_compiled if self.kernel == "compiled" else forward_blocks)(x, tables, axis)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        what = "layer-wise" if self.channels is None else f"{self.channels}, channel_axis={self.channel_axis}"
        return f"{what}, intervals={self.slopes.shape[1] - 2}"


class _ReluFrozen(torch.autograd.Function):
    """ReLU of the first argument; the parameters get gradients of zero."""

    @staticmethod
    def forward(x: Tensor, *parameters: Tensor) -> Tensor:  # noqa: ARG004  # they only take part in the graph
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(output, *inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        output, *parameters = ctx.saved_tensors
        return (torch.where(output > 0, grad, 0), *(torch.zeros_like(p) for p in parameters))


def _channel_axis(x: Tensor, channels: int | None, axis: int) -> int:
    """Where the channels of ``x`` are, counted from the front; 0 for a layer-wise unit."""
    if not x.is_floating_point():
        raise TrainingError(f"PWLU got {x.dtype} input", hint="give it floating point")
    if channels is None:
        return 0
    found = axis % x.ndim if -x.ndim <= axis < x.ndim else None
    # A trace takes sizes for tensors, and warns of every comparison.
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]  # it is public
    if found is None or (not tracing and x.shape[found] != channels):
        raise TrainingError(
            f"PWLU of {channels} channels on axis {axis} got input of shape {tuple(x.shape)}",
            hint="set channels and channel_axis to the input's, or channels=None for a whole layer",
        )
    return found
