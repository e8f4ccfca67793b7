"""Feed samples to a network and measure every float activation on the way."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from calib.batches import Batch, batches
from calib.errors import CalibrationError, DataError
from calib.fingerprint import combine, model_fingerprint, sample_hash, to_hex
from calib.graph import activations, channel_axes, leads_only_to_softmax, producer, refuse_quantized
from calib.inputs import InputSpec, Sample, model_inputs
from calib.model import opset
from calib.observers import Observer, Tensor, make_observer, widened
from calib.options import METHODS
from calib.progress import Progress, silent
from calib.ranges import EMPTY, Ranges
from calib.session import Session, with_outputs
from calib.sources import Source

MASK = "it holds -inf as an attention mask"
_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_OTHER_FLOATS = {"tensor(double)": "float64", "tensor(bfloat16)": "bfloat16"}


def calibrate(
    model: onnx.ModelProto,
    source: Source,
    *,
    method: str = "max",
    batch_size: int = 1,
    max_samples: int | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Ranges:
    """Measure the range of every float activation of a network.

    The extremes are reduced inside ONNX Runtime, with graph optimisations off, so memory does not grow with the
    number of samples. Neither batch size nor order changes a bit of the result as long as the runtime's own kernels
    compute a sample alike in every batch, which those of onnxruntime 1.31 were seen to do on x86; batch size 1 does
    not depend on that.

    Args:
        model: A float network, weights inside it. It is not changed.
        source: Samples, from :func:`calib.sources.open_source`.
        method: How a range is chosen; ``max`` takes the extremes.
        batch_size: Samples a run, where the network's batch axis is dynamic. A fixed one is kept to.
        max_samples: Stop after as many.
        threads: Of the runtime; None: one a core.
        progress: Told of each batch.

    Raises:
        DataError: the data is empty, does not fit the network, or holds NaN or Inf.
        CalibrationError: the network is quantised already, has nothing to measure, cannot be run, or gives NaN or
            Inf; then the first such tensor and the sample are named.

    Source: "ReLU for inference acceleration", eq. 2 (the scale is ``max / 255`` over the calibration set).
    """
    if method != "max":
        raise CalibrationError(f"there is no calibration method {method!r}", hint=f"methods are {', '.join(METHODS)}")
    if batch_size < 1 or (max_samples is not None and max_samples < 1):
        raise DataError(f"batch size {batch_size} and number of samples {max_samples} must be at least 1")
    refuse_quantized(model)
    specs = model_inputs(model)
    total = _total(source, max_samples)
    hashed = _Hashed(itertools.islice(source, max_samples))
    grouped = batches(hashed, specs, batch_size=batch_size)
    first = next(grouped, None)
    if first is None:
        raise DataError("the data is empty: it gives no sample", hint="calibration needs at least one sample")
    meter = _Meter.create(model, specs, first, method=method, threads=threads)
    for batch in itertools.chain([first], grouped):
        meter.take(batch)
        progress("calibrate", batch.first + len(batch.samples), total)
    return meter.finish(hashed, method)


def _total(source: Source, most: int | None) -> int | None:
    """How many samples there will be, if that is known."""
    length = source.length
    return most if length is None else min(length, most or length)


class _Hashed:
    """Pass samples through, adding up their fingerprint."""

    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples, self.count, self.value = samples, 0, 0

    def __iter__(self) -> Iterator[Sample]:
        for sample in self._samples:
            self.count, self.value = self.count + 1, combine(self.value, sample_hash(sample.feeds))
            yield sample


@dataclasses.dataclass
class _Watched:
    """One tensor: its observer, and the name of the sum that shows NaN."""

    observer: Observer
    total: str

    def suspicious(self, values: Mapping[str, NDArray[Any]]) -> bool:
        """Whether the tensor may hold NaN or Inf.

        ReduceMin and ReduceMax of ONNX Runtime pass NaN over (measured, 1.31), but not infinities; a sum with a NaN
        in it is NaN. A sum that is infinite while the extremes are not is an overflow of large finite values.
        """
        low, high = (values[name] for name in self.observer.outputs)
        if np.isnan(values[self.total]) or np.isnan(low).any() or np.isnan(high).any():
            return True
        # An empty tensor, or one without an element in some channel, reduces to +inf and -inf.
        return bool((np.isinf(low) & (low <= high)).any() or (np.isinf(high) & (low <= high)).any())


class _Meter:
    """The instrumented network and all observers."""

    def __init__(
        self, model: onnx.ModelProto, watched: list[_Watched], skipped: dict[str, str], *, threads: int | None
    ) -> None:
        self._model, self._watched, self._skipped, self._threads = model, watched, skipped, threads
        version = opset(model)
        nodes = [node for w in watched for node in (*w.observer.nodes(version or 17), _sum_node(w))]
        self._outputs = [name for w in watched for name in (*w.observer.outputs, w.total)]
        instrumented = with_outputs(model, self._outputs, nodes)
        if not version:
            instrumented.opset_import.append(helper.make_opsetid("", 17))
        self._session = Session(instrumented, threads=threads)
        self._exact: Session | None = None

    @classmethod
    def create(
        cls, model: onnx.ModelProto, specs: tuple[InputSpec, ...], first: Batch, *, method: str, threads: int | None
    ) -> _Meter:
        """Find what to measure, and put the observers in."""
        tensors, skipped = _discover(model, specs, first, threads)
        if not tensors:
            raise CalibrationError("the model has no float32 or float16 activation, so there is nothing to measure")
        prefix = "calib"
        while any(name.startswith(prefix) for name in activations(model)):
            prefix += "_"
        watched = [
            _Watched(make_observer(method, tensor, f"{prefix}/{i}"), f"{prefix}/{i}/sum")
            for i, tensor in enumerate(tensors)
        ]
        return cls(model, watched, skipped, threads=threads)

    def take(self, batch: Batch) -> None:
        """Run one batch and update the observers."""
        results = self._session.run(self._outputs, batch.feeds, batch.samples[0].origin)
        values = dict(zip(self._outputs, results, strict=True))
        suspects = [w for w in self._watched if w.observer.tensor.name not in self._skipped and w.suspicious(values)]
        if suspects:
            self._examine(batch, [w.observer.tensor.name for w in suspects])
        for w in self._watched:
            w.observer.update([values[name] for name in w.observer.outputs], len(batch.samples))

    def _examine(self, batch: Batch, names: list[str]) -> None:
        """Look at the suspects' own values, sample by sample, and name the first that is not finite."""
        everything = [w.observer.tensor.name for w in self._watched]
        if self._exact is None:
            self._exact = Session(with_outputs(self._model, set(everything)), threads=self._threads)
        for offset, sample in enumerate(batch.samples):
            feeds = _alone(batch, offset)
            for name, value in zip(names, self._exact.run(names, feeds, sample.origin), strict=True):
                array = np.asarray(value)
                if np.isfinite(array).all():
                    continue
                masked = not np.isnan(array).any() and not np.isposinf(array).any()
                if masked and leads_only_to_softmax(self._model, name):
                    self._skipped[name] = MASK
                    continue
                what = "NaN" if np.isnan(array).any() else "Inf"
                raise CalibrationError(
                    f"the network gives {what} in tensor {name!r} ({producer(self._model, name)}) "
                    f"at sample {batch.first + offset} ({sample.origin})",
                    hint="no range can hold it: look at that sample, or mend the network before that node",
                )

    def finish(self, hashed: _Hashed, method: str) -> Ranges:
        """Collect the results, in the network's order."""
        tensors = {}
        for w in self._watched:
            name, result = w.observer.tensor.name, w.observer.result()
            if name in self._skipped:
                continue
            if result is None:
                self._skipped[name] = EMPTY
            else:
                tensors[name] = result
        versions = {"onnx": onnx.__version__, "onnxruntime": ort.__version__}
        return Ranges(
            tensors, model_fingerprint(self._model), to_hex(hashed.value), method, hashed.count,
            dict(sorted(self._skipped.items())), versions,
        )  # fmt: skip


