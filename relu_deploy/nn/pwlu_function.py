"""The function of the Piecewise Linear Unit and its gradients: one form that exports, one that is quick to train.

Both read ``y = K'[c, j] x + Z'[c, j]`` from tables of N + 2 segments a channel, segment 0 left of ``B_L`` and segment
N + 1 right of ``B_R``. Segments are chosen by ``floor((x - B_L) / (B_R - B_L) * N)``: the quotient is exactly 1 at
``B_R``, and rounding is monotone, so ``x < B_L`` and ``x >= B_R`` land on their outer segments without a comparison.

Arithmetic is at least float32, whatever the input: in bfloat16 ``(x - B_L) / d`` has 8 bits, too few to name a segment.
NaN gives NaN. An infinite input meets an outer slope of 0 as ``inf * 0 = NaN``, as IEEE arithmetic has it.

Source: PWLU, section 3.1 (definition, gradients with the segment held constant) and 3.4 (tables).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

BLOCK = 1 << 17
"""Elements worked on at once. Smaller blocks stay in a nearer cache but cost more calls, which weighs more; larger ones
gain little and add more terms in float32 before a block's sums are put together."""

MIN_INTERVAL = 1e-3
"""Smallest width of an interval. Boundaries that training drove together or across stay this far apart."""


class Parameters(NamedTuple):
    """What a PWLU learns: ``left``, ``right``, ``slope_left``, ``slope_right`` (C,), ``values`` (C, N + 1)."""

    left: Tensor
    right: Tensor
    values: Tensor
    slope_left: Tensor
    slope_right: Tensor

    @property
    def intervals(self) -> int:
        """N, the number of intervals between the boundaries."""
        return self.values.shape[1] - 1

    def as_work(self, dtype: torch.dtype) -> Parameters:
        """In the dtype of the arithmetic, with ``right`` at least N ``MIN_INTERVAL`` beyond ``left``.

        The correction of ``right`` is a constant to autograd, so crossed boundaries still feel their gradients.
        """
        left, right, values, low, high = (p.to(dtype) for p in self)
        apart = torch.maximum(right, left + self.intervals * MIN_INTERVAL)
        return Parameters(left, right + (apart - right).detach(), values, low, high)


class Tables(NamedTuple):
    """A PWLU ready to evaluate: ``left`` and ``width`` (C,), ``slopes`` K' and ``offsets`` Z' (C, N + 2)."""

    left: Tensor
    width: Tensor
    slopes: Tensor
    offsets: Tensor


def work_dtype(x: Tensor, parameter: Tensor) -> torch.dtype:
    """The dtype of the arithmetic: that of the wider side, at least float32."""
    return torch.promote_types(torch.promote_types(x.dtype, parameter.dtype), torch.float32)


def tables_of(p: Parameters) -> Tables:
    """Slope and offset of every segment, from parameters that passed :meth:`Parameters.as_work`; differentiable."""
    n = p.intervals
    width = p.right - p.left
    step = (width / n).unsqueeze(1)
    inner = (p.values[:, 1:] - p.values[:, :-1]) / step
    starts = p.left.unsqueeze(1) + step * torch.arange(n, device=step.device, dtype=step.dtype)
    low, high = p.slope_left.unsqueeze(1), p.slope_right.unsqueeze(1)
    slopes = torch.cat((low, inner, high), 1)
    anchors = torch.cat((p.left.unsqueeze(1), starts, p.right.unsqueeze(1)), 1)
    heights = torch.cat((p.values[:, :1], p.values), 1)
    return Tables(p.left, width, slopes, heights - slopes * anchors)


def evaluate(x: Tensor, t: Tables, axis: int) -> Tensor:
    """The function in plain operators, for export and compilers; autograd finds the gradients of the paper in it.

    Args:
        x: Any shape; floating point.
        t: Tables of C channels; with C = 1 every element uses them.
        axis: Axis of ``x`` with C elements, not negative; ignored for C = 1.
    """
    channels, segments = t.slopes.shape
    shape = [1] * x.ndim
    if channels > 1:
        shape[axis] = channels
    wide = x.to(t.left.dtype)
    place = (wide - t.left.detach().view(shape)) / t.width.detach().view(shape) * (segments - 2)
    # Clamped twice: as a float because infinities have no integer, as an integer because NaN has none.
    segment = (place.detach().floor().clamp(-1, segments - 2).to(torch.int64) + 1).clamp(0, segments - 1)
    if channels > 1:
        segment = segment + (torch.arange(channels, device=x.device) * segments).view(shape)
    y = t.slopes.reshape(-1)[segment] * wide + t.offsets.reshape(-1)[segment]
    return y.to(x.dtype)


