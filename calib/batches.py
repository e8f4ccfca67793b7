"""Samples put side by side on the batch axis, as far as the network allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from calib.errors import DataError
from calib.inputs import Array, InputSpec, Sample, check_extents


@dataclasses.dataclass(frozen=True)
class Batch:
    """One feed of the network.

    Attributes:
        feeds: Array by input name.
        samples: The samples in it, in order; a fixed batch that they do not fill repeats the last one.
        first: Index of the first sample in the whole run.
    """

    feeds: Mapping[str, Array]
    samples: tuple[Sample, ...]
    first: int


def fixed_batch(specs: Iterable[InputSpec]) -> int | None:
    """The batch extent that a network insists on; None: any.

    Raises:
        DataError: its inputs have different fixed first axes, so there is no batch axis.

    >>> fixed_batch([InputSpec("x", np.dtype("float32"), (None, 3))]) is None
    True
    """
    found = {spec.shape[0] for spec in specs if spec.shape and spec.shape[0] is not None}
    if len(found) > 1:
        raise DataError(
            "the inputs of the model have different first axes: " + "; ".join(map(str, specs)),
            hint="give complete inputs: arrays of shape (samples, *shape of the input)",
        )
    return found.pop() if found else None


def batches(source: Iterable[Sample], specs: Iterable[InputSpec], *, batch_size: int) -> Iterator[Batch]:
    """Group consecutive samples of equal shapes.

    Args:
        source: The samples.
        specs: The network's inputs. A fixed batch extent overrides ``batch_size``.
        batch_size: Most samples a batch, where the network leaves it open.

    Raises:
        DataError: complete inputs (``Sample.whole``) do not fit the network.
    """
    specs = tuple(specs)
    pending: list[Sample] = []
    first = 0
    for sample in source:
        if pending and (sample.whole or not _alike(pending[0], sample)):
            yield _batch(pending, specs, first)
            first, pending = first + len(pending), []
        pending.append(sample)
        if sample.whole or len(pending) == (fixed_batch(specs) or batch_size):
            yield _batch(pending, specs, first)
            first, pending = first + len(pending), []
    if pending:
        yield _batch(pending, specs, first)


def _alike(a: Sample, b: Sample) -> bool:
    """Whether two samples can share a batch."""
    return all(a.feeds[name].shape == array.shape for name, array in b.feeds.items())


def _batch(samples: list[Sample], specs: tuple[InputSpec, ...], first: int) -> Batch:
    """Concatenate; fill a fixed batch by repeating the last sample, which changes no extreme."""
    if samples[0].whole:
        for spec in specs:
            check_extents(spec, samples[0].feeds[spec.name].shape, samples[0].origin, first=0)
        return Batch(samples[0].feeds, tuple(samples), first)
    size = fixed_batch(specs) or len(samples)
    filled = samples + samples[-1:] * (size - len(samples))
    feeds = {spec.name: np.concatenate([sample.feeds[spec.name] for sample in filled]) for spec in specs}
    return Batch(feeds, tuple(samples), first)
