"""How far a quantised network's outputs are from the float network's, on a few samples: a collapse is seen at once."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

import numpy as np
import onnx

from calib.batches import batches
from calib.errors import message_of
from calib.inputs import Sample, model_inputs
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.errors import QuantizationError
from relu_deploy.int8.choices import chosen_tensors

# Enough to see a collapse, few enough to cost less than the calibration before.
SAMPLES = 8
# Noise of a tenth of the signal's power: below it the calibration data is wrong, or the network does not bear INT8.
COLLAPSE_DB = 10.0


@dataclasses.dataclass(frozen=True)
class OutputDrift:
    """One output of the float network against the quantised one.

    Attributes:
        name: The output.
        samples: How many inputs were compared.
        sqnr_db: 10 log10(sum ref^2 / sum (ref - out)^2) over all of them; None when equal, or not finite.
        max_abs_error: Largest difference; None when not finite.
    """

    name: str
    samples: int
    sqnr_db: float | None
    max_abs_error: float | None

    @property
    def collapsed(self) -> bool:
        """Whether the output is too far off to be of use."""
        return self.max_abs_error is None or (self.sqnr_db is not None and self.sqnr_db < COLLAPSE_DB)


def measure_drift(
    model: onnx.ModelProto, quantized: onnx.ModelProto, source: Iterable[Sample], *, integer_kernels: bool
) -> tuple[OutputDrift, ...]:
    """Run both networks in ONNX Runtime on the first samples of a source and compare their float outputs.

    Args:
        model: The float network.
        quantized: The same with Q/DQ.
        source: The samples; calibration data will do, since a collapse shows there too.
        integer_kernels: Fuse Q/DQ into the integer kernels of this CPU, as an ``ort`` engine does. Without it Q/DQ are
            computed as ONNX defines them, in float, which stands for a compiler that is not here.

    Returns:
        One entry for each output that is a float tensor and is not chosen by values, as a list of detections is.

    Raises:
        QuantizationError: the quantised network does not run.
    """
    specs, chosen = model_inputs(model), chosen_tensors(files.import_graph(model))
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    worst: dict[str, float] = {}
    count = 0
    try:
        before, after = open_session(model), open_session(quantized, optimise=integer_kernels)
        names = [output.name for output in before.get_outputs() if output.name not in chosen]
        some = itertools.islice(source, SAMPLES) if names else ()  # asked for nothing, a session gives everything
        for batch in batches(some, specs, batch_size=1):
            count += len(batch.samples)
            feeds = dict(batch.feeds)
            for name, wanted, got in zip(names, before.run(names, feeds), after.run(names, feeds), strict=True):
                if isinstance(wanted, np.ndarray) and np.issubdtype(wanted.dtype, np.floating):
                    reference, difference = wanted.astype(np.float64), wanted.astype(np.float64) - got
                    signal[name] = signal.get(name, 0.0) + float(np.sum(reference**2))
                    noise[name] = noise.get(name, 0.0) + float(np.sum(difference**2))
                    worst[name] = max(worst.get(name, 0.0), float(np.max(np.abs(difference), initial=0.0)))
    except RUNTIME_ERRORS as error:
        raise QuantizationError(f"the quantised network does not run in ONNX Runtime: {message_of(error)}") from error
    return tuple(
        OutputDrift(
            name, count, sqnr_db(signal[name], noise[name]), worst[name] if math.isfinite(noise[name]) else None
        )
        for name in signal
    )


def sqnr_db(signal: float, noise: float) -> float | None:
    """Signal over quantisation noise in decibels; None when there is no noise, no signal, or either is not finite.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    if not (math.isfinite(signal) and math.isfinite(noise)) or signal <= 0 or noise <= 0:
        return None
    return 10 * math.log10(signal / noise)
