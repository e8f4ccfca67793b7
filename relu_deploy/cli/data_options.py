"""The options that name input data, for every command that reads some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from calib.options import PREPROCESS_HELP

_DATA = (
    "Samples: a .npy file, a .npz file (arrays named by input), a folder of either, a folder of images, or "
    "module:function (looked for in the current folder too; returns or yields arrays or dicts of arrays). Samples are "
    "on axis 0."
)

preprocess_option = click.option(
    "--preprocess", metavar="SPEC", help=f"How images become inputs, as KEY=VALUE,... Keys: {PREPROCESS_HELP}"
)


def data_options(*, required: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add ``--calib``, ``--preprocess``, ``--samples`` and ``--batch-size``.

    The command receives ``data: str | None``, ``preprocess: str | None``, ``samples: int | None`` and ``batch_size:
    int``; the first two go to :func:`calib.sources.open_source`.
    """
    options = (
        click.option("--calib", "data", required=required, metavar="DATA", help=_DATA),
        preprocess_option,
        click.option("--samples", type=click.IntRange(min=1), metavar="N", help="Use the first N.  [default: all]"),
        click.option("--batch-size", type=click.IntRange(min=1), default=1, show_default=True, metavar="B",
                     help="Samples a run, where the model's batch axis is dynamic; it does not change the result."),
    )  # fmt: skip

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add
