"""Options that every command which quantises takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def int8_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--weight-bits``, ``--weight-granularity`` and ``--keep-float``."""
    function = click.option(
        "--keep-float",
        multiple=True,
        metavar="NODE",
        help="Leave this linear layer in float; may be given several times.",
    )(function)
    function = click.option(
        "--weight-granularity", type=click.Choice(["channel", "tensor"]), default="channel", show_default=True,
        help="A weight scale for each output channel, or one for a layer: less precise, but tensorrt-rtx then fuses "
        "bias and ReLU into its int8 convolutions.",
    )(function)  # fmt: skip
    return click.option(
        "--weight-bits", type=click.Choice(["auto", "7", "8"]), default="auto", show_default=True,
        help="Width of int8 weights for ort. auto: 7 where this CPU is x86 without VNNI and 8 would saturate; else 8.",
    )(function)  # fmt: skip


def weight_width(choice: str, target: str) -> tuple[int, tuple[str, ...]]:
    """Resolve ``--weight-bits`` for a target; the second value warns where this CPU decided or contradicts it."""
    if target != "ort":
        return 8, ()
    from relu_deploy.int8.formats import weight_bits_for_cpu
    from relu_deploy.machine import describe_machine

    here = weight_bits_for_cpu(describe_machine().flags)
    if choice == "auto":
        if here == 8:
            return 8, ()
        return 7, ("this CPU has no VNNI, so weights have 7 bits; for a CPU that has it, give --weight-bits 8",)
    if choice == "8" and here == 7:
        return 8, (
            "this CPU has no VNNI: 8-bit weights saturate here and lose accuracy, on CPUs with VNNI they do not",
        )
    return int(choice), ()
