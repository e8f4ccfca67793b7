"""The table of integer multipliers of a quantised network, as JSON: one entry for each operator on codes.

``docs/integer.md`` is its schema, and the arithmetic that it stands for.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from calib.files import read_json, write_text
from calib.fingerprint import model_fingerprint
from relu_deploy.errors import QuantizationError
from relu_deploy.graph import import_graph
from relu_deploy.int8.multipliers import Multiplier
from relu_deploy.int8.multipliers_entries import Entry, read_entry
from relu_deploy.int8.qoperator import MOVING, to_qoperator
from relu_deploy.report import PassReport, to_json

FORMAT = "relu-deploy-multipliers"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Table:
    """The multipliers of one network.

    Attributes:
        model: Fingerprint of the quantised file that it belongs to.
        entries: Operators that need arithmetic, in the order of the network.
        moves: Node -> operator, of those that only move codes, or look them up in a constant.
        other: Node -> why it has no entry.
    """

    model: str
    entries: tuple[Entry, ...]
    moves: dict[str, str]
    other: dict[str, str]


def build_table(quantized: onnx.ModelProto) -> tuple[Table, onnx.ModelProto]:
    """Multipliers of a quantised network, and its form in integer operators, which has the weights.

    Args:
        quantized: Q/DQ, or integer operators already. Not changed.

    Raises:
        QuantizationError: it holds no operator on codes.
    """
    report, integer = PassReport("fuse_qdq"), quantized
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in quantized.graph.node):
        integer, report = to_qoperator(quantized)
    graph = import_graph(integer)
    found = {node.name: read_entry(node) for node in graph.nodes}
    entries = tuple(entry for entry in found.values() if isinstance(entry, Entry))
    if not entries:
        raise QuantizationError("the network has no operator on codes: there is nothing to multiply")
    other = {skip.name: skip.reason for skip in report.skipped}
    other |= {name: reason for name, reason in found.items() if isinstance(reason, str)}
    return Table(model_fingerprint(quantized), entries, _moves(graph, entries), other), integer


def _moves(graph: gs.Graph, entries: Iterable[Entry]) -> dict[str, str]:
    """Operators that hand codes on."""
    codes = {grid.tensor for entry in entries for grid in (entry.output, *entry.inputs) if grid is not None}
    codes |= {node.outputs[0].name for node in graph.nodes if node.op == "QuantizeLinear"}
    moves: dict[str, str] = {}
    for node in graph.nodes:
        if node.op in (*MOVING, "Cast") and any(tensor.name in codes for tensor in node.inputs):
            moves[node.name] = node.op
            codes.update(tensor.name for tensor in node.outputs)
    return moves


def save_table(table: Table, path: Path) -> None:
    """Write a table, whole or not at all. Raises: FileError."""
    head = {
        "format": FORMAT, "version": VERSION, "model": table.model, "rounding": "half_even", "moves": table.moves,
        "other": table.other,
    }  # fmt: skip
    # One entry a line: a layer has hundreds of numbers, and a person looks for a layer.
    lines = [f"  {json.dumps(key)}: {json.dumps(item, allow_nan=False)}" for key, item in head.items()]
    rows = ",\n".join(f"    {json.dumps(_entry_json(entry), allow_nan=False)}" for entry in table.entries)
    write_text(path, "{\n" + ",\n".join(lines) + ',\n  "entries": [\n' + rows + "\n  ]\n}\n")


def load_table(path: Path, model: onnx.ModelProto) -> dict[str, Any]:
    """Read a table for the quantised file that it belongs to.

    Raises:
        FileError: it cannot be read, or is not JSON.
        QuantizationError: it is no table, of another version, or of another network.
    """
    value = read_json(path)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise QuantizationError(f"{path} is no table of multipliers", hint="make one with: relu-deploy quantize")
    if value.get("version") != VERSION:
        raise QuantizationError(f"{path} has version {value.get('version')!r}; this program reads {VERSION}")
    if value.get("model") != model_fingerprint(model):
        raise QuantizationError(f"{path} belongs to another network", hint="write both files in one run")
    return value


def _entry_json(entry: Entry) -> dict[str, Any]:
    """An entry without what does not apply to it; multipliers as columns, since a layer has many."""
    value = {key: item for key, item in to_json(entry).items() if item not in (None, {}, [])}
    if entry.multipliers:
        columns = [field.name for field in dataclasses.fields(Multiplier)]
        value["multipliers"] = [
            {column: [getattr(each, column) for each in row] for column in columns} for row in entry.multipliers
        ]
    return value
