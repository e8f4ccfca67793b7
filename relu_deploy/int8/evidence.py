"""Samples to decide on while quantising, and what to decide."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

from calib.inputs import Sample
from calib.progress import Progress, silent

# Signal over noise of a network that works as its original does. What has less is helped, as far as that is worth it.
GOOD_DB = 30.0


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Samples, and what is done with them.

    Attributes:
        source: Samples such as the network is fed in use; calibration data will do. Iterated over several times.
        samples: Look at no more than this many; None: as many as each step wants.
        keep_worst: Leave at least so many of the layers in float that INT8 damages most.
        floor_db: Signal over noise that every output is to have.
        rank: Rank all layers by the damage that INT8 does, also where nothing depends on it.
        correct: Choose weight codes and biases by what they do on the samples.
        progress: Told how far each step is.
    """

    source: Iterable[Sample]
    samples: int | None = None
    keep_worst: int = 0
    floor_db: float = 0.0
    rank: bool = False
    correct: bool = True
    progress: Progress = silent

    def first(self, count: int) -> list[Sample]:
        """The first samples, ``count`` at most."""
        return list(itertools.islice(self.source, count if self.samples is None else min(count, self.samples)))
