"""Collapse to a tolerance, and check each certificate on what really flows through the network.

The result differs from the original, and by how much at its outputs no certificate says: layers amplify what each
Relu is off. So two things are measured in ONNX Runtime. Each collapsed region against ReLU, on the values that reach
it: more than its certificate allows is an error. And the outputs, which are reported and not judged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx

from calib.errors import first_line
from calib.ranges import Ranges, check_fresh
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy.errors import CheckFailedError, ToolkitError
from relu_deploy.passes.certificate import above
from relu_deploy.passes.collapse_within import Collapsed
from relu_deploy.passes.domain import Calibrated, Domains, Everywhere, Given
from relu_deploy.passes.verify import Feed, difference, is_float, random_feeds

# Of a float32 that a runtime computed through some ten operations, where a certificate does not state its rounding.
_LEAST_ROUNDING = {"float16": 2e-2, "float32": 4e-6, "float64": 1e-14}


@dataclasses.dataclass(frozen=True)
class CollapseCheck:
    """One collapsed region, what was proven, and what was seen.

    Attributes:
        node: The node whose output a Relu now makes.
        input: Tensor that the Relu reads.
        eps: Proven bound of ``|region(x) - relu(x)|``, tensor units.
        slope: Proven share of ``relu(x)`` on top of it, from weights that are rounded.
        low: Smallest ``x`` for which that holds.
        high: Largest ``x`` for which that holds.
        domain: ``type``, ``given`` or ``calibrated``.
        measured: Largest difference on values inside the domain; None where nothing could be run.
        outside: Share of the values that lay outside the domain; None where nothing could be run.
    """

    node: str
    input: str
    eps: float
    slope: float
    low: float
    high: float
    domain: str
    measured: float | None = None
    outside: float | None = None


@dataclasses.dataclass(frozen=True)
class Drift:
    """How far an output moved.

    Attributes:
        name: Output.
        error: Largest difference relative to the output's largest magnitude; for discrete ones the share that differs.
    """

    name: str
    error: float


@dataclasses.dataclass(frozen=True)
class Approximation:
    """What collapsing to a tolerance did.

    Attributes:
        tolerance: What was allowed, tensor units.
        collapses: The regions, in the order of the graph.
        outputs: How far each output moved, measured; empty where nothing could be run.
        samples: Inputs on which that was measured.
        note: Why nothing was measured; empty otherwise.
    """

    tolerance: float
    collapses: tuple[CollapseCheck, ...]
    outputs: tuple[Drift, ...] = ()
    samples: int = 0
    note: str = ""


def domains_of(domain: tuple[float, float] | Ranges | None, model: onnx.ModelProto) -> Domains:
    """The domains that a user asks for.

    Args:
        domain: A range for every region, ranges measured on ``model``, or None for every finite number.
        model: The network as it was given.

    Raises:
        RangesError: the ranges are another network's.
        ToolkitError: the ends of a range are not in order, or not finite.
    """
    if domain is None:
        return Everywhere()
    if isinstance(domain, Ranges):
        check_fresh(domain, model)
        return Calibrated(domain)
    low, high = domain
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise ToolkitError(f"{low:g} to {high:g} is no range", hint="give two finite numbers, the smaller one first")
    return Given(float(low), float(high))


def check_tolerance(tolerance: float) -> None:
    """Refuse a tolerance that is not a finite number from 0 on.

    Raises:
        ToolkitError: it is not.
    """
    if not (np.isfinite(tolerance) and tolerance >= 0):
        raise ToolkitError(
            f"a collapse tolerance of {tolerance:g} makes no sense",
            hint="give the largest difference from ReLU that is acceptable, such as 0.005; 0 accepts none",
        )


def describe(collapsed: Sequence[Collapsed], tolerance: float) -> Approximation:
    """The certificates as a report, nothing measured."""
    rows = []
    for item in collapsed:
        proven = item.certificate
        row = CollapseCheck(item.node, item.input, proven.eps, proven.slope, proven.low, proven.high, proven.domain)
        rows.append(row)
    return Approximation(tolerance, tuple(rows))


def measure(
    before: onnx.ModelProto,
    after: onnx.ModelProto,
    collapsed: Sequence[Collapsed],
    tolerance: float,
    *,
    samples: Sequence[Feed] | None,
    seed: int,
) -> Approximation:
    """Run both networks and compare, region by region and at the outputs.

    Args:
        before: Holds the regions.
        after: Holds Relus in their place.
        collapsed: The regions.
        tolerance: What was allowed.
        samples: Inputs; None makes random ones.
        seed: Of the random inputs.

    Raises:
        CheckFailedError: a region is further from ReLU than its certificate allows, or the new network fails or is not
            finite where the old one is.
    """
    report = describe(collapsed, tolerance)
    try:
        old, new = open_session(_with_outputs(before, collapsed)), open_session(after)
        feeds = list(samples) if samples is not None else random_feeds(before, old, seed)
        runs = [(old.run(None, dict(feed)), new.run(None, dict(feed))) for feed in feeds]
    except RUNTIME_ERRORS as error:
        return dataclasses.replace(report, note=f"ONNX Runtime cannot run it: {first_line(error)}")
    if not runs:
        return dataclasses.replace(report, note="no random input was found that the original accepts")
    names = [output.name for output in old.get_outputs()]
    seen = [dict(zip(names, values, strict=True)) for values, _ in runs]
    rows = tuple(_check(row, item, seen) for row, item in zip(report.collapses, collapsed, strict=True))
    drifts = tuple(
        Drift(
            output.name,
            _moved(output.name, [(run[output.name], values[i]) for run, (_, values) in zip(seen, runs, strict=True)]),
        )
        for i, output in enumerate(new.get_outputs())
    )
    return dataclasses.replace(report, collapses=rows, outputs=drifts, samples=len(runs))


def _moved(name: str, pairs: list[tuple[object, object]]) -> float:
    """Drift of one output, where the original is finite."""
    finite = [pair for pair in pairs if not is_float(pair[0]) or np.isfinite(pair[0]).all()]  # type: ignore[call-overload]
    error = difference(name, finite) if finite else 0.0
    if not np.isfinite(error):
        raise CheckFailedError(
            f"output {name!r} of the rewritten network is not finite where the original's is",
            hint="give a range that covers what the regions really see, or a smaller tolerance",
        )
    return error


def _with_outputs(model: onnx.ModelProto, collapsed: Sequence[Collapsed]) -> onnx.ModelProto:
    """The network with the ends of every region among its outputs."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    given = {value.name for value in shown.graph.output}
    wanted = dict.fromkeys(name for item in collapsed for name in (item.input, item.output))
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted if name not in given)
    return shown


