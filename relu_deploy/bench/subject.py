"""What is measured: a plain ONNX file, or an engine with its manifest."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import external_data_helper

from calib.files import read_json, require_file
from calib.model import first_quantized
from relu_deploy.bench.protocol import PLAIN_ONNX
from relu_deploy.engines.manifest import manifest_path, read_manifest
from relu_deploy.errors import EngineError
from relu_deploy.graph import load_model, parse_model

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """One thing to measure.

    Attributes:
        path: The engine or ONNX file.
        name: How it is called in the report; unique there.
        target: ``onnx`` for a plain file, else the backend that built it.
        precision: ``int8``, ``fp32``, ``fp16``, ... or ``unknown``.
        size_bytes: On disk, with external data.
        layers: Linear layers that run in int8, and all of them, as the build found; None for a plain file.
    """

    path: Path
    name: str
    target: str
    precision: str
    size_bytes: int
    layers: tuple[int, int] | None = None


def read_subject(path: Path) -> Subject:
    """Recognise a file by its manifest and its bytes; nothing of it is executed.

    Raises:
        FileError: it is missing.
        ModelError: it is an ONNX file that is damaged or unsupported.
        EngineError: it is neither an ONNX file nor an engine with a manifest, or not the engine its manifest describes.
    """
    require_file(path, to="measure")
    if _has_manifest(path):
        return _read_engine(path)
    if path.suffix != ".onnx":
        raise EngineError(
            f"{path} is no ONNX file, and has no manifest {manifest_path(path).name} beside it",
            hint="build it with 'relu-deploy build-engine', and copy both files",
        )
    size = path.stat().st_size + _external_bytes(path)
    return Subject(path, path.name, PLAIN_ONNX, onnx_precision(load_model(path)), size)


def _has_manifest(path: Path) -> bool:
    """Whether a manifest lies beside it. ``model.onnx.json`` may also be some step's report on a plain file."""
    manifest = manifest_path(path)
    if not manifest.is_file():
        return False
    stored = read_json(manifest)
    return path.suffix != ".onnx" or (isinstance(stored, dict) and "sha256" in stored)


def unique_names(subjects: Sequence[Subject]) -> tuple[Subject, ...]:
    """The same subjects, told apart where two files are called alike: by folder, then by number.

    >>> a, b = (Subject(Path(p), "m.onnx", "onnx", "fp32", 1) for p in ("x/m.onnx", "y/m.onnx"))
    >>> [s.name for s in unique_names([a, b, b])]
    ['x/m.onnx', 'y/m.onnx', 'y/m.onnx (2)']
    """
    plain = [subject.name for subject in subjects]
    named: list[Subject] = []
    taken: dict[str, int] = {}
    for subject in subjects:
        alike = plain.count(subject.name) > 1 and len({s.path for s in subjects if s.name == subject.name}) > 1
        name = f"{subject.path.parent.name}/{subject.name}" if alike else subject.name
        taken[name] = taken.get(name, 0) + 1
        named.append(dataclasses.replace(subject, name=name if taken[name] == 1 else f"{name} ({taken[name]})"))
    return tuple(named)


def onnx_precision(model: onnx.ModelProto) -> str:
    """The number format of most of a network's work, from its operators and weights."""
    if first_quantized(model) is not None:
        return "int8"
    return _widest_share((tensor.data_type, int(np.prod(tensor.dims))) for tensor in model.graph.initializer)


def _widest_share(tensors: Iterable[tuple[int, int]]) -> str:
    """Float format that holds most elements; ``unknown`` without any."""
    elements: dict[str, int] = {}
    for data_type, count in tensors:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(data_type).name
        if dtype in _SHORT:
            elements[dtype] = elements.get(dtype, 0) + count
    return _SHORT[max(elements, key=lambda dtype: elements[dtype])] if elements else "unknown"


def _external_bytes(path: Path) -> int:
    """Bytes of the files an ONNX file keeps its weights in; what is missing is load_model's to report."""
    files: set[Path] = set()
    for tensor in external_data_helper._get_all_tensors(parse_model(path)):  # noqa: SLF001
        files.update(path.parent / entry.value for entry in tensor.external_data if entry.key == "location")
    return sum(file.stat().st_size for file in files if file.is_file())


def _read_engine(path: Path) -> Subject:
    """An engine whose manifest describes the file that lies there; damaged and stale ones are refused."""
    report = read_manifest(path)
    audit = report.audit
    counts = Counter(layer.precision for layer in audit.linear)
    precision = "int8" if audit.int8 else counts.most_common(1)[0][0] if counts else "unknown"
    layers = (audit.int8, len(audit.linear)) if audit.linear else None
    return Subject(path, path.name, report.target, precision, report.engine_bytes, layers)
