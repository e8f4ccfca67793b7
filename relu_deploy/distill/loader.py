"""Batches in an order that the seed and the epoch decide alone, cut to equal parts for the processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from calib.errors import ToolkitError
from relu_deploy.errors import DataError, TrainingError

_LOOKED_AT = 16  # samples of a data set that its fingerprint is made of


class EpochBatches(Sampler[list[int]]):
    """This process's part of every batch of one epoch.

    The order of the samples is ``randperm`` of ``seed`` and ``epoch``, so a resumed run needs no state of a generator,
    and several processes see together what one process would.

    Args:
        size: Samples in the data set.
        batch_size: Samples a step over all processes.
        seed: Of the order.
        epoch: From 0.
        first: The first batch that is wanted, after a resume in the middle.
        rank: This process.
        processes: How many there are.
    """

    def __init__(
        self, size: int, batch_size: int, *, seed: int, epoch: int, first: int = 0, rank: int = 0, processes: int = 1
    ) -> None:
        self.steps = steps_an_epoch(size, batch_size, processes)
        self._size, self._batch, self._first = size, batch_size, first
        self._order, self._rank, self._processes = seed * 1_000_003 + epoch, rank, processes
        self.seed = self._order * 4099 + rank

    def __len__(self) -> int:
        """Batches that are left."""
        return self.steps - self._first

    def __iter__(self) -> Iterator[list[int]]:
        """Indices of samples."""
        order = torch.randperm(self._size, generator=torch.Generator().manual_seed(self._order)).tolist()
        for i in range(self._first, self.steps):
            yield order[i * self._batch : (i + 1) * self._batch][self._rank :: self._processes]


def steps_an_epoch(size: int, batch_size: int, processes: int = 1) -> int:
    """How many whole batches there are.

    Raises:
        DataError: there are fewer samples than a batch has.
        TrainingError: the processes cannot have equal parts.
    """
    if batch_size % processes:
        raise TrainingError(
            f"a batch of {batch_size} samples cannot be shared equally by {processes} processes",
            hint="batch_size counts the samples of all processes together",
        )
    if size < batch_size:
        raise DataError(f"{size} samples are fewer than one batch of {batch_size}", hint="lower batch_size")
    return size // batch_size


def train_loader(
    data: Dataset[Any], batches: EpochBatches, *, workers: int, collate: Callable[[list[Any]], Any] | None
) -> DataLoader[Any]:
    """A loader that draws nothing from torch's global generator, whose state belongs to the model."""
    generator = torch.Generator().manual_seed(batches.seed)  # of the workers' seeds: other draws in each epoch
    return DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=generator)


def evaluation_loader(
    data: Dataset[Any],
    batch_size: int,
    *,
    rank: int,
    processes: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None,
) -> DataLoader[Any]:
    """Every sample once, over all processes together; parts may differ in size by one batch."""
    indices = list(range(size_of(data, "evaluate")))[rank::processes]
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    return DataLoader(
        data, batch_sampler=batches, num_workers=workers, collate_fn=collate, generator=torch.Generator().manual_seed(0)
    )


def told_plainly(batches: DataLoader[Any]) -> Iterator[Any]:
    """The batches; what goes wrong with one is told in a line, without the traceback of the process that loads it.

    Raises:
        DataError: a sample cannot be had, samples do not fit together, or a loading process was killed.
    """
    try:
        yield from batches
    except ToolkitError as error:
        told = error.message.strip().splitlines()
        if len(told) == 1:
            raise
        raise DataError(told[-1].partition(": ")[2] or told[-1], hint=error.hint) from error
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        raise DataError(f"the samples of a batch cannot be put together: {reason[:400]}") from error


def size_of(data: Dataset[Any], name: str) -> int:
    """Number of samples.

    Raises:
        DataError: the data set has no length, or is empty.
    """
    if not hasattr(data, "__len__"):
        raise DataError(f"{name}= is a {type(data).__name__} without a length", hint="give a map-style Dataset")
    size = len(data)
    if size == 0:
        raise DataError(f"{name}= has no samples")
    return size


def fingerprint(data: Dataset[Any]) -> str:
    """Hash of the size and of sixteen samples spread over a data set: enough to notice another set or another order.

    Random augmentations would change it at every look, so the random state is fixed for them.
    """
    size = size_of(data, "data")
    digest = hashlib.sha256(str(size).encode())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for i in sorted({k * (size - 1) // max(1, _LOOKED_AT - 1) for k in range(_LOOKED_AT)}):
            _hash(digest, data[i])
    return digest.hexdigest()


def fingerprint_state(state: Mapping[str, Tensor]) -> str:
    """Hash of every name, dtype, shape and value."""
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(name.encode())
        _hash(digest, tensor)
    return digest.hexdigest()


def _hash(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _hash(digest, value[key])
    elif isinstance(value, (tuple, list)):
        for item in value:
            _hash(digest, item)
    else:
        array = getattr(value, "tobytes", None)
        digest.update(array() if callable(array) else repr(value).encode())
