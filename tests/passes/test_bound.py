"""Bounds of regions: never below what is found by search, and close to it; near, far, and where floats give up."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from relu_deploy.passes.bound import LOOSENESS, largest_magnitude, minus_relu
from relu_deploy.passes.certificate import Certificate, Refusal, above, certify_within
from relu_deploy.passes.domain import Domain
from relu_deploy.passes.floats import FLOAT_TYPES
from relu_deploy.passes.program import Builder, Program
from relu_deploy.passes.pwl import RELU, PiecewiseLinear
from relu_deploy.passes.smooth import RISING, slope_range
from relu_deploy.passes.symbolic import evaluate
from relu_deploy.passes.tail import MOMENTS, tail

mpmath = pytest.importorskip("mpmath", reason="mpmath is not installed: pip install mpmath")
_SPEC = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(programs)
ACTS, PROGRAMS, blend, compute = programs.ACTS, programs.PROGRAMS, programs.blend, programs.compute

FLOAT32 = FLOAT_TYPES[TensorProto.FLOAT]


def exact(program: Program, column: np.ndarray) -> PiecewiseLinear | None:
    return evaluate(program, [float(v) for v in column])


def certify(program: Program, tolerance: float, low: float | None = None, high: float = 0.0) -> Certificate | Refusal:
    domain = None if low is None else Domain(np.array([low]), np.array([high]), "given")
    return certify_within(program, FLOAT32, exact, tolerance=tolerance, domain=domain)


def eps_of(program: Program, low: float | None = None, high: float = 0.0) -> float:
    found = certify(program, math.inf, low, high)
    assert found.eps is not None, found
    return found.eps


def dense(program: Program, low: float, high: float, channel: int = 0) -> float:
    """Largest distance from ReLU at many points: a grid, and points crowded about the best of them."""
    x = np.concatenate([np.linspace(low, high, 20001), np.random.default_rng(0).uniform(low, high, 20001)])
    for width in (1e-3, 1e-6):
        gap = np.abs(compute(program, x, channel) - np.maximum(x, 0))
        best = x[np.argsort(np.where(np.isfinite(gap), gap, -1))[-20:]]
        spread = np.linspace(-width, width, 101) * (high - low)
        x = np.clip((best[:, None] + spread).reshape(-1), low, high)
    gap = np.abs(compute(program, x, channel) - np.maximum(x, 0))
    return float(np.max(gap[np.isfinite(gap)], initial=0.0))


@settings(max_examples=200, deadline=None)
@given(PROGRAMS, st.sampled_from([(-8.0, 8.0), (-0.5, 0.75), (-100.0, 3.0), (0.0, 2.0), (-3.0, -1.0)]))
def test_a_bound_is_never_below_what_a_search_finds(program, ends):
    low, high = ends
    bound = float(largest_magnitude(minus_relu(program), np.array([low]), np.array([high]))[0])
    found = dense(program, low, high)
    assert bound >= found * (1 - 1e-9) - 1e-9


@settings(max_examples=100, deadline=None)
@given(programs.PIECEWISE)
def test_piecewise_linear_and_smooth_analysis_agree(program):
    """Where a function is piecewise linear its distance is exact; branch and bound knows nothing of that."""
    function = exact(program, program.constants[:, 0] if len(program.constants) else np.array([]))
    assert function is not None
    distance = float(function.distance(RELU, Fraction(-8), Fraction(8)))
    bound = float(largest_magnitude(minus_relu(program), np.array([-8.0]), np.array([8.0]))[0])
    assert bound >= distance * (1 - 1e-12)
    assert bound <= distance * (1 + 2 * LOOSENESS) + 1e-9


@pytest.mark.parametrize("act", sorted(ACTS))
def test_blends_are_bounded_closely_and_quickly(act):
    program = blend(ACTS[act], 0.01)
    start = time.perf_counter()
    bound = float(largest_magnitude(minus_relu(program), np.array([-64.0]), np.array([64.0]))[0])
    assert time.perf_counter() - start < 1  # takes 10 ms
    found = dense(program, -64, 64)
    assert found <= bound <= found * (1 + 2 * LOOSENESS) + 1e-12


@pytest.mark.parametrize("act", sorted(ACTS))
def test_blends_are_bounded_on_the_whole_line(act):
    """At every magnitude that float32 has, to 60 digits; gamma is a power of two, so that weights sum to 1."""
    program = blend(ACTS[act], 2.0**-7)
    if (
        act == "silu by division"
    ):  # exp overflows, so that a float says x / inf; real arithmetic has a bound all the same
        assert "in float32 not finite" in str(certify(program, math.inf))
        return
    found = certify(program, math.inf)
    assert isinstance(found, Certificate), found
    assert found.slope == 0
    assert found.eps <= dense(program, -20, 20) * 1.01
    for power in range(-20, 128):
        for x in (mpmath.mpf(2) ** power, -(mpmath.mpf(2) ** power)):
            if power < 20 or act != "gelu tanh":
                assert abs(compute(program, x) - max(x, 0)) <= found.eps


def test_rounded_weights_are_stated_apart():
    share, rest = float(np.float32(0.01)), float(np.float32(0.99))
    found = certify(blend(ACTS["silu"], share, rest), 0.01)
    assert isinstance(found, Certificate)
    assert 0 < found.slope == pytest.approx(share + rest - 1)
    for power in range(-10, 127):
        for side in (1, -1):
            x = side * mpmath.mpf(2) ** power
            assert abs(compute(blend(ACTS["silu"], share, rest), x) - max(x, 0)) <= found.eps + found.slope * max(x, 0)
    assert "of rounded weights" in str(found)
    wrong = certify(blend(ACTS["silu"], share, rest + 1e-5), 0.01)
    assert isinstance(wrong, Refusal)
    ranged = certify(blend(ACTS["silu"], share, rest), 0.01, -1e7, 1e7)
    assert isinstance(ranged, Refusal)  # there, it is more than the tolerance
    assert ranged.eps is not None
    assert ranged.eps >= found.slope * 1e7


def test_a_slope_where_relu_is_zero_is_no_rounding():
    b = Builder()
    x = b.step("x")
    leaky = b.step("select", b.step("gt", b.const(0.0), x), b.step("mul", b.const(1e-30), x), x)
    assert "no bound" in str(certify(b.finish(leaky), 0.1))
    found = certify(b.finish(leaky), 0.1, -1e6, 1e6)
    assert isinstance(found, Certificate)
    assert found.eps >= 1e-24 * (1 - 1e-12)


@settings(max_examples=100, deadline=None)
@given(programs.PIECEWISE)
def test_certificates_of_piecewise_linear_functions_hold_everywhere(program):
    found = certify(program, math.inf)
    if isinstance(found, Refusal):
        return
    function = exact(program, program.constants[:, 0] if len(program.constants) else np.array([]))
    assert function is not None
    places = [Fraction(n, 4) for n in range(-40, 41)] + [
        side * Fraction(2) ** p for p in range(4, 127) for side in (1, -1)
    ]
    for x in [*places, *function.breaks, *(b + Fraction(1, 10**9) for b in function.breaks)]:
        assert abs(function(x) - max(x, 0)) <= Fraction(found.eps) + Fraction(found.slope) * max(x, 0)


def spiked(height: float, width: float, at: float) -> Program:
    """ReLU and a triangle that any grid misses."""
    b = Builder()
    x = b.step("x")
    off = b.step("add", x, b.const(-at))
    inside = b.step("add", b.const(width), b.neg(b.step("max", off, b.neg(off))))
    spike = b.step("mul", b.const(height / width), b.step("max", inside, b.const(0.0)))
    return b.finish(b.step("add", b.step("max", x, b.const(0.0)), spike))


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-12, 1e-3), st.floats(-1e3, 1e3))
def test_a_narrow_spike_is_found(height, width, at):
    assert eps_of(spiked(height, width, at)) >= height * (1 - 1e-6)
    assert isinstance(certify(spiked(height, width, at), height / 2), Refusal)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-3, 10), st.floats(1e-6, 1e-3), st.floats(-100, 100))
def test_a_narrow_smooth_spike_is_found(height, width, at):
    """``height sech^2((x - at) / width)``: no breakpoint tells where it is."""
    b = Builder()
    x = b.step("x")
    t = b.fn("tanh", b.step("mul", b.step("add", x, b.const(-at)), b.const(1 / width)))
    spike = b.step("mul", b.const(height), b.step("add", b.const(1.0), b.neg(b.step("mul", t, t))))
    program = b.finish(b.step("add", b.step("max", x, b.const(0.0)), spike))
    bound = float(largest_magnitude(minus_relu(program), np.array([-128.0]), np.array([128.0]))[0])
    assert height * (1 - 1e-6) <= bound <= height * 1.01


@pytest.mark.parametrize(("step", "most"), [(1.0, 0.0101), (2.0**-6, 0.0101), (2.0**-10, 0.011)])
def test_a_wave_that_vanishes_on_a_grid_is_found(step, most):
    """The finest has more maxima than there are boxes, so that its bound is a little loose."""
    b = Builder()
    x = b.step("x")
    wave = b.step("mul", b.const(0.01), b.fn("sin", b.step("mul", x, b.const(math.pi / step))))
    program = b.finish(b.step("add", b.step("max", x, b.const(0.0)), wave))
    assert float(np.abs(compute(program, np.arange(-8, 8, step)) - np.maximum(np.arange(-8, 8, step), 0)).max()) < 1e-10
    assert 0.01 <= eps_of(program, -8, 8) <= most


@pytest.mark.parametrize("at", [10.0, 1e6, 1e30])
def test_a_kink_far_out_counts_where_it_is_in_the_domain(at):
    b = Builder()
    x = b.step("x")
    program = b.finish(b.step("min", b.step("max", x, b.const(0.0)), b.const(at)))
    assert isinstance(certify(program, 0.1), Refusal)
    assert isinstance(certify(program, 0.1, -1, 2 * at), Refusal)
    found = certify(program, 0.0, -1, at)
    assert isinstance(found, Certificate)
    assert (found.eps, found.low, found.high, found.whole) == (0, -1, at, False)


def test_what_overflows_is_refused_where_it_does():
    b = Builder()
    x = b.step("x")
    small = b.step("mul", b.const(1e-30), b.fn("exp", x))
    program = b.finish(b.step("add", b.step("max", x, b.const(0.0)), small))
    assert isinstance(certify(program, 1.0), Refusal)
    assert isinstance(certify(program, 1.0, -10, 200), Refusal)
    found = certify(program, 1.0, -10, 60)
    assert isinstance(found, Certificate)
    assert 1e-30 * math.exp(60) <= found.eps <= 1.01e-30 * math.exp(60)


def test_overflow_between_two_steps_is_refused_although_real_arithmetic_has_no_qualms():
    b = Builder()
    x = b.step("x")
    far = b.step("mul", b.step("mul", b.step("max", x, b.const(0.0)), b.const(2.0**100)), b.const(2.0**-100))
    assert "in float32 not finite" in str(certify(b.finish(far), 0.1, -1, 1e20))
    assert isinstance(certify(b.finish(far), 0.1, -1, 1e6), Certificate)


def test_what_has_no_bound_is_not_searched_for_long():
    b = Builder()
    x = b.step("x")
    program = minus_relu(b.finish(b.fn("exp", b.step("mul", x, x))))
    largest = np.array([FLOAT32.largest])
    start = time.perf_counter()
    assert math.isinf(largest_magnitude(program, -largest, largest)[0])
    assert time.perf_counter() - start < 1  # takes 3 ms


def test_channels_are_bounded_each_on_its_own_domain():
    gammas = np.array([0.5, 0.01, 0.25])
    program = blend(ACTS["silu"], gammas)
    narrow = Domain(np.array([0.0, -9.0, 0.0]), np.array([1e-3, 9.0, 1e-3]), "calibrated")
    found = certify_within(program, FLOAT32, exact, tolerance=0.01, domain=narrow)
    assert isinstance(found, Certificate)
    assert found.eps == pytest.approx(0.01 * 0.27846, rel=0.01)
    refused = certify_within(program, FLOAT32, exact, tolerance=0.01, domain=None)
    assert isinstance(refused, Refusal)
    assert refused.eps == pytest.approx(0.5 * 0.27846, rel=0.01)


def test_half_a_thousand_channels_take_a_second():
    program = blend(ACTS["gelu"], np.linspace(0.001, 0.02, 512))
    start = time.perf_counter()
    found = certify(program, 0.01)
    assert isinstance(found, Certificate)
    assert found.eps == pytest.approx(0.02 * 0.17, rel=0.01)
    assert time.perf_counter() - start < 5  # takes 0.6 s


@settings(max_examples=150, deadline=None)
@given(PROGRAMS, st.sampled_from([1, -1]), st.sampled_from([4.0, 16.0, 64.0]))
def test_a_tail_is_a_line_and_a_remainder_within_its_moments(program, side, start):
    difference = minus_relu(program)
    found = tail(difference, [float(row[0]) for row in difference.constants], side, start)
    assume(found is not None)
    assert found is not None
    with mpmath.workdps(60):
        for factor in (1, 1.0001, 1.5, 4, 1e3, 1e9):
            x = side * mpmath.mpf(start) * factor
            line = mpmath.mpf(found.slope.numerator) / found.slope.denominator * x
            line += mpmath.mpf(found.offset.numerator) / found.offset.denominator
            remainder = abs(compute(difference, x) - line)
            for power in range(MOMENTS):
                # What 60 digits cannot tell from 0.
                assert remainder * abs(x) ** power <= found.moments[power] + mpmath.mpf(10) ** -45 * abs(x) ** (
                    power + 1
                )


def test_a_tail_knows_the_saturating_functions():
    for act in sorted(set(ACTS) - {"silu by division"}):
        program = minus_relu(blend(ACTS[act], 2.0**-7))
        for side in (1, -1):
            found = tail(program, [float(row[0]) for row in program.constants], side, 64.0)
            assert found is not None, act
            assert found.slope == 0
            assert found.moments[1] < 1e-9


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        sorted({*RISING, "sin", "cos", "cosh"} - {"floor", "ceil", "round", "integer", "float16", "bfloat16"})
    ),
    st.floats(-20, 20),
    st.floats(0, 3),
)
def test_slopes_lie_in_their_range(name, low, width):
    assume(name not in ("log", "sqrt") or low > 1e-3)
    down, up = slope_range(name, np.array([low]), np.array([low + width]))
    for share in (0.0, 0.3, 0.5, 0.99, 1.0):
        slope = float(mpmath.diff(programs._MP[name], mpmath.mpf(low + width * share)))
        assert down[0] - 1e-9 * abs(down[0]) - 1e-15 <= slope <= up[0] + 1e-9 * abs(up[0]) + 1e-15


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-300, 1e300), st.integers(1, 6))
def test_numbers_are_shown_rounded_up(value, digits):
    assert value <= float(above(value, digits)) <= value * (1 + 10.0 ** (1 - digits)) * (1 + 1e-12)


def test_certificates_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        certify(blend(ACTS["silu"], 0.5), 1.0).eps = 0.0
