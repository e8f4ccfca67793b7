"""How large a region's value gets on an interval: interval branch and bound, in float64 rounded outwards.

Every step of a program gets a range of its values and a range of its slopes on a box ``[a, b]``. The result lies in the
former, and, by the mean value theorem, in ``f(m) + f'([a, b]) (x - m)`` about the middle ``m``; the second closes in on
the truth with the square of the width, however often ``x`` occurs. Boxes that may hold the maximum are halved.

Where comparisons of ``x`` with a constant change their outcome the line is cut beforehand, and those points are boxes
of their own: all other boxes are open, so that ``x > 0`` is true on ``(0, b)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.program import INTEGER, Program, Step
from relu_deploy.passes.smooth import BOUNDED, RISING, slope_range, value_range
from relu_deploy.passes.stretches import Stretches

Array = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

# The bound is at most this much above the truth, where that can be reached in the rounds and boxes below.
LOOSENESS = 0.002
_ROUNDS, _BOXES = 48, 1 << 16
# A sum or product is off by half a unit of float64, a function by a few; both are enlarged twice over.
_UNIT, _FUNCTION_UNIT, _TINY = 2.0**-52, 2.0**-48, 1e-320


@dataclasses.dataclass(frozen=True)
class Jet:
    """Ranges of a step on each box: ``lo <= value <= hi``, and ``down <= slope <= up`` where it is known."""

    lo: Array
    hi: Array
    down: Array
    up: Array


def minus_relu(program: Program) -> Program:
    """``program(x) - max(x, 0)``."""
    count, width = len(program.steps), program.constants.shape[1]
    x = next((i for i, step in enumerate(program.steps) if step.op == "x"), 0)
    rows = len(program.constants)
    steps = (
        Step("const", param=rows), Step("max", (x, count)), Step("const", param=rows + 1),
        Step("mul", (count + 1, count + 2)), Step("add", (count - 1, count + 3)),
    )  # fmt: skip
    constants = np.concatenate([program.constants, np.zeros((1, width)), np.full((1, width), -1.0)])
    origin = (*program.origin, *([program.origin[-1]] * len(steps)))
    return Program((*program.steps, *steps), constants, origin, program.axis)


def largest_magnitude(program: Program, low: Array, high: Array) -> Array:
    """An upper bound of ``|program(x)|`` over ``low <= x <= high``, in real arithmetic.

    Args:
        program: With ``C`` channels, all columns of ``program.constants``.
        low: Finite, ``(C,)``.
        high: Finite, ``(C,)``, ``>= low``.

    Returns:
        ``(C,)``; ``inf`` where none was found. Above the truth by ``LOOSENESS``, or more where boxes ran out.
    """
    with np.errstate(all="ignore"):
        return _Search(program, low, high).run()


class _Search:
    """Boxes as parallel arrays: ends, and the channel that each belongs to."""

    def __init__(self, program: Program, low: Array, high: Array) -> None:
        self.program = program
        self.kinks = _kinks(program)
        self.lower = np.zeros(len(low))
        self.upper = np.zeros(len(low))
        boxes = [self._first_boxes(channel, float(low[channel]), float(high[channel])) for channel in range(len(low))]
        self.lo, self.hi = (np.concatenate([box[end] for box in boxes]) for end in (0, 1))
        self.channel = np.repeat(np.arange(len(low)), [len(box[0]) for box in boxes])
        self.budget = _BOXES + 8 * len(self.lo)

    def run(self) -> Array:
        for last in [False] * (_ROUNDS - 1) + [True]:
            ceiling, floor = self._measure()
            np.maximum.at(self.lower, self.channel, floor)
            goal = self.lower[self.channel] * (1 + LOOSENESS) + 2.0**-40 * np.maximum(1, np.abs(self.lo))
            self.budget -= len(self.lo)
            open_ = (ceiling > goal) & (self.lo < self.hi)
            if last or 2 * open_.sum() > self.budget:
                open_[:] = False
            np.maximum.at(self.upper, self.channel[~open_], ceiling[~open_])
            open_ &= np.isfinite(self.upper[self.channel])  # a channel without a bound at one point has none
            if not open_.any():
                break
            self._halve(open_)
        return self.upper

    def _halve(self, which: Bools) -> None:
        lo, hi, channel = self.lo[which], self.hi[which], self.channel[which]
        middle = _middle(lo, hi)
        self.lo, self.hi = np.concatenate([lo, middle]), np.concatenate([middle, hi])
        self.channel = np.concatenate([channel, channel])

    def _measure(self) -> tuple[Array, Array]:
        """For each box an upper bound of the magnitude, and what it reaches somewhere in it."""
        middle = _middle(self.lo, self.hi)
        columns = self.program.constants[:, self.channel]
        whole = _evaluate(self.program, columns, self.lo, self.hi)
        point = _evaluate(self.program, columns, middle, middle)
        radius = np.maximum(self.hi - middle, middle - self.lo) * (1 + _UNIT)
        swing = np.maximum(np.abs(whole.down), np.abs(whole.up)) * radius
        centred = np.maximum(np.abs(point.lo), np.abs(point.hi)) + np.where(np.isnan(swing), np.inf, swing)
        ceiling = np.fmin(np.maximum(np.abs(whole.lo), np.abs(whole.hi)), centred * (1 + 4 * _UNIT))
        floor = np.maximum(0.0, np.maximum(point.lo, -point.hi))
        return np.where(np.isnan(ceiling), np.inf, ceiling), np.where(np.isfinite(floor), floor, 0.0)

    def _first_boxes(self, channel: int, low: float, high: float) -> tuple[Array, Array]:
        """Boxes between powers of two and kinks, and each kink and end as a box of its own."""
        powers = np.ldexp(1.0, np.arange(-6, 128))
        kinks = [float(self.program.constants[row, channel]) for row in self.kinks]
        spots = np.concatenate([-powers, powers, [0.0, low, high], kinks])
        cuts = np.unique(spots[(spots >= low) & (spots <= high)])
        alone = np.unique([spot for spot in (0.0, low, high, *kinks) if low <= spot <= high])
        return np.concatenate([cuts[:-1], alone]), np.concatenate([cuts[1:], alone])


def _middle(lo: Array, hi: Array) -> Array:
    return np.clip(lo / 2 + hi / 2, lo, hi)


def _kinks(program: Program) -> tuple[int, ...]:
    """Rows of the constants that ``x`` itself is compared with."""
    rows = set()
    for step in program.steps:
        if step.op in ("gt", "ge", "eq", "max", "min"):
            sides = [program.steps[arg] for arg in step.args]
            if any(side.op == "x" for side in sides):
                rows |= {int(side.param) for side in sides if side.op == "const"}
    return tuple(rows)


def _evaluate(program: Program, columns: Array, lo: Array, hi: Array) -> Jet:
    values: list[Jet] = []
    for step in program.steps:
        args = [values[index] for index in step.args]
        if step.op == "x":
            one = np.ones_like(lo)
            values.append(Jet(lo, hi, one, one))
        elif step.op == "const":
            row, zero = columns[int(step.param)], np.zeros_like(lo)
            values.append(Jet(row, row, zero, zero))
        elif step.op in ("gt", "ge", "eq"):
            direct = {program.steps[arg].op for arg in step.args} == {"x", "const"}
            values.append(_compare(step.op, args[0], args[1], is_open=direct & (lo < hi)))
        else:
            values.append(_known(_apply(step, args)))
    return values[-1]


def _apply(step: Step, args: list[Jet]) -> Jet:
    if step.op == "fn":
        return _function(str(step.param), args[0])
    if step.op == "lookup" and isinstance(step.param, bytes):
        return _lookup(np.frombuffer(step.param), args[0])
    if step.op in ("random", "bernoulli"):
        return _drawn(step.op, args)
    rules: dict[str, Callable[..., Jet]] = {
        "add": _add, "mul": _mul, "div": _div, "max": _max, "min": _min, "select": _select,
    }  # fmt: skip
    return rules[step.op](*args)


def _known(jet: Jet) -> Jet:
    """NaN, which comes of infinite ends, means that nothing is known."""
    lo, down = (np.where(np.isnan(v), -np.inf, v) for v in (jet.lo, jet.down))
    hi, up = (np.where(np.isnan(v), np.inf, v) for v in (jet.hi, jet.up))
    return Jet(lo, hi, down, up)


def _outwards(lo: Array, hi: Array, unit: float = _UNIT) -> tuple[Array, Array]:
    return lo - (np.abs(lo) * unit + _TINY), hi + (np.abs(hi) * unit + _TINY)


def _add(a: Jet, b: Jet) -> Jet:
    return Jet(*_outwards(a.lo + b.lo, a.hi + b.hi), *_outwards(a.down + b.down, a.up + b.up))


def _product(alo: Array, ahi: Array, blo: Array, bhi: Array) -> tuple[Array, Array]:
    """Range of a product. Values are finite, if unbounded, numbers: 0 times such a one is 0."""
    corners = np.stack([alo * blo, alo * bhi, ahi * blo, ahi * bhi])
    corners = np.where(np.isnan(corners), 0.0, corners)
    lo, hi = _outwards(corners.min(axis=0), corners.max(axis=0))
    nothing = ((alo == 0) & (ahi == 0)) | ((blo == 0) & (bhi == 0))
    return np.where(nothing, 0.0, lo), np.where(nothing, 0.0, hi)


def _mul(a: Jet, b: Jet) -> Jet:
    if a is b:  # a square is not negative, whatever the range of its root
        lo, hi = _product(a.lo, a.hi, a.lo, a.hi)
        down, up = _product(a.lo, a.hi, 2 * a.down, 2 * a.up)
        return Jet(np.maximum(lo, 0.0), hi, down, up)
    first, second = _product(a.lo, a.hi, b.down, b.up), _product(b.lo, b.hi, a.down, a.up)
    slope = _outwards(first[0] + second[0], first[1] + second[1])
    return Jet(*_product(a.lo, a.hi, b.lo, b.hi), *slope)


def _div(a: Jet, b: Jet) -> Jet:
    """``(a / b)' = (a' - (a / b) b') / b``."""
    crosses = (b.lo <= 0) & (b.hi >= 0)
    low, high = (np.where(crosses, np.nan, 1 / end) for end in (b.hi, b.lo))
    inverse = _outwards(low, high)
    value = _product(a.lo, a.hi, *inverse)
    carried = _product(*value, b.down, b.up)
    slope = _product(*_outwards(a.down - carried[1], a.up - carried[0]), *inverse)
    everywhere = [
        np.where(crosses, limit, end) for limit, end in zip((-np.inf, np.inf) * 2, (*value, *slope), strict=True)
    ]
    return Jet(*everywhere)


