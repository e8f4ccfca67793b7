"""The manifest beside every engine: its build report, and the hash that tells the right file from a stale one."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from calib.files import read_json, require_file, sha256_file, write_json
from relu_deploy.engines.audit import UNTRAINED, Activation, Audit, LinearLayer
from relu_deploy.engines.base import BuildReport, ShapeRange
from relu_deploy.engines.typed import check_types
from relu_deploy.errors import EngineError, FileError, NetworkWarning
from relu_deploy.report import to_json
from relu_deploy.targets import TARGETS
from relu_deploy.tensors import TensorSpec

FORMAT = 1


def manifest_path(engine: Path) -> Path:
    """``<engine>.json``, beside the engine."""
    return engine.with_name(f"{engine.name}.json")


def data_path(engine: Path) -> Path:
    """``<engine>.data``: where the weights of an ``ort`` engine lie when it is too large for one protobuf."""
    return engine.with_name(f"{engine.name}.data")


def write_manifest(engine: Path, report: BuildReport) -> None:
    """Write the manifest of an engine beside it."""
    files = [path for path in (engine, data_path(engine)) if path.is_file()]
    hashes = {path.name.removeprefix(engine.name) or "engine": sha256_file(path) for path in files}
    write_json(manifest_path(engine), {"format": FORMAT, "sha256": hashes, **to_json(report)})


def read_manifest(engine: Path) -> BuildReport:
    """Read the manifest of an engine and check that it describes the file that lies there.

    Raises:
        FileError: the engine or its manifest is missing, or the manifest is not JSON.
        EngineError: the manifest is not one of ours, or the engine is not the file it describes.
    """
    require_file(engine, to="read the engine")
    path = manifest_path(engine)
    if not path.is_file():
        raise FileError(
            f"{engine} has no manifest: {path.name} does not lie beside it",
            hint="copy both files together, or build the engine again; a plain ONNX file is not an engine",
        )
    stored = read_json(path)
    try:
        report, hashes = _report(stored), dict(stored["sha256"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, EngineError) as error:
        raise EngineError(
            f"{path} is not the manifest of an engine: {error!r}", hint="build the engine again"
        ) from error
    _check_hashes(engine, hashes)
    for note in report.audit.notes:
        if note.startswith(UNTRAINED):
            warnings.warn(f"{engine}: {note}", NetworkWarning, stacklevel=2)
    return report


def _check_hashes(engine: Path, hashes: dict[str, Any]) -> None:
    """Refuse an engine whose files are not those the manifest was written for."""
    for suffix, expected in {"engine": None, **hashes}.items():
        file = engine if suffix == "engine" else data_path(engine)
        if not file.is_file():
            raise EngineError(f"{engine}: its weights are missing: {file.name} does not lie beside it")
        if sha256_file(file) != expected:
            raise EngineError(
                f"{file} is not what {manifest_path(engine).name} describes: it is damaged, cut short or stale",
                hint="copy both files again, or build the engine again",
            )


def _report(stored: Any) -> BuildReport:
    """The report inside a manifest."""
    if stored["format"] != FORMAT:
        raise EngineError(f"manifest format {stored['format']!r}, this version reads {FORMAT}")
    if stored["target"] not in TARGETS:
        raise EngineError(f"unknown target {stored['target']!r}")
    values = {field.name: stored[field.name] for field in dataclasses.fields(BuildReport)}
    for name in ("inputs", "outputs"):
        values[name] = tuple(TensorSpec.from_json(spec) for spec in stored[name])
    values["shapes"] = {
        name: ShapeRange(*(tuple(entry[part]) for part in ("minimum", "optimum", "maximum")))
        for name, entry in stored["shapes"].items()
    }
    audit = dict(stored["audit"])
    audit["linear"] = tuple(LinearLayer(**entry) for entry in audit["linear"])
    audit["activations"] = tuple(Activation(**entry) for entry in audit["activations"])
    audit.update({name: tuple(audit[name]) for name in ("islands", "conflicts", "notes")})
    values["audit"] = Audit(**audit)
    values.update({name: tuple(stored[name]) for name in ("sm", "disagreements")})
    report = BuildReport(**values)
    check_types(report)
    return report
