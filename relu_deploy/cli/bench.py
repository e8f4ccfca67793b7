"""``relu-deploy bench``."""

from __future__ import annotations

from pathlib import Path

import click

from relu_deploy.cli.common import INPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.data_options import preprocess_option
from relu_deploy.cli.safety import FileCommand


def _read_shapes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """``NAME=1x3x320x320``, any number of times."""
    shapes = {}
    for value in values:
        name, equals, extents = value.rpartition("=")
        if not equals or not name or not all(extent.isdecimal() for extent in extents.split("x")):
            raise click.BadParameter(f"{value!r} is not of the form NAME=1x3x320x320", ctx, param)
        shapes[name] = tuple(int(extent) for extent in extents.split("x"))
    return shapes


def _read_percentiles(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    """``50,90,95,99``."""
    try:
        return tuple(sorted({float(part) for part in value.split(",")}))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of percentiles such as 50,90,99", ctx, param) from None


@click.command("bench", cls=FileCommand, short_help="Measure engines against their original: speed and accuracy.")
@click.argument("engines", nargs=-1, required=True, type=INPUT_FILE, metavar="ENGINE...")
@click.option("--against", required=True, type=INPUT_FILE, help="The original: an ONNX file or an engine.")
@click.option("--data", metavar="DATA", help="As --calib of calibrate: measure accuracy too.  [default: random inputs]")
@preprocess_option
@click.option("--labels", type=INPUT_FILE, help="A .npy file of class numbers, one a sample: gives top-1 accuracy.")
@click.option("--output", metavar="NAME", help="Output that accuracy is read from.  [default: the original's first]")
@click.option("--batch", type=click.IntRange(min=1), help="Items an inference.  [default: the network's, or 1]")
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    callback=_read_shapes,
    metavar="NAME=1x3x320x320",
    help="Shape of an input with dynamic axes besides the batch.  [default: the data's]",
)
@click.option("--rounds", type=click.IntRange(min=1), default=20, show_default=True, help="Turns of each engine.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    help="Measured time of each engine, all rounds together.",
)
@click.option("--warmup", type=click.FloatRange(min=0), default=1.0, show_default=True, help="Seconds, not counted.")
@click.option("--threads", type=click.IntRange(min=1), help="Of each runtime.  [default: all processors allowed]")
@click.option(
    "--percentiles",
    callback=_read_percentiles,
    metavar="P,P,...",
    default="50,90,95,99",
    show_default=True,
    help="Printed only where there are runs enough.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of inputs, turns and interval.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    help="Seconds an engine may be late before it is given up.",
)
@json_option
def command(
    engines: tuple[Path, ...],
    *,
    against: Path,
    data: str | None,
    preprocess: str | None,
    labels: Path | None,
    output: str | None,
    batch: int | None,
    shapes: dict[str, tuple[int, ...]],
    rounds: int,
    seconds: float,
    warmup: float,
    threads: int | None,
    percentiles: tuple[float, ...],
    seed: int,
    timeout: float,
    json_path: str | None,
) -> None:
    """Measure engines against their original: latency, FPS or QPS, the ratio with its interval, accuracy.

    Each engine runs in a process of its own; all take turns in random order, so that what changes on the machine meets
    them alike. A percentile is printed only if there are runs enough for it, and an engine is called faster only if the
    95 % interval of the ratio excludes 1. --json also keeps every run.

    \b
    Example:
      relu-deploy bench student-int8.onnx original-int8.onnx --against original.onnx \\
          --data test.npy --labels test-labels.npy --threads 2 --json bench.json
    """  # noqa: D301  click's \b keeps the example's lines; the doubled backslash is the shell's
    from relu_deploy.bench.compare import bench
    from relu_deploy.bench.table import render

    with progress_bar() as progress:
        report = bench(
            engines,
            against=against,
            data=data,
            preprocess=preprocess,
            labels=labels,
            output=output,
            batch=batch,
            shapes=shapes,
            rounds=rounds,
            seconds=seconds,
            warmup=warmup,
            threads=threads,
            percentiles=percentiles,
            seed=seed,
            timeout=timeout,
            progress=progress,
        )
    emit(report, json_path, lambda: render(report))
