"""What is claimed when a region is replaced by ReLU: how far off, where, and in which arithmetic; and its proof.

Piecewise-linear channels are measured at their breakpoints, in fractions; smooth ones by interval branch and bound
(:mod:`relu_deploy.passes.bound`), and far out by what they tend to (:mod:`relu_deploy.passes.tail`).
"""

from __future__ import annotations

import dataclasses
import decimal
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.bound import largest_magnitude, minus_relu
from relu_deploy.passes.classify import classify_piecewise_linear
from relu_deploy.passes.domain import Domain
from relu_deploy.passes.float_tables import table_behaviour
from relu_deploy.passes.floats import LEAST_DOMAIN, FloatType
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import RELU, PiecewiseLinear
from relu_deploy.passes.tail import Line, tail

Array = npt.NDArray[np.float64]
Exact = Callable[[Program, Array], PiecewiseLinear | None]

EXACT = "bit for bit"
# Weights of a blend that are rounded do not sum to 1: a slope that is off by no more than this many units of the type,
# where ReLU rises, is rounding of its output, and is stated apart from the bound.
SLOPE_UNITS = 2.0
# With a tolerance, a bound counts if it holds up to this magnitude at least (or LEAST_DOMAIN, in narrow types): the
# cube inside a tanh GELU overflows float32 past 2**42, an index has no integer past 2**31, and no activation of a
# network gets there.
LEAST_LIMIT = 2.0**31
# Beyond the first of these that leaves a remainder under _REMAINDER a region counts as its line.
_STARTS, _REMAINDER = tuple(2.0**k for k in range(4, 21)), 2.0**-40


def is_exact(note: str) -> bool:
    """Whether the text of a certificate claims that not one bit changes."""
    return note.endswith(EXACT)


@dataclasses.dataclass(frozen=True)
class Certificate:
    """``|region(x) - relu(x)| <= eps + slope relu(x)`` on a domain, in real arithmetic; and what floats add.

    Attributes:
        eps: Tensor units; 0 for an identity of functions.
        slope: What weights that are rounded add, relative to the result; at most ``SLOPE_UNITS`` units of the type, 0
            on a range that was given or measured, where ``eps`` holds all.
        low: Smallest ``x`` covered, tensor units.
        high: Largest ``x`` covered.
        dtype: Float type of the tensor, such as ``float32``.
        domain: ``type``: every finite number of it, or those up to where its arithmetic holds; ``given``;
            ``calibrated``.
        whole: Whether every finite number of the type is covered.
        rounding: Bound of what rounding in the *original* adds, relative to ``max(|x|, 1)``; 0 when its floats are
            exact too. The Relu that replaces it does not round.

    >>> print(Certificate(0.0, 0.0, -3.4028234663852886e38, 3.4028234663852886e38, "float32", "type", True, 0.0))
    equals ReLU for every finite float32, bit for bit
    """

    eps: float
    slope: float
    low: float
    high: float
    dtype: str
    domain: str
    whole: bool
    rounding: float

    def __str__(self) -> str:
        off = f"equals ReLU for {self.where}" if self.eps == 0 else f"within {above(self.eps)} of ReLU for {self.where}"
        claim = off if self.slope == 0 else f"{off}, plus {above(self.slope)} relu(x) of rounded weights"
        if self.rounding == 0:
            return f"{claim}, {EXACT}" if self.eps == 0 == self.slope and self.domain == "type" else claim
        return (
            f"{claim} in exact arithmetic; the original's own rounding is at most {above(self.rounding, 2)} max(|x|, 1)"
        )

    @property
    def where(self) -> str:
        """The domain as a phrase."""
        if self.whole:
            return f"every finite {self.dtype}"
        if self.domain == "type":
            return f"|x| <= {self.high:.4g} ({self.dtype})"
        return f"{self.low:.4g} <= x <= {self.high:.4g} ({self.domain})"


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why there is no certificate.

    Attributes:
        reason: One phrase.
        eps: The bound that was found, tensor units; None where there is none, or none was asked for.
        distance: Whether the distance from ReLU is what is wrong.
    """

    reason: str
    eps: float | None = None
    distance: bool = False

    def __str__(self) -> str:
        return self.reason


def above(value: float, digits: int = 3) -> str:
    """A positive number in a few digits, rounded up: a bound in a text is still a bound.

    >>> above(0.0028441), above(1.0), above(9.996e-9)
    ('0.00285', '1', '1e-08')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    context = decimal.Context(prec=digits, rounding=decimal.ROUND_CEILING)
    return f"{float(context.create_decimal(decimal.Decimal(value))):.{digits}g}"


