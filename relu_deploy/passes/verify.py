"""Run the original and the rewritten network on the same inputs and compare every output."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from calib.errors import first_line
from calib.model import all_nodes
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy.errors import CheckFailedError

Feed = Mapping[str, np.ndarray]

# Relative to the largest magnitude of an output, where a pass reorders roundings (BatchNormalization folded, a lerp
# removed): each layer adds a few units of roundoff, 2**-24 in float32, and a hundred layers stay under this; a wrong
# fold is off by 1e-2 or more.
ROUNDING_TOLERANCE = {"float16": 2e-2, "float32": 1e-4, "float64": 1e-10}
# A network may itself amplify rounding: what ONNX Runtime's own fusions change in the original, times this, is
# allowed too, up to a bound below what a wrong fold does.
NOISE_FACTOR, MOST_NOISE = 8.0, 1e-2
# Kernels compute 1 / (1 + exp(-x)) and the like to a unit of 1, so where a Sigmoid gives nothing but 1e-7, rounding
# moves it by all of itself. Up to this, an absolute difference is noise if rounding of the inputs makes it too.
SMALLEST_UNITS = 2.0**-22
# Discrete outputs (class numbers, kept boxes) may flip where two floats tie.
DISCRETE_TOLERANCE = 0.01
# Sizes tried for dimensions that the model leaves open; text recognisers want 48 rows, most detectors multiples of 32.
_BATCHES, _SIZES = (2, 1), (32, 48, 64, 224, 16, 8, 128, 1)
_SCALES = (0.1, 1.0, 10.0)
# Random inputs are made as float64 and three at once: this many elements take 3 GiB. numpy has at most 64 axes.
_MOST_ELEMENTS, _MOST_AXES = 1 << 27, 64
_NOT_RUNNABLE: tuple[type[Exception], ...] = (*RUNTIME_ERRORS, KeyError)


@dataclasses.dataclass(frozen=True)
class OutputCheck:
    """One output over all samples.

    Attributes:
        name: Output.
        error: Largest difference, relative to the output's largest magnitude; for discrete ones the share that differs.
        allowed: Tolerance, same unit.
    """

    name: str
    error: float
    allowed: float


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a comparison showed.

    Attributes:
        samples: Inputs on which both networks ran and the original was finite.
        outputs: One entry an output; empty when nothing could be compared.
        note: Why nothing was compared, or what was left out; empty otherwise.
    """

    samples: int
    outputs: tuple[OutputCheck, ...] = ()
    note: str = ""