def _max(a: Jet, b: Jet) -> Jet:
    above, below = a.lo >= b.hi, b.lo >= a.hi
    down = np.where(above, a.down, np.where(below, b.down, np.minimum(a.down, b.down)))
    up = np.where(above, a.up, np.where(below, b.up, np.maximum(a.up, b.up)))
    return Jet(np.maximum(a.lo, b.lo), np.maximum(a.hi, b.hi), down, up)


def _min(a: Jet, b: Jet) -> Jet:
    flipped = _max(_negated(a), _negated(b))
    return _negated(flipped)


def _negated(a: Jet) -> Jet:
    return Jet(-a.hi, -a.lo, -a.up, -a.down)


def _compare(op: str, a: Jet, b: Jet, *, is_open: Bools) -> Jet:
    """1 or 0 where it is decided; of ``x`` and a constant it is on open boxes beside the constant."""
    if op == "eq":
        yes = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo)
        no = (a.lo > b.hi) | (b.lo > a.hi) | (is_open & ((a.lo >= b.hi) | (b.lo >= a.hi)))
    else:
        yes = (a.lo > b.hi) | ((a.lo >= b.hi) & (is_open | (op == "ge")))
        no = (a.hi < b.lo) | ((a.hi <= b.lo) & (is_open | (op == "gt")))
    slope = np.where(yes | no, 0.0, np.inf)
    return Jet(np.where(yes, 1.0, 0.0), np.where(no, 0.0, 1.0), -slope, slope)


