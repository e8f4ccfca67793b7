"""``relu-deploy distill``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, emit, json_option, progress_bar
from relu_deploy.cli.safety import FileCommand, OutputPath
from relu_deploy.distill.config import RECIPE_NAMES, TASK_NAMES

if TYPE_CHECKING:
    from relu_deploy.distill.config import DistillConfig
    from relu_deploy.distill.sets import Sets
    from relu_deploy.nn.swap import SwapReport
    from relu_deploy.student import Plan, StudentReport

_OUT = OutputPath(
    holds=("student.safetensors", "student.pt2", "report.json", "config.json", "metrics.jsonl", "training.png")
)
_SHOWN = 12


@click.command("distill", cls=FileCommand, short_help="Train the ReLU student of a torch model.")
@click.argument("model")
@click.option(
    "--data", metavar="FUNCTION", help="module:function or file.py:function; returns (train, evaluate[, task])."
)
@click.option("--train", type=INPUT_FILE, metavar="X.npy", help="Inputs to train on; with the next three, not --data.")
@click.option("--train-labels", type=INPUT_FILE, metavar="Y.npy", help="Their labels.")
@click.option("--test", type=INPUT_FILE, metavar="X.npy", help="Inputs to measure on.")
@click.option("--test-labels", type=INPUT_FILE, metavar="Y.npy", help="Their labels.")
@click.option("-o", "--output", type=_OUT, required=True, metavar="DIR", help="Folder for all that is made.")
@click.option("--weights", type=INPUT_FILE, help="The original's state_dict: .safetensors, or .pt without code.")
@click.option("--config", type=INPUT_FILE, metavar="X.toml", help="Settings; options and --set come before it.")
@click.option("--recipe", type=click.Choice(RECIPE_NAMES), help="How the student comes about.  [default: B+KD]")
@click.option("--task", type=click.Choice(TASK_NAMES), help="Losses and metrics.  [default: classification]")
@click.option("--epochs", type=int, metavar="N", help="Passes over the training data.  [default: 10]")
@click.option("--batch-size", type=int, metavar="N", help="Samples a step, of all processes together.  [default: 64]")
@click.option("--learning-rate", type=float, metavar="X", help="Peak of the one-cycle schedule.  [default: 0.001]")
@click.option("--seed", type=int, metavar="N", help="Of samples' order, first weights and dropout.  [default: 0]")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), help="Of autocast.  [default: no]")
@click.option("--workers", type=int, metavar="N", help="Processes that load data.  [default: 0]")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Activations to leave, by name. Repeat for more.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Gates, heads, squeeze-excites to replace too.")
@click.option("--checkpoint-steps", type=int, metavar="N", help="A checkpoint also every N steps.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE",
    help="Any other setting of the configuration, as transition.pure=0.3. Repeat for more.",
)  # fmt: skip
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in DIR, with the settings found there.")
@click.option("--dry-run", is_flag=True, help="Show what would be replaced and trained; write nothing.")
@json_option
def command(
    model: str,
    output: Path,
    weights: Path | None,
    config: Path | None,
    settings: tuple[str, ...],
    resume: bool,
    dry_run: bool,
    json_path: str | None,
    **options: Any,
) -> None:
    """Train the ReLU student of a torch MODEL, and save it for export.

    MODEL is as in export: module:factory or path/to/file.py:factory. The data is a function of yours that returns
    map-style data sets of (inputs, target), or four .npy files. docs/students.md has recipes, settings, tasks, and how
    several processes and machines train together.

    A training that stops, however it does, loses no more than the current epoch: the same command with --resume goes
    on, on a CPU bit for bit.

    \b
    Example, after relu-deploy demo:
      relu-deploy distill relu_deploy.demo.network:build_network --weights demo-run/original.safetensors \\
          --data relu_deploy.demo.train:data_sets --recipe B+KD-SAT --epochs 2 -o student
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.distill import require_packages

    require_packages()
    from relu_deploy.distill.launch import join
    from relu_deploy.export.source import load_factory
    from relu_deploy.student import flat, make_job, telling_what_is_kept

    files = {name: options.pop(name) for name in ("data", "train", "train_labels", "test", "test_labels")}
    chosen = _settings(config, output if resume else None, settings, options)
    sets = _sets(**files)
    teacher = load_factory(model, weights=weights)
    processes = join()
    # Without --weights, the factory may well bring trained ones, which are no first weights.
    fresh = (lambda: load_factory(model)) if weights is not None else None
    job = make_job(teacher, sets, chosen, output, processes=processes, fresh=fresh)
    if dry_run:
        plan = job.plan()
        emit(plan, json_path, lambda: _render_plan(plan))
        return

    def tell(text: str) -> None:
        if processes.first:
            click.echo(text, err=True)

    if processes.warning:
        tell(click.style(f"Warning: {processes.warning}", fg="yellow"))
    tell(f"training {chosen.recipe} on {processes}: {chosen.epochs} epochs, {job.distiller.total} steps")
    with progress_bar() as progress, telling_what_is_kept(output, tell):
        report = job.run(resume=resume, progress=progress)
    if processes.first:
        emit(flat(report), json_path, lambda: _render(report))


