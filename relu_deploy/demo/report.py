"""The demo's result: a table like the paper's Table 1, and a page that says what each file is."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from calib.errors import MissingExtraError
from calib.files import write_json, write_text
from relu_deploy.bench.stats import Ratio
from relu_deploy.demo.run import SM, DemoReport
from relu_deploy.flow import EngineBuilt
from relu_deploy.machine import lacks_vnni
from relu_deploy.report import to_json

NO_GPU = f"no GPU: the TensorRT-RTX engines (SM {SM}) were built and read, not run; their speed is not known"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the main table, as text.

    Attributes:
        method: Recipe of the paper, B or B+KD.
        activation: SiLU or ReLU.
        precision: FP32 or INT8.
        fps: Images a second.
        ratio: Against the original in FP32, with its 95 % interval.
        accuracy: On the held-out test images, %.
        value: Images a second, for the bars of the page.
    """

    method: str
    activation: str
    precision: str
    fps: str
    ratio: str
    accuracy: str
    value: float


def rows(report: DemoReport) -> tuple[Row, ...]:
    """The main table: method, activation, precision, FPS, ratio with its interval, accuracy."""
    networks = {network.name: network for network in report.networks}
    found = []
    for result in (report.speed.original, *report.speed.engines):
        network = networks[Path(result.path).name.partition(".")[0]]
        top1 = None if result.accuracy is None else result.accuracy.top1
        found.append(
            Row(
                network.recipe, network.activation, result.precision.upper(), f"{result.throughput:.0f}",
                "1" if result.ratio is None else format_ratio(result.ratio),
                "-" if top1 is None else f"{100 * top1:.2f}", result.throughput,
            )
        )  # fmt: skip
    return tuple(found)


def format_ratio(ratio: Ratio) -> str:
    """``1.52 [1.48, 1.55]``, and what it means where the interval contains 1 or does not exist.

    >>> format_ratio(Ratio(1.5, 1.4, 1.6, 20, "faster"))
    '1.50 [1.40, 1.60]'
    >>> format_ratio(Ratio(1.01, 0.97, 1.04, 20, "not distinguishable"))
    '1.01 [0.97, 1.04] not distinguishable'
    """
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f} (too few rounds for an interval)"
    tail = "" if ratio.significant else f" {ratio.verdict}"
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{tail}"


def compiled(report: DemoReport) -> tuple[dict[str, str], ...]:
    """One line for each engine: what the compiler made of the network."""
    return tuple(_compiled(name, built) for name, built in report.builds.items())


def _compiled(name: str, built: EngineBuilt) -> dict[str, str]:
    audit = built.engine.audit
    smooth: dict[str, int] = {}
    for activation in audit.left:
        smooth[activation.kind] = smooth.get(activation.kind, 0) + 1
    return {
        "engine": name,
        "int8": f"{audit.int8} of {len(audit.linear)}",
        "left": ", ".join(f"{count} {kind}" for kind, count in smooth.items()) or "none",
        "kernels": "unknown" if audit.kernels is None else str(audit.kernels),
        "moved": "-" if audit.bytes_moved is None else f"{audit.bytes_moved / 1e6:.2f}",
    }


def render(report: DemoReport) -> RenderableType:
    """What the terminal shows at the end."""
    table = Table("method", "activation", "precision", title="Images: 32x32 digits, batch 1, ONNX Runtime on the CPU")
    for heading in ("FPS", "ratio [95 % interval]", "accuracy %"):
        table.add_column(heading, justify="right")
    for row in rows(report):
        table.add_row(row.method, row.activation, row.precision, row.fps, row.ratio, row.accuracy)
    engines = Table(title="What the compilers made of it")
    engines.add_column("engine", overflow="fold")
    for heading in ("int8 layers", "activations that are not ReLU", "kernels", "MB moved"):
        engines.add_column(heading, justify="right")
    for line in compiled(report):
        engines.add_row(*line.values())
    texts = [Text(fact) for fact in facts(report)]
    warnings = [Text(f"warning: {warning}", style="yellow") for warning in report.speed.warnings]
    return Group(
        table, Text(), engines, Text(), *texts, *warnings, Text(f"everything is in {report.folder}, see index.html")
    )


def facts(report: DemoReport) -> Iterator[str]:
    """Sentences below the tables."""
    yield f"ReLU over SiLU, both INT8: {format_ratio(report.student_over_original)} times as fast"
    yield "a ratio is the median over rounds, so it may differ a little from the quotient of two FPS"
    collapsed = report.builds["student.int8.ort.onnx"].quantize
    if collapsed is not None:
        yield (
            f"the student's quantiser replaced {len(collapsed.dropped_activations)} ReLU; "
            f"weights have {collapsed.weight_bits} bits on this CPU"
        )
    yield report.without_rtx or NO_GPU
    machine = report.machine
    cpu = f"{machine.cpu} without VNNI" if lacks_vnni(machine.flags) else machine.cpu
    yield f"{cpu}, {machine.logical_cpus} processors; onnxruntime {machine.packages.get('onnxruntime')}"


def write_pages(report: DemoReport) -> None:
    """Write ``index.html``, ``README.md`` and ``demo.json`` into the demo's folder.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise MissingExtraError("jinja2", extra="demo", purpose="the demo's page") from error
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("relu_deploy.demo", "pages"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=jinja2.select_autoescape(["html.j2"]),  # README.md is no HTML
    )  # fmt: skip
    found = rows(report)
    values: dict[str, Any] = {
        "report": report, "rows": found, "engines": compiled(report), "facts": list(facts(report)),
        "fastest": max(row.value for row in found), "files": _files(report),
    }  # fmt: skip
    for name in ("index.html", "README.md"):
        write_text(report.folder / name, environment.get_template(f"{name}.j2").render(values) + "\n")
    write_json(report.folder / "demo.json", to_json(report))


def _files(report: DemoReport) -> list[tuple[str, str]]:
    """Every file or folder the demo wrote, and what it is."""
    files = [
        ("index.html", "this page; README.md is the same as text"),
        ("demo.json", "everything that was found, with the raw samples of the measurement"),
        ("data/calibration.npy", "256 training images, float32 (256, 1, 32, 32), that the ranges were measured on"),
        ("data/test.npy", "the 599 held-out test images, never trained or calibrated on"),
        ("data/test_labels.npy", "their classes, int64 (599,)"),
    ]
    for network in report.networks:
        title = f"the {network.activation} {network.name}"
        files += [
            (f"{network.name}.safetensors", f"weights of {title}, as trained ({network.recipe})"),
            (f"{network.name}.metrics.jsonl", f"loss and metrics of {title} while it was trained"),
            (f"{network.name}.training.png", "the same as a plot"),
            (f"{network.name}.onnx", f"{title}, exported from torch with a dynamic batch"),
        ]
    for name, built in report.builds.items():
        kind = "INT8" if built.quantize is not None else "FP32"
        files += [
            (name, f"{kind} engine for {built.engine.target}"),
            (f"{name}.json", "its manifest: versions, hashes, what the compiler did"),
            (f"steps/{name}/", "what lies between: " + ", ".join(Path(file).name for file in built.kept)),
        ]
    return files
