"""Names of functions from their values: parameters come back, and neighbours are told apart."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from relu_deploy.passes.classify import TOLERANCE, Activation, classify_piecewise_linear, classify_samples, summary
from relu_deploy.passes.known import FAMILIES, KNOWN, PROBES
from relu_deploy.passes.program import Builder, Program
from relu_deploy.passes.pwl import PiecewiseLinear


def swish(build: Builder, x: int, beta: float) -> int:
    return build.step("mul", x, build.fn("sigmoid", build.step("mul", build.const(beta), x)))


def elu(build: Builder, x: int, alpha: float) -> int:
    low = build.step("mul", build.const(alpha), build.step("add", build.fn("exp", x), build.const(-1.0)))
    return build.step("select", build.step("gt", x, build.const(0.0)), x, low)


def softplus(build: Builder, x: int, beta: float) -> int:
    return build.step("div", build.fn("softplus", build.step("mul", build.const(beta), x)), build.const(beta))


def squareplus(build: Builder, x: int, b: float) -> int:
    root = build.fn("sqrt", build.step("add", build.step("mul", x, x), build.const(b)))
    return build.step("mul", build.const(0.5), build.step("add", x, root))


UNITS = {"swish": swish, "elu": elu, "softplus": softplus, "squareplus": squareplus}


def named(make, *parameters: float):
    build = Builder()
    program: Program = build.finish(make(build, build.step("x"), *parameters))
    return classify_samples(program, program.constants[:, 0])


@pytest.mark.parametrize("kind", UNITS)
@given(parameter=st.floats(0.2, 5.0))
def test_parameters_come_back(kind, parameter):
    found = named(UNITS[kind], parameter)
    if found.kind != kind:  # at 1 and 1.702 there are names of their own
        alone = {"swish": {1.0: "silu", 1.702: "gelu_sigmoid"}}.get(kind, {})
        near = [name for value, name in alone.items() if abs(parameter - value) < 1e-2]
        assert [found.kind] == near
    else:
        numbers = re.findall(r"[\d.]+", found.detail)
        assert not numbers or float(numbers[-1]) == pytest.approx(parameter, rel=2e-3)


def gated(name: str, inner: str):
    return lambda build, x: build.step("mul", x, build.fn(name, build.fn(inner, x)))


ACTS = {
    "SiLU": lambda build, x: swish(build, x, 1.0),
    "GELU (sigmoid, 1.702)": lambda build, x: swish(build, x, 1.702),
    "Mish": gated("tanh", "softplus"),
    "TeLU": gated("tanh", "exp"),
    "Serf": gated("erf", "softplus"),
}


@given(gamma=st.floats(0.005, 0.995), name=st.sampled_from(sorted(ACTS)))
def test_a_blend_is_a_blend_by_its_values(gamma, name):
    def blend(build: Builder, x: int) -> int:
        relu = build.step("mul", build.const(1 - gamma), build.step("max", x, build.const(0.0)))
        return build.step("add", build.step("mul", build.const(gamma), ACTS[name](build, x)), relu)

    found = named(blend)
    assert found.kind == "blend"
    share = float(re.search(r"and ([\d.e-]+) ", found.detail)[1])
    assert share == pytest.approx(gamma, rel=0.02, abs=2e-3)


@pytest.mark.parametrize("known", KNOWN, ids=lambda known: known.kind)
def test_no_two_known_functions_are_within_each_others_reach(known):
    """Else the nearest of two could be the wrong one after rounding."""
    points = np.linspace(-9, 9, 401) + 0.01
    with np.errstate(all="ignore"):
        values = known.function(points)
        for other in KNOWN:
            theirs = other.function(points)
            if other is not known and (np.isfinite(values) == np.isfinite(theirs)).all():
                finite = np.isfinite(values)
                gap = np.abs(values - theirs)[finite] / np.maximum(1, np.abs(theirs[finite]))
                assert gap.max() > 2 * TOLERANCE, other.kind


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.kind)
def test_a_family_fits_its_own_members(family):
    parameters = {"sau": (0.1, 0.8), "aptx": (1.5, 0.5, 0.4)}.get(family.kind, (0.7,))
    found = family.fit(family.function(PROBES, *parameters))
    assert found == pytest.approx(parameters, rel=1e-6)


def test_a_grid_that_lost_breakpoints_is_still_one():
    def hinges(*places: float) -> PiecewiseLinear:
        x, total = PiecewiseLinear.identity(), PiecewiseLinear.constant(0)
        for index, place in enumerate(places):
            kink = x.minus(PiecewiseLinear.constant(Fraction(place))).maximum(PiecewiseLinear.constant(0))
            total = total.plus(kink.scaled(Fraction(index + 1, 3)))
        return total

    assert classify_piecewise_linear(hinges(-2, -1, 0, 1, 2)).kind == "pwlu"
    assert classify_piecewise_linear(hinges(-2, -1, 1, 2)).kind == "pwlu"
    assert classify_piecewise_linear(hinges(-2, -1, 0.3, 2)).kind == "piecewise_linear"
    assert classify_piecewise_linear(hinges(-1, 2)).kind == "piecewise_linear"


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["silu", "swish"], "swish"), (["relu", "blend"], "blend"), (["affine", "identity", "constant"], "affine"),
        (["relu", "leaky_relu", "identity"], "prelu"), (["relu", "pwlu", "piecewise_linear"], "pwlu"),
        (["relu6", "clipped_relu"], "clipped_relu"), (["silu", "relu"], "mixed"), (["mish", "elu"], "mixed"),
    ],
)  # fmt: skip
def test_channels_of_several_kinds(names, kind):
    kinds = [Activation(name, f"{name} {number}", exact=False) for number, name in enumerate(names)]
    assert summary(kinds, 8).kind == kind
