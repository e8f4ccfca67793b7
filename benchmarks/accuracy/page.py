"""The page that a run leaves: a summary with verdicts, then a table for each task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.accuracy.cells import MISSING
from benchmarks.accuracy.peers.tools import ENVIRONMENTS, Tool
from benchmarks.accuracy.task import Plan
from relu_deploy.machine import describe_machine, lacks_vnni

HEADINGS = (
    "task", "float", "ours, ort", "int8", "best peer", "", "int8", "at most half its loss", "ours, rtx", "int8",
    "best modelopt, float arithmetic", "int8",
)  # fmt: skip

HOW = """Value, difference to float in points, SQNR. The best peer is the best of all its settings on the test samples
themselves, which flatters it; ours is one setting. "At most half its loss" says "no, within the interval" where the
interval of our loss reaches what is allowed."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A cell with its result, see :func:`benchmarks.accuracy.cells.cell`."""

    plan: Plan
    tool: Tool
    result: dict[str, Any]

    @property
    def ours(self) -> bool:
        """Whether it is this package's."""
        return self.tool.environment == "ours"

    @property
    def error(self) -> str | None:
        """Why there is no result."""
        error: str | None = self.result["error"]
        return error

    @property
    def main(self) -> dict[str, float]:
        """The metric that is compared."""
        metrics: dict[str, dict[str, float]] = self.result["metrics"]
        return next(iter(metrics.values()))

    @property
    def sqnr(self) -> float:
        """Of the worst output, in decibels."""
        return float(self.result["sqnr_db"])

    def line(self) -> str:
        """For the screen while the table fills."""
        if self.error is not None:
            return f"failed: {self.error}"
        metrics = ", ".join(f"{name} {change(values)}" for name, values in self.result["metrics"].items())
        return f"int8 {layers(self.result['nodes'])}, {self.sqnr:.1f} dB, {metrics}"


def page(rows: Sequence[Row]) -> str:
    """All of it, as Markdown."""
    tasks = list(dict.fromkeys(row.plan.name for row in rows))
    parts = [_head(), _summary([[row for row in rows if row.plan.name == name] for name in tasks])]
    for name in tasks:
        mine = [row for row in rows if row.plan.name == name]
        good = [row for row in mine if row.error is None]
        title = f"## {name}\n\n{mine[0].plan.about}."
        if good:
            first = good[0].result
            floats = ", ".join(f"{key} {values['float']:.4f}" for key, values in first["metrics"].items())
            title += f" {first['samples']} test samples; float: {floats}."
        parts.append(f"{title}\n\n{_table(mine)}")
    return "\n\n".join(parts) + "\n"


def change(values: dict[str, float]) -> str:
    """A metric, and its distance to the float network's with the interval, both in points.

    >>> change({"value": 0.9, "difference": -0.012, "low": -0.02, "high": 0.001})
    '0.9000 (-1.20 [-2.00, +0.10])'
    """
    gap, low, high = (100 * values[key] for key in ("difference", "low", "high"))
    return f"{values['value']:.4f} ({_signed(gap)} [{_signed(low)}, {_signed(high)}])"


def layers(count: Sequence[int] | None) -> str:
    """So many of so many."""
    return "-" if count is None else f"{count[0]} of {count[1]}"


def best(rows: Iterable[Row]) -> Row | None:
    """The row with the best metric; of equals the one with the better SQNR."""
    good = [row for row in rows if row.error is None]
    return max(good, key=lambda row: (row.main["value"], _finite(row.sqnr)), default=None)


