"""Intervals of floats: what every primitive of a program gives, with the rounding error, as IEEE 754 does it.

The result of a smooth function carries no error of its own where the symbolic proof holds for *any* value of an atom,
hence for the float that the runtime really computed (each step of a program is computed once and is one atom). A floor
is no such atom, since the proof knows what it is: an argument that is off may land it on another integer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.float_types import FloatType
from relu_deploy.passes.program import INTEGER, Program, Step
from relu_deploy.passes.smooth import BOUNDED, RISING, slope_range, value_range
from relu_deploy.passes.stretches import Stretches

Array = npt.NDArray[np.float64]


@dataclasses.dataclass
class Interval:
    """Floats of one step: ``lo <= value <= hi``, ``|value - real value| <= err``. NaN means: may be NaN.

    Attributes:
        lo: Smallest value, up to ``err``.
        hi: Largest value, up to ``err``.
        err: Largest rounding error.
        sure: Whether ``lo`` and ``hi`` hold for floats and reals alike, with nothing to add.
        whole: Whether all values are integers, floats and reals.
    """

    lo: Array
    hi: Array
    err: Array
    sure: bool = False
    whole: bool = False

    @property
    def low(self) -> Array:
        """No float and no real is below."""
        return self.lo if self.sure else self.lo - self.err

    @property
    def high(self) -> Array:
        """No float and no real is above."""
        return self.hi if self.sure else self.hi + self.err

    @property
    def size(self) -> Array:
        """Largest magnitude."""
        return np.maximum(np.abs(self.lo), np.abs(self.hi))


def run_intervals(
    program: Program,
    x: Interval,
    kind: FloatType,
    *,
    atoms: bool = True,
    fixed: Mapping[int, Interval] | None = None,
) -> list[Interval]:
    """Every step on every box.

    Args:
        program: The region.
        x: Its input on each box, ``(boxes,)``, or ``(channels, boxes)`` with the channels of ``program.channels()``.
        kind: Float type of the arithmetic.
        atoms: As in :func:`relu_deploy.passes.floats.float_behaviour`.
        fixed: Steps that are known to be something.

    Returns:
        One interval a step, of a shape that goes with ``(channels, boxes)``.
    """
    channels = program.channels()
    values: list[Interval] = []
    known = {} if fixed is None else fixed
    with np.errstate(all="ignore"):
        for number, step in enumerate(program.steps):
            value = known.get(number) or (
                x if step.op == "x" else _apply(step, [values[i] for i in step.args], channels, kind, atoms)
            )
            values.append(_overflow(value, kind))
    return values


def _apply(step: Step, args: list[Interval], channels: Array, kind: FloatType, atoms: bool) -> Interval:
    if step.op == "const":
        row = channels[int(step.param)][:, None]
        return Interval(row, row, np.zeros_like(row), sure=True, whole=bool((np.rint(row) == row).all()))
    if step.op == "fn":
        name = str(step.param)
        if name in INTEGER:
            return _integer_fn(name, args[0])
        value = _fn(name, args[0], kind)
        return value if atoms else Interval(value.lo, value.hi, _fn_error(name, args[0], value, kind), sure=True)
    if step.op == "lookup" and isinstance(step.param, bytes):
        return _lookup(np.frombuffer(step.param), args[0])
    if step.op in ("random", "bernoulli"):
        return _random(step.op, args, kind)
    rules: dict[str, Callable[..., Interval]] = {
        "add": _add, "mul": _mul, "div": _div, "max": _max, "min": _min, "select": _select,
        "gt": _compare(lambda lo: lo > 0, lambda hi: hi <= 0),
        "ge": _compare(lambda lo: lo >= 0, lambda hi: hi < 0),
        "eq": _equal,
    }  # fmt: skip
    rule = rules[step.op]
    return rule(*args, kind) if step.op in ("add", "mul", "div") else rule(*args)


def _overflow(value: Interval, kind: FloatType) -> Interval:
    """Past the largest finite number a float is infinite, and nothing is known of its error."""
    # Half a unit more rounds down to the largest number; the constants -inf and inf are themselves, without error.
    edge = kind.largest * (1 + kind.unit / 2)
    crosses = (value.hi > edge) | (value.lo < -edge)
    given = np.isinf(value.lo) & (value.lo == value.hi) & (value.err == 0)
    lo = np.where(value.lo < -edge, -np.inf, value.lo)
    hi = np.where(value.hi > edge, np.inf, value.hi)
    return dataclasses.replace(value, lo=lo, hi=hi, err=np.where(crosses & ~given, np.inf, value.err))


def _rounded(size: Array, kind: FloatType, exact: npt.NDArray[np.bool_]) -> Array:
    return np.where(exact, 0.0, kind.unit * size + kind.tiny)


def _is(value: Interval, *numbers: float) -> npt.NDArray[np.bool_]:
    """Where a step is exactly one of these numbers."""
    same: npt.NDArray[np.bool_] = (value.lo == value.hi) & (value.err == 0) & np.isin(value.lo, numbers)
    return same


def _whole(low: Array, high: Array, err: Array, kind: FloatType) -> Interval:
    """Of integers alone: exact up to where a type has them all, as indices are, whether they are floats or not."""
    size = np.maximum(np.abs(low), np.abs(high))
    off = np.where(size <= 1 / kind.unit, 0.0, kind.unit * size)
    return Interval(low - off, high + off, err + off, sure=True, whole=True)


def _add(a: Interval, b: Interval, kind: FloatType) -> Interval:
    if a.whole and b.whole:
        return _whole(a.low + b.low, a.high + b.high, a.err + b.err, kind)
    lo, hi = a.lo + b.lo, a.hi + b.hi
    exact = _is(a, 0.0) | _is(b, 0.0)
    size = np.maximum(np.abs(lo), np.abs(hi)) + a.err + b.err
    return Interval(lo, hi, a.err + b.err + _rounded(size, kind, exact))


def _mul(a: Interval, b: Interval, kind: FloatType) -> Interval:
    corners = np.stack(np.broadcast_arrays(a.lo * b.lo, a.lo * b.hi, a.hi * b.lo, a.hi * b.hi))
    exact = _is(a, 0.0, 1.0, -1.0) | _is(b, 0.0, 1.0, -1.0)
    # Where a factor is exactly 0 or the other has no error, no error comes over; elsewhere 0 * inf is NaN, rightly.
    err = _times(a.size, b.err) + _times(b.size, a.err) + _times(a.err, b.err)
    lo, hi = corners.min(axis=0), corners.max(axis=0)
    if a.whole and b.whole and a.sure and b.sure:
        return _whole(lo, hi, err, kind)
    return Interval(lo, hi, err + _rounded(np.maximum(np.abs(lo), np.abs(hi)) + err, kind, exact))


def _times(size: Array, err: Array) -> Array:
    """``size * err`` where 0 wins over an infinite size: the bounds of the product show the overflow."""
    return np.where(err == 0, 0.0, size * err)


def _div(a: Interval, b: Interval, kind: FloatType) -> Interval:
    least = np.minimum(np.abs(b.lo), np.abs(b.hi)) - b.err
    corners = np.stack(np.broadcast_arrays(a.lo / b.lo, a.lo / b.hi, a.hi / b.lo, a.hi / b.hi))
    corners = np.where((b.lo <= b.err) & (b.hi >= -b.err), np.nan, corners)
    lo, hi = corners.min(axis=0), corners.max(axis=0)
    size = np.maximum(np.abs(lo), np.abs(hi))
    err = (a.err + _times(size, b.err)) / least
    return Interval(lo, hi, err + _rounded(size + err, kind, _is(b, 1.0, -1.0)))


def _max(a: Interval, b: Interval) -> Interval:
    err = np.where(a.low >= b.high, a.err, np.maximum(a.err, b.err))
    err = np.where(b.low >= a.high, b.err, err)
    return Interval(np.maximum(a.low, b.low), np.maximum(a.high, b.high), err, sure=True, whole=a.whole and b.whole)


def _min(a: Interval, b: Interval) -> Interval:
    flipped = _max(_negative(a), _negative(b))
    return _negative(flipped)


def _negative(a: Interval) -> Interval:
    return dataclasses.replace(a, lo=-a.hi, hi=-a.lo)


def _truth(yes: npt.NDArray[np.bool_], no: npt.NDArray[np.bool_], err: Array) -> Interval:
    """A comparison: decided, or open; open with inexact sides, the floats may even decide otherwise than the reals."""
    lo, hi = np.where(yes, 1.0, 0.0), np.where(no, 0.0, 1.0)
    return Interval(lo, hi, np.where(yes | no | (err == 0), 0.0, 1.0), sure=True, whole=True)


def _compare(
    sure: Callable[[Array], npt.NDArray[np.bool_]], never: Callable[[Array], npt.NDArray[np.bool_]]
) -> Callable[[Interval, Interval], Interval]:
    def rule(a: Interval, b: Interval) -> Interval:
        return _truth(sure(a.low - b.high), never(a.high - b.low), a.err + b.err)

    return rule


def _equal(a: Interval, b: Interval) -> Interval:
    err = a.err + b.err
    yes = (a.lo == a.hi) & (b.lo == b.hi) & (a.lo == b.lo) & (err == 0)
    return _truth(yes, (a.low > b.high) | (b.low > a.high), err)


def _select(condition: Interval, yes: Interval, no: Interval) -> Interval:
    """The branch that is not taken may be NaN or infinite: it is never looked at."""
    lo, hi = np.minimum(yes.low, no.low), np.maximum(yes.high, no.high)
    err = np.maximum(yes.err, no.err) + np.where(condition.err == 0, 0.0, hi - lo)
    taken, refused = _is(condition, 1.0), _is(condition, 0.0)
    low, high, off = (
        np.where(taken, y, np.where(refused, n, both))
        for y, n, both in ((yes.low, no.low, lo), (yes.high, no.high, hi), (yes.err, no.err, err))
    )
    return Interval(low, high, off, sure=True, whole=yes.whole and no.whole)


def _integer_fn(name: str, a: Interval) -> Interval:
    """A rounding to integers: without error where the argument has none, or stays between two steps."""
    low, high = RISING[name](a.low), RISING[name](a.high)
    err = np.where((a.err == 0) | (low == high), 0.0, np.floor(a.err) + 1)
    return Interval(low, high, err, sure=True, whole=True)


def _lookup(table: Array, index: Interval) -> Interval:
    """The range of the entries that an index can mean; an index that is off by rounding may mean any of them."""
    lo, hi = Stretches(table).of_index(np.rint(index.low), np.rint(index.high))
    return Interval(lo, hi, np.where(index.err == 0, 0.0, hi - lo), sure=True)


def _random(op: str, args: list[Interval], kind: FloatType) -> Interval:
    """A draw: any float of ``[low, high)``; or 0 or 1, which is the probability itself where that is 0 or 1."""
    if op == "bernoulli":
        certain = _is(args[0], 0.0, 1.0)
        return Interval(
            np.where(certain, args[0].lo, 0.0), np.where(certain, args[0].hi, 1.0), np.zeros_like(args[0].err)
        )
    low, high = args
    below = high.hi - np.abs(high.hi) * kind.unit
    return Interval(low.lo, np.maximum(low.lo, below), np.zeros_like(low.lo))


def _fn_error(name: str, a: Interval, value: Interval, kind: FloatType) -> Array:
    """How far a runtime's function is off: what its argument is off times its slope, and eight units of its own."""
    low, high = a.low, a.high
    if name in ("float16", "bfloat16"):
        unit, steepest = (2.0**-11 if name == "float16" else 2.0**-8), np.ones(np.broadcast(low, high).shape)
    else:
        unit, steepest = 8 * kind.unit, np.abs(np.stack(slope_range(name, low, high))).max(axis=0)
    carried = np.minimum(_times(steepest, a.err), value.hi - value.lo)
    # Runtimes compute those that saturate to a few units of 1: ONNX Runtime's sigmoid is 0 from -18 downwards.
    size = np.maximum(value.size, 1.0) if name in BOUNDED else value.size
    return np.where(a.err == 0, 0.0, carried) + unit * size + kind.tiny


def _fn(name: str, a: Interval, kind: FloatType) -> Interval:
    """Range of a smooth function over the floats that can reach it, and a few units for the runtime's accuracy."""
    lo, hi = value_range(name, a.low, a.high)
    if kind.unit > 2.0**-50:
        waves = name in ("sin", "cos")
        below, above = (np.ones_like(lo) if waves else np.abs(end) for end in (lo, hi))
        low_end, high_end = BOUNDED.get(name, (-np.inf, np.inf))
        lo = np.maximum(lo - below * 8 * kind.unit, low_end)
        hi = np.minimum(hi + above * 8 * kind.unit, high_end)
    return Interval(lo, hi, np.zeros(np.broadcast(lo, hi).shape))
