"""``relu-deploy inspect``: what an engine is, and what the compiler made of the network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from relu_deploy.cli.common import INPUT_FILE, emit, json_option
from relu_deploy.cli.safety import FileCommand

if TYPE_CHECKING:
    from relu_deploy.engines.inspect import Inspection

# So many lines of a kind are printed before `--layers` is pointed to.
_FEW = 10


@click.command("inspect", cls=FileCommand, short_help="Say what an engine is and what the compiler made of it.")
@click.argument("engine", type=INPUT_FILE)
@click.option(
    "--layers", is_flag=True, help="Also print every linear layer with its precision, output type and kernel."
)
@json_option
def command(engine: Path, layers: bool, json_path: str | None) -> None:
    """Print what ENGINE is and holds. Nothing is loaded or executed, and no GPU is needed.

    ENGINE is a file that build-engine wrote, for any target; its manifest ENGINE.json is read and checked where it is
    there. A TensorRT plan or an ONNX file from elsewhere is read too, as far as its bytes tell.

    \b
    Example:
      relu-deploy inspect student.engine --layers
    """  # noqa: D301  \b is click's mark for text that keeps its lines
    from relu_deploy.engines.inspect import inspect_engine

    found = inspect_engine(engine)
    emit(found, json_path, lambda: render(found, layers=layers))


def render(found: Inspection, *, layers: bool) -> RenderableType:
    """The report as a person reads it."""
    parts: list[RenderableType] = [_summary(found)]
    if layers:
        parts.append(_layers(found))
    parts += _listing("left in float or not known", _fallbacks(found), full=layers)
    parts += _listing("activations other than ReLU", _left(found), full=layers)
    parts += _listing("float between quantised layers", list(found.audit.islands), full=layers)
    parts += _listing("not as the network promised", list(found.disagreements), full=layers)
    parts += [Text(f"note: {note}", style="dim") for note in (*found.notes, *found.audit.notes)]
    return Group(*parts)


def _summary(found: Inspection) -> Table:
    """One fact a line."""
    audit = found.audit
    counts = ", ".join(f"{number} {kind}" for kind, number in audit.activation_counts().items())
    rows = {
        "engine": f"{found.engine} ({found.engine_bytes / 1e6:.2f} MB)",
        "target": found.target + (f", SM {', '.join(found.sm)}" if found.sm else ""),
        "built with": ", ".join(f"{name} {version}" for name, version in found.versions.items()) or "not known",
        "inputs": ", ".join(map(str, found.inputs)) or "not known",
        "outputs": ", ".join(map(str, found.outputs)) or "not known",
        "int8 layers": f"{audit.int8} of {len(audit.linear)} linear layers",
        "activations": counts or "none",
        "nodes" if found.target == "ort" else "kernels": "not known" if audit.kernels is None else str(audit.kernels),
        "bytes moved": "not known" if audit.bytes_moved is None else f"{audit.bytes_moved / 1e6:.2f} MB an inference",
        "read from": audit.source,
    }
    for name, shapes in found.shapes.items():
        rows[f"range of {name}"] = f"{list(shapes.minimum)} to {list(shapes.maximum)}, best at {list(shapes.optimum)}"
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), Text(value))
    return table


def _layers(found: Inspection) -> Table:
    """Every linear layer."""
    table = Table("layer", "computes in", "writes", "relu fused", "bias fused", "kernel")
    words = {True: "yes", False: "no", None: "?"}
    for layer in found.audit.linear:
        row = (layer.name, layer.precision, layer.output, words[layer.relu], words[layer.bias], layer.kernel)
        table.add_row(*(Text(cell) for cell in row))
    return table


def _fallbacks(found: Inspection) -> list[str]:
    """Layers that are not int8; nothing for a network that has no int8 layer at all."""
    layers = found.audit.fallbacks if found.audit.int8 or found.disagreements else ()
    return [f"{layer.name}: {layer.precision}" + (f", {layer.reason}" if layer.reason else "") for layer in layers]


def _left(found: Inspection) -> list[str]:
    """Activations other than ReLU."""
    return [f"{activation.kind}: {activation.name}" for activation in found.audit.left]


def _listing(title: str, lines: list[str], *, full: bool) -> list[Text]:
    """A titled list, cut short unless asked for in full; nothing for an empty one."""
    if not lines:
        return []
    shown = lines if full else lines[:_FEW]
    more = [Text(f"  ... and {len(lines) - len(shown)} more (--layers shows all)")] if len(shown) < len(lines) else []
    return [Text(f"{title} ({len(lines)}):", style="bold"), *(Text(f"  {line}") for line in shown), *more]
