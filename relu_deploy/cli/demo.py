"""``relu-deploy demo``: the whole flow on real data, in one command."""

from __future__ import annotations

from pathlib import Path

import click

from relu_deploy.cli.common import OUTPUT_FOLDER, emit, json_option, progress_bar
from relu_deploy.cli.safety import FileCommand


@click.command("demo", cls=FileCommand, short_help="See the whole job done on real data, with no download.")
@click.option(
    "-o", "--output", type=OUTPUT_FOLDER, default=Path("demo-run"), show_default=True, metavar="DIR",
    help="Folder for everything that is made.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of split, training and measuring."
)
@click.option(
    "--seconds", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
    help="Measured time of each engine.",
)  # fmt: skip
@json_option
def command(output: Path, seed: int, seconds: float, json_path: str | None) -> None:
    """See the whole job done on real data, with no download.

    Trains a small SiLU network on scikit-learn's digits, distils its ReLU student, exports both, rewrites, calibrates,
    quantises, builds engines (ONNX Runtime; TensorRT-RTX too where it is installed), measures them against the
    original, and writes a page that says what each file is.

    \b
    Example:
      relu-deploy demo -o demo-run
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.demo.report import render, write_pages
    from relu_deploy.demo.run import run_demo

    with progress_bar() as progress:
        report = run_demo(output, seed=seed, bench_seconds=seconds, progress=progress)
    write_pages(report)
    emit(report, json_path, lambda: render(report))
