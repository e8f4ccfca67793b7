"""The ranges file: what calibration measured, of which network, on which data.

JSON that a person can open, one tensor a line. Numbers are the shortest decimals that give the measured float32 back
exactly.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.errors import FileError, RangesError
from calib.files import read_json, write_text
from calib.fingerprint import combine, model_fingerprint, to_hex
from calib.options import METHODS

FORMAT = "calib-ranges"
FORMAT_VERSION = 1
EMPTY = "it was empty for every sample"


@dataclasses.dataclass(frozen=True, eq=False)
class TensorRange:
    """Extremes of one tensor over all samples, in tensor units.

    Attributes:
        min: Smallest value seen; a float32 exactly.
        max: Largest value seen; ``>= min``.
        dtype: The tensor's type in the network: float32 or float16.
        count: Samples in which it held at least one element.
        axis: Which axis the channels are on, from 0. None: no channels (a scalar or vector, or extents that vary).
        channel_min: float32 ``(C,)``, or None with ``axis``.
        channel_max: float32 ``(C,)``, or None with ``axis``.
    """

    min: float
    max: float
    dtype: str
    count: int
    axis: int | None = None
    channel_min: NDArray[np.float32] | None = None
    channel_max: NDArray[np.float32] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorRange):
            return NotImplemented
        return _scalars(self) == _scalars(other) and all(
            np.array_equal(np.asarray(a), np.asarray(b)) if a is not None and b is not None else a is b
            for a, b in ((self.channel_min, other.channel_min), (self.channel_max, other.channel_max))
        )

    def __hash__(self) -> int:
        return hash(_scalars(self))

    @property
    def absmax(self) -> float:
        """Largest magnitude, ``max(|min|, |max|)``."""
        return max(abs(self.min), abs(self.max))


@dataclasses.dataclass(frozen=True)
class Ranges:
    """What a calibration run measured.

    Attributes:
        tensors: By tensor name, in the network's order.
        model: Fingerprint of the network.
        data: Fingerprint of the data.
        method: How: ``max``.
        samples: How many samples were fed.
        skipped: Tensors that have no range, with the reason.
        versions: Packages that measured.
    """

    tensors: Mapping[str, TensorRange]
    model: str
    data: str
    method: str
    samples: int
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def save(ranges: Ranges, path: Path) -> None:
    """Write a ranges file, whole or not at all. Raises: FileError."""
    head = {
        "format": FORMAT, "version": FORMAT_VERSION, "model": ranges.model, "data": ranges.data,
        "settings": {"method": ranges.method, "samples": ranges.samples},
        "versions": dict(ranges.versions), "skipped": dict(ranges.skipped),
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"    {json.dumps(name)}: {json.dumps(_row(r), allow_nan=False)}" for name, r in ranges.tensors.items()]
    lines.append('  "tensors": {\n' + ",\n".join(rows) + "\n  }" if rows else '  "tensors": {}')
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load(path: Path) -> Ranges:
    """Read and check a ranges file.

    Raises:
        FileError: it does not exist or cannot be read.
        RangesError: it is cut short, not a ranges file, of another format version, or holds impossible values.
    """
    if not path.is_file():
        raise FileError(f"cannot read the ranges file {path}: it does not exist or is not a file")
    try:
        value = read_json(path)
    except FileError as error:
        raise RangesError(f"{path} is not a whole ranges file: {error.message}", hint="calibrate again") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise RangesError(f"{path} is not a ranges file", hint="make one with: relu-deploy calibrate")
    if value.get("version") != FORMAT_VERSION:
        raise RangesError(
            f"{path} has format version {value.get('version')!r}; this program reads {FORMAT_VERSION}",
            hint="calibrate again, or update the program that reads it",
        )
    try:
        return _parse(value)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"the entry {error} is missing" if isinstance(error, KeyError) else str(error)
        raise RangesError(f"{path} is damaged: {what}", hint="calibrate again") from error


def check_fresh(ranges: Ranges, model: onnx.ModelProto, *, source: Path | str = "the ranges file") -> None:
    """Refuse ranges that were measured on another network.

    Raises:
        RangesError: the fingerprints differ.
    """
    found = model_fingerprint(model)
    if found != ranges.model:
        raise RangesError(
            f"{source} was measured on another network: fingerprint {ranges.model[:12]}, this network has {found[:12]}",
            hint="calibrate this network; ranges belong to the exact graph they were measured on",
        )


def merge(*parts: Ranges) -> Ranges:
    """Join shards into what one run over all their samples would have measured, bit for bit.

    Raises:
        RangesError: there is nothing to join, or the parts are of different networks or methods.
    """
    if not parts:
        raise RangesError("there are no ranges to merge")
    if len({(part.model, part.method) for part in parts}) > 1:
        raise RangesError("cannot merge ranges of different networks or methods", hint="calibrate the shards alike")
    lost = {name: why for part in parts for name, why in part.skipped.items() if why != EMPTY}
    # Names in the order of the network, which every part keeps; a tensor that one shard never filled may lack in it.
    names = _merge_order(part.tensors for part in parts)
    joined = {n: _join([p.tensors[n] for p in parts if n in p.tensors]) for n in names if n not in lost}
    empty = {
        name: why for part in parts for name, why in part.skipped.items() if name not in joined and name not in lost
    }
    return dataclasses.replace(
        parts[0],
        tensors=joined,
        data=to_hex(combine(*(int(part.data, 16) for part in parts))),
        samples=sum(part.samples for part in parts),
        skipped=dict(sorted({**lost, **empty}.items())),
    )


def _merge_order(lists: Iterable[Iterable[str]]) -> list[str]:
    """Union of ordered lists: each new name goes after the one it follows in its own list."""
    order: list[str] = []
    for names in lists:
        at, known = 0, set(order)
        for name in names:
            if name in known:
                at = order.index(name, at) + 1 if name in order[at:] else at
            else:
                order.insert(at, name)
                at += 1
    return order


def _join(parts: list[TensorRange]) -> TensorRange:
    """Extremes of extremes; channels only where all parts have the same ones."""
    layouts = {(p.axis, None if p.channel_min is None else len(p.channel_min)) for p in parts}
    lows = [p.channel_min for p in parts if p.channel_min is not None]
    highs = [p.channel_max for p in parts if p.channel_max is not None]
    channels = len(layouts) == 1 and parts[0].axis is not None
    return TensorRange(
        min(p.min for p in parts), max(p.max for p in parts), parts[0].dtype, sum(p.count for p in parts),
        parts[0].axis if channels else None,
        np.minimum.reduce(lows) if channels else None, np.maximum.reduce(highs) if channels else None,
    )  # fmt: skip


def _scalars(r: TensorRange) -> tuple[float, float, str, int, int | None]:
    """What of a range can be hashed."""
    return r.min, r.max, r.dtype, r.count, r.axis


def _row(r: TensorRange) -> dict[str, Any]:
    """One tensor as JSON."""
    row: dict[str, Any] = {"min": _short(r.min), "max": _short(r.max), "dtype": r.dtype, "count": r.count}
    if r.axis is not None and r.channel_min is not None and r.channel_max is not None:
        row["axis"] = r.axis
        row["channel_min"] = [_short(value) for value in r.channel_min]
        row["channel_max"] = [_short(value) for value in r.channel_max]
    return row


def _short(value: float | np.float32) -> float:
    """The float64 whose decimal is shortest among those that round to this float32."""
    exact = np.float32(value)
    short = float(str(exact))
    return short if np.float32(short) == exact else float(exact)


def _parse(value: dict[str, Any]) -> Ranges:
    """Build from JSON; any ValueError, KeyError or TypeError means damage."""
    settings = value["settings"]
    if settings["method"] not in METHODS:
        raise ValueError(f"unknown method {settings['method']!r}")
    if type(settings["samples"]) is not int or settings["samples"] < 1:
        raise ValueError(f"samples is {settings['samples']!r}")
    for key in ("model", "data"):
        if not isinstance(value[key], str) or len(value[key]) != 64 or int(value[key], 16) < 0:
            raise ValueError(f"the {key} fingerprint is not 64 hex digits")
    return Ranges(
        {name: _parse_row(name, row) for name, row in value["tensors"].items()},
        value["model"], value["data"], settings["method"], settings["samples"],
        _strings(value["skipped"]), _strings(value["versions"]),
    )  # fmt: skip


def _strings(value: Mapping[str, Any]) -> dict[str, str]:
    """A map of strings."""
    return {str(key): str(item) for key, item in value.items()}


def _parse_row(name: str, row: dict[str, Any]) -> TensorRange:
    """One tensor from JSON."""
    low, high = _number(row["min"], name), _number(row["max"], name)
    if low > high:
        raise ValueError(f"tensor {name!r} has min {low} above max {high}")
    if row["dtype"] not in ("float32", "float16") or type(row["count"]) is not int or row["count"] < 1:
        raise ValueError(f"tensor {name!r} has dtype {row['dtype']!r} and count {row['count']!r}")
    if row.get("axis") is None:
        return TensorRange(low, high, row["dtype"], row["count"])
    lows = np.array([_number(v, name) for v in row["channel_min"]], np.float32)
    highs = np.array([_number(v, name) for v in row["channel_max"]], np.float32)
    if type(row["axis"]) is not int or row["axis"] < 0 or not len(lows) or lows.shape != highs.shape:
        raise ValueError(
            f"tensor {name!r} has {len(lows)} channel minima and {len(highs)} maxima on axis {row['axis']!r}"
        )
    if (lows > highs).any() or lows.min() != np.float32(low) or highs.max() != np.float32(high):
        raise ValueError(f"tensor {name!r} has channel extremes that contradict each other or its min and max")
    return TensorRange(low, high, row["dtype"], row["count"], row["axis"], lows, highs)


def _number(value: Any, name: str) -> float:
    """A finite float32."""
    with np.errstate(over="ignore"):
        number = float(np.float32(value)) if type(value) in (int, float) else math.nan
    if not math.isfinite(number):
        raise ValueError(f"tensor {name!r} has {value!r} where a finite float32 belongs")
    return number
