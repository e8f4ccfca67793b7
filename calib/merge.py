"""Shards joined into what one run over all their samples would have measured."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

import numpy as np

from calib.errors import RangesError
from calib.fingerprint import combine, sketch, to_hex
from calib.histogram import merge_histograms
from calib.ranges import EMPTY, Ranges, TensorRange


def merge(*parts: Ranges) -> Ranges:
    """Join shards into what one run over all their samples would have measured, bit for bit.

    Samples that lie in several parts count several times, see :func:`shared_samples`.

    Raises:
        RangesError: there is nothing to join, or the parts are of different networks or methods.
    """
    if not parts:
        raise RangesError("there are no ranges to merge")
    if not all(part.samples for part in parts):
        raise RangesError("ranges that were read from a calibration cache of TensorRT cannot be merged")
    if len({part.model for part in parts}) > 1:
        raise RangesError("cannot merge ranges of different networks", hint="calibrate the shards on one network")
    if len({(part.method, part.percentile, part.channels) for part in parts}) > 1:
        raise RangesError("cannot merge ranges of different methods", hint="calibrate the shards with the same options")
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
        sketch=sketch(*(part.sketch for part in parts)),
    )


def shared_samples(*parts: Ranges) -> int:
    """How many samples are known to be in more than one part.

    Known are those in the parts' sketches: all of them up to :data:`calib.fingerprint.SKETCH` samples a part; beyond,
    some, where a noticeable share is in several.
    """
    seen = Counter(name for part in parts for name in part.sketch)
    return sum(times > 1 for times in seen.values())


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
    """Extremes of extremes and sums of counts; channels only where all parts have the same ones."""
    first = parts[0]
    counts = [p.histogram for p in parts if p.histogram is not None]
    layouts = {(p.axis, None if p.channel_min is None else len(p.channel_min)) for p in parts}
    joined = TensorRange(
        min(p.min for p in parts), max(p.max for p in parts), first.dtype, sum(p.count for p in parts),
        histogram=merge_histograms(counts) if counts else None,
    )  # fmt: skip
    if len(layouts) > 1 or first.axis is None:
        return joined
    channels = [p.channel_histograms for p in parts if p.channel_histograms is not None]
    return dataclasses.replace(
        joined,
        axis=first.axis,
        channel_min=np.minimum.reduce([p.channel_min for p in parts if p.channel_min is not None]),
        channel_max=np.maximum.reduce([p.channel_max for p in parts if p.channel_max is not None]),
        channel_histograms=tuple(map(merge_histograms, zip(*channels, strict=True))) if channels else None,
    )