def pwlu(x: Tensor, p: Parameters, axis: int) -> Tensor:
    """The trainable function: by the blocked kernels below, or by plain operators (compilers, exporters, GPUs)."""
    if plain_wanted(x):
        return evaluate(x, tables_of(p.as_work(work_dtype(x, p.values))), axis)
    y: Tensor = PWLUFunction.apply(x, *p, axis)  # type: ignore[no-untyped-call]  # torch's own signature
    return y


def plain_wanted(x: Tensor) -> bool:
    """True where plain operators serve better: they are compiled and exported, and a GPU has no cache to block for."""
    return torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export() or x.device.type != "cpu"


class PWLUFunction(torch.autograd.Function):
    """PWLU with the gradients of the paper, section 3.1; keeps only ``x`` and the parameters for the backward pass.

    A backward pass that is itself differentiated (``create_graph=True``) goes through the plain operators.
    """

    @staticmethod
    def forward(
        x: Tensor, left: Tensor, right: Tensor, values: Tensor, slope_left: Tensor, slope_right: Tensor, axis: int
    ) -> Tensor:
        """Values; arguments as in :class:`Parameters`."""
        raw = Parameters(left, right, values, slope_left, slope_right)
        return forward_blocks(x, tables_of(raw.as_work(work_dtype(x, values))), axis)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004  # torch's signature
        """Keep what the gradients need."""
        ctx.save_for_backward(*inputs[:6])
        ctx.axis = inputs[6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the five parameters."""
        x, *rest = ctx.saved_tensors
        raw = Parameters(*rest)
        if torch.is_grad_enabled():
            return (*differentiable(x, raw, grad, ctx.axis, ctx.needs_input_grad[:6]), None)
        work = raw.as_work(work_dtype(x, raw.values))
        dx, sums = backward_blocks(x, grad, tables_of(work), ctx.axis, parameters=any(ctx.needs_input_grad[1:6]))
        if sums is None:
            return dx, None, None, None, None, None, None
        grads = parameter_gradients(work, *sums)
        return (dx, *(g.to(p.dtype) for g, p in zip(grads, raw, strict=True)), None)


def differentiable(
    x: Tensor, raw: Parameters, grad: Tensor, axis: int, wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``x`` and the parameters, those wanted, that can be differentiated again."""
    y = evaluate(x, tables_of(raw.as_work(work_dtype(x, raw.values))), axis)
    inputs = [tensor for tensor, want in zip((x, *raw), wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, inputs, grad, create_graph=True, materialize_grads=True))
    return tuple(next(found) if want else None for want in wanted)


def parameter_gradients(p: Parameters, g: Tensor, gu: Tensor) -> Parameters:
    """Gradients from the sums of ``grad`` and of ``grad * (x - B_L)`` over each segment, both (C, N + 2)."""
    n = p.intervals
    width = (p.right - p.left).unsqueeze(1)
    index = torch.arange(n, device=g.device, dtype=g.dtype)
    slope = (p.values[:, 1:] - p.values[:, :-1]) * (n / width)
    inner, along = g[:, 1:-1], gu[:, 1:-1] / width
    values = torch.zeros_like(p.values)
    values[:, :-1] += (index + 1) * inner - along * n  # (B_{i+1} - x) / d
    values[:, 1:] += along * n - index * inner  # (x - B_i) / d
    values[:, 0] += g[:, 0]
    values[:, -1] += g[:, -1]
    left = (slope * (along - inner)).sum(1) - p.slope_left * g[:, 0]  # K_i (x - B_R) / (B_R - B_L)
    right = -(slope * along).sum(1) - p.slope_right * g[:, -1]  # -K_i (x - B_L) / (B_R - B_L)
    return Parameters(left, right, values, gu[:, 0], gu[:, -1] - g[:, -1] * width[:, 0])


class Rows(NamedTuple):
    """A tensor as a matrix in memory order, with per-channel constants that broadcast against its rows."""

    matrix: Tensor
    by_row: bool
    """True if a row lies in one channel (N C, H W), False if its columns are the channels (N H W, C)."""
    shape: torch.Size
    back: int | None
    """The axis that channels go back to, if they were moved last."""

    def constant(self, per_channel: Tensor) -> Tensor:
        """(C,) to (rows, 1) or (1, columns)."""
        if per_channel.numel() > 1 and self.by_row:
            return per_channel.repeat(self.matrix.shape[0] // per_channel.numel()).unsqueeze(1)
        return per_channel.unsqueeze(0)

    def restore(self, matrix: Tensor) -> Tensor:
        """A result in the layout of the input."""
        result = matrix.view(self.shape)
        return result if self.back is None else result.movedim(-1, self.back)


def as_rows(x: Tensor, axis: int, channels: int) -> Rows:
    """See :class:`Rows`; copies ``x`` only if its channels are neither where they are told to be nor last in memory."""
    if channels == 1:
        dense = x.contiguous()
        return Rows(dense.view(-1, 1), True, dense.shape, None)
    moved = axis < x.ndim - 1 and not x.is_contiguous() and x.movedim(axis, -1).is_contiguous()
    dense = x.movedim(axis, -1) if moved else x.contiguous()
    inner = 1 if moved else dense.shape[axis + 1 :].numel()
    by_row = inner > 1
    columns = inner if by_row else channels
    return Rows(dense.view(dense.numel() // columns, columns), by_row, dense.shape, axis if moved else None)


class _Segments:
    """Finds ``x - B_L`` and the place of each element's segment in the flat tables, block by block."""

    def __init__(self, rows: Rows, t: Tables) -> None:
        self.rows = rows
        channels, segments = t.slopes.shape
        self.intervals = segments - 2
        self.left = rows.constant(t.left)
        self.width = rows.constant(t.width)
        self.starts = rows.constant(torch.arange(channels, device=t.left.device, dtype=torch.int32) * segments)

    def blocks(self) -> list[slice]:
        """The rows of each block."""
        count, columns = self.rows.matrix.shape
        step = max(1, BLOCK // max(1, columns))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    def __call__(self, block: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The block itself, ``x - B_L`` and the flat int32 index, shaped as the block."""
        here = block if self.left.shape[0] > 1 else slice(None)
        x = self.rows.matrix[block].to(self.left.dtype)
        along = x - self.left[here]
        place = (along / self.width[here]).mul_(self.intervals).floor_().clamp_(-1, self.intervals).add_(1)
        # NaN has no integer, so the integers are clamped as well.
        index = place.to(torch.int32).clamp_(0, self.intervals + 1)
        if self.starts.numel() > 1:
            index += self.starts[here]
        return x, along, index


def forward_blocks(x: Tensor, t: Tables, axis: int) -> Tensor:
    """Same values as :func:`evaluate`, a cache-sized block at a time."""
    rows = as_rows(x, axis, t.left.numel())
    find = _Segments(rows, t)
    slopes, offsets = t.slopes.reshape(-1), t.offsets.reshape(-1)
    y = torch.empty_like(rows.matrix)
    for block in find.blocks():
        xs, _, index = find(block)
        flat = index.view(-1)
        found = slopes.index_select(0, flat).view_as(xs).mul_(xs)
        y[block] = found.add_(offsets.index_select(0, flat).view_as(xs))
    return rows.restore(y)


def backward_blocks(
    x: Tensor, grad: Tensor, t: Tables, axis: int, *, parameters: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gradient of x, and the sums of ``grad`` and ``grad * (x - B_L)`` over each segment, (C, N + 2) each."""
    rows = as_rows(x, axis, t.left.numel())
    given = grad if rows.back is None else grad.movedim(rows.back, -1)
    upstream = given.contiguous().view(rows.matrix.shape)
    find = _Segments(rows, t)
    slopes = t.slopes.reshape(-1)
    dx = torch.empty_like(rows.matrix)
    total = slopes.new_zeros(2, slopes.numel())
    for block in find.blocks():
        _, along, index = find(block)
        flat = index.view(-1)
        g = upstream[block].to(along.dtype)
        dx[block] = slopes.index_select(0, flat).view_as(g).mul_(g)
        if parameters:
            # A sum of its own for each block: adding small terms to one large total loses digits.
            part = torch.zeros_like(total)
            part[0].index_add_(0, flat, g.reshape(-1))
            part[1].index_add_(0, flat, along.mul_(g).view(-1))
            total += part
    sums = total.view(2, *t.slopes.shape)
    return rows.restore(dx), (sums[0], sums[1]) if parameters else None
