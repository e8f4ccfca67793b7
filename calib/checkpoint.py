"""What was measured so far, kept in a file, so that a run that was killed goes on from there.

A checkpoint is the ranges of the first samples. To go on is to measure the others and to merge, which is exact.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from pathlib import Path

from calib.errors import RangesError
from calib.fingerprint import combine, sample_hash, to_hex
from calib.inputs import Sample
from calib.ranges import Ranges, load, save

KIND = "calib-checkpoint"


class Checkpoint:
    """A file that is written every so often, whole or not at all.

    Args:
        path: The file.
        resume: Go on from it where it exists; else it is written anew.
        seconds: Least time between two writings.

    Attributes:
        path: The file.
        resumed: How many samples an earlier run had measured.
    """

    def __init__(self, path: Path, *, resume: bool, seconds: float = 30.0) -> None:
        self.path, self._resume, self._seconds = path, resume, seconds
        self._written = time.monotonic()
        self.resumed = 0

    def resume(self, settings: Ranges, samples: Iterator[Sample]) -> Ranges | None:
        """What was measured before; None where there is nothing to go on from.

        Args:
            settings: Network, method and options of this run.
            samples: Of this run, from the first; those that were measured are taken from it.

        Raises:
            RangesError: the checkpoint is of another network, of other settings, or of other samples.
        """
        if not self._resume or not self.path.exists():
            return None
        before = load(self.path, kind=KIND)
        for what, found, wanted in (
            ("network", before.model, settings.model),
            ("method", before.method, settings.method),
            ("percentile", before.percentile, settings.percentile),
            ("choice of --channels", before.channels, settings.channels),
        ):
            if found != wanted:
                raise RangesError(f"{self.path} is of another {what}, so there is no going on from it", hint=_ANEW)
        # They are read, though not run: only so can it be told that they are the same.
        hashes = [sample_hash(sample.feeds) for sample in itertools.islice(samples, before.samples)]
        if to_hex(combine(*hashes)) != before.data or len(hashes) != before.samples:
            raise RangesError(f"{self.path} is of other samples, so there is no going on from it", hint=_ANEW)
        self.resumed = before.samples
        return before

    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return time.monotonic() - self._written >= self._seconds

    def keep(self, measured: Ranges) -> None:
        """Write what was measured so far. Raises: FileError."""
        save(measured, self.path, kind=KIND)
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget it: the run has ended, and its result is written."""
        self.path.unlink(missing_ok=True)


_ANEW = "leave --resume out to calibrate from the first sample on"
