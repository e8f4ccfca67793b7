"""Name what a region computes: exactly where it is piecewise linear, by value against a known list where it is smooth.

A name from values is a label for people and reports. It proves nothing, and nothing is replaced because of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.floats import sample
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import ONE, ZERO, PiecewiseLinear

Array = npt.NDArray[np.float64]
_IDENTITY = (ONE, ZERO)


@dataclasses.dataclass(frozen=True)
class Activation:
    """What a function is.

    Attributes:
        kind: Such as ``relu``, ``relu6``, ``leaky_relu``, ``silu``, ``gelu_erf``, ``piecewise_linear`` or ``unknown``.
        detail: The same for a person, with its numbers.
        exact: Whether it was decided by the function's breakpoints and not from samples.
    """

    kind: str
    detail: str
    exact: bool

    def __str__(self) -> str:
        if self.exact or self.kind == "unknown":
            return self.detail
        return f"{self.detail} (a label from samples, not a proof)"


def classify_piecewise_linear(function: PiecewiseLinear) -> Activation:
    """Name an exact function.

    >>> classify_piecewise_linear(PiecewiseLinear.identity()).kind
    'identity'
    """
    if function.is_affine:
        slope, intercept = (float(value) for value in function.lines[0])
        if slope == 0:
            return Activation("constant", f"the constant {intercept:.6g}", exact=True)
        if (slope, intercept) == (1, 0):
            return Activation("identity", "the identity", exact=True)
        return Activation("affine", f"affine: {slope:.6g} x + {intercept:.6g}", exact=True)
    if function.is_relu():
        return Activation("relu", "ReLU", exact=True)
    named = _one_break(function) or _clipped(function)
    if named:
        return named
    shape = "" if function.is_continuous else ", not continuous"
    count = len(function.breaks)
    where = ", ".join(f"{float(x):.4g}" for x in function.breaks[:4]) + (", ..." if count > 4 else "")
    plural = "" if count == 1 else "s"
    return Activation(
        "piecewise_linear", f"piecewise linear with {count} breakpoint{plural} ({where}){shape}", exact=True
    )


def _one_break(function: PiecewiseLinear) -> Activation | None:
    """LeakyReLU: bends at 0 only, slope 1 to the right."""
    bends_at_zero = function.breaks == (ZERO,) and function.points == (ZERO,)
    if not bends_at_zero or function.lines[1] != _IDENTITY or function.lines[0][1]:
        return None
    return Activation("leaky_relu", f"LeakyReLU with slope {float(function.lines[0][0]):.6g}", exact=True)


def _clipped(function: PiecewiseLinear) -> Activation | None:
    """Clipped ReLU, Clip with any other bounds, and HardSigmoid: flat, sloped, flat."""
    if len(function.breaks) != 2 or not function.is_continuous or function.lines[0][0] or function.lines[2][0]:
        return None
    if (function.lines[0][1], function.lines[2][1]) == (ZERO, ONE) and function.lines[1] != _IDENTITY:
        ends = " to ".join(f"{float(x):.4g}" for x in function.breaks)
        return Activation("hard_sigmoid", f"HardSigmoid rising from {ends}", exact=True)
    if function.lines[1] != _IDENTITY:
        return None
    low, high = (float(x) for x in function.breaks)
    kind = {(0.0, 6.0): "relu6"}.get((low, high), "clipped_relu" if low == 0 else "clip")
    return Activation(kind, f"{'clipped ReLU' if low == 0 else 'Clip'} [{low:.6g}, {high:.6g}]", exact=True)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _sigmoid(x: Array) -> Array:
    return np.asarray(1 / (1 + np.exp(-x)))


def _elu(x: Array) -> Array:
    return np.where(x > 0, x, np.expm1(x))


_KNOWN: tuple[tuple[str, str, Callable[[Array], Array]], ...] = (
    ("silu", "SiLU", lambda x: x * _sigmoid(x)),
    ("gelu_erf", "GELU (erf)", lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)))),
    ("gelu_tanh", "GELU (tanh)", lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("gelu_sigmoid", "GELU (sigmoid, 1.702)", lambda x: x * _sigmoid(1.702 * x)),
    ("hardswish", "HardSwish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ("mish", "Mish", lambda x: x * np.tanh(np.logaddexp(0, x))),
    ("sigmoid", "Sigmoid", _sigmoid),
    ("tanh", "Tanh", np.tanh),
    ("elu", "ELU (alpha 1)", _elu),
    ("selu", "SELU", lambda x: 1.0507009873554805 * np.where(x > 0, x, 1.6732632423543772 * np.expm1(x))),
    ("softplus", "Softplus", lambda x: np.logaddexp(0, x)),
    ("softsign", "Softsign", lambda x: x / (1 + np.abs(x))),
    ("erf", "Erf", _erf),
    ("exp", "Exp", np.exp),
    ("log", "Log", np.log),
    ("sqrt", "Sqrt", np.sqrt),
    ("square", "Square", np.square),
    ("reciprocal", "Reciprocal", np.reciprocal),
    ("relu_squared", "ReLU squared", lambda x: np.square(np.maximum(x, 0))),
)  # fmt: skip

# Odd numbers of points miss 0 nowhere and the kinks at -3 and 3 everywhere, so one wrong constant shows.
_POINTS = np.linspace(-9.0, 9.0, 401) + 0.01


def classify_samples(program: Program, constants: npt.ArrayLike) -> Activation:
    """Name one channel of a smooth region by its values at 401 points, to 2e-4: float16 constants are off by that."""
    values = sample(program, constants, _POINTS)
    with np.errstate(all="ignore"):
        for kind, name, function in _KNOWN:
            known = function(_POINTS)
            both = np.isfinite(values) == np.isfinite(known)
            close = np.abs(values - known) <= 2e-4 * np.maximum(1, np.abs(known))
            if both.all() and (close | ~np.isfinite(known)).all():
                return Activation(kind, name, exact=False)
        return _blend(values) or Activation("unknown", "smooth or not recognised: not piecewise linear", exact=False)


def _blend(values: Array) -> Activation | None:
    """``gamma act(x) + (1 - gamma) relu(x)`` for a known ``act``: what an unfinished schedule leaves behind."""
    relu = np.maximum(_POINTS, 0)
    for kind, name, function in _KNOWN[:9]:
        step = function(_POINTS) - relu
        gamma = float(step @ (values - relu) / (step @ step))
        if kind not in ("sigmoid", "tanh") and 0 < gamma < 1 and np.abs(relu + gamma * step - values).max() <= 1e-4:
            return Activation("blend", f"a blend of ReLU and {gamma:.4g} {name}", exact=False)
    return None


def summary(kinds: list[Activation], channels: int) -> Activation:
    """One description of all channels of a region, given those of its distinct channels."""
    details = {kind.detail for kind in kinds}
    if len(details) == 1:
        return kinds[0]
    names = sorted({kind.kind for kind in kinds})
    exact = all(kind.exact for kind in kinds)
    if set(names) <= {"leaky_relu", "relu", "identity"} and "leaky_relu" in names:
        return Activation("prelu", f"PReLU with its own slope for each of {channels} channels", exact=exact)
    kind = names[0] if len(names) == 1 else "mixed"
    return Activation(kind, f"not the same in all {channels} channels: {', '.join(names)}", exact=exact)
