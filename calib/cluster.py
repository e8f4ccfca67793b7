"""Calibration spread over a cluster of Dask: one shard a worker, merged to what one machine would have measured.

Every worker opens the model and the data by their paths, so both lie where all of them can read them. Dask was chosen
over Ray for being plain Python with few requirements: its extra installs in seconds, and a cluster of local processes
is one line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from calib.errors import CalibrationError, DataError, MissingExtraError, NoSampleError, ToolkitError
from calib.inputs import model_inputs
from calib.merge import merge
from calib.progress import Progress, silent
from calib.ranges import Ranges
from calib.run import calibrate
from calib.shards import Shard
from calib.sources import open_source

_LOCAL = re.compile(r"local(?::([1-9]\d*))?")


@dataclasses.dataclass(frozen=True)
class Job:
    """What every worker is told.

    Attributes:
        model: The network's file.
        data: As for :func:`calib.sources.open_source`; a path or ``module:function``.
        preprocess: For folders of images.
        options: Of :func:`calib.run.calibrate`: method, percentile, channels, batch_size, max_samples, threads.
    """

    model: Path
    data: str
    preprocess: str | None = None
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class _Failed:
    """What went wrong on a worker and is the user's to mend."""

    message: str
    hint: str | None


@contextlib.contextmanager
def connect(address: str) -> Iterator[Any]:
    """A client of a cluster.

    Args:
        address: Of its scheduler, as ``tcp://host:8786``; ``local`` or ``local:N`` for one of N processes here.

    Raises:
        MissingExtraError: Dask is not installed.
        CalibrationError: nothing answers at that address.
    """
    try:
        import distributed
    except ImportError as error:
        raise MissingExtraError("distributed", extra="cluster", purpose="calibrating on a cluster") from error
    local = _LOCAL.fullmatch(address)
    with contextlib.ExitStack() as stack:
        try:
            if local:
                workers = int(local[1] or os.cpu_count() or 1)
                # No dashboard: it would want a port of its own.
                here = distributed.LocalCluster(n_workers=workers, threads_per_worker=1, dashboard_address=None)
                address = stack.enter_context(here).scheduler_address
            client = stack.enter_context(distributed.Client(address, timeout="10s"))
        except (OSError, ValueError) as error:
            raise CalibrationError(
                f"there is no Dask scheduler at {address}: {error}",
                hint="start one with 'dask scheduler', or use local:N",
            ) from error
        yield client


def calibrate_on(client: Any, job: Job, *, shards: int | None = None, progress: Progress = silent) -> Ranges:
    """Calibrate on a cluster; the result is that of one run, bit for bit.

    Args:
        client: Of Dask, from :func:`connect`.
        job: The network, the data and the options.
        shards: How many; None: one a worker. More than workers spread the load where samples are of unlike sizes.
        progress: Told of each shard that is done.

    Raises:
        ToolkitError: as :func:`calib.run.calibrate`; what failed on a worker is told as it would be here.
    """
    from distributed import as_completed

    workers = len(client.scheduler_info(n_workers=-1)["workers"])
    count = shards or max(workers, 1)
    tasks = [client.submit(_one, job, Shard(index + 1, count), pure=False, retries=1) for index in range(count)]
    whole: Ranges | None = None
    try:
        # Shards are merged as they come in, so no more than two are here at a time.
        for done, (_, found) in enumerate(as_completed(tasks, with_results=True), 1):
            if isinstance(found, _Failed):
                raise CalibrationError(found.message, hint=found.hint)
            if found is not None:
                whole = found if whole is None else merge(whole, found)
            progress("calibrate", done, count)
    finally:
        client.cancel(tasks)
    if whole is None:
        raise DataError("the data is empty: it gives no sample", hint="calibration needs at least one sample")
    return whole


def _one(job: Job, shard: Shard) -> Ranges | _Failed | None:
    """One shard, on a worker; None where there are fewer samples than shards."""
    try:
        model = onnx.load(job.model)
        source = open_source(job.data, model_inputs(model), preprocess=job.preprocess)
        return calibrate(model, source, shard=shard, **job.options)
    except ToolkitError as error:
        # Told, not raised: errors with arguments of their own do not survive the way back.
        return None if isinstance(error, NoSampleError) else _Failed(error.message, error.hint)
    except FileNotFoundError as error:
        return _Failed(f"a worker cannot read {job.model}: {error.strerror}", "put it where all workers can read it")
