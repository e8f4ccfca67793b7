"""Feed samples to a network and measure every float activation on the way."""

from __future__ import annotations

import itertools
import os

import onnx

from calib.ahead import Workers, ahead
from calib.batches import batches
from calib.checkpoint import Checkpoint
from calib.choose import check_method
from calib.errors import CalibrationError, DataError, NoSampleError
from calib.fingerprint import model_fingerprint, to_hex
from calib.graph import mixes_samples, refuse_quantized, shaped_only
from calib.inputs import model_inputs
from calib.merge import merge
from calib.meter import Meter
from calib.options import PERCENTILE
from calib.progress import Progress, silent
from calib.ranges import Ranges
from calib.shards import Selection, Shard
from calib.sources import Source


def calibrate(
    model: onnx.ModelProto,
    source: Source,
    *,
    method: str = "max",
    percentile: float | None = None,
    channels: bool = False,
    batch_size: int = 1,
    max_samples: int | None = None,
    shard: Shard | None = None,
    checkpoint: Checkpoint | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Ranges:
    """Measure the range of every float activation of a network.

    Each tensor is measured as the graph is written, see :mod:`calib.network`. Activations are looked at where the
    runtime left them and dropped: memory does not grow with the number of samples. Neither batch size nor order
    changes a bit of the result as long as the runtime's own kernels compute a sample alike in every batch. Those of
    convolutions were seen to, some sums and matrix products not (onnxruntime 1.31, x86); batch size 1 does not depend
    on that.

    Args:
        model: A float network, weights inside it. It is not changed.
        source: Samples, from :func:`calib.sources.open_source`.
        method: How a range is to be chosen; all but ``max`` keep histograms, see :mod:`calib.choose`.
        percentile: For the method of that name; None: 99.99.
        channels: Keep a histogram of each channel too, for :func:`calib.choose.choose_channels`.
        batch_size: Samples a run, where the network's batch axis is dynamic. A fixed one is kept to. A network in which
            shapes or branches depend on values is run sample by sample, and so is one that computes with shapes where
            values are counted: what of it a batch holds once could not be told from what it holds once a sample.
        max_samples: Stop after as many.
        shard: Only this part of the samples; :func:`calib.merge.merge` joins what shards measured.
        checkpoint: Where to keep what was measured so far, and whether to go on from it.
        threads: How many work; None: one a core. Batches are measured side by side where memory allows, each in a
            thread of its own.
        progress: Told of each batch.

    Raises:
        DataError: the data is empty, does not fit the network, or holds NaN or Inf.
        CalibrationError: the network is quantised already, has nothing to measure, cannot be run, or gives NaN or
            Inf; then the first such tensor and the sample are named.
        RangesError: the checkpoint is of another network, data or settings.

    Source: "ReLU for inference acceleration", eq. 2 (the scale is ``max / 255`` over the calibration set).
    """
    check_method(method, percentile)
    if channels and method == "max":
        raise CalibrationError(
            "histograms of channels are of no use to the method max, which has their extremes anyway"
        )
    if batch_size < 1 or (max_samples is not None and max_samples < 1):
        raise DataError(f"batch size {batch_size} and number of samples {max_samples} must be at least 1")
    refuse_quantized(model)
    specs = model_inputs(model)
    selection = Selection(source, max_samples, shard or Shard())
    used = (PERCENTILE if percentile is None else percentile) if method == "percentile" else None
    settings = Ranges({}, model_fingerprint(model), to_hex(0), method, 0, percentile=used, channels=channels)
    samples = iter(selection)
    before = None if checkpoint is None else checkpoint.resume(settings, samples)
    start = done = 0 if before is None else before.samples
    alone = mixes_samples(model) or (method != "max" and shaped_only(model))
    grouped = ahead(batches(samples, specs, batch_size=1 if alone else batch_size))
    first = next(grouped, None)
    if first is None:
        if before is None:
            raise _no_sample(selection.shard)
        return before
    total = selection.length
    runs = None if total is None else -(-(total - done) // len(first.samples))
    meter = Meter(
        model, specs, first, settings, threads=threads or _cpus(), runs=runs,
        index=lambda place: selection.index(start + place),
    )  # fmt: skip
    workers = Workers(meter.take, meter.workers)
    for count in workers.map(itertools.chain([first], grouped)):
        if checkpoint is not None and checkpoint.due() and workers.settle():
            checkpoint.keep(_joined(before, meter.finish()))
        done += count
        progress("calibrate", done, total)
    return _joined(before, meter.finish())


def _cpus() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _no_sample(shard: Shard) -> DataError:
    """The error for data without a sample for this run."""
    if shard.index == 1:
        return DataError("the data is empty: it gives no sample", hint="calibration needs at least one sample")
    return NoSampleError(
        f"shard {shard.index}/{shard.of} holds no sample: the data has fewer than {shard.index}",
        hint="make no more shards than there are samples",
    )


def _joined(before: Ranges | None, now: Ranges) -> Ranges:
    """What an earlier run measured, and this one."""
    return now if before is None else merge(before, now)
