"""Piecewise-linear functions against evaluation of the same expression at every interesting point."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.passes.pwl import MAX_BREAKS, NotPiecewiseLinearError, PiecewiseLinear

Pair = tuple[PiecewiseLinear, Callable[[Fraction], Fraction]]

NUMBERS = st.integers(-8, 8).map(lambda n: Fraction(n, 2))
X: Pair = (PiecewiseLinear.identity(), lambda x: x)


def constant(c: Fraction) -> Pair:
    return PiecewiseLinear.constant(c), lambda x: c


def grow(pairs: st.SearchStrategy[Pair]) -> st.SearchStrategy[Pair]:
    two = st.tuples(pairs, pairs)
    return st.one_of(
        two.map(lambda p: (p[0][0].plus(p[1][0]), lambda x: p[0][1](x) + p[1][1](x))),
        two.map(lambda p: (p[0][0].minus(p[1][0]), lambda x: p[0][1](x) - p[1][1](x))),
        two.map(lambda p: (p[0][0].maximum(p[1][0]), lambda x: max(p[0][1](x), p[1][1](x)))),
        two.map(lambda p: (p[0][0].minimum(p[1][0]), lambda x: min(p[0][1](x), p[1][1](x)))),
        two.map(lambda p: (p[0][0].after(p[1][0]), lambda x: p[0][1](p[1][1](x)))),
        st.tuples(pairs, NUMBERS).map(lambda p: (p[0][0].scaled(p[1]), lambda x: p[1] * p[0][1](x))),
        pairs.map(lambda p: (p[0].greater(), lambda x: Fraction(p[1](x) > 0))),
        pairs.map(lambda p: (p[0].greater_equal(), lambda x: Fraction(p[1](x) >= 0))),
        pairs.map(lambda p: (p[0].equal_zero(), lambda x: Fraction(p[1](x) == 0))),
        st.tuples(pairs, pairs, pairs).map(
            lambda p: (
                p[0][0].greater().choose(p[1][0], p[2][0]),
                lambda x: p[1][1](x) if p[0][1](x) > 0 else p[2][1](x),
            )
        ),
        st.tuples(pairs, pairs, pairs).map(
            lambda p: (
                p[0][0].equal_zero().choose(p[1][0], p[2][0]),
                lambda x: p[1][1](x) if p[0][1](x) == 0 else p[2][1](x),
            )
        ),
        st.tuples(NUMBERS, pairs, pairs).map(lambda p: (_until(p[0], p[1][0], p[2][0]), _chosen(*p))),
    )


def _until(turn: Fraction, first: PiecewiseLinear, second: PiecewiseLinear) -> PiecewiseLinear:
    """``first`` up to a place, ``second`` behind it: what chains of Where are made of."""
    return PiecewiseLinear.constant(turn).minus(PiecewiseLinear.identity()).greater_equal().choose(first, second)


def _chosen(turn: Fraction, first: Pair, second: Pair) -> Callable[[Fraction], Fraction]:
    return lambda x: first[1](x) if x <= turn else second[1](x)


EXPRESSIONS = st.recursive(st.one_of(st.just(X), NUMBERS.map(constant)), grow, max_leaves=8)


@settings(max_examples=150, deadline=None)
@given(EXPRESSIONS, st.lists(st.fractions(-100, 100, max_denominator=64), max_size=10))
def test_agrees_with_plain_evaluation_everywhere_it_can_bend(pair, extra):
    function, plain = pair
    places = {Fraction(0), *extra, *function.breaks}
    places |= {b + d for b in function.breaks for d in (Fraction(1, 10**6), Fraction(-1, 10**6), 50, -50)}
    for x in places:
        assert function(x) == plain(x)


@settings(max_examples=80, deadline=None)
@given(EXPRESSIONS, EXPRESSIONS)
def test_equal_exactly_when_the_difference_is_zero(first, second):
    f, g = first[0], second[0]
    assert (f == g) == (f.minus(g) == PiecewiseLinear.constant(0))
    assert f.plus(g).minus(g) == f  # canonical: no breakpoint is left over


def test_strict_and_weak_comparison_differ_in_one_point():
    x = X[0]
    assert x.greater() != x.greater_equal()
    assert x.greater_equal().minus(x.greater()) == x.equal_zero()
    assert x.greater().times(x) == x.greater_equal().times(x)


@pytest.mark.parametrize(
    ("center", "limit", "same"), [(100, 50, True), (100, 99, False), (100, 98, True), (-3, 2, True)]
)
def test_equality_on_a_domain_sees_the_edge(center, limit, same):
    x = X[0]
    spike = PiecewiseLinear.constant(1).minus(x.plus(PiecewiseLinear.constant(-center)).maximum(
        PiecewiseLinear.constant(center).minus(x))).maximum(PiecewiseLinear.constant(0))  # fmt: skip
    f = x.maximum(PiecewiseLinear.constant(0)).plus(spike.scaled(Fraction(1, 10**30)))
    # The spike is positive on the open interval (center - 1, center + 1) only; it touches 99 with value 0.
    expected = same or limit <= abs(center) - 1
    assert f.is_relu(Fraction(limit)) is expected
    assert not f.is_relu()


def test_a_jump_in_the_edge_point_itself_counts():
    x = X[0]
    at_two = x.minus(PiecewiseLinear.constant(2)).equal_zero()
    f = x.maximum(PiecewiseLinear.constant(0)).plus(at_two)
    assert not f.is_relu(Fraction(2))
    assert f.is_relu(Fraction(2) - Fraction(1, 1 << 40))


def test_a_parabola_is_refused():
    with pytest.raises(NotPiecewiseLinearError, match="parabola"):
        X[0].times(X[0])


def test_a_tower_of_absolute_values_is_refused_before_it_is_slow():
    f, one = X[0], PiecewiseLinear.constant(1)
    with pytest.raises(NotPiecewiseLinearError, match=str(MAX_BREAKS)):
        functools.reduce(
            lambda g, k: g.maximum(g.scaled(-1)).minus(one.scaled(Fraction(1 << 40, 1 << k))), range(40), f
        )


def test_reciprocal_of_a_step_and_of_a_zero():
    step = X[0].greater().plus(PiecewiseLinear.constant(1))
    assert step.reciprocal()(Fraction(3)) == Fraction(1, 2)
    with pytest.raises(NotPiecewiseLinearError, match="reciprocal"):
        X[0].greater().reciprocal()