def _head() -> str:
    machine = describe_machine()
    flags = "without" if lacks_vnni(machine.flags) else "with"
    software = ", ".join(
        ["onnxruntime " + str(machine.packages["onnxruntime"]), *(
            package.replace("==", " ") for package in (ENVIRONMENTS["nncf"][0], ENVIRONMENTS["modelopt"][1])
        )]
    )  # fmt: skip
    return f"""# INT8 accuracy against other quantisers

Printed by `python -m benchmarks.accuracy.run --work accuracy-run --output docs/accuracy-peers.md` on {machine.cpu}
{flags} VNNI, {machine.logical_cpus} CPUs, no GPU; {software}.

Every tool gets the same float network and the same calibration samples; test samples are others. "ours" is one call of
`relu-deploy build-engine MODEL --int8 --calib DATA` with the target and no other flag. Peers are run as they come
("default") and as someone sets them up who knows them: opset 17 and ONNX Runtime's pre-processing first, unsigned 8-bit
activations, weights per channel, only linear layers. Every file is run by ONNX Runtime on the CPU with all
optimisations, except where "float arithmetic" is said and for `rtx`, the files for TensorRT-RTX: those are computed as
ONNX defines Q/DQ.

In parentheses: the difference to the float network in points, with the 95 % interval of a paired bootstrap over the
test samples. *int8 by Q/DQ*: linear layers (constant weights) whose data and weights are dequantised; *by kernels*:
integer operators among all linear layers in the graph that ONNX Runtime made of the file. A tool that leaves layers in
float looks accurate. SQNR is that of the worst output, in decibels."""


def _summary(groups: Sequence[Sequence[Row]]) -> str:
    lines = [HEADINGS]
    for rows in groups:
        ort = best(row for row in rows if row.ours and not row.tool.symmetric)
        rtx = best(row for row in rows if row.ours and row.tool.symmetric and row.tool.default)
        peer = best(row for row in rows if not row.ours)
        other = best(row for row in rows if not row.ours and not row.tool.integer_kernels)
        known = [row for row in (ort, peer, rtx, other) if row is not None]
        lines.append((
            rows[0].plan.name,
            f"{known[0].main['float']:.4f}" if known else "-",
            _short(ort), _share(ort), _short(peer), peer.tool.name if peer else "-", _share(peer), _verdict(ort, peer),
            _short(rtx), _share(rtx), _short(other), _share(other),
        ))  # fmt: skip
    return f"## Summary\n\n{HOW}\n\n{_markdown(lines)}"


def _verdict(ours: Row | None, peer: Row | None) -> str:
    """Whether this package loses at most half of what the best peer loses; what samples cannot tell is said."""
    if ours is None or peer is None:
        return "-"
    allowed = min(0.0, peer.main["difference"] / 2)
    if ours.main["difference"] >= allowed:
        return "yes"
    return "no, within the interval" if ours.main["high"] >= allowed else "no"


def _short(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.main['value']:.4f} ({_signed(100 * row.main['difference'])}), {row.sqnr:.1f} dB"


def _share(row: Row | None) -> str:
    return "-" if row is None else layers(row.result["nodes"])


def _table(rows: Sequence[Row]) -> str:
    good = next((row for row in rows if row.error is None), None)
    metrics = list(good.result["metrics"]) if good else []
    lines: list[tuple[str, ...]] = [("tool", "int8 by Q/DQ", "by kernels", "SQNR", *metrics)]
    for row in rows:
        if row.error is not None:
            how, why = ("not run", "") if row.error == MISSING else ("failed", _plain(row.error))
            lines.append((row.tool.name, how, "", "", why, *("" for _ in metrics[1:])))
            continue
        found = row.result
        lines.append((
            row.tool.name, layers(found["nodes"]), layers(found["kernels"]), f"{row.sqnr:.1f}",
            *(change(found["metrics"][name]) for name in metrics),
        ))  # fmt: skip
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    shown = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines]
    return "\n".join([shown[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *shown[1:]])


def _plain(text: str) -> str:
    """Without what Markdown would take for its own, and without a machine's folders."""
    words = (word.rpartition("/")[2] if word.startswith("/") else word for word in text.split())
    return " ".join(words).replace("|", "/")[:140]


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _finite(value: float) -> float:
    return -math.inf if math.isnan(value) else value
