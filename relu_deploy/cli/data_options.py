"""The options that name input data, for every command that reads some."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import click

from calib.options import METHODS, PERCENTILE, PREPROCESS_HELP

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
    return _all_of(options)


def method_options(method: str, percentile: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options for how ranges are chosen, under these names.

    The command receives ``method: str`` and ``percentile: float | None``; both go to :func:`calib.run.calibrate`.
    """
    options = (
        click.option(method, "method", type=click.Choice(METHODS), default=METHODS[0], show_default=True,
                     help="How a range is chosen: max, the extremes; percentile, what P of 100 values keep to; entropy "
                     "or mse, where quantising to int8 changes the distribution or the values least."),
        click.option(percentile, "percentile", type=click.FloatRange(0, 100, min_open=True), metavar="P",
                     help=f"For the method percentile.  [default: {PERCENTILE}]"),
    )  # fmt: skip
    return _all_of(options)


def _all_of(options: Iterable[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """One decorator that adds several options, listed by ``--help`` in their order."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(tuple(options)):
            function = option(function)
        return function

    return add
