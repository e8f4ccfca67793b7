"""The smooth functions of a program: their values in float64, and how steep they are on an interval."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Function = Callable[[Array], Array]

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _narrow(limit: float) -> Function:
    return lambda v: np.where(np.abs(v) > limit, np.copysign(np.inf, v), v)


def _integer(v: Array) -> Array:
    """Truncation; beyond the range of int32 the result of a cast is not defined."""
    return np.where(np.abs(v) < 2.0**31, np.trunc(v), np.nan)


def _sech_squared(v: Array) -> Array:
    small = np.exp(-2 * np.abs(v))
    return np.asarray(4 * small / (1 + small) ** 2)


def _bell(v: Array) -> Array:
    """Slope of the sigmoid."""
    small = np.exp(-np.abs(v))
    return np.asarray(small / (1 + small) ** 2)


# Functions that rise wherever they are defined.
RISING: dict[str, Function] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "erf": _erf, "tanh": np.tanh, "atan": np.arctan,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "softplus": lambda v: np.logaddexp(0, v), "asinh": np.arcsinh,
    "softsign": lambda v: np.where(np.isinf(v), np.sign(v), v / (1 + np.abs(v))), "sinh": np.sinh,
    "floor": np.floor, "ceil": np.ceil, "round": np.round, "cube": lambda v: v * v * v, "integer": _integer,
    "float16": _narrow(65520.0), "bfloat16": _narrow(2.0**128),
}  # fmt: skip
# Ends that no runtime oversteps.
BOUNDED = {"sigmoid": (0.0, 1.0), "tanh": (-1.0, 1.0), "erf": (-1.0, 1.0), "softsign": (-1.0, 1.0)}
# Slopes that fall with the distance from 0, ...
_FALLING_SLOPES: dict[str, Function] = {
    "erf": lambda v: 2 / math.sqrt(math.pi) * np.exp(-v * v), "tanh": _sech_squared, "sigmoid": _bell,
    "softsign": lambda v: 1 / (1 + np.abs(v)) ** 2, "atan": lambda v: 1 / (1 + v * v),
    "asinh": lambda v: 1 / np.sqrt(1 + v * v),
}  # fmt: skip
# ... that rise with it, ...
_RISING_SLOPES: dict[str, Function] = {"sinh": np.cosh, "cube": lambda v: 3 * v * v}
# ... and that change in one direction from left to right.
_MONOTONE_SLOPES: dict[str, Function] = {
    "exp": np.exp, "softplus": RISING["sigmoid"], "log": lambda v: 1 / v, "sqrt": lambda v: 0.5 / np.sqrt(v),
    "cosh": np.sinh,
}  # fmt: skip


def value_range(name: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Smallest and largest value of a function between two points, to the accuracy of float64's own functions.

    Args and returns as :func:`slope_range`; NaN where a wave is asked for at infinity.
    """
    if name in ("sin", "cos"):
        middle, radius = (low + high) / 2, (high - low) / 2
        value = np.sin(middle) if name == "sin" else np.cos(middle)
        return np.maximum(-1.0, value - radius), np.minimum(1.0, value + radius)
    if name == "cosh":
        nearest = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
        return np.cosh(nearest), np.cosh(np.maximum(np.abs(low), np.abs(high)))
    return RISING[name](low), RISING[name](high)


def slope_range(name: str, low: Array, high: Array) -> tuple[Array, Array]:
    """Smallest and largest slope of a function between two points, to the accuracy of float64's own functions.

    Args:
        name: One of ``program.SMOOTH``.
        low: Left ends, any shape.
        high: Right ends, ``>= low``.

    Returns:
        Two arrays of that shape. ``(-inf, inf)`` where the function jumps or has no bounded slope.
    """
    unbounded = np.full(np.broadcast(low, high).shape, np.inf)
    if name in ("sin", "cos"):
        middle, radius = (low + high) / 2, (high - low) / 2
        slope = np.cos(middle) if name == "sin" else -np.sin(middle)
        return np.maximum(-1.0, slope - radius), np.minimum(1.0, slope + radius)
    if name in _MONOTONE_SLOPES:
        if name in ("log", "sqrt"):
            low = np.where(low > 0, low, np.nan)
        ends = _MONOTONE_SLOPES[name](low), _MONOTONE_SLOPES[name](high)
        return np.minimum(*ends), np.maximum(*ends)
    nearest = np.where((low <= 0) & (high >= 0), 0.0, np.minimum(np.abs(low), np.abs(high)))
    farthest = np.maximum(np.abs(low), np.abs(high))
    if name in _FALLING_SLOPES:
        return _FALLING_SLOPES[name](farthest), _FALLING_SLOPES[name](nearest)
    if name in _RISING_SLOPES:
        return _RISING_SLOPES[name](nearest), _RISING_SLOPES[name](farthest)
    return -unbounded, unbounded