def certify_exact(program: Program, kind: FloatType, exact: Exact) -> Certificate | Refusal:
    """Prove that every channel is ReLU, in real arithmetic and in floats.

    Args:
        program: The region.
        kind: Type of its input and output.
        exact: Gives one channel as a piecewise-linear function, or None.
    """
    largest = Fraction(kind.largest)
    for column in program.channels().T:
        function = exact(program, column)
        if function is None or not function.is_relu(largest):
            what = "not piecewise linear" if function is None else classify_piecewise_linear(function).detail
            return Refusal(f"ReLU in some channels only; in another it is {what}")
    behaviour = table_behaviour(program, kind)
    if behaviour.limit < LEAST_DOMAIN * kind.largest:
        return Refusal(
            f"ReLU in exact arithmetic, but in {kind.name} not finite or not accurate for "
            f"|x| > {behaviour.limit:.4g} (0 * inf, overflow or lost digits)"
        )
    whole = behaviour.limit == kind.largest
    return Certificate(0.0, 0.0, -behaviour.limit, behaviour.limit, kind.name, "type", whole, behaviour.rounding)


def certify_within(
    program: Program, kind: FloatType, exact: Exact, *, tolerance: float, domain: Domain | None
) -> Certificate | Refusal:
    """Prove that every channel is ReLU to a tolerance on a domain.

    Args:
        program: The region.
        kind: Type of its input and output.
        exact: Gives one channel as a piecewise-linear function, or None.
        tolerance: Largest ``eps`` of a certificate, tensor units; ``>= 0``.
        domain: None for every finite number of the type.

    Returns:
        The certificate, or a refusal with the bound that was found.
    """
    where = f"every finite {kind.name}" if domain is None else str(domain)
    gap = _Gap(program, kind, exact, domain)
    eps = gap.eps
    if not math.isfinite(eps) or gap.grows:
        hint = "; a range may give one" if domain is None else ""
        return Refusal(f"no bound of its distance from ReLU for {where} (tolerance {tolerance:g}){hint}", distance=True)
    if eps > tolerance:
        reason = f"within {above(eps)} of ReLU for {where}, which is more than the tolerance {tolerance:g}"
        return Refusal(reason, eps, distance=True)
    ends = None if domain is None else domain.ends
    behaviour = table_behaviour(program, kind, atoms=gap.piecewise_linear, domain=ends)
    if behaviour.limit < (kind.largest if ends else min(LEAST_LIMIT, LEAST_DOMAIN * kind.largest)):
        return Refusal(
            f"within {above(eps)} of ReLU for {where} in exact arithmetic, but in {kind.name} not finite or not "
            f"accurate for |x| > {behaviour.limit:.4g}",
            eps,
        )
    low, high = ends or (-behaviour.limit, behaviour.limit)
    whole = domain is None and behaviour.limit == kind.largest
    source = "type" if domain is None else domain.source
    return Certificate(eps, gap.slope, low, high, kind.name, source, whole, behaviour.rounding)