def _alone(batch: Batch, offset: int) -> Mapping[str, NDArray[Any]]:
    """Feeds in which only one sample of a batch is present, at the same batch extent."""
    if len(batch.samples) == 1:
        return batch.feeds
    sizes = {name: len(array) for name, array in batch.feeds.items()}
    return {name: np.repeat(batch.feeds[name][offset : offset + 1], size, axis=0) for name, size in sizes.items()}


def _sum_node(watched: _Watched) -> onnx.NodeProto:
    """Sum over all elements, in float32; it takes the widened tensor that the observer's operators made."""
    source, _ = widened(watched.observer.tensor, watched.total.removesuffix("/sum"))
    return helper.make_node("ReduceSum", [source], [watched.total], keepdims=0)


def _discover(
    model: onnx.ModelProto, specs: tuple[InputSpec, ...], first: Batch, threads: int | None
) -> tuple[list[Tensor], dict[str, str]]:
    """Types and ranks of all activations, as the runtime infers them; where it cannot, by running the first batch."""
    fed = {spec.name: spec for spec in specs}
    names = activations(model)
    made = [name for name in names if name not in fed]
    session = Session(with_outputs(model, made), threads=threads)
    found = session.describe()
    dtypes = {name: _FLOATS.get(found[name][0]) if name in found else fed[name].dtype.name for name in names}
    skipped = {n: f"its type is {_OTHER_FLOATS[found[n][0]]}" for n in made if found[n][0] in _OTHER_FLOATS}
    wanted = {name: dtype for name, dtype in dtypes.items() if dtype in _FLOATS.values()}
    ranks = {name: first.feeds[name].ndim if name in fed else len(found[name][1]) for name in wanted}
    # The shape of an output is what the file says of it, which exporters get wrong and the runtime only warns of.
    declared = {value.name for value in model.graph.output}
    unknown = [name for name in wanted if name not in fed and (not ranks[name] or name in declared)]
    if unknown:
        values = session.run(unknown, first.feeds, first.samples[0].origin)
        ranks.update({name: np.ndim(value) for name, value in zip(unknown, values, strict=True)})
    axes = channel_axes(model, ranks)
    return [Tensor(name, str(dtype), ranks[name], axes[name]) for name, dtype in wanted.items()], skipped
