"""Options that every command which quantises takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click


def int8_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--weight-bits``, ``--channel-fusion``, ``--weight-granularity``, ``--float-part`` and ``--keep-float``."""
    function = click.option(
        "--keep-float",
        multiple=True,
        metavar="NODE|N",
        help="Leave this linear layer in float; may be given several times. A number, with data to measure on: the N "
        "layers that INT8 damages most.",
    )(function)
    function = click.option(
        "--weight-granularity", type=click.Choice(["auto", "channel", "tensor"]), default="auto", show_default=True,
        help="A weight scale for each output channel, or one for a layer: less precise, but tensorrt-rtx then fuses "
        "bias and ReLU into its int8 convolutions. auto: the second there, for layers that lose little by it.",
    )(function)  # fmt: skip
    function = click.option(
        "--float-part", type=click.Choice(["auto", "fp32", "fp16"]), default="auto", show_default=True,
        help="What is left in float computes in this type; inputs and outputs stay float32. auto: fp16 for TensorRT, "
        "where values fit; fp32 for ort.",
    )(function)  # fmt: skip
    function = click.option(
        "--channel-fusion", type=click.Choice(["pow2", "free", "off"]), default="pow2", show_default=True,
        help="Scale channels against each other where ReLU lets it through, so that one scale fits all. pow2: by "
        "powers of two, which leaves the float network bit for bit what it is.",
    )(function)  # fmt: skip
    return click.option(
        "--weight-bits", type=click.Choice(["auto", "7", "8"]), default="auto", show_default=True,
        help="Width of int8 weights for ort. auto: 7 where this CPU is x86 without VNNI and 8 would saturate; else 8.",
    )(function)  # fmt: skip


def parse_weight_bits(choice: str) -> int | None:
    """``--weight-bits`` as :func:`relu_deploy.int8.run.quantize` takes it; None is auto."""
    return None if choice == "auto" else int(choice)
