"""TensorRT's calibration cache, as its calibrators wrote it until version 10 and its builder read it.

A text: the version and algorithm of TensorRT, then a line ``name: scale`` for each tensor. The scale is the magnitude
that int8 covers divided by 127, as the hexadecimal digits of a big-endian float32 without leading zeros::

    TRT-8601-EntropyCalibration2
    images: 3c010a14
    /conv/Conv_output_0: 3d9b1c2f

Names may hold colons and spaces; the last ``": "`` of a line is what divides it.

Source: files published by their users, and how ONNX Runtime's TensorRT provider reads them (``scale * 127``).
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from calib.choose import chosen_bounds
from calib.errors import FileError, RangesError
from calib.files import write_text
from calib.fingerprint import model_fingerprint, to_hex
from calib.graph import activations, never_negative
from calib.ranges import Ranges, TensorRange

LIMIT = 127
VERSION = "8601"
ALGORITHM = "EntropyCalibration2"
# What a tensor that was always zero gets: TensorRT writes 0, and then builds networks that divide by it.
_DEAD = 2.0**-12
_SMALLEST = 2.0**-126  # of normal float32
_HEADER = re.compile(r"TRT-[\w.]+-\w+")
_HEX = re.compile(r"[0-9a-fA-F]{1,8}")
_MAX_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Cache:
    """A calibration cache.

    Attributes:
        header: Version and algorithm.
        scales: Tensor units to a step of int8, by tensor name; a float32 exactly.
    """

    header: str
    scales: Mapping[str, float]


def read_cache(path: Path) -> Cache:
    """Read a calibration cache.

    Raises:
        FileError: it cannot be read.
        RangesError: it is no calibration cache, is cut short, or names a tensor twice.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise RangesError(f"{path} is larger than {_MAX_BYTES} bytes, so it is no calibration cache")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FileError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise RangesError(f"{path} is no calibration cache of TensorRT: it is no text") from error
    header, _, body = text.partition("\n")
    if not _HEADER.fullmatch(header.strip()):
        raise RangesError(
            f"{path} is no calibration cache of TensorRT", hint="its first line reads like TRT-8601-EntropyCalibration2"
        )
    scales: dict[str, float] = {}
    for number, line in enumerate(body.split("\n"), 2):
        if not line.strip():
            continue
        name, divider, digits = line.rpartition(": ")
        if not divider or not name or not _HEX.fullmatch(digits.strip()):
            raise RangesError(
                f"{path}, line {number}: {line[:80]!r} is no name with a scale", hint="it may be cut short"
            )
        if name in scales:
            raise RangesError(f"{path}, line {number}: tensor {name!r} has two scales")
        (scales[name],) = struct.unpack(">f", bytes.fromhex(digits.strip().zfill(8)))
    return Cache(header.strip(), scales)


def write_cache(cache: Cache, path: Path) -> None:
    """Write a calibration cache, whole or not at all. Raises: FileError."""
    lines = [f"{name}: {struct.unpack('>I', struct.pack('>f', scale))[0]:x}" for name, scale in cache.scales.items()]
    write_text(path, "\n".join([cache.header, *lines]) + "\n")


def to_cache(
    ranges: Ranges, *, method: str | None = None, version: str = VERSION, algorithm: str = ALGORITHM
) -> tuple[Cache, dict[str, str]]:
    """Scales of a ranges file for TensorRT.

    Args:
        ranges: What was measured.
        method: Another than the file's own, where it has histograms.
        version: Of the TensorRT that is to read it, four digits or five. Others refuse it.
        algorithm: Of the calibrator that the builder is given: EntropyCalibration2, MinMaxCalibration, ...

    Returns:
        The cache, and tensors that it cannot name, with the reason.

    Raises:
        RangesError: the method needs histograms, and there are none; or the header is none.
    """
    header = f"TRT-{version}-{algorithm}"
    if not _HEADER.fullmatch(header):
        raise RangesError(f"{header!r} is no header of a calibration cache", hint="8601 and EntropyCalibration2, say")
    scales: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, (low, high) in chosen_bounds(ranges, unsigned=False, method=method).items():
        if "\n" in name or "\r" in name or not name.strip():
            skipped[name] = "its name does not fit on a line"
        else:
            size = max(-low, high)
            scales[name] = float(np.float32(max(size / LIMIT, _SMALLEST))) if size else _DEAD
    return Cache(header, scales), skipped


def from_cache(cache: Cache, model: onnx.ModelProto) -> Ranges:
    """Ranges for a network from TensorRT's scales.

    A cache knows less than a ranges file: no data, no number of samples, no channels, and of each tensor only the
    magnitude; where the network shows that a tensor is never negative, its range begins at 0. Which network it was
    measured on is not in it either; that it was this one is the caller's word.

    Returns:
        Ranges of no samples, with the tensors that the cache and the network share; others are in ``skipped``.

    Raises:
        RangesError: cache and network share no tensor.
    """
    positive = never_negative(model)
    types = {value.name: value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.value_info)}
    tensors: dict[str, TensorRange] = {}
    skipped: dict[str, str] = {}
    for name in activations(model):
        if (scale := cache.scales.get(name)) is None:
            continue
        with np.errstate(over="ignore"):
            size = float(np.float32(scale * LIMIT)) if math.isfinite(scale) else math.inf
        if not math.isfinite(size) or scale < 0:
            skipped[name] = f"its scale in the cache is {scale}"
            continue
        dtype = "float16" if types.get(name) == onnx.TensorProto.FLOAT16 else "float32"
        tensors[name] = TensorRange(0.0 if name in positive else -size, size, dtype, 1)
    if not tensors:
        raise RangesError(
            "the calibration cache has no scale for any tensor of the model",
            hint="it is of another network, or of one whose tensors were renamed",
        )
    return Ranges(
        tensors, model_fingerprint(model), to_hex(0), "max", 0, skipped, {"calibration cache": cache.header}
    )  # fmt: skip
