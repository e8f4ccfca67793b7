"""What building has in common for every target: reading the model, the promise check, the manifest."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

from calib.files import atomic_path, check_writable
from calib.fingerprint import model_fingerprint
from relu_deploy.engines.audit import UNTRAINED, Audit
from relu_deploy.engines.base import BuildConfig, BuildReport
from relu_deploy.engines.manifest import data_path, manifest_path, write_manifest
from relu_deploy.engines.promise import disagreements
from relu_deploy.errors import CheckFailedError, FileError
from relu_deploy.graph import WHAT_IF, fits_one_message, load_model, name_nodes, save_model, tensor_bytes
from relu_deploy.model_io import model_io

# Turns a model (its bytes, or a file when it is too large for one protobuf) into an engine at a path.
Compile = Callable[["bytes | Path", Path], Audit]


def build_engine(
    model: Path | onnx.ModelProto,
    out: Path,
    config: BuildConfig,
    *,
    versions: dict[str, str],
    compile_: Callable[[onnx.ModelProto], Compile],
) -> BuildReport:
    """Compile a model and write engine and manifest, each whole or not at all.

    Args:
        model: File, or a model in memory; unnamed nodes are given names in a copy, since the report needs them.
        out: The engine.
        config: How.
        versions: Of the packages that take part, for the report.
        compile_: Given the model, returns what compiles it.

    Raises:
        CheckFailedError: ``config.require_int8`` and the compiler broke a promise; nothing is written then.
        ModelError, FileError, EngineError: as :meth:`relu_deploy.engines.base.Backend.build`.
    """
    check_writable(out)
    loaded = load_model(model) if isinstance(model, Path) else _named(model)
    inputs, outputs = model_io(loaded)
    # A folder of its own, because a large engine is two files that name one another; beside `out`, so that renaming
    # is atomic.
    with _workspace(out) as folder:
        built = folder / out.name
        with _source(loaded, folder) as source:
            start = time.perf_counter()
            audit = _noted(compile_(loaded)(source, built), loaded)
            seconds = time.perf_counter() - start
        found = disagreements(loaded, audit)
        if config.require_int8 and found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CheckFailedError(f"the engine is not the INT8 engine that was asked for: {found[0]}{more}")
        parts = [built, *(path for path in [data_path(built)] if path.exists())]
        report = BuildReport(
            target=config.target,
            sm=config.sm if config.target == "tensorrt-rtx" else (),
            versions=versions,
            model_sha256=model_fingerprint(loaded),
            model_bytes=tensor_bytes(loaded),
            engine_bytes=sum(path.stat().st_size for path in parts),
            build_seconds=round(seconds, 3),
            inputs=inputs,
            outputs=outputs,
            shapes=dict(config.shapes),
            audit=audit,
            disagreements=found,
        )
        write_manifest(built, report)
        _publish([*reversed(parts), manifest_path(built)], out)
    return report


def _noted(audit: Audit, model: onnx.ModelProto) -> Audit:
    """The audit with a note where the network was never trained as it stands: whoever reads the engine is told."""
    notes = (f"{UNTRAINED}, {entry.value}" for entry in model.metadata_props if entry.key == WHAT_IF)
    return dataclasses.replace(audit, notes=(*audit.notes, *notes))


@contextlib.contextmanager
def _workspace(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, gone afterwards. Raises: FileError where nothing can be written there."""
    try:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        raise FileError(f"cannot write {out}: {error.strerror or error}") from error


def _publish(parts: list[Path], out: Path) -> None:
    """Move a finished engine into place, its manifest last: an interruption leaves no engine that would open.

    All of it was written before, so a full disk is met while the older engine still stands.
    """
    manifest_path(out).unlink(missing_ok=True)
    if data_path(out).name not in [part.name for part in parts]:
        data_path(out).unlink(missing_ok=True)
    for part in parts:
        with atomic_path(out.parent / part.name) as temporary:
            part.replace(temporary)


def _named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model itself when every node has a name of its own, else a copy in which that is so."""
    names = [node.name for node in model.graph.node]
    if all(names) and len(set(names)) == len(names):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    name_nodes(copy.graph)
    return copy


@contextlib.contextmanager
def _source(model: onnx.ModelProto, folder: Path) -> Iterator[bytes | Path]:
    """The model as bytes; as a file with external data when it is too large for one protobuf."""
    if fits_one_message(model):
        yield model.SerializeToString()
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix="source.") as inner:
        path = Path(inner) / "model.onnx"
        save_model(model, path)
        yield path
