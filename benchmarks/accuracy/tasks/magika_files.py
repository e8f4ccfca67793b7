"""magika (dense layers on bytes, tanh-GELU) on files of this machine: right is a type that has the file's extension."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import magika
import numpy as np
from magika import Magika
from magika.types import Seekable

from benchmarks.accuracy.scores import Score, each
from benchmarks.accuracy.task import Array, Plan, batches, write_samples
from benchmarks.accuracy.tasks.classes import answers

ROOT = Path(magika.__file__).parent
MODEL = ROOT / "models" / "standard_v3_3"
CALIBRATION, TEST, MOST_OF_ONE = 128, 800, 40
PLACES = (Path("/usr/lib"), Path("/usr/share"), Path("/usr/include"), Path("/etc"), Path(sys.base_prefix, "lib"))
EXTENSIONS = (
    "bat", "c", "cc", "cmake", "cpp", "css", "csv", "go", "gz", "h", "hpp", "htm", "html", "ini", "jar", "java",
    "jpg", "js", "json", "lua", "md", "mjs", "o", "pdf", "php", "pl", "png", "po", "ps", "py", "pyc", "pyi", "rb", "rs",
    "rst", "sh", "so", "sql", "svg", "tcl", "tex", "toml", "ts", "ttf", "wav", "whl", "woff2", "xml", "yaml", "yml",
    "zip",
)  # fmt: skip
# What magika's own list of extensions lacks: a header is C or C++, and these files are of another's format.
ALSO = {"h": ("c", "cpp"), "hpp": ("cpp",), "cc": ("c", "cpp"), "so": ("elf",), "o": ("elf",), "whl": ("zip",)}


def prepare(folder: Path, _: Path) -> None:
    """Files by a hash of their bytes: no content is in both parts."""
    shutil.copy(MODEL / "model.onnx", folder / "model.onnx")
    settings = json.loads((MODEL / "config.min.json").read_text())
    chosen = [(extension, tokens) for extension, file in _files() if (tokens := _tokens(file, settings)) is not None]
    calibration, test = chosen[:CALIBRATION], chosen[CALIBRATION : CALIBRATION + TEST]
    write_samples(folder / "calibration", ({"bytes": tokens[None]} for _, tokens in calibration))
    write_samples(folder / "test", ({"bytes": tokens} for tokens in batches([tokens for _, tokens in test])))
    labels = settings["target_labels_space"]
    kinds = json.loads((ROOT / "config" / "content_types_kb.min.json").read_text())
    allowed = [
        [extension in kinds[label]["extensions"] or label in ALSO.get(extension, ()) for label in labels]
        for extension, _ in test
    ]
    np.savez(folder / "truth.npz", allowed=np.array(allowed))


def score(found: Sequence[int], reference: Sequence[int], truth: Mapping[str, Array]) -> dict[str, Score]:
    """Right types, and types that are the float network's."""
    return {
        "right": each([allowed[f] for f, allowed in zip(found, truth["allowed"], strict=True)]),
        "same as float": each([f == r for f, r in zip(found, reference, strict=True)]),
    }


def _files() -> Iterable[tuple[str, Path]]:
    """Some files of each extension, mixed, none twice."""
    found: dict[str, dict[str, Path]] = {extension: {} for extension in EXTENSIONS}
    for place in PLACES:
        for file in sorted(place.rglob("*.*")):
            kept = found.get(file.suffix[1:])
            # The first few hundred are enough to choose from, and a hash of each would read gigabytes.
            if kept is None or len(kept) >= 10 * MOST_OF_ONE or file.is_symlink() or not file.is_file():
                continue
            if 64 < file.stat().st_size < 1 << 20:
                kept.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
    chosen = [
        (digest, extension, file) for extension, files in found.items()
        for digest, file in sorted(files.items())[:MOST_OF_ONE]
    ]  # fmt: skip
    return [(extension, file) for _, extension, file in sorted(chosen)]


def _tokens(file: Path, settings: Mapping[str, Any]) -> Array | None:
    """The package's features, int32; None for files that it does not show to the network."""
    with file.open("rb") as stream:
        features = Magika._extract_features_from_seekable(  # noqa: SLF001  # the package's own way, not public
            Seekable(stream), settings["beg_size"], settings["mid_size"], settings["end_size"],
            settings["padding_token"], settings["block_size"], settings["use_inputs_at_offsets"],
        )  # fmt: skip
    if features.beg[settings["min_file_size_for_dl"] - 1] == settings["padding_token"]:
        return None
    return np.array([*features.beg, *features.end], np.int32)


PLAN = Plan("magika", "magika 1.0.3: files of this machine by extension", prepare, answers, score)