class _Gap:
    """``sup |f_c(x) - relu(x)|`` over the channels' domains, without far-out slopes that are rounding.

    Attributes:
        eps: The bound, without ``slope relu(x)``.
        slope: Largest slope of that kind; 0 on a range.
        grows: Whether it is another slope that keeps a channel from ReLU, on the whole line.
        piecewise_linear: Whether every channel is.
    """

    def __init__(self, program: Program, kind: FloatType, exact: Exact, domain: Domain | None) -> None:
        self.kind = kind
        self.whole = domain is None
        columns, low, high = _distinct(program, kind, domain)
        smooth = np.zeros(columns.shape[1], dtype=bool)
        self.slope, self.grows = 0.0, False
        bounds: list[float] = []
        for channel, column in enumerate(columns.T):
            function = exact(program, column)
            if function is None:
                smooth[channel] = True
                continue
            ends = Fraction(float(low[channel])), Fraction(float(high[channel]))
            bounds.append(self._breakpoints(function, *ends))
            if self.grows:  # no channel can mend that, and there may be thousands
                break
        if smooth.any() and not self.grows:
            bounds.append(self._smooth(program, columns[:, smooth], low[smooth], high[smooth]))
        self.eps = max(bounds)
        self.piecewise_linear = not smooth.any()

    def _is_rounding(self, slope: Fraction, side: int) -> bool:
        """Whether a slope of the difference is stated apart; if so, notes it. Where ReLU is 0 nothing is rounding."""
        most = SLOPE_UNITS * self.kind.unit if side > 0 else 0.0
        if not self.whole or abs(slope) > most:
            self.grows |= self.whole
            return False
        self.slope = max(self.slope, _up(abs(slope)))
        return True

    def _breakpoints(self, function: PiecewiseLinear, low: Fraction, high: Fraction) -> float:
        difference, zero = function.minus(RELU), PiecewiseLinear.constant(0)
        (left, start), (right, end) = difference.lines[0], difference.lines[-1]
        if not (self._is_rounding(left, -1) and self._is_rounding(right, 1)):
            return _up(difference.distance(zero, low, high))
        # The right piece may begin below 0, where its slope is no rounding.
        ends = [*difference.breaks[:1], Fraction(0), *difference.breaks[-1:]]
        return _up(max(difference.distance(zero, min(ends), max(ends)), abs(start), abs(end)))

    def _smooth(self, program: Program, columns: Array, low: Array, high: Array) -> float:
        """Branch and bound up to where a channel counts as its line, and the line beyond."""
        difference = minus_relu(dataclasses.replace(program, constants=columns))
        low, high = low.copy(), high.copy()
        beyond = 0.0
        for channel, column in enumerate(difference.constants.T):
            for side, ends, others in ((-1, low, high), (1, high, low)):
                last = float(ends[channel])
                found = _far(difference, column, side, last) if side * last > _STARTS[0] else None
                if found is not None:
                    start, line = found
                    ends[channel] = side * max(start, side * float(others[channel]))
                    beyond = max(beyond, self._beyond(line, side, abs(last)))
        return max(beyond, float(largest_magnitude(difference, low, high).max()))

    def _beyond(self, line: Line, side: int, last: float) -> float:
        constant = _up(abs(line.offset)) + line.moments[0]
        return constant if self._is_rounding(line.slope, side) else constant + _up(abs(line.slope) * Fraction(last))


def _far(difference: Program, column: Array, side: int, last: float) -> tuple[float, Line] | None:
    """Where a channel of the difference starts to count as its line; None where it does not before ``last``."""
    found = None
    constants = [float(value) for value in column]
    for start in _STARTS:
        if start >= side * last:
            break
        line = tail(difference, constants, side, start)
        if line is not None:
            found = start, line
            if line.moments[0] <= _REMAINDER:
                break
    return found


def _distinct(program: Program, kind: FloatType, domain: Domain | None) -> tuple[Array, Array, Array]:
    """Distinct channels: constants ``(rows, D)``, and the ends of their domains ``(D,)``."""
    constants = program.constants
    if domain is None:
        columns = program.channels()
        high = np.full(columns.shape[1], kind.largest)
        return columns, -high, high
    width = max(constants.shape[1], len(domain.low))
    rows = [np.broadcast_to(row, (1, width)) for row in (domain.low, domain.high)]
    joined = np.unique(np.concatenate([np.broadcast_to(constants, (len(constants), width)), *rows]), axis=1)
    return joined[:-2], joined[-2], joined[-1]


def _up(value: Fraction) -> float:
    """The fraction as a float that is not below it."""
    try:
        number = float(value)
    except OverflowError:
        return math.inf
    return number if Fraction(number) >= value else math.nextafter(number, math.inf)
