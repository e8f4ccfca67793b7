"""PWLU as one pass over memory each way: C++ that is compiled when it is asked for, never by itself.

Chosen with :func:`relu_deploy.nn.pwlu_model.use_kernel`. Outputs and gradients of the input are bit for bit those of
the other forms; sums over elements (the gradients of the parameters) run in another order than theirs, which is why
what is installed never decides. The order depends on shapes alone: not on threads, and not on the instructions that the
machine has, so a training that is resumed, even on other threads, repeats itself.

The library is built once a process in a temporary folder, in some seconds, and leaves no file behind.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import BackendUnavailableError
from relu_deploy.nn.pwlu_function import (
    Parameters,
    Rows,
    Tables,
    as_rows,
    backward_blocks,
    differentiable,
    forward_blocks,
    parameter_gradients,
    tables_of,
    work_dtype,
)

SOURCE = Path(__file__).with_suffix(".cpp")
COMPILERS = ("c++", "g++", "clang++")
# Without -ffp-contract=off a product and a sum become one rounding, and values differ from the other forms.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")
GRAIN = 1 << 14
"""Elements that are worth a thread."""


@functools.cache
def library() -> ctypes.CDLL:
    """Compile and load the kernels, once a process.

    Raises:
        BackendUnavailableError: there is no C++ compiler, or it refuses the source.
    """
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        raise BackendUnavailableError(
            f"no C++ compiler ({', '.join(COMPILERS)}) to build the PWLU kernel with",
            hint="install one (apt install g++), or stay with the kernel 'blocks', which needs none",
        )
    native = ("-march=native",) if platform.machine() in {"x86_64", "AMD64"} else ()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "pwlu.so"
        command = [compiler, *FLAGS, *native, "-shared", "-fPIC", "-o", str(target), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  # our own source
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise BackendUnavailableError(
                f"{compiler} cannot build the PWLU kernel: {said}",
                hint="a g++ or clang++ with OpenMP is needed; the kernel 'blocks' needs no compiler",
            )
        return ctypes.CDLL(str(target))


def serves(x: Tensor, parameter: Tensor) -> bool:
    """True if the arithmetic is float32 on a CPU, which is all that the kernels do; float64 takes the blocked form."""
    return x.device.type == "cpu" and work_dtype(x, parameter) == torch.float32


class CompiledPWLU(torch.autograd.Function):
    """PWLU with the gradients of the paper, section 3.1, as :class:`relu_deploy.nn.pwlu_function.PWLUFunction`."""

    @staticmethod
    def forward(
        x: Tensor, left: Tensor, right: Tensor, values: Tensor, slope_left: Tensor, slope_right: Tensor, axis: int
    ) -> Tensor:
        """Values; arguments as in :class:`Parameters`."""
        raw = Parameters(left, right, values, slope_left, slope_right)
        return forward_compiled(x, tables_of(raw.as_work(work_dtype(x, values))), axis)

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
        dx, sums = backward_compiled(x, grad, tables_of(work), ctx.axis, parameters=any(ctx.needs_input_grad[1:6]))
        if sums is None:
            return dx, None, None, None, None, None, None
        # In float64, as the sums are: a few hundred numbers.
        grads = parameter_gradients(Parameters(*(p.to(torch.float64) for p in work)), *sums)
        return (dx, *(g.to(p.dtype) for g, p in zip(grads, raw, strict=True)), None)


def forward_compiled(x: Tensor, t: Tables, axis: int) -> Tensor:
    """Same values as :func:`relu_deploy.nn.pwlu_function.evaluate`; any floating dtype, float64 by blocks."""
    if not serves(x, t.slopes):
        return forward_blocks(x, t, axis)
    rows = as_rows(x, axis, t.left.numel())
    wide = rows.matrix.to(torch.float32)
    y = torch.empty_like(wide)
    constants = [p.detach().contiguous() for p in (t.left, t.width)] + [_padded(p) for p in (t.slopes, t.offsets)]
    _call("forward", rows, [wide, y, *constants], t.slopes.shape[1])
    return rows.restore(y.to(x.dtype))


def backward_compiled(
    x: Tensor, grad: Tensor, t: Tables, axis: int, *, parameters: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gradient of x, and the float64 sums of ``grad`` and ``grad * (x - B_L)`` over each segment, (C, N + 2) each."""
    if not serves(x, t.slopes):
        return backward_blocks(x, grad, t, axis, parameters=parameters)
    rows = as_rows(x, axis, t.left.numel())
    given = grad if rows.back is None else grad.movedim(rows.back, -1)
    upstream = given.contiguous().view(rows.matrix.shape).to(torch.float32)
    wide = rows.matrix.to(torch.float32)
    dx, slopes, segments = torch.empty_like(wide), _padded(t.slopes), t.slopes.shape[1]
    sums = torch.zeros(*slopes.shape, 2, dtype=torch.float64) if parameters else None
    constants = [t.left.detach().contiguous(), t.width.detach().contiguous(), slopes]
    _call("backward", rows, [wide, upstream, dx, sums, *constants], segments)
    found = None if sums is None else (sums[:, :segments, 0], sums[:, :segments, 1])
    return rows.restore(dx.to(x.dtype)), found


def _padded(table: Tensor) -> Tensor:
    """Rows of a multiple of 8 entries, as many as a vector register holds."""
    return F.pad(table.detach(), (0, -table.shape[1] % 8)).contiguous()


def _call(which: str, rows: Rows, tensors: list[Tensor | None], segments: int) -> None:
    """Run a kernel; the last tensor is a table, the tensors before the constants have the layout of ``rows``."""
    table = tensors[-1]
    assert table is not None  # noqa: S101  # for the type checker
    channels, pitch = table.shape
    size, columns = rows.matrix.shape
    if channels == 1:
        outer, length, layout = 1, size * columns, "rows"
    elif rows.by_row:
        outer, length, layout = size // channels, columns, "rows"
    else:
        outer, length, layout = size, 1, "columns"
    first = 2 if which == "forward" else 4
    integer, pointer = ctypes.c_int64, ctypes.c_void_p
    pointers = [pointer(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    threads = max(1, min(torch.get_num_threads(), size * columns // GRAIN))
    getattr(library(), f"pwlu_{which}_{layout}")(
        *pointers[:first], integer(outer), integer(length), *pointers[first:],
        integer(channels), integer(segments), integer(pitch), ctypes.c_int(threads),
    )  # fmt: skip
