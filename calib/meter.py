"""The network and the observers of its tensors: takes batches, gives ranges."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from calib.batches import Batch
from calib.derived import derive
from calib.discover import discover
from calib.errors import CalibrationError
from calib.fingerprint import combine, sample_hash, sketch, sketch_of, to_hex
from calib.graph import is_mask, producer
from calib.inputs import InputSpec
from calib.network import Network
from calib.observers import Observer, Wanted, widened
from calib.pooled import Extremes
from calib.ranges import EMPTY, Ranges, TensorRange
from calib.stages import STAGE_BYTES

MASK = "it holds -inf as a mask, in attention or around scores"
# Activations of all runs at a time.
_PARALLEL_BYTES = 1 << 29
_Feeds = Mapping[str, NDArray[Any]]


class Meter:
    """Measures batches, also several at a time: what is measured does not depend on their order.

    Args:
        model: The network.
        specs: Its inputs.
        first: The first batch, from which types, ranks and sizes are learnt. It is not measured by that.
        settings: Of the ranges to be made: network, method and options.
        threads: How many may work, of ours and the runtime's together.
        runs: How many batches there will be; None: not known.
        index: Which sample of the data is the n-th measured, for messages.

    Attributes:
        workers: How many batches are best measured at a time.

    Raises:
        CalibrationError: the network has nothing to measure, or cannot be run.
    """

    def __init__(
        self, model: onnx.ModelProto, specs: tuple[InputSpec, ...], first: Batch, settings: Ranges, *,
        threads: int, runs: int | None, index: Callable[[int], int],
    ) -> None:  # fmt: skip
        found = discover(model, specs, first)
        if not found.tensors:
            raise CalibrationError("the model has no float32 or float16 activation, so there is nothing to measure")
        self._model, self._settings, self._index = model, settings, index
        self._fed = {spec.name for spec in specs}
        self._skipped = dict(found.skipped)
        wanted = Wanted(settings.method != "max", settings.channels)
        self._order, self._derived = [tensor.name for tensor in found.tensors], found.derived
        self._observers = {t.name: Observer(t, wanted) for t in found.tensors if t.name not in found.derived}
        # Two runs of one thread each are quicker than one of two, which wait for each other at every operator.
        needed = min(sum(found.sizes[name] for name in self._observers), STAGE_BYTES)
        self.workers = max(1, min(threads, _PARALLEL_BYTES // max(needed, 1), threads if runs is None else runs))
        self._network = Network(
            model, found, self._observers.keys() - self._fed, pool=not wanted.histogram, threads=threads // self.workers
        )
        self._extremes = Extremes(self._network.pooled)
        self.samples, self._data = 0, 0
        self._sketch: tuple[str, ...] = ()
        self._lock = threading.Lock()

    def take(self, batch: Batch) -> int:
        """Run one batch and take its tensors in; says how many samples it held.

        Raises:
            CalibrationError: as :func:`calib.run.calibrate`.
        """
        extent = _extent(batch)
        if self._settings.method != "max" and extent > len(batch.samples) and not batch.samples[0].whole:
            # The samples that fill a fixed batch would be counted too.
            for offset in range(len(batch.samples)):
                self._run(batch, _alone(batch, offset), 1, copies=extent)
        else:
            self._run(batch, batch.feeds, len(batch.samples))
        hashes = [sample_hash(sample.feeds) for sample in batch.samples]
        with self._lock:
            self.samples += len(hashes)
            self._data = combine(self._data, *hashes)
            self._sketch = sketch(self._sketch, map(sketch_of, hashes))
        return len(hashes)

    def _run(self, batch: Batch, feeds: _Feeds, samples: int, *, copies: int = 1) -> None:
        """Run the network once and update the observers."""
        for name, value in self._values(feeds, batch.samples[0].origin):
            if name == self._network.extremes:
                if not np.isfinite(value).all():
                    self._examine(batch, feeds, self._extremes.not_finite(value))
                self._extremes.update(value, samples)
            elif value.size:
                observer, values = self._observers[name], widened(value)
                low, high = observer.extremes(values)
                if np.isfinite(low).all() and np.isfinite(high).all():
                    observer.update(values, (low, high), samples, copies=copies)
                elif self._is_fault(name, low, high):
                    self._examine(batch, feeds, [name])

    def _values(self, feeds: _Feeds, what: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """All that is looked at of a run."""
        yield from ((name, feeds[name]) for name in self._observers if name in self._fed)
        yield from self._network.run(feeds, what)

    def _is_fault(self, name: str, *values: NDArray[Any]) -> bool:
        """Whether values of a tensor are none that it may have: finite, or -inf where it is a mask."""
        if self._skipped.get(name) == MASK:
            return any(bool(np.isnan(array).any() or np.isposinf(array).any()) for array in values)
        return not all(np.isfinite(array).all() for array in values)

    def _examine(self, batch: Batch, feeds: _Feeds, names: list[str]) -> None:
        """Find the first tensor of the network that is not finite, and who is to blame.

        There may be none but ``names``, in which it was seen; and there are no names where only the mean of large
        values was infinite.
        """
        for name, value in self._network.run_plainly(feeds, batch.samples[0].origin):
            if self._is_fault(name, value):
                self._blame(batch, name)
        for name in names:
            if self._skipped.get(name) != MASK:
                self._blame(batch, name)

    def _blame(self, batch: Batch, name: str) -> None:
        """Name the sample in which a tensor is not finite; or skip a mask."""
        for offset, sample in enumerate(batch.samples):
            alone = self._network.run_plainly(_alone(batch, offset), sample.origin)
            array = next(value for tensor, value in alone if tensor == name)
            if np.isfinite(array).all():
                continue
            what = "NaN" if np.isnan(array).any() else "Inf"
            if what == "Inf" and not np.isposinf(array).any() and is_mask(self._model, name):
                self._skipped[name] = MASK
                return
            raise CalibrationError(
                f"the network gives {what} in tensor {name!r} ({producer(self._model, name)}) "
                f"at sample {self._index(batch.first + offset)} ({sample.origin})",
                hint="no range can hold it: look at that sample, or mend the network before that node",
            )
        raise CalibrationError(
            f"the network gives NaN or Inf in tensor {name!r} ({producer(self._model, name)}) for the samples "
            f"{self._index(batch.first)} to {self._index(batch.first + len(batch.samples) - 1)} together, "
            "and for none of them alone",
            hint="calibrate with --batch-size 1",
        )

    def finish(self) -> Ranges:
        """What was measured so far, in the network's order."""
        samples, extremes = self._extremes.taken()
        for name, found in extremes.items():
            self._observers[name].widen(found, samples)
        tensors: dict[str, TensorRange] = {}
        skipped = dict(self._skipped)
        for name in self._order:
            how = self._derived.get(name)
            if how is not None and (lost := next((skipped[n] for n in how.inputs if n in skipped), None)):
                skipped[name] = lost
            if name in skipped:
                continue
            result = self._observers[name].result() if how is None else derive(how, [tensors[n] for n in how.inputs])
            if result is None:
                skipped[name] = EMPTY
            else:
                tensors[name] = result
        return dataclasses.replace(
            self._settings,
            tensors=tensors,
            data=to_hex(self._data),
            samples=self.samples,
            skipped=dict(sorted(skipped.items())),
            versions={"onnx": onnx.__version__, "onnxruntime": ort.__version__},
            sketch=self._sketch,
        )


def _extent(batch: Batch) -> int:
    """How many samples the network was fed, those that fill a fixed batch among them."""
    return max((len(array) for array in batch.feeds.values() if array.ndim), default=1)


def _alone(batch: Batch, offset: int) -> _Feeds:
    """Feeds in which only one sample of a batch is present, at the same batch extent."""
    if batch.samples[0].whole or _extent(batch) == 1:
        return batch.feeds
    return {name: np.repeat(array[offset : offset + 1], len(array), axis=0) for name, array in batch.feeds.items()}
