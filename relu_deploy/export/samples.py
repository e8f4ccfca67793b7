"""Which inputs to compare on: seeded random values at the example's shapes and over the range of every dynamic axis."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from relu_deploy.export.specs import DynamicAxis, ExampleInput, format_shape

KINDS = ("any", "low", "high")
# Any vocabulary, mask and token type has the entries 0 and 1; what needs more is told with lo..hi.
_DEFAULT_INT_RANGE = (0.0, 1.0)
# Elements of all inputs together that a comparison may take (256 MiB of float32).
_MAX_ELEMENTS = 1 << 26

Shapes = dict[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One set of inputs, with a title for messages."""

    title: str
    feeds: dict[str, npt.NDArray[Any]]


def make_sample(inputs: Sequence[ExampleInput], shapes: Shapes, kind: str, *, seed: int) -> Sample:
    """Draw values for every input at the given shapes; the same for the same seed."""
    rng = np.random.default_rng(seed)
    feeds = {spec.name: draw(spec, shapes[spec.name], kind, rng) for spec in inputs}
    sizes = ", ".join(f"{name}={format_shape(shape)}" for name, shape in shapes.items())
    return Sample(f"{sizes} ({kind} values of the range, seed {seed})", feeds)


def traced_shapes(inputs: Sequence[ExampleInput], dynamic: Sequence[DynamicAxis]) -> Shapes:
    """The example's shapes; a dynamic size of 1 is made larger, as torch.export treats the size 1 as a constant."""
    shapes = {spec.name: list(spec.shape) for spec in inputs}
    for axis in dynamic:
        if shapes[axis.input][axis.axis] < 2:
            shapes[axis.input][axis.axis] = min(axis.high, 2 + axis.axis)
    return {name: tuple(shape) for name, shape in shapes.items()}


def make_samples(
    inputs: Sequence[ExampleInput],
    dynamic: Sequence[DynamicAxis],
    symbols: Mapping[tuple[str, int], str],
    *,
    seed: int,
) -> tuple[list[Sample], list[str]]:
    """All kinds of values at the example's shapes, and one set at both ends and the middle of the dynamic axes.

    Args:
        inputs: Of the model.
        dynamic: Its dynamic axes.
        symbols: Name of the size of every (input, axis) of ``dynamic``; axes with one name get one size.
        seed: Of the first sample; the others count on.

    Returns:
        The samples, and notes on sizes that were too large to try.
    """
    example: Shapes = {spec.name: spec.shape for spec in inputs}
    plan: list[tuple[Shapes, str]] = [(example, kind) for kind in KINDS]
    notes: list[str] = []
    for share in (0.0, 0.5, 1.0) if dynamic else ():
        shapes, note = _shapes_at(share, example, dynamic, symbols)
        notes += [note] if note else []
        if (shapes, "any") not in plan:
            plan.append((shapes, "any"))
    return [make_sample(inputs, shapes, kind, seed=seed + n) for n, (shapes, kind) in enumerate(plan)], notes


def _shapes_at(
    share: float, example: Shapes, dynamic: Sequence[DynamicAxis], symbols: Mapping[tuple[str, int], str]
) -> tuple[Shapes, str]:
    """Every dynamic axis at a share of its range, made smaller where that would take too much memory."""
    ranges: dict[str, tuple[int, int]] = {}
    for axis in dynamic:
        symbol = symbols[axis.input, axis.axis]
        low, high = ranges.get(symbol, (axis.low, axis.high))
        ranges[symbol] = (max(low, axis.low), min(high, axis.high))
    sizes = {symbol: round(low + share * (high - low)) for symbol, (low, high) in ranges.items()}
    note = ""
    while sum(math.prod(s) for s in _with_sizes(example, sizes, symbols).values()) > _MAX_ELEMENTS:
        smaller = {symbol: max(ranges[symbol][0], size // 2) for symbol, size in sizes.items()}
        if smaller == sizes:
            break
        sizes = smaller
        note = (
            f"larger inputs than {', '.join(f'{k}={v}' for k, v in sizes.items())} were not compared, to spare memory"
        )
    return _with_sizes(example, sizes, symbols), note


def _with_sizes(example: Shapes, sizes: Mapping[str, int], symbols: Mapping[tuple[str, int], str]) -> Shapes:
    return {
        name: tuple(sizes.get(symbols.get((name, axis), ""), size) for axis, size in enumerate(shape))
        for name, shape in example.items()
    }


def draw(spec: ExampleInput, shape: Sequence[int], kind: str, rng: np.random.Generator) -> npt.NDArray[Any]:
    """Random values for an input, of its dtype.

    ``kind`` is ``"any"``, ``"low"`` or ``"high"``: all of the range, or its lower or upper half. A branch on the data
    that an exporter fixed to one side is seen when the halves are tried, where three draws of one distribution often
    all agree.
    """
    if spec.dtype == "bool":
        return rng.random(shape) < {"any": 0.5, "low": 0.1, "high": 0.9}[kind]
    if spec.low is None or spec.high is None:
        if spec.is_float:
            normal = rng.standard_normal(shape)
            return np.asarray({"any": normal, "low": -np.abs(normal), "high": np.abs(normal)}[kind], dtype=spec.dtype)
        low, high = _DEFAULT_INT_RANGE
    else:
        low, high = spec.low, spec.high
    if not spec.is_float:
        return _integers(int(low), int(high), shape, kind, rng).astype(spec.dtype)
    middle = (low + high) / 2
    ends = {"any": (low, high), "low": (low, middle), "high": (middle, high)}[kind]
    return np.asarray(rng.uniform(*ends, shape), dtype=spec.dtype)


def _integers(low: int, high: int, shape: Sequence[int], kind: str, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Integers of the range; the upper half of a range of one value is that value."""
    middle = (low + high) // 2
    first, last = {"any": (low, high), "low": (low, middle), "high": (min(middle + 1, high), high)}[kind]
    return rng.integers(first, last, shape, dtype=np.int64, endpoint=True)