def _settings(
    config: Path | None, resumed: Path | None, settings: tuple[str, ...], options: dict[str, Any]
) -> DistillConfig:
    """Options before ``--set`` before the file; a resumed training begins with the settings it was started with."""
    from calib.files import read_json
    from relu_deploy.distill.config import from_dict, layered, parse_setting, read_toml

    layers: list[dict[str, Any]] = []
    if resumed is not None and (resumed / "config.json").is_file():
        layers.append(read_json(resumed / "config.json"))
    if config is not None:
        layers.append(read_toml(config))
        from_dict(layers[-1], source=str(config))  # so that a mistake in it names the file
    layers.append(layered(*(dict([parse_setting(text)]) for text in settings)))
    layers.append({name: value for name, value in options.items() if value not in (None, ())})
    return from_dict(layered(*layers))


def _sets(
    *, data: str | None, train: Path | None, train_labels: Path | None, test: Path | None, test_labels: Path | None
) -> Sets:
    from relu_deploy.distill.sets import sets_of_arrays, sets_of_function

    if data is not None and train is train_labels is test is test_labels is None:
        return sets_of_function(data)
    if data is None and train and train_labels and test and test_labels:
        return sets_of_arrays(train, train_labels, test, test_labels)
    raise click.UsageError("give --data, or all of --train, --train-labels, --test and --test-labels")


def _render(report: StudentReport) -> Group:
    training = report.training
    table = Table("metric", "original", "student", "kept")
    for name, value in training.metrics.items():
        teacher = training.teacher_metrics.get(name)
        kept = f"{100 * report.kept:.1f} %" if name == report.metric and report.kept is not None else ""
        table.add_row(name, "-" if teacher is None else f"{teacher:.4g}", f"{value:.4g}", kept)
    on = f"{training.processes} process{'' if training.processes == 1 else 'es'}"
    lines = [f"{training.recipe}: {training.steps} steps in {len(training.epochs)} epochs on {on}"]
    if training.resumed_from is not None:
        lines.append(f"went on from the checkpoint of step {training.resumed_from}")
    lines += _replaced(training.swap)
    after = [f"wrote {path}" for path in report.files] + [f"note: {note}" for note in training.notes]
    after += [f"next: {report.next}"] if report.next else []
    return Group(*map(Text, lines), table, *map(Text, after))


def _render_plan(plan: Plan) -> Group:
    on = f"{plan.processes} process{'' if plan.processes == 1 else 'es'}"
    lines = [
        f"{plan.config['recipe']}: {plan.steps} steps in {plan.config['epochs']} epochs on {on}",
        f"{plan.parameters} parameters to train",
        f"{plan.samples[0]} samples to train on, {plan.samples[1]} to evaluate on",
        *_replaced(plan.swap),
    ]
    table = Table("place", "what stands there", "what will")
    for item in plan.swap.replaced if plan.swap else ():
        table.add_row(item.name or "(the model)", item.old, item.new)
    for skip in plan.swap.left if plan.swap else ():
        table.add_row(skip.name or "(the model)", "", f"left: {skip.reason}")
    notes = [f"note: {note}" for note in (*plan.notes, *(plan.swap.notes if plan.swap else ()))]
    return Group(*map(Text, lines), *([table] if plan.swap else []), *map(Text, notes), Text("nothing was written"))


def _replaced(swap: SwapReport | None) -> list[str]:
    if swap is None:
        return ["no activation is replaced"]
    lines = [f"activations: {len(swap.replaced)} replaced, {len(swap.left)} left"]
    lines += [f"left {skip.name}: {skip.reason}" for skip in swap.left[:_SHOWN]]
    return lines + ([f"and {len(swap.left) - _SHOWN} more"] if len(swap.left) > _SHOWN else [])
