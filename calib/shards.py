"""Which samples of a source a run takes: the first N, every n-th of them, and those that an earlier run left."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator

from calib.errors import DataError
from calib.inputs import Sample
from calib.sources import ImageSource, Source

_TEXT = re.compile(r"(\d+)/(\d+)")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of ``of`` shards: the samples ``index - 1``, ``index - 1 + of``, ``index - 1 + 2 of``, ...

    So every shard has samples from the whole of the data, and together they are all of it.

    Attributes:
        index: From 1 to ``of``.
        of: How many shards there are.
    """

    index: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.of:
            raise DataError(f"there is no shard {self.index}/{self.of}", hint="shards of 4 are 1/4, 2/4, 3/4 and 4/4")


def parse_shard(text: str) -> Shard:
    """Read ``i/n``.

    Raises:
        DataError: it is not of that form, or ``i`` is not among 1 to ``n``.

    >>> parse_shard("2/4")
    Shard(index=2, of=4)
    """
    if not (found := _TEXT.fullmatch(text)):
        raise DataError(f"{text!r} is no shard", hint="give one as i/n: 1/4, 2/4, 3/4 and 4/4 are all of the data")
    return Shard(int(found[1]), int(found[2]))


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of a source that one run takes.

    Attributes:
        source: All samples.
        most: Only the first of them; None for all.
        shard: Of what ``most`` leaves.
    """

    source: Source
    most: int | None = None
    shard: Shard = dataclasses.field(default_factory=Shard)

    def index(self, place: int) -> int:
        """Which sample of the source is the ``place``-th of the selection, both from 0."""
        return self.shard.index - 1 + place * self.shard.of

    @property
    def length(self) -> int | None:
        """How many samples there are, if that is known."""
        total = self.source.length
        total = self.most if total is None else min(total, self.most or total)
        return None if total is None else len(range(self.shard.index - 1, total, self.shard.of))

    def __iter__(self) -> Iterator[Sample]:
        first, step = self.shard.index - 1, self.shard.of
        if isinstance(self.source, ImageSource):  # files that are not wanted are not decoded
            yield from dataclasses.replace(self.source, files=self.source.files[: self.most][first::step])
        else:
            yield from itertools.islice(self.source, first, self.most, step)
