"""Samples of a calibration source, put together into the batches that are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from calib.inputs import InputSpec, Sample
from relu_deploy.bench.feeds import Feeds, Shape
from relu_deploy.errors import DataError
from relu_deploy.tensors import TensorSpec


def input_specs(specs: Sequence[TensorSpec]) -> tuple[InputSpec, ...]:
    """What a source must deliver for an engine with these inputs."""
    return tuple(
        InputSpec(
            spec.name, np.dtype(spec.dtype), tuple(axis if isinstance(axis, int) else None for axis in spec.shape)
        )
        for spec in specs
    )


def shapes_of_data(specs: Sequence[TensorSpec], samples: Iterable[Sample], batch: int | None) -> dict[str, Shape]:
    """Shapes of the inputs that have dynamic axes, as the first sample gives them.

    Args:
        specs: Inputs of the original.
        samples: At least one.
        batch: Asked for, or None: what the network fixes, else the sample's own.

    Raises:
        DataError: there is no sample.
    """
    first = next(iter(samples), None)
    if first is None:
        raise DataError("the data is empty", hint="give one sample at least")
    shapes = {}
    for spec in specs:
        own = first.feeds[spec.name].shape
        if spec.dynamic:
            joined = own[:1] if first.whole or batch is None or not own else (batch,)
            shapes[spec.name] = (*joined, *own[1:])
    return shapes


def iter_batches(samples: Iterable[Sample], batch: int) -> Iterator[tuple[Feeds, int]]:
    """Whole batches, and how many of each one's items are samples; the last is filled up by repeating them.

    Raises:
        DataError: samples of different shapes cannot share a batch; samples that are whole inferences have another one.
    """
    waiting: list[Sample] = []
    for sample in samples:
        if sample.whole:
            yield _whole(sample, batch), batch
            continue
        waiting.append(sample)
        if len(waiting) == batch:
            yield _join(waiting, batch), batch
            waiting = []
    if waiting:
        yield _join(waiting, batch), len(waiting)


def _whole(sample: Sample, batch: int) -> Feeds:
    """A whole inference, where one of its arrays at least has the batch: that of a state may lie on another axis."""
    held = [(len(array), name) for name, array in sample.feeds.items() if array.ndim >= 2]
    if held and all(length != batch for length, _ in held):
        length, name = held[0]
        raise DataError(
            f"{sample.origin}: input {name!r} holds a batch of {length}, and {batch} is measured",
            hint=f"use --batch {length}",
        )
    return dict(sample.feeds)


def _join(samples: Sequence[Sample], batch: int) -> Feeds:
    filled = [samples[index % len(samples)] for index in range(batch)]
    joined = {}
    for name, array in samples[0].feeds.items():
        for sample in samples:
            if sample.feeds[name].shape != array.shape:
                raise DataError(
                    f"{sample.origin}: input {name!r} has shape {sample.feeds[name].shape}, {samples[0].origin} has "
                    f"{array.shape}; they cannot share a batch",
                    hint="use --batch 1, or samples of one shape",
                )
        joined[name] = np.concatenate([sample.feeds[name] for sample in filled])
    return joined
