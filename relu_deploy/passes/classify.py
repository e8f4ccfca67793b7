"""Name what a region computes: exactly where it is piecewise linear, by value against a known list where it is smooth.

A name from values is a label for people and reports. It proves nothing, and nothing is replaced because of it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from relu_deploy.passes.floats import sample
from relu_deploy.passes.known import FAMILIES, KNOWN, PROBES, Array, bisect, sigmoid
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import ONE, ZERO, PiecewiseLinear

_IDENTITY = (ONE, ZERO)
# A PWLU has 16 intervals as published; one with more is still one. Its numbers went through float16 at worst.
MOST_INTERVALS = 256
GRID_JITTER = 2.0**-10


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
    joined = function.is_continuous or _joined(function)
    shape = "" if function.is_continuous else ", continuous up to rounding" if joined else ", not continuous"
    count = len(function.breaks)
    where = ", ".join(f"{float(x):.4g}" for x in function.breaks[:4]) + (", ..." if count > 4 else "")
    plural = "" if count == 1 else "s"
    kind = "pwlu" if joined and _on_a_grid(function) else "piecewise_linear"
    if count == 1 and function.is_continuous and {slope for slope, _ in function.lines} == {ZERO, ONE} and (
        _IDENTITY in function.lines):  # fmt: skip
        kind = "clip"
    return Activation(kind, f"piecewise linear with {count} breakpoint{plural} ({where}){shape}", exact=True)


def _joined(function: PiecewiseLinear) -> bool:
    """Whether its jumps are no more than what rounding leaves where tables of slopes and intercepts meet."""
    jump = size = ZERO
    places = zip(function.breaks, function.points, function.lines[:-1], function.lines[1:], strict=True)
    for x, point, (a, b), (c, d) in places:
        jump = max(jump, abs(a * x + b - point), abs(c * x + d - point))
        size = max(size, abs(a * x) + abs(b))
    return jump <= GRID_JITTER * size


def _on_a_grid(function: PiecewiseLinear) -> bool:
    """Whether three breakpoints or more are equally spaced, as those of a PWLU are; some of them may have vanished."""
    if not 3 <= len(function.breaks) <= MOST_INTERVALS:
        return False
    steps = np.diff(np.array([float(x) for x in function.breaks]))
    steps = steps / steps.min()
    return bool(steps.sum() <= MOST_INTERVALS and np.abs(steps - np.round(steps)).max() <= GRID_JITTER)


def _one_break(function: PiecewiseLinear) -> Activation | None:
    """LeakyReLU and the absolute value: bends at 0 only, slope 1 to the right."""
    bends_at_zero = function.breaks == (ZERO,) and function.points == (ZERO,)
    if not bends_at_zero or function.lines[1] != _IDENTITY or function.lines[0][1]:
        return None
    if function.lines[0][0] == -1:
        return Activation("abs", "absolute value", exact=True)
    return Activation("leaky_relu", f"LeakyReLU with slope {float(function.lines[0][0]):.6g}", exact=True)


def _clipped(function: PiecewiseLinear) -> Activation | None:
    """Clipped ReLU, Clip with any other bounds, and HardSigmoid: flat, sloped, flat."""
    if len(function.breaks) != 2 or not function.is_continuous or function.lines[0][0] or function.lines[2][0]:
        return None
    rises_through_zero = function.breaks[0] < 0 < function.breaks[1]
    if (function.lines[0][1], function.lines[2][1]) == (ZERO, ONE) and rises_through_zero:
        ends = " to ".join(f"{float(x):.4g}" for x in function.breaks)
        return Activation("hard_sigmoid", f"HardSigmoid rising from {ends}", exact=True)
    if function.lines[1] != _IDENTITY:
        return None
    low, high = (float(x) for x in function.breaks)
    kind = {(0.0, 6.0): "relu6"}.get((low, high), "clipped_relu" if low == 0 else "clip")
    return Activation(kind, f"{'clipped ReLU' if low == 0 else 'Clip'} [{low:.6g}, {high:.6g}]", exact=True)


# Odd numbers of points miss 0 nowhere and the kinks at -3 and 3 everywhere, so one wrong constant shows; the far ones
# show what is clipped.
_NEAR = np.linspace(-9.0, 9.0, 401) + 0.01
_FAR = np.array([-60.0, -30.0, -20.0, -12.0, 12.0, 20.0, 30.0, 60.0])
_POINTS = np.concatenate([_NEAR, _FAR])
_RELU = np.maximum(_POINTS, 0)
# Relative to max(1, |value|): constants are written with four digits now and then.
TOLERANCE = 2e-4
# A function with a few constants is off by a little more than the rounding of one.
_ROUNDINGS = 1.25
# What is not a multiple of a gated activation but by accident.
_LEAST_SCALE, _MOST_SCALE = 1e-2, 1e2


def classify_samples(program: Program, constants: npt.ArrayLike, *, unit: float = 0.0) -> Activation:
    """Name one channel of a smooth region by its values at some 400 points: the nearest known function.

    Args:
        program: The region.
        constants: One column of ``program.channels()``.
        unit: Unit roundoff of the tensor's type: what its constants may be off by.
    """
    values = sample(program, constants, np.concatenate([_POINTS, PROBES]))
    near = _Values(values[: _POINTS.size], values[_POINTS.size :], max(TOLERANCE, _ROUNDINGS * unit))
    with np.errstate(all="ignore"):
        found = near.known() or near.member(program, constants) or near.blend() or near.scaled()
    return found or Activation("unknown", "smooth or not recognised: not piecewise linear", exact=False)


def is_arithmetic(kind: str) -> bool:
    """Whether a name stands for a step of normalisations and positions, not for an activation.

    >>> is_arithmetic("sqrt"), is_arithmetic("silu")
    (True, False)
    """
    return any(known.arithmetic for known in KNOWN if known.kind == kind)


@functools.cache
def _known_values() -> tuple[Array, ...]:
    with np.errstate(all="ignore"):
        return tuple(np.asarray(known.function(_POINTS)) for known in KNOWN)


def _error(values: Array, known: Array) -> float:
    """Largest difference relative to ``max(1, |known|)``; infinite where only one of the two is finite."""
    finite = np.isfinite(known)
    if (np.isfinite(values) != finite).any():
        return np.inf
    difference = np.abs(values - known)[finite] / np.maximum(1, np.abs(known[finite]))
    return float(difference.max(initial=0.0))


@dataclasses.dataclass(frozen=True)
class _Values:
    """A function at ``_POINTS`` and at ``PROBES``, and how near to them a known one has to be."""

    values: Array
    probes: Array
    tolerance: float

    def known(self) -> Activation | None:
        """The nearest function without parameters."""
        errors = [_error(self.values, known) for known in _known_values()]
        best = int(np.argmin(errors))
        near = errors[best] <= self.tolerance
        return Activation(KNOWN[best].kind, KNOWN[best].name, exact=False) if near else None

    def member(self, program: Program, constants: npt.ArrayLike) -> Activation | None:
        """A function that is known but for its parameters."""
        if not np.isfinite(self.probes).all():
            return None
        for family in FAMILIES:
            fitted = family.fit(self.probes)
            if fitted is None or _error(self.values, family.function(_POINTS, *fitted)) > self.tolerance:
                continue
            if family.kind == "elu" and fitted[0] < 1 and self._blends_elu(program, constants):
                return Activation("blend", f"a blend of ReLU and {fitted[0]:.4g} ELU (alpha 1)", exact=False)
            member = Activation(family.kind, family.text.format(*fitted), exact=False)
            return (self.scaled() or member) if family.kind == "aptx" else member  # a scaled SiLU is an APTx too
        return None

    def _blends_elu(self, program: Program, constants: npt.ArrayLike) -> bool:
        """Whether ReLU and ELU are steps on the way: as a function, their blend is ELU with a smaller alpha."""
        elu = next(number for number, known in enumerate(KNOWN) if known.kind == "elu")
        wanted = [_RELU, _known_values()[elu]]
        for end in range(1, len(program.steps)):
            step = sample(dataclasses.replace(program, steps=program.steps[:end]), constants, _POINTS)
            wanted = [other for other in wanted if _error(step, other) > self.tolerance]
        return not wanted

    def blend(self) -> Activation | None:
        """``gamma act(x) + (1 - gamma) relu(x)`` for a known ``act``: what an unfinished schedule leaves behind."""
        best, text = self.tolerance, ""
        for known, act in zip(KNOWN, _known_values(), strict=True):
            if not known.gated:
                continue
            step = act - _RELU
            gamma = float(step @ (self.values - _RELU) / (step @ step))
            error = _error(self.values, _RELU + gamma * step)
            if 0 < gamma < 1 and error < best:
                best, text = error, f"a blend of ReLU and {gamma:.4g} {known.name}"
        text = text or self._blend_of_swish()
        return Activation("blend", text, exact=False) if text else None

    def _blend_of_swish(self) -> str:
        """The same for Swish with some beta, which two values on the left give away; empty where it is none."""
        far, near = self.probes[1] / -2, self.probes[2] / -1
        if not 0 < far < near:
            return ""
        beta = bisect(lambda b: float(sigmoid(np.array(-2 * b)) / sigmoid(np.array(-b))), float(far / near), 0.05, 50.0)
        if beta is None:
            return ""
        gamma = float(near / sigmoid(np.array(-beta)))
        blend = _RELU + gamma * (_POINTS * sigmoid(beta * _POINTS) - _RELU)
        if not 0 < gamma < 1 or _error(self.values, blend) > self.tolerance:
            return ""
        return f"a blend of ReLU and {gamma:.4g} Swish with beta {beta:.4g}"

    def scaled(self) -> Activation | None:
        """A multiple of an activation whose scale is one with its own constants: ``x * 0.51 * (1 + erf(...))``."""
        if not np.isfinite(self.values).all():
            return None
        for known, act in zip(KNOWN, _known_values(), strict=True):
            scale = float(act @ self.values / (act @ act)) if known.gated else 0.0
            if _LEAST_SCALE <= scale <= _MOST_SCALE and _error(self.values / scale, act) <= self.tolerance:
                return Activation(f"scaled_{known.kind}", f"{scale:.4g} times {known.name}", exact=False)
        return None


def summary(kinds: list[Activation], channels: int) -> Activation:
    """One description of all channels of a region, given those of its distinct channels."""
    details = {kind.detail for kind in kinds}
    if len(details) == 1:
        return kinds[0]
    names = sorted({kind.kind for kind in kinds})
    exact = all(kind.exact for kind in kinds)
    if set(names) <= {"leaky_relu", "relu", "identity", "abs"} and "leaky_relu" in names:
        return Activation("prelu", f"PReLU with its own slope for each of {channels} channels", exact=exact)
    kind = next((name for name, others in _CONTAINS.items() if name in names and set(names) <= others), "mixed")
    if len(names) == 1:
        return Activation(names[0], f"its own for each of {channels} channels", exact=exact)
    return Activation(kind, f"not the same in all {channels} channels: {', '.join(names)}", exact=exact)


# A layer whose channels have these names is a layer of the first one, with special cases among its channels.
_GATED = {known.kind for known in KNOWN if known.gated}
_PIECES = {"piecewise_linear", "abs", "relu", "leaky_relu", "clipped_relu", "relu6", "clip", "identity", "affine"}
_CONTAINS = {
    "pwlu": {"pwlu", *_PIECES},
    "piecewise_linear": _PIECES,
    "swish": {"swish", "silu", "gelu_sigmoid"},
    "blend": {"blend", "relu", "leaky_relu", "elu", "swish", *_GATED},
    "clipped_relu": {"clipped_relu", "relu6", "relu"},
    "elu": {"elu", "relu"},
    "affine": {"affine", "identity", "constant"},
}