def _check(row: CollapseCheck, item: Collapsed, seen: list[dict[str, object]]) -> CollapseCheck:
    """Hold what was seen of one region against its certificate."""
    proven = item.certificate
    worst, outside, count = 0.0, 0, 0
    for values in seen:
        x, y = (np.asarray(values[name]) for name in (item.input, item.output))
        unit = max(proven.rounding, _LEAST_ROUNDING.get(str(x.dtype), 4e-6))
        x, y = x.astype(np.float64), y.astype(np.float64)
        low, high = item.domain.along(x.ndim) if item.domain else (proven.low, proven.high)
        inside = (x >= low) & (x <= high) & np.isfinite(x) & np.isfinite(y)
        count, outside = count + x.size, outside + int(x.size - inside.sum())
        gap, size = np.abs(y - np.maximum(x, 0))[inside], np.maximum(np.abs(x), 1.0)[inside]
        if (gap > proven.eps + proven.slope * np.maximum(x, 0)[inside] + unit * size).any():
            raise CheckFailedError(
                f"region {row.node!r} is {gap.max():.3g} from ReLU, and its certificate allows {above(proven.eps)}",
                hint="nothing was written; this is a fault of a graph pass, please report it with the model",
            )
        worst = max(worst, float(gap.max(initial=0.0)))
    return dataclasses.replace(row, measured=worst, outside=outside / count if count else 0.0)
