"""Programs for tests: activations and blends built by hand, random ones, and what they compute by other means."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import numpy as np
from hypothesis import strategies as st

from relu_deploy.passes.program import Builder, Program

Act = Callable[[Builder, int], int]


def silu(b: Builder, x: int) -> int:
    return b.step("mul", x, b.fn("sigmoid", x))


def silu_by_division(b: Builder, x: int) -> int:
    return b.step("div", x, b.step("add", b.const(1.0), b.fn("exp", b.neg(x))))


def gelu(b: Builder, x: int) -> int:
    gate = b.step("add", b.const(1.0), b.fn("erf", b.step("mul", x, b.const(math.sqrt(0.5)))))
    return b.step("mul", b.step("mul", x, b.const(0.5)), gate)


def gelu_tanh(b: Builder, x: int) -> int:
    inner = b.step("add", x, b.step("mul", b.const(0.044715), b.fn("cube", x)))
    gate = b.step("add", b.const(1.0), b.fn("tanh", b.step("mul", b.const(math.sqrt(2 / math.pi)), inner)))
    return b.step("mul", x, b.step("mul", b.const(0.5), gate))


def mish(b: Builder, x: int) -> int:
    return b.step("mul", x, b.fn("tanh", b.fn("softplus", x)))


def elu(b: Builder, x: int) -> int:
    low = b.step("add", b.fn("exp", x), b.const(-1.0))
    return b.step("select", b.step("gt", x, b.const(0.0)), x, low)


def hardswish(b: Builder, x: int) -> int:
    gate = b.step(
        "max", b.const(0.0), b.step("min", b.const(1.0), b.step("add", b.step("div", x, b.const(6.0)), b.const(0.5)))
    )
    return b.step("mul", x, gate)


def softplus(b: Builder, x: int) -> int:
    return b.fn("softplus", x)


ACTS: dict[str, Act] = {
    "silu": silu, "silu by division": silu_by_division, "gelu": gelu, "gelu tanh": gelu_tanh, "mish": mish, "elu": elu,
    "hardswish": hardswish, "softplus": softplus,
}  # fmt: skip


def blend(act: Act, gamma: Any, rest: Any = None) -> Program:
    """``gamma act(x) + rest relu(x)``; ``rest`` is ``1 - gamma`` in float64 if it is not given."""
    b = Builder()
    x = b.step("x")
    relu = b.step("max", x, b.const(0.0))
    share = np.asarray(gamma, dtype=np.float64)
    other = b.const(1 - share if rest is None else rest)
    return b.finish(b.step("add", b.step("mul", b.const(share), act(b, x)), b.step("mul", other, relu)), -1)


_MP: dict[str, Callable[[Any], Any]] = {
    "exp": mpmath.exp, "log": mpmath.log, "sqrt": mpmath.sqrt, "erf": mpmath.erf, "tanh": mpmath.tanh,
    "sigmoid": lambda v: 1 / (1 + mpmath.exp(-v)), "softplus": lambda v: mpmath.log1p(mpmath.exp(v)),
    "softsign": lambda v: v / (1 + abs(v)), "atan": mpmath.atan, "asinh": mpmath.asinh, "sinh": mpmath.sinh,
    "sin": mpmath.sin, "cos": mpmath.cos, "cosh": mpmath.cosh, "floor": mpmath.floor, "ceil": mpmath.ceil,
    "cube": lambda v: v**3, "integer": lambda v: mpmath.floor(v) if v >= 0 else mpmath.ceil(v),
}  # fmt: skip
_NP: dict[str, Callable[[Any], Any]] = {
    "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "erf": np.vectorize(math.erf, otypes=[float]), "tanh": np.tanh,
    "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "softplus": lambda v: np.logaddexp(0, v),
    "softsign": lambda v: v / (1 + np.abs(v)), "atan": np.arctan, "asinh": np.arcsinh, "sinh": np.sinh, "sin": np.sin,
    "cos": np.cos, "cosh": np.cosh, "floor": np.floor, "ceil": np.ceil, "cube": lambda v: v**3, "integer": np.trunc,
}  # fmt: skip


def compute(program: Program, x: Any, channel: int = 0) -> Any:
    """A channel at ``x``: in float64 for an array, to 60 digits for an ``mpf``."""
    precise = isinstance(x, mpmath.mpf)
    functions = _MP if precise else _NP
    rules: dict[str, Callable[..., Any]] = {
        "add": lambda a, b: a + b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
        "max": max if precise else np.maximum, "min": min if precise else np.minimum,
        "gt": lambda a, b: (a > b) * 1.0, "ge": lambda a, b: (a >= b) * 1.0, "eq": lambda a, b: (a == b) * 1.0,
        "select": (lambda c, a, b: a if c == 1 else b) if precise else (lambda c, a, b: np.where(c == 1, a, b)),
    }  # fmt: skip
    values: list[Any] = []
    with mpmath.workdps(60), np.errstate(all="ignore"):
        for step in program.steps:
            args = [values[i] for i in step.args]
            if step.op == "x":
                values.append(x)
            elif step.op == "const":
                number = float(program.constants[int(step.param), min(channel, program.constants.shape[1] - 1)])
                values.append(mpmath.mpf(number) if precise else np.full_like(x, number))
            elif step.op == "fn":
                values.append(functions[str(step.param)](args[0]))
            elif step.op == "lookup" and isinstance(step.param, bytes):
                values.append(np.frombuffer(step.param)[args[0].astype(int)])
            else:
                values.append(rules[step.op](*args))
    return values[-1]


Grower = Callable[[Builder, int], int]
_NUMBERS = st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 3.0])
_SMOOTH = st.sampled_from(["tanh", "sigmoid", "erf", "softplus", "softsign", "atan", "asinh", "sin", "cos"])


def _grow(parts: st.SearchStrategy[Grower]) -> st.SearchStrategy[Grower]:
    two = st.tuples(parts, parts)
    return st.one_of(
        st.tuples(_SMOOTH, parts).map(lambda p: lambda b, x: b.fn(p[0], p[1](b, x))),
        st.tuples(st.sampled_from(["add", "mul", "max", "min"]), parts, parts).map(
            lambda p: lambda b, x: b.step(p[0], p[1](b, x), p[2](b, x))
        ),
        st.tuples(_NUMBERS, parts).map(lambda p: lambda b, x: b.step("mul", b.const(p[0]), p[1](b, x))),
        st.tuples(st.sampled_from(["gt", "ge"]), parts, _NUMBERS, two).map(
            lambda p: (
                lambda b, x: b.step("select", b.step(p[0], p[1](b, x), b.const(p[2])), p[3][0](b, x), p[3][1](b, x))
            )
        ),
        parts.map(lambda p: lambda b, x: b.fn("floor", p(b, x))),
        parts.map(lambda p: lambda b, x: b.fn("cube", b.fn("tanh", p(b, x)))),
        parts.map(lambda p: lambda b, x: b.fn("exp", b.fn("sin", p(b, x)))),
        two.map(lambda p: lambda b, x: b.step("div", p[0](b, x), b.step("add", b.const(1.5), b.fn("cos", p[1](b, x))))),
    )


_LEAVES: st.SearchStrategy[Grower] = st.one_of(st.just(lambda b, x: x), _NUMBERS.map(lambda v: lambda b, x: b.const(v)))


def _program(grower: Grower) -> Program:
    b = Builder()
    x = b.step("x")
    return b.finish(grower(b, x))


def _bend(parts: st.SearchStrategy[Grower]) -> st.SearchStrategy[Grower]:
    """Only what keeps a function piecewise linear."""
    two = st.tuples(parts, parts)
    return st.one_of(
        st.tuples(st.sampled_from(["add", "max", "min"]), parts, parts).map(
            lambda p: lambda b, x: b.step(p[0], p[1](b, x), p[2](b, x))
        ),
        st.tuples(_NUMBERS, parts).map(lambda p: lambda b, x: b.step("mul", b.const(p[0]), p[1](b, x))),
        st.tuples(st.sampled_from(["gt", "ge"]), _NUMBERS, two).map(
            lambda p: lambda b, x: b.step("select", b.step(p[0], x, b.const(p[1])), p[2][0](b, x), p[2][1](b, x))
        ),
    )


PROGRAMS: st.SearchStrategy[Program] = st.recursive(_LEAVES, _grow, max_leaves=10).map(_program)
PIECEWISE: st.SearchStrategy[Program] = st.recursive(_LEAVES, _bend, max_leaves=10).map(_program)
