"""Time of PWLU, in each form that it has here, next to activations of torch, on a CPU in float32.

Every form runs once in each round, in turn, so that a busy machine slows all of them alike. Shown are medians over the
rounds of the ratio to ``hardswish`` in the same round, forward (no gradients) and forward with backward (gradients of
the input and of all parameters), and in brackets the ratio of the shortest times, which other processes disturb least.
With one thread the processor's time is taken, to which other processes do not add their own.

Needs the extra torch, and a C++ compiler. Run:

    python benchmarks/activations.py --rounds 30 --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from relu_deploy.machine import describe_machine
from relu_deploy.nn.pwlu import PWLU
from relu_deploy.nn.pwlu_function import evaluate, tables_of
from relu_deploy.nn.pwlu_model import use_kernel

BASE = "hardswish"
LAYOUTS = {"NCHW": 1, "channels last": 1, "NTC": -1}


class Plain(nn.Module):
    """PWLU by the operators that exporters and compilers see, run eagerly."""

    def __init__(self, unit: PWLU, axis: int) -> None:
        super().__init__()
        self.unit, self.axis = unit, axis

    def forward(self, x: Tensor) -> Tensor:
        return evaluate(x, tables_of(self.unit.parameters_in_order().as_work(torch.float32)), self.axis % x.ndim)


def unit(axis: int, channels: int, kernel: str) -> PWLU:
    """A unit of 16 intervals whose heights have left ReLU; tables with zeros would be as quick."""
    torch.manual_seed(0)
    made = PWLU(channels, channel_axis=axis)
    with torch.no_grad():
        made.values.add_(0.05 * torch.randn_like(made.values))
    use_kernel(made, kernel)
    return made


def forms(axis: int, channels: int, *, compiled: bool) -> dict[str, nn.Module]:
    """What is timed; the first is what the others are compared with."""
    found: dict[str, nn.Module] = {
        BASE: nn.Hardswish(),
        "relu": nn.ReLU(),
        "silu": nn.SiLU(),
        "gelu": nn.GELU(),
        "PWLU kernel=compiled": unit(axis, channels, "compiled"),
        "PWLU kernel=blocks": unit(axis, channels, "blocks"),
        "PWLU plain operators": Plain(unit(axis, channels, "blocks"), axis),
    }
    if compiled:
        torch.compiler.reset()
        found["PWLU torch.compile"] = torch.compile(unit(axis, channels, "blocks"))
    return found


def example(layout: str, shape: tuple[int, ...]) -> Tensor:
    x = torch.randn(shape)
    if layout == "channels last":
        return x.to(memory_format=torch.channels_last)
    return x.flatten(2).transpose(1, 2).contiguous() if layout == "NTC" else x


def timed(form: nn.Module, x: Tensor, upstream: Tensor | None, clock: Callable[[], float]) -> float:
    """Seconds of one run, the release of its results included."""
    start = clock()
    if upstream is None:
        with torch.no_grad():
            form(x)
    else:
        torch.autograd.grad(form(x), [x, *form.parameters()], upstream)
    return clock() - start


def rounds(
    chosen: dict[str, nn.Module], x: Tensor, upstream: Tensor | None, *, count: int, clock: Callable[[], float]
) -> dict[str, tuple[float, float, float]]:
    """Median seconds, median ratio and ratio of the shortest times; two rounds of warm-up are dropped."""
    taken: dict[str, list[float]] = {name: [] for name in chosen}
    for turn in range(count + 2):
        for name, form in chosen.items():
            seconds = timed(form, x, upstream, clock)
            if turn >= 2:
                taken[name].append(seconds)
    base = taken[BASE]
    return {
        name: (
            statistics.median(times),
            statistics.median(a / b for a, b in zip(times, base, strict=True)),
            min(times) / min(base),
        )
        for name, times in taken.items()
    }


def keep_memory() -> str:
    """Have the C library keep what is freed.

    A large block goes back to the system and comes anew page by page, or not, as the blocks around it decide: that cost
    up to 15 ms a tensor, five times a ``hardswish``, and fell on forms by chance.
    """
    if platform.libc_ver()[0] != "glibc":
        return "allocator as it comes"
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, 1 << 30)
    return "freed memory is kept and used again"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shape", type=int, nargs=4, default=(32, 64, 56, 56), metavar=("N", "C", "H", "W"))
    parser.add_argument("--layout", choices=LAYOUTS, action="append", help="all by default")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    memory = keep_memory()
    clock, kind = (time.process_time, "processor") if options.threads == 1 else (time.perf_counter, "wall")
    machine = describe_machine()
    shape = tuple(options.shape)
    print(f"{machine.cpu}, {machine.logical_cpus} processors, torch {torch.__version__}, {options.threads} threads")
    print(f"{shape}, float32, {options.rounds} rounds, {kind} time; {memory}\n")
    print("| layout | form | forward, ms | x hardswish | forward + backward, ms | x hardswish |")
    print("|---|---|---|---|---|---|")
    for layout in options.layout or LAYOUTS:
        x = example(layout, shape)
        chosen = forms(LAYOUTS[layout], shape[1], compiled=not options.no_compile)
        one = rounds(chosen, x, None, count=options.rounds, clock=clock)
        both = rounds(chosen, x.clone().requires_grad_(), torch.randn_like(x), count=options.rounds, clock=clock)
        for name in chosen:
            cells = [f"{ms * 1e3:.1f} | {ratio:.2f} ({least:.2f})" for ms, ratio, least in (one[name], both[name])]
            print(f"| {layout} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
