"""Say what an engine is and holds, from its bytes and its manifest. Nothing is loaded into a runtime or executed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from relu_deploy.engines.audit import Audit
from relu_deploy.engines.base import BuildReport, ShapeRange
from relu_deploy.engines.log import Log
from relu_deploy.engines.manifest import manifest_path, read_manifest
from relu_deploy.engines.ort_audit import audit_graph
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import EngineError, FileError
from relu_deploy.graph import load_model
from relu_deploy.model_io import model_io
from relu_deploy.tensors import TensorSpec

# What a serialised plan starts with: TensorRT-RTX (seen in 1.7), TensorRT (8 and later).
_MAGIC = {b"vtrt": "tensorrt-rtx", b"ftrt": "tensorrt"}


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What an engine is and holds.

    Attributes:
        engine: The file.
        target: ``ort``, ``tensorrt-rtx`` or ``tensorrt``.
        sm: Compute capabilities it was compiled for; empty for ``ort``.
        versions: What built it; empty without a manifest.
        engine_bytes: Size of the file.
        inputs: What it takes; empty where only a manifest would tell.
        outputs: What it gives.
        shapes: Shape ranges it accepts, by input.
        audit: What the compiler did.
        disagreements: Where that differs from what the network promised.
        notes: What this could not tell, and why.
    """

    engine: str
    target: str
    sm: tuple[str, ...]
    versions: dict[str, str]
    engine_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    shapes: dict[str, ShapeRange]
    audit: Audit
    disagreements: tuple[str, ...]
    notes: tuple[str, ...] = ()


def inspect_engine(engine: Path) -> Inspection:
    """Read an engine, with or without its manifest; a plain ONNX file too.

    Raises:
        FileError: the file is missing.
        EngineError: it is no engine, or not the one its manifest describes.
        ModelError: it is a damaged ONNX file.
    """
    if manifest_path(engine).is_file() or not engine.is_file():
        report = read_manifest(engine)
        _check_kind(engine, report)
        return _described(engine, report)
    target = _kind(engine)
    return _bare_onnx(engine) if target == "ort" else _bare_plan(engine, target)


def _described(engine: Path, report: BuildReport) -> Inspection:
    """What the manifest says of an engine that it was checked against."""
    values = {field.name: getattr(report, field.name) for field in dataclasses.fields(BuildReport)}
    kept = {field.name for field in dataclasses.fields(Inspection)}
    return Inspection(engine=str(engine), **{name: value for name, value in values.items() if name in kept})


def _bare_plan(engine: Path, target: str) -> Inspection:
    """What a plan tells alone: kernels and types, but not which operators of the network they stand for."""
    programs = read_plan(engine.read_bytes())
    missing = f"{manifest_path(engine).name} is not there: inputs, outputs and versions are not known,"
    note = f"{missing} and an activation shows only where the compiler's own names tell it"
    return Inspection(
        engine=str(engine),
        target=target,
        sm=tuple(sorted({name.removeprefix("sm") for program in programs for name in program.accelerators})),
        versions={},
        engine_bytes=engine.stat().st_size,
        inputs=(),
        outputs=(),
        shapes={},
        audit=audit_engine(programs, Log({}, ()), None),
        disagreements=(),
        notes=(note,),
    )


def _bare_onnx(engine: Path) -> Inspection:
    """What an ONNX file holds as it is; onnxruntime will optimise it further when it is loaded."""
    model = load_model(engine)
    inputs, outputs = model_io(model)
    notes = ("a plain ONNX file without a manifest: layers are as the file has them, before any optimisation",)
    size = engine.stat().st_size
    return Inspection(str(engine), "ort", (), {}, size, inputs, outputs, {}, audit_graph(model, model), (), notes)


def _check_kind(engine: Path, report: BuildReport) -> None:
    """Refuse a manifest that calls a file what its bytes are not."""
    found = _kind(engine)
    if (found == "ort") != (report.target == "ort"):
        raise EngineError(f"{engine} is an engine for {found}, but its manifest says {report.target}")


def _kind(engine: Path) -> str:
    """Target of an engine, from its first bytes."""
    try:
        with engine.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise FileError(f"cannot read {engine}: {error.strerror or error}") from error
    if start in _MAGIC:
        return _MAGIC[start]
    # An ONNX file is a protobuf message whose first field is the IR version, a small number (tag 0x08), or, from some
    # writers, a later field of the same message.
    if len(start) == 4 and start[0] in (0x08, 0x12, 0x1A, 0x22, 0x3A, 0x42):
        return "ort"
    hint = "inspect reads TensorRT plans and ONNX files"
    raise EngineError(f"{engine} is not an engine: its first bytes are {start.hex() or 'missing'}", hint=hint)
