"""The noise model and the choice of factors: what the mathematics promises, on any layers and tensors."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.int8.fuse_factors import choose_factors
from relu_deploy.int8.fuse_noise import Bounds, Product, Span, noise
from relu_deploy.int8.fuse_terms import headroom


@st.composite
def problems(draw, *, shared=None):
    """Terms over 12 channels: tensors of them, layers from some to others, with sizes that differ by 2^20."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    terms = []
    for _ in range(draw(st.integers(1, 3))):
        ids = rng.permutation(12)[: rng.integers(2, 9)]
        size = 2.0 ** rng.uniform(-10, 10, ids.size)
        below = np.where(rng.random(ids.size) < 0.5, 0, size * rng.random(ids.size))
        signed = bool(rng.random() < 0.5)
        terms.append(Span(ids, below, size, 2.0 ** rng.uniform(-8, 8, ids.size), 127 if signed else 255, signed))
    for _ in range(draw(st.integers(1, 3))):
        rows, columns = rng.integers(1, 6, 2)
        grouped = bool(rng.random() < 0.4)
        inputs = rng.integers(0, 12, (rows, columns)) if grouped else rng.permutation(12)[None, :columns]
        one_step = bool(rng.random() < 0.5) if shared is None else shared
        peak = 2.0 ** rng.uniform(-8, 8, (rows, columns)) * (rng.random((rows, columns)) < 0.9)
        energy, weight = 2.0 ** rng.uniform(-8, 8, inputs.shape), 2.0 ** rng.uniform(-8, 8, rows)
        terms.append(Product(inputs, rng.permutation(12)[:rows], peak, energy, weight, 127, one_step))
    return terms, rng


@settings(max_examples=40, deadline=None)
@given(problems())
def test_never_more_noise_than_without(problem):
    terms, rng = problem
    free = rng.random(12) < 0.8
    for powers_of_two in (True, False):
        factors = choose_factors(terms, free, powers_of_two=powers_of_two)
        assert (factors[~free] == 1).all()
        assert (factors > 0).all()
        assert noise(terms, factors) <= noise(terms, np.ones(12)) * (1 + 1e-9)
        if powers_of_two:
            assert (np.frexp(factors)[0] == 0.5).all()


@settings(max_examples=40, deadline=None)
@given(problems(shared=False))
def test_the_bound_holds_within_its_limits_and_meets_the_noise(problem):
    """``falling / g^2 + rising g^2`` is the noise at the factors it was made at, and no less anywhere inside."""
    terms, rng = problem
    here = 2.0 ** rng.uniform(-3, 3, 12)
    bounds = Bounds.of(terms, here)

    def bound(g):
        return float((bounds.falling / g**2 + bounds.rising * g**2).sum())

    assert bound(here) == pytest.approx(noise(terms, here), rel=1e-9)
    assert (bounds.least <= here * (1 + 1e-9)).all()
    assert (bounds.most >= here * (1 - 1e-9)).all()
    low, high = np.maximum(bounds.least, here / 64), np.minimum(bounds.most, here * 64)
    inside = low * (high / low) ** rng.random(12)
    assert noise(terms, inside) <= bound(inside) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_noise_does_not_depend_on_the_unit(problem):
    """All channels of a network times one number: every step grows with them, and so does the signal."""
    terms, _ = problem
    assert noise(terms, np.full(12, 8.0)) == pytest.approx(noise(terms, np.ones(12)), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(problems())
def test_choosing_twice_finds_nothing_more(problem):
    terms, _ = problem
    free = np.ones(12, dtype=bool)
    factors = choose_factors(terms, free)
    scaled = [rescaled(term, factors) for term in terms]
    assert noise(scaled, np.ones(12)) == pytest.approx(noise(terms, factors), rel=1e-9)
    # Blocks that are chosen one after the other may leave a little: LEAST_GAIN a block.
    assert noise(scaled, choose_factors(scaled, free)) >= noise(terms, factors) * 0.9


def rescaled(term, factors):
    """The term of the network whose channels have been scaled."""
    if isinstance(term, Span):
        g = factors[term.ids]
        return Span(term.ids, term.below * g, term.above * g, term.gain / g**2, term.codes, term.signed)
    g, h = factors[term.inputs], factors[term.outputs]
    return Product(
        term.inputs, term.outputs, term.peak * h[:, None] / g, term.energy * g**2, term.weight / h**2, term.codes,
        term.shared,
    )  # fmt: skip


def test_even_activations_where_weights_do_not_mind():
    """Depthwise weights have a scale each: activations are evened out in full."""
    above = np.array([1.0, 1 / 4, 1 / 32, 1.0])
    ids = np.arange(4)
    layer = Product(ids[:, None], ids + 4, np.ones((4, 1)), above[:, None] ** 2 / 16, np.ones(4), 127, False)
    terms = [Span(ids, np.zeros(4), above, np.ones(4), 255, False), layer]
    free = np.arange(8) < 4
    assert choose_factors(terms, free).tolist() == [1, 4, 32, 1, 1, 1, 1, 1]


def test_rows_of_a_layer_with_one_step():
    """One step for the layer: small rows are enlarged where nothing else speaks against it."""
    ids = np.arange(3)
    layer = Product(np.array([[3]]), ids, np.array([[1.0], [1 / 8], [1 / 2]]), np.ones((1, 1)), np.ones(3), 127, True)
    assert choose_factors([layer], np.arange(4) < 3).tolist() == [1, 8, 2, 1]


@given(st.floats(3, 1e9), st.sampled_from([127, 255]))
def test_headroom_falls_with_the_values_seen(seen, codes):
    assert headroom(seen, codes) >= headroom(seen * 2, codes) >= 1


def test_headroom_makes_clipping_as_small_as_rounding():
    """Of values with an exponential tail: measured, with the largest of 64 where the tail says it is."""
    n, codes = 64, 127
    room = headroom(n, codes)
    values = np.random.default_rng(0).exponential(1, 4_000_000)
    largest = np.log(n)
    clipping = np.mean(np.maximum(values - room * largest, 0) ** 2)
    rounding = (largest / codes) ** 2 / 12
    assert 0.7 < clipping / rounding < 1.4
    assert np.mean(np.maximum(values - largest, 0) ** 2) > 100 * rounding
