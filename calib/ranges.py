"""The ranges file: what calibration measured, of which network, on which data.

JSON that a person can open, one tensor a line. Numbers are the shortest decimals that give the measured float32 back
exactly. Methods that need one add the tensor's histogram, as :func:`calib.histogram.to_runs` writes it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calib.errors import FileError, RangesError
from calib.files import read_json, write_text
from calib.fingerprint import model_fingerprint, to_hex
from calib.histogram import CHANNEL_BITS, TENSOR_BITS, Histogram, bins_of, from_runs, to_runs
from calib.options import METHODS

FORMAT = "calib-ranges"
# Version 2 added histograms; without one, a file is of version 1 still.
FORMAT_VERSION = 2
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
        histogram: Of all values; None for the method ``max``, which needs none.
        channel_histograms: One for each channel where that was asked for, with wider bins; else None.
    """

    min: float
    max: float
    dtype: str
    count: int
    axis: int | None = None
    channel_min: NDArray[np.float32] | None = None
    channel_max: NDArray[np.float32] | None = None
    histogram: Histogram | None = None
    channel_histograms: tuple[Histogram, ...] | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorRange):
            return NotImplemented
        counted = self.histogram, self.channel_histograms
        same = _scalars(self) == _scalars(other) and counted == (other.histogram, other.channel_histograms)
        return same and all(
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
        method: How a range is to be chosen, one of :data:`calib.options.METHODS`; see :mod:`calib.choose`.
        samples: How many samples were fed; 0 where the ranges were not measured here (:mod:`calib.trt_cache`).
        skipped: Tensors that have no range, with the reason.
        versions: Packages that measured.
        percentile: Of the method ``percentile``: how many of 100 values keep their size. None for the others.
        channels: Whether channels were given histograms too.
        sketch: The smallest of the samples' hashes, by which shards that hold the same samples are told; see
            :func:`calib.fingerprint.sketch`.
    """

    tensors: Mapping[str, TensorRange]
    model: str
    data: str
    method: str
    samples: int
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    percentile: float | None = None
    channels: bool = False
    sketch: tuple[str, ...] = ()


def save(ranges: Ranges, path: Path, *, kind: str = FORMAT) -> None:
    """Write a ranges file, whole or not at all; ``kind`` is what it claims to be. Raises: FileError."""
    settings: dict[str, Any] = {"method": ranges.method, "samples": ranges.samples}
    if ranges.percentile is not None:
        settings["percentile"] = ranges.percentile
    if ranges.channels:
        settings["channels"] = True
    head = {
        "format": kind, "version": FORMAT_VERSION, "model": ranges.model, "data": ranges.data, "settings": settings,
        "versions": dict(ranges.versions), "skipped": dict(ranges.skipped), "sketch": list(ranges.sketch),
    }  # fmt: skip
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    rows = [f"    {json.dumps(name)}: {json.dumps(_row(r), allow_nan=False)}" for name, r in ranges.tensors.items()]
    lines.append('  "tensors": {\n' + ",\n".join(rows) + "\n  }" if rows else '  "tensors": {}')
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load(path: Path, *, kind: str = FORMAT) -> Ranges:
    """Read and check a ranges file, or another ``kind`` of file that :func:`save` wrote.

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
    if not isinstance(value, dict) or value.get("format") != kind:
        raise RangesError(f"{path} is not a ranges file", hint="make one with: relu-deploy calibrate")
    if type(value.get("version")) is not int or value["version"] not in range(1, FORMAT_VERSION + 1):
        raise RangesError(
            f"{path} has format version {value.get('version')!r}; this program reads 1 to {FORMAT_VERSION}",
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
    if r.histogram is not None:
        row["histogram"] = to_runs(r.histogram)
    if r.channel_histograms is not None:
        row["channel_histograms"] = [to_runs(histogram) for histogram in r.channel_histograms]
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
    # Of no samples is what was not measured here: see calib.trt_cache.
    least = 0 if value["data"] == to_hex(0) else 1
    if type(settings["samples"]) is not int or settings["samples"] < least:
        raise ValueError(f"samples is {settings['samples']!r}")
    for key in ("model", "data"):
        if not isinstance(value[key], str) or len(value[key]) != 64 or int(value[key], 16) < 0:
            raise ValueError(f"the {key} fingerprint is not 64 hex digits")
    return Ranges(
        {name: _parse_row(name, row) for name, row in value["tensors"].items()},
        value["model"], value["data"], settings["method"], settings["samples"],
        _strings(value["skipped"]), _strings(value["versions"]), _percentile(settings),
        settings.get("channels") is True, tuple(str(item) for item in value.get("sketch", ())),
    )  # fmt: skip


def _percentile(settings: dict[str, Any]) -> float | None:
    """The percentile, which its method needs and no other has."""
    if settings["method"] != "percentile":
        return None
    percentile = settings["percentile"]
    if type(percentile) not in (int, float) or not 0 < percentile <= 100:
        raise ValueError(f"percentile is {percentile!r}")
    return float(percentile)


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
    histogram = _histogram(TENSOR_BITS, row["histogram"], name, low, high) if "histogram" in row else None
    if row.get("axis") is None:
        return TensorRange(low, high, row["dtype"], row["count"], histogram=histogram)
    lows = np.array([_number(v, name) for v in row["channel_min"]], np.float32)
    highs = np.array([_number(v, name) for v in row["channel_max"]], np.float32)
    if type(row["axis"]) is not int or row["axis"] < 0 or not len(lows) or lows.shape != highs.shape:
        raise ValueError(
            f"tensor {name!r} has {len(lows)} channel minima and {len(highs)} maxima on axis {row['axis']!r}"
        )
    if (lows > highs).any() or lows.min() != np.float32(low) or highs.max() != np.float32(high):
        raise ValueError(f"tensor {name!r} has channel extremes that contradict each other or its min and max")
    channels = None
    if "channel_histograms" in row:
        rows = zip(row["channel_histograms"], lows, highs, strict=True)
        channels = tuple(_histogram(CHANNEL_BITS, runs, name, float(a), float(b)) for runs, a, b in rows)
    return TensorRange(low, high, row["dtype"], row["count"], row["axis"], lows, highs, histogram, channels)


def _histogram(bits: int, runs: list[list[int]], name: str, low: float, high: float) -> Histogram:
    """A histogram whose outermost bins are those of the extremes."""
    histogram = from_runs(bits, runs)
    ends = bins_of(np.array([low, high], np.float32), bits)
    if not len(histogram.bins) or (histogram.bins[[0, -1]] != ends).any():
        raise ValueError(f"tensor {name!r} has a histogram that contradicts its min and max")
    return histogram


def _number(value: Any, name: str) -> float:
    """A finite float32."""
    with np.errstate(over="ignore"):
        number = float(np.float32(value)) if type(value) in (int, float) else math.nan
    if not math.isfinite(number):
        raise ValueError(f"tensor {name!r} has {value!r} where a finite float32 belongs")
    return number
