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
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from relu_deploy.errors import BackendUnavailableError
from relu_deploy.nn.pwlu_function import (
    MIN_INTERVAL,
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


class Packed(NamedTuple):
    """Tables as the kernels read them, float32: rows of a multiple of 8 entries, as many as a vector register holds.

    ``left`` and ``width`` (C,); ``slopes`` and ``offsets`` (C, P), of which the first ``segments`` columns are used.
    """

    left: Tensor
    width: Tensor
    slopes: Tensor
    offsets: Tensor
    segments: int


class CompiledPWLU(torch.autograd.Function):
    """PWLU with the gradients of the paper, section 3.1, as :class:`relu_deploy.nn.pwlu_function.PWLUFunction`.

    In torch's older form, with ``ctx`` in ``forward``: a separate ``setup_context`` has torch inspect the signature at
    every call, a tenth of a millisecond.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        values: Tensor,
        slope_left: Tensor,
        slope_right: Tensor,
        axis: int,
    ) -> Tensor:
        """Values; arguments as in :class:`Parameters`."""
        ctx.save_for_backward(x, left, right, values, slope_left, slope_right)
        ctx.axis = axis
        raw = Parameters(left, right, values, slope_left, slope_right)
        if _direct(x, raw):
            return _forward(x, _tables(raw), axis)
        return forward_compiled(x, tables_of(raw.as_work(work_dtype(x, values))), axis)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the five parameters."""
        x, *rest = ctx.saved_tensors
        raw = Parameters(*rest)
        wanted = any(ctx.needs_input_grad[1:6])
        if torch.is_grad_enabled():
            return (*differentiable(x, raw, grad, ctx.axis, ctx.needs_input_grad[:6]), None)
        if _direct(x, raw):
            dx, sums = _backward(x, grad, _tables(raw), ctx.axis, parameters=wanted)
            return (dx, *(_gradients(raw, sums) if sums is not None else [None] * 5), None)
        work = raw.as_work(work_dtype(x, raw.values))
        dx, parts = backward_compiled(x, grad, tables_of(work), ctx.axis, parameters=wanted)
        if parts is None:
            return dx, None, None, None, None, None, None
        # In float64, as the sums are: a few hundred numbers.
        grads = parameter_gradients(Parameters(*(p.to(torch.float64) for p in work)), *parts)
        return (dx, *(g.to(p.dtype) for g, p in zip(grads, raw, strict=True)), None)


def forward_compiled(x: Tensor, t: Tables, axis: int) -> Tensor:
    """Same values as :func:`relu_deploy.nn.pwlu_function.evaluate`; any floating dtype, float64 by blocks."""
    return _forward(x, _packed(t), axis) if serves(x, t.slopes) else forward_blocks(x, t, axis)


def backward_compiled(
    x: Tensor, grad: Tensor, t: Tables, axis: int, *, parameters: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Gradient of x, and the float64 sums of ``grad`` and ``grad * (x - B_L)`` over each segment, (C, N + 2) each."""
    if not serves(x, t.slopes):
        return backward_blocks(x, grad, t, axis, parameters=parameters)
    packed = _packed(t)
    dx, sums = _backward(x, grad, packed, axis, parameters=parameters)
    return dx, None if sums is None else (sums[:, : packed.segments, 0], sums[:, : packed.segments, 1])


def _forward(x: Tensor, t: Packed, axis: int) -> Tensor:
    rows = as_rows(x, axis, t.left.numel())
    wide = rows.matrix.to(torch.float32)
    y = torch.empty_like(wide)
    _call("forward", rows, [wide, y], t, [t.slopes, t.offsets])
    return rows.restore(y.to(x.dtype))


def _backward(x: Tensor, grad: Tensor, t: Packed, axis: int, *, parameters: bool) -> tuple[Tensor, Tensor | None]:
    """Gradient of x, and sums (C, P, 2) in float64."""
    rows = as_rows(x, axis, t.left.numel())
    given = grad if rows.back is None else grad.movedim(rows.back, -1)
    upstream = given.contiguous().view(rows.matrix.shape).to(torch.float32)
    wide = rows.matrix.to(torch.float32)
    dx = torch.empty_like(wide)
    sums = torch.zeros(*t.slopes.shape, 2, dtype=torch.float64) if parameters else None
    _call("backward", rows, [wide, upstream, dx, sums], t, [t.slopes])
    return rows.restore(dx.to(x.dtype)), sums


def _direct(x: Tensor, p: Parameters) -> bool:
    """True if the small work on the parameters is done in C++ too; it is a dozen calls of torch otherwise."""
    return serves(x, p.values) and all(each.dtype == torch.float32 and each.is_contiguous() for each in p)


def _tables(p: Parameters) -> Packed:
    """As :func:`relu_deploy.nn.pwlu_function.tables_of`, bit for bit."""
    segments = p.intervals + 2
    width = torch.empty_like(p.left)
    slopes = p.values.new_zeros(len(p.left), segments + -segments % 8)
    offsets = torch.zeros_like(slopes)
    library().pwlu_tables(*_in(p, slopes.shape[1]), *map(_pointer, (width, slopes, offsets)))
    return Packed(p.left, width, slopes, offsets, segments)


def _gradients(p: Parameters, sums: Tensor) -> list[Tensor]:
    """As :func:`relu_deploy.nn.pwlu_function.parameter_gradients`, in float64."""
    made = [torch.empty_like(each) for each in p]
    library().pwlu_gradients(_pointer(sums), *_in(p, sums.shape[1]), *map(_pointer, made))
    return made


def _in(p: Parameters, pitch: int) -> list[Any]:
    """The parameters, and what else the small functions take before their outputs."""
    sizes = [ctypes.c_int64(size) for size in (len(p.left), p.intervals, pitch)]
    return [*map(_pointer, p), *sizes, ctypes.c_float(p.intervals * MIN_INTERVAL)]


def _packed(t: Tables) -> Packed:
    segments = t.slopes.shape[1]
    left, width = t.left.detach().contiguous(), t.width.detach().contiguous()
    slopes, offsets = (F.pad(table.detach(), (0, -segments % 8)).contiguous() for table in (t.slopes, t.offsets))
    return Packed(left, width, slopes, offsets, segments)


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(which: str, rows: Rows, tensors: list[Tensor | None], t: Packed, tables: list[Tensor]) -> None:
    """Run a kernel; ``tensors`` have the layout of ``rows``."""
    channels, pitch = t.slopes.shape
    size, columns = rows.matrix.shape
    if channels == 1:
        outer, length, layout = 1, size * columns, "rows"
    elif rows.by_row:
        outer, length, layout = size // channels, columns, "rows"
    else:
        outer, length, layout = size, 1, "columns"
    threads = max(1, min(torch.get_num_threads(), size * columns // GRAIN))
    getattr(library(), f"pwlu_{which}_{layout}")(
        *map(_pointer, tensors), *map(ctypes.c_int64, (outer, length)), *map(_pointer, (t.left, t.width, *tables)),
        *map(ctypes.c_int64, (channels, t.segments, pitch)), ctypes.c_int(threads),
    )  # fmt: skip
