"""Smooth activations by value: those without parameters, and families whose parameters a few values give away.

Each is the formula of its paper in float64; relatives that differ by a constant only (GELU's two approximations, Swish
and its beta) are told apart by the values of :mod:`relu_deploy.passes.classify`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Where a family is asked for its parameters.
PROBES = np.array([-100.0, -2.0, -1.0, 0.0, 1.0, 100.0])


@dataclasses.dataclass(frozen=True)
class Known:
    """A function without parameters.

    Attributes:
        kind: Its name in reports that programs read.
        name: Its name for a person.
        function: Its values, elementwise.
        arithmetic: Whether it is what normalisations and positions are made of, and no activation by itself.
        gated: Whether it is ``x`` times something between 0 and 1, so that a scale in front of it may hide in it.
    """

    kind: str
    name: str
    function: Callable[[Array], Array]
    arithmetic: bool = False
    gated: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """Functions that differ by parameters.

    Attributes:
        kind: Name in reports that programs read.
        fit: Parameters from the values at ``PROBES``; None where no member has such values.
        function: Values of the member with these parameters.
        text: Format string of the name for a person, with the parameters.
    """

    kind: str
    fit: Callable[[Array], tuple[float, ...] | None]
    function: Callable[..., Array]
    text: str


_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x: Array) -> Array:
    """``1 / (1 + exp(-x))``."""
    return np.asarray(1 / (1 + np.exp(-x)))


def softplus(x: Array) -> Array:
    """``log(1 + exp(x))`` without overflow."""
    return np.asarray(np.logaddexp(0, x))


def _elu(x: Array, alpha: float = 1.0) -> Array:
    return np.asarray(np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0))))


def _celu(x: Array, alpha: float) -> Array:
    return np.asarray(np.maximum(x, 0) + np.minimum(0, alpha * np.expm1(x / alpha)))


def _gelu_tanh(x: Array) -> Array:
    return np.asarray(x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def _smelu(x: Array, beta: float) -> Array:
    return np.asarray(np.clip(x + beta, 0, 2 * beta) ** 2 / (4 * beta) + np.maximum(x - beta, 0))


def _sau(x: Array, slope: float, beta: float) -> Array:
    density = np.exp(-0.5 * (beta * x) ** 2) / (beta * math.sqrt(2 * math.pi))
    return np.asarray(slope * x + (1 - slope) * (x * 0.5 * (1 + _erf(x * beta / math.sqrt(2))) + density))


KNOWN: tuple[Known, ...] = (
    Known("silu", "SiLU", lambda x: x * sigmoid(x), gated=True),
    Known("gelu_erf", "GELU (erf)", lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2))), gated=True),
    Known("gelu_tanh", "GELU (tanh)", _gelu_tanh, gated=True),
    Known("gelu_sigmoid", "GELU (sigmoid, 1.702)", lambda x: x * sigmoid(1.702 * x), gated=True),
    Known("hardswish", "HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1), gated=True),
    Known("mish", "Mish", lambda x: x * np.tanh(softplus(x)), gated=True),
    Known("golu", "GoLU", lambda x: x * np.exp(-np.exp(-x)), gated=True),
    Known("telu", "TeLU", lambda x: x * np.tanh(np.exp(x)), gated=True),
    Known("serf", "Serf", lambda x: x * _erf(softplus(x)), gated=True),
    Known("elu", "ELU (alpha 1)", _elu),
    Known("selu", "SELU", lambda x: 1.0507009873554805 * _elu(x, 1.6732632423543772)),
    Known("sigmoid", "Sigmoid", sigmoid),
    Known("tanh", "Tanh", np.tanh),
    Known("softplus", "Softplus", softplus),
    Known("softsign", "Softsign", lambda x: x / (1 + np.abs(x))),
    Known("log_sigmoid", "LogSigmoid", lambda x: -softplus(-x)),
    Known("tanhshrink", "Tanhshrink", lambda x: x - np.tanh(x)),
    Known("relu_squared", "ReLU squared", lambda x: np.square(np.maximum(x, 0))),
    Known("erf", "Erf", _erf),
    Known("atan", "Atan", np.arctan),
    Known("rounding", "a change of type", lambda x: x, arithmetic=True),
    Known("exp", "Exp", np.exp, arithmetic=True),
    Known("log", "Log", np.log, arithmetic=True),
    Known("sqrt", "Sqrt", np.sqrt, arithmetic=True),
    Known("square", "Square", np.square, arithmetic=True),
    Known("cube", "Cube", lambda x: x**3, arithmetic=True),
    Known("reciprocal", "Reciprocal", np.reciprocal, arithmetic=True),
    Known("reciprocal_sqrt", "Reciprocal of the square root", lambda x: 1 / np.sqrt(x), arithmetic=True),
    Known("sin", "Sin", np.sin, arithmetic=True),
    Known("cos", "Cos", np.cos, arithmetic=True),
    Known("floor", "Floor", np.floor, arithmetic=True),
    Known("ceil", "Ceil", np.ceil, arithmetic=True),
    Known("round", "Round", np.round, arithmetic=True),
)  # fmt: skip


def _fit_swish(at: Array) -> tuple[float, ...] | None:
    return (math.log(at[4] / (1 - at[4])),) if 0.5 < at[4] < 1 else None


def _fit_elu(at: Array) -> tuple[float, ...] | None:
    alpha = at[2] / math.expm1(-1)
    return (alpha,) if alpha > 0 else None


def _fit_celu(at: Array) -> tuple[float, ...] | None:
    """``alpha (exp(-1 / alpha) - 1)`` falls from 0 to -1 as alpha rises."""
    alpha = bisect(lambda a: a * math.expm1(-1 / a), at[2], 1e-2, 1e3)
    return None if alpha is None else (alpha,)


def _fit_softplus(at: Array) -> tuple[float, ...] | None:
    return (math.log(2) / at[3],) if at[3] > 0 else None


def _fit_smelu(at: Array) -> tuple[float, ...] | None:
    return (4 * at[3],) if 0 < at[3] < 10 else None


def _fit_squareplus(at: Array) -> tuple[float, ...] | None:
    return (4 * at[3] ** 2,) if at[3] > 0 else None


def _fit_sau(at: Array) -> tuple[float, ...] | None:
    slope = at[0] / -100
    return (slope, (1 - slope) / (at[3] * math.sqrt(2 * math.pi))) if at[3] > 0 and -1e-9 < slope < 1 else None


def _fit_aptx(at: Array) -> tuple[float, ...] | None:
    """``(alpha + tanh(beta x)) gamma x``: gamma and alpha from far out, beta from the value at 1."""
    right, left = at[5] / 100, at[0] / -100
    gamma = (right - left) / 2
    if gamma <= 0:
        return None
    alpha = (right + left) / (2 * gamma)
    rest = at[4] / gamma - alpha
    return (alpha, math.atanh(rest), gamma) if 0 < rest < 1 else None


FAMILIES: tuple[Family, ...] = (
    Family("swish", _fit_swish, lambda x, beta: x * sigmoid(beta * x), "Swish with beta {0:.4g}"),
    Family("elu", _fit_elu, _elu, "ELU with alpha {0:.4g}"),
    Family("celu", _fit_celu, _celu, "CELU with alpha {0:.4g}"),
    Family("softplus", _fit_softplus, lambda x, beta: softplus(beta * x) / beta, "Softplus with beta {0:.4g}"),
    Family("smelu", _fit_smelu, _smelu, "SmeLU with beta {0:.4g}"),
    Family("squareplus", _fit_squareplus, lambda x, b: (x + np.sqrt(x * x + b)) / 2, "Squareplus with b {0:.4g}"),
    Family("sau", _fit_sau, _sau, "SAU with slope {0:.4g} and beta {1:.4g}"),
    Family("aptx", _fit_aptx, lambda x, a, b, c: (a + np.tanh(b * x)) * c * x,
           "APTx with alpha {0:.4g}, beta {1:.4g}, gamma {2:.4g}"),
)  # fmt: skip


def bisect(falling: Callable[[float], float], value: float, low: float, high: float) -> float | None:
    """Where a falling function has a value; None outside ``[low, high]``.

    >>> bisect(lambda a: -a, -2.0, 0.0, 10.0)
    2.0
    """
    if not falling(low) >= value >= falling(high):
        return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) >= value else (low, middle)
    return round((low + high) / 2, 12)
