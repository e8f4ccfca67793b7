"""What floats make of a region: interval evaluation of every primitive over all finite numbers of a type.

Real arithmetic says that ``0 * f(x)`` is 0; a float says NaN where ``f`` overflows, and ``(x + 2**60) - 2**60`` is
``x`` on paper only. So the domain is cut into dyadic boxes ``[2**k, 2**(k+1)]`` of either sign, and on each box every
intermediate gets an interval and a bound of its rounding error, with infinities and NaN followed as IEEE 754 does.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from relu_deploy.passes.float_types import FLOAT_TYPES, FloatType
from relu_deploy.passes.intervals import Interval, run_intervals
from relu_deploy.passes.program import Program

__all__ = [
    "FLOAT_TYPES", "LEAST_DOMAIN", "MOST_ROUNDING", "FloatBehaviour", "FloatType", "dyadic_boxes", "float_behaviour",
    "sample",
]  # fmt: skip

Array = npt.NDArray[np.float64]

# A replacement counts only on a domain that a sane network never leaves: down to 2**-8 of the largest finite value,
# which is 1.3e36 in float32 and 256 in float16. ``0 * GELU`` passes (it overflows past half of the largest value),
# ``0 * exp`` does not.
LEAST_DOMAIN = 2.0**-8
# Rounding a blend may leave behind, in units of max(|x|, 1) u: a lerp needs 4, a table of 16 hinges some 40.
MOST_ROUNDING = 64.0


@dataclasses.dataclass(frozen=True)
class FloatBehaviour:
    """How far real arithmetic can be trusted.

    Attributes:
        limit: Largest ``D`` such that for every ``|x| <= D`` the result is finite and its error small; 0 if none.
        rounding: Largest error found inside that domain, relative to ``max(|x|, 1)``; 0 when every operation is exact.
        culprit: Node behind the first step that is not finite beyond ``limit``; empty when there is none.
    """

    limit: float
    rounding: float
    culprit: str


def float_behaviour(
    program: Program, kind: FloatType, *, atoms: bool = True, domain: tuple[float, float] | None = None
) -> FloatBehaviour:
    """Evaluate a region over every finite number of a type, all channels at once.

    Args:
        program: The region.
        kind: Its float type.
        atoms: Whether the proof holds for any value of a smooth function; without it a function is off by what its
            argument is off times its slope, and by eight units of its own (of 1, if it saturates).
        domain: Numbers outside it do not matter.
    """
    low, lo, hi = dyadic_boxes(kind)
    with np.errstate(all="ignore"):
        values = run_intervals(program, Interval(lo, hi, np.zeros_like(lo)), kind, atoms=atoms)
        scale = np.maximum(np.minimum(np.abs(lo), np.abs(hi)), 1.0)
        bad = _bad(values[-1], scale, kind)
        relative = np.atleast_2d(values[-1].err / scale).max(axis=0)
    if domain is not None:
        outside = (hi < domain[0]) | (lo > domain[1])
        bad, relative = bad & ~outside, np.where(outside, 0.0, relative)
    if bad[0]:
        return FloatBehaviour(0.0, 0.0, _culprit(program, values, 0))
    sides = bad[1:].reshape(2, -1).any(axis=0)
    first = int(np.argmax(sides)) if sides.any() else sides.size
    good = np.concatenate([[True], np.tile(np.arange(sides.size) < first, 2)])
    if first == sides.size:
        return FloatBehaviour(kind.largest, float(relative.max()), "")
    box = 1 + first if bad[1 + first] else 1 + sides.size + first
    return FloatBehaviour(float(low[first]), float(relative[good].max()), _culprit(program, values, box))


def dyadic_boxes(kind: FloatType) -> tuple[Array, Array, Array]:
    """Every finite number of a type: 0, ``[2**k, 2**(k + 1))``, and the same below 0.

    Returns:
        The powers of two, and the ends of the boxes: 0, then the positive ones by size, then the negative ones.
    """
    low = np.ldexp(1.0, np.arange(kind.lowest, math.frexp(kind.largest)[1]))
    with np.errstate(over="ignore"):
        high = np.minimum(low * 2 * (1 - kind.unit / 2), kind.largest)
    return low, np.concatenate([[0.0], low, -high]), np.concatenate([[0.0], high, -low])


def sample(program: Program, constants: npt.ArrayLike, points: Array) -> Array:
    """Value of one channel at some points, in float64; NaN where it cannot be told."""
    column = dataclasses.replace(program, constants=np.asarray(constants, dtype=np.float64).reshape(-1, 1))
    zero = np.zeros_like(points)
    result = run_intervals(column, Interval(points, points, zero), FLOAT_TYPES[TensorProto.DOUBLE])[-1]
    with np.errstate(all="ignore"):
        middle: Array = (result.lo + result.hi) / 2
    return np.broadcast_to(middle.reshape(-1, middle.shape[-1])[0], points.shape)


def _bad(value: Interval, scale: Array, kind: FloatType) -> npt.NDArray[np.bool_]:
    """Boxes on which a result is not finite or not accurate."""
    allowed = MOST_ROUNDING * (kind.unit * scale + kind.tiny)
    fine = np.isfinite(value.lo) & np.isfinite(value.hi) & (value.err <= allowed)
    return np.asarray(np.atleast_2d(~fine).any(axis=0))


def _culprit(program: Program, values: list[Interval], box: int) -> str:
    for origin, value in zip(program.origin, values, strict=True):
        parts = [np.atleast_2d(part) for part in (value.lo, value.hi, value.err)]
        if not all(np.isfinite(part[:, min(box, part.shape[1] - 1)]).all() for part in parts):
            return origin
    return program.origin[-1]