def compare(
    original: onnx.ModelProto,
    rewritten: onnx.ModelProto,
    *,
    exact: bool,
    samples: Sequence[Feed] | None = None,
    seed: int = 0,
) -> Verification:
    """Compare two networks with ONNX Runtime on the CPU, its own graph optimisations switched off.

    Args:
        original: The network as it was.
        rewritten: The same inputs and outputs.
        exact: Demand equality bit for bit (0 and -0 are equal); else ``ROUNDING_TOLERANCE`` of each output's type, or
            of float16 where the network computes in it, which is all that can be asked there even of an exact change.
        samples: Inputs; None makes random ones at three scales, ones and zeros for integers.
        seed: Of the random inputs.

    Returns:
        The errors found. ``samples`` is 0 and ``note`` says why where the original itself cannot be run here.

    Raises:
        CheckFailedError: the rewritten network does not load or run, or an output differs by more than allowed.
    """
    try:
        before = open_session(original)
    except RUNTIME_ERRORS as error:
        return Verification(0, note=f"ONNX Runtime cannot load the original: {first_line(error)}")
    feeds = list(samples) if samples is not None else random_feeds(original, before, seed)
    runs, note = _run_both(before, rewritten, feeds)
    if not runs:
        return Verification(0, note=note)
    half = computes_in_half(original)
    exact = exact and not half
    noise = {} if exact else _own_noise(original, before, runs)
    checks = [
        _check(output.name, [(run.old[i], run.new[i]) for run in runs], exact=exact, half=half, noise=noise.get(i, 0.0))
        for i, output in enumerate(before.get_outputs())
    ]
    return Verification(len(runs), tuple(checks), note)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Outputs of both networks for one feed."""

    feed: Feed
    old: list[Any]
    new: list[Any]


def _own_noise(original: onnx.ModelProto, before: ort.InferenceSession, runs: list[_Run]) -> dict[int, float]:
    """How far rounding alone moves each output.

    That is the original against itself: under ONNX Runtime's own fusions, and with its inputs moved by some units in
    the last place, as much as a few layers round.
    """
    others = [[before.run(None, _nudged(run.feed, units)) for run in runs] for units in (4, -4)]
    with contextlib.suppress(*RUNTIME_ERRORS):
        session = open_session(original, optimise=True)
        others.append([session.run(None, dict(run.feed)) for run in runs])
    return {
        i: max(_moved([(run.old[i], new[i]) for run, new in zip(runs, other, strict=True)]) for other in others)
        for i in range(len(before.get_outputs()))
    }


def _moved(pairs: list[tuple[Any, Any]]) -> float:
    """Difference of two runs of one network; all of it where a number of boxes or of hits depends on rounding."""
    try:
        return difference("", pairs)
    except CheckFailedError:
        return math.inf


def _nudged(feed: Feed, units: int) -> dict[str, np.ndarray]:
    """Inputs that differ from these by rounding: every second float by ``units``, the others by as many down."""
    nudged = dict(feed)
    for name, value in feed.items():
        if is_float(value):
            signs = (1 - 2 * (np.arange(value.size) % 2)).reshape(value.shape).astype(value.dtype)
            nudged[name] = np.asarray(value + units * signs * np.spacing(np.abs(value)), value.dtype)
    return nudged


def _run_both(before: ort.InferenceSession, rewritten: onnx.ModelProto, feeds: list[Feed]) -> tuple[list[_Run], str]:
    """Outputs of both networks for every feed on which the original is finite; and what was left out."""
    try:
        after = open_session(rewritten)
    except RUNTIME_ERRORS as error:
        raise CheckFailedError(f"ONNX Runtime does not load the rewritten network: {first_line(error)}") from error
    runs: list[_Run] = []
    note = "" if feeds else "no random input was found that the original accepts"
    for feed in feeds:
        try:
            old = before.run(None, dict(feed))
        except RUNTIME_ERRORS as error:
            note = f"the original does not run: {first_line(error)}"
            continue
        if not all(np.isfinite(value).all() for value in old if is_float(value)):
            note = "samples on which the original itself gives NaN or Inf were left out"
            continue
        try:
            runs.append(_Run(feed, old, after.run(None, dict(feed))))
        except RUNTIME_ERRORS as error:
            raise CheckFailedError(
                f"the rewritten network fails where the original runs: {first_line(error)}"
            ) from error
    return runs, note


def computes_in_half(model: onnx.ModelProto) -> bool:
    """Whether anything in a network is float16 or bfloat16.

    ONNX Runtime's CPU kernels compute those in float32, and round to 16 bits between two nodes or do not, as their
    neighbours want it: with a constant computed beforehand, or an Identity gone, the last bit of a result changes.
    """
    types = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    values = (value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output))
    if any(kind in types for kind in values) or any(tensor.data_type in types for tensor in model.graph.initializer):
        return True
    nodes = itertools.chain(all_nodes(model.graph), (node for function in model.functions for node in function.node))
    attributes = (attribute for node in nodes for attribute in node.attribute)
    return any(a.t.data_type in types or (a.name in ("to", "dtype") and a.i in types) for a in attributes)


def _check(name: str, pairs: list[tuple[Any, Any]], *, exact: bool, half: bool, noise: float) -> OutputCheck:
    first = pairs[0][0]
    discrete = not is_float(first)
    kind = "float16" if half else str(getattr(first, "dtype", ""))
    loose = DISCRETE_TOLERANCE if discrete else ROUNDING_TOLERANCE.get(kind, 1e-4)
    most = max(MOST_NOISE, SMALLEST_UNITS / _largest(pairs)) if not discrete else MOST_NOISE
    allowed = 0.0 if exact else max(loose, min(NOISE_FACTOR * noise, most))
    error = difference(name, pairs)
    if not error <= allowed:
        raise CheckFailedError(
            f"the rewritten network differs in output {name!r}: error {error:.3g}, allowed {allowed:.3g}"
            f" ({'share of entries' if discrete else 'relative to its largest magnitude'})",
            hint="nothing was written; this is a fault of a graph pass, please report it with the model",
        )
    return OutputCheck(name, error, allowed)


def _largest(pairs: list[tuple[Any, Any]]) -> float:
    """Largest magnitude of an output of the original, over all samples."""
    smallest = float(np.finfo(np.float64).tiny)
    return max((float(np.abs(old.astype(np.float64)).max(initial=smallest)) for old, _ in pairs), default=smallest)


def difference(name: str, pairs: list[tuple[Any, Any]]) -> float:
    """Largest difference relative to the largest magnitude of all samples; share of unequal entries where discrete."""
    gap, size, unequal = 0.0, float(np.finfo(np.float64).tiny), 0.0
    for old, new in pairs:
        if not isinstance(old, np.ndarray):  # sequences and maps: compared as they print
            unequal = max(unequal, float(str(old) != str(new)))
            continue
        if old.shape != new.shape:
            raise CheckFailedError(
                f"the rewritten network gives output {name!r} the shape {new.shape} instead of {old.shape}"
            )
        if not old.size:
            continue
        if not is_float(old):
            unequal = max(unequal, float(np.mean(old != new)))
            continue
        wide = old.astype(np.float64)
        gap = max(gap, float(np.abs(wide - new.astype(np.float64)).max()) if np.isfinite(new).all() else math.inf)
        size = max(size, float(np.abs(wide).max()))
    return max(gap / size, unequal)


def is_float(value: object) -> bool:
    """Whether an output is an array of floats."""
    return isinstance(value, np.ndarray) and value.dtype.kind == "f"


def random_feeds(model: onnx.ModelProto, session: ort.InferenceSession, seed: int) -> list[Feed]:
    """Random inputs of the first open sizes that the original runs with; empty when there are none."""
    for sizes in itertools.product(_BATCHES, _SIZES):
        if not all(_can_be_made(value.type, sizes) for value in _inputs(model)):
            continue
        feeds = list(_feeds_of_size(model, sizes, np.random.default_rng(seed)))
        try:
            session.run(None, dict(feeds[1]))
        except _NOT_RUNNABLE:
            if not _has_open_dimension(model):
                return []
            continue
        return feeds
    return []


def _can_be_made(kind: onnx.TypeProto, sizes: tuple[int, int]) -> bool:
    """Whether an array can be made for an input: it is a tensor of numbers, of a size that memory holds."""
    if not kind.tensor_type.elem_type:
        return False
    # ONNX Runtime's Python side takes no others: strings are objects, bfloat16 and float8 are no types of numpy's own.
    if onnx.helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type).kind not in "fiub":
        return False
    shape = _shape(kind.tensor_type, sizes)
    return len(shape) <= _MOST_AXES and math.prod(shape) <= _MOST_ELEMENTS


def _shape(kind: onnx.TypeProto.Tensor, sizes: tuple[int, int]) -> list[int]:
    """Extents of an input, with ``sizes`` where the model leaves them open: of the batch, of every other axis."""
    return [
        d.dim_value if d.dim_value > 0 else sizes[0] if axis == 0 else sizes[1] for axis, d in enumerate(kind.shape.dim)
    ]


def _inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    given = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in given]


def _has_open_dimension(model: onnx.ModelProto) -> bool:
    return any(d.dim_value <= 0 for v in _inputs(model) for d in v.type.tensor_type.shape.dim)


def _feeds_of_size(model: onnx.ModelProto, sizes: tuple[int, int], random: np.random.Generator) -> Iterator[Feed]:
    for scale in _SCALES:
        yield {v.name: _random_array(v.type.tensor_type, sizes, scale, random) for v in _inputs(model)}


def _random_array(
    kind: onnx.TypeProto.Tensor, sizes: tuple[int, int], scale: float, random: np.random.Generator
) -> np.ndarray:
    """Floats of a normal distribution; integers 0 and 1, valid as token, mask and index."""
    dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    shape = _shape(kind, sizes)
    if dtype.kind == "b" or dtype.kind in "iu":
        high = 256 if dtype == np.uint8 else 2
        return random.integers(0, high, shape).astype(dtype)
    if dtype.kind != "f":
        return np.zeros(shape, dtype=dtype)
    return np.asarray(random.normal(0.0, scale, shape)).astype(dtype)