def _select(condition: Jet, yes: Jet, no: Jet) -> Jet:
    """Undecided, it is one of the two, and may jump from one to the other."""
    taken, refused = condition.lo >= 1, condition.hi <= 0
    either = (
        np.minimum(yes.lo, no.lo),
        np.maximum(yes.hi, no.hi),
        np.full_like(yes.lo, -np.inf),
        np.full_like(yes.lo, np.inf),
    )
    sides = zip(dataclasses.astuple(yes), dataclasses.astuple(no), either, strict=True)
    return Jet(*(np.where(taken, y, np.where(refused, n, both)) for y, n, both in sides))


def _function(name: str, a: Jet) -> Jet:
    if name in INTEGER:
        lo, hi = RISING[name](a.lo), RISING[name](a.hi)
        jump = np.where(lo == hi, 0.0, np.inf)
        return Jet(lo, hi, -jump, jump)
    if name in ("float16", "bfloat16"):  # rounding to 11 or 8 bits
        unit, least = (2.0**-11, 2.0**-25) if name == "float16" else (2.0**-8, 2.0**-134)
        lo, hi = RISING[name](a.lo), RISING[name](a.hi)
        everywhere = np.full_like(a.lo, np.inf)
        return Jet(lo - np.abs(lo) * unit - least, hi + np.abs(hi) * unit + least, -everywhere, everywhere)
    steep = _outwards(*slope_range(name, a.lo, a.hi), _FUNCTION_UNIT)
    return Jet(*_range(name, a.lo, a.hi), *_product(*steep, a.down, a.up))


def _range(name: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Values of a smooth function between two points, rounded outwards."""
    lo, hi = value_range(name, low, high)
    if name in ("sin", "cos"):  # a wave is as far off as its argument
        argument = _FUNCTION_UNIT * np.maximum(np.abs(low), np.abs(high))
        lo, hi = lo - argument, hi + argument
    lo, hi = _outwards(lo, hi, _FUNCTION_UNIT)
    ends = BOUNDED.get(name, (-np.inf, np.inf))
    return np.maximum(lo, ends[0]), np.minimum(hi, ends[1])


def _lookup(table: Array, index: Jet) -> Jet:
    lo, hi = Stretches(table).of_index(np.rint(index.lo), np.rint(index.hi))
    jump = np.where(lo == hi, 0.0, np.inf)
    return Jet(lo, hi, -jump, jump)


def _drawn(op: str, args: list[Jet]) -> Jet:
    low, high = (np.zeros_like(args[0].lo), np.ones_like(args[0].lo)) if op == "bernoulli" else (args[0].lo, args[1].hi)
    everywhere = np.full_like(low, np.inf)
    return Jet(low, high, -everywhere, everywhere)
