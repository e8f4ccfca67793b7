"""The choice of factors: least predicted noise, never more than with all factors 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from relu_deploy.int8.fuse_noise import Array, Bounds, Numbers, Product, Span, noise

Term = Span | Product

# A gain below this is left: every factor that is not 1 is a weight that is not the one in the float file.
LEAST_GAIN = 0.01
# A channel smaller than this part of the largest is dead, whatever is left of it: one that training or pruning took
# out has numbers like 1e-39, and a factor that made up for that would leave float32.
_FAINTEST = 2.0**-40
_TINY = float(np.finfo(np.float32).tiny)
_ROUNDS = 12
_SWEEPS = 8


def choose_factors(terms: Sequence[Term], free: npt.NDArray[np.bool_], *, powers_of_two: bool = True) -> Array:
    """Choose factors that minimise the sum of the terms.

    Channels that share a tensor or a layer are chosen together. From several starts (activations evened out in part or
    in full, rows of the producers' weights evened out) factors descend on a bound that is separable by channel
    (:class:`relu_deploy.int8.fuse_noise.Bounds`), so each step can only lower the noise, and the best end is kept where
    it beats what was there.

    Args:
        terms: Of the network with all factors 1; channels are numbered from 0.
        free: Which channels may be scaled, ``(n,)``.
        powers_of_two: Only these; else any positive factor.

    Returns:
        float64 ``(n,)``; 1 where a channel is not free.
    """
    factors = np.ones(free.size)
    blocks = [_Block(terms, channels, free) for channels in _connected(terms, free)]
    for _ in range(_SWEEPS):
        better = [block.improve(factors, powers_of_two=powers_of_two) for block in blocks]
        if not any(better):
            break
    return factors


class _Block:
    """Channels that are chosen together, and the terms that they are in, with channels numbered from 0."""

    def __init__(self, terms: Sequence[Term], channels: Numbers, free: npt.NDArray[np.bool_]) -> None:
        wanted = np.zeros(free.size, dtype=bool)
        wanted[channels] = True
        mine = [term for term in terms if any(wanted[ids].any() for ids in _sides(term))]
        self.ids = np.unique(np.concatenate([ids.reshape(-1) for term in mine for ids in _all_ids(term)]))
        self.free = wanted[self.ids]
        self.terms = [_renumbered(term, self.ids) for term in mine]

    def improve(self, factors: Array, *, powers_of_two: bool) -> bool:
        """Put better factors into the array; False where none were found."""
        present = factors[self.ids]
        before = noise(self.terms, present)
        best, least = present, before * (1 - LEAST_GAIN)
        for start in self._starts(present):
            g = _descend(self.terms, _rounded(start) if powers_of_two else start, self.free, powers_of_two)
            if (found := noise(self.terms, g)) < least:
                best, least = g, found
        if best is present:
            return False
        factors[self.ids[self.free]] = best[self.free]
        return True

    def _starts(self, g: Array) -> Iterator[Array]:
        """Factors from which to descend; channels that are not free stay."""
        extent, rows, columns = self._extents(g)
        ways = [extent * t for t in (0.25, 0.5, 0.75, 1.0)]
        if rows.any():
            ways += [rows, rows / 2, (extent + rows) / 2, (rows - columns) / 2]
        fixed = extent[~self.free & (extent > 0)]
        if fixed.size:  # what the fixed channels leave below the largest
            ways.append(extent - fixed.min())
        yield g
        for way in ways:
            for phase in (0.0, 0.5):
                yield np.where(self.free, g * 2.0 ** (way + phase), g)

    def _extents(self, g: Array) -> tuple[Array, Array, Array]:
        """Octaves by which each channel lies below the largest: its values, producers' rows, readers' columns."""
        extent, rows, columns = (np.zeros(g.size) for _ in range(3))
        for term in self.terms:
            if isinstance(term, Span):
                reach = g[term.ids] * np.maximum(term.below, term.above)
                np.maximum.at(extent, term.ids, reach / max(reach.max(), np.finfo(np.float64).tiny))
            else:
                scaled = term.peak * g[term.outputs][:, None] / g[term.inputs]
                each = scaled.max(axis=1)
                if term.shared:
                    np.maximum.at(rows, term.outputs, each / max(each.max(), np.finfo(np.float64).tiny))
                share = scaled / np.maximum(each, np.finfo(np.float64).tiny)[:, None]
                np.maximum.at(columns, np.broadcast_to(term.inputs, share.shape), share)
        return _octaves(extent), _octaves(rows), _octaves(columns)


def alive_channels(reach: Array) -> npt.NDArray[np.bool_]:
    """Which channels hold anything.

    Args:
        reach: Largest magnitude of each channel of one tensor, ``(C,)``.

    >>> alive_channels(np.array([1.0, 1e-9, 1e-14, 0.0])).tolist()
    [True, True, False, False]
    """
    return np.asarray(reach >= max(_TINY, _FAINTEST * float(reach.max(initial=0))))


def choose_first(terms: Sequence[Term], alive: npt.NDArray[np.bool_]) -> Array:
    """Factors of the channels numbered from 0, any positive ones; what else the terms number stays as it is.

    Args:
        terms: As for :func:`choose_factors`.
        alive: Which of the first channels may be scaled, ``(C,)``.

    Returns:
        float64 ``(C,)``.
    """
    count = 1 + max(int(term.ids.max() if isinstance(term, Span) else term.outputs.max()) for term in terms)
    free = np.zeros(count, dtype=bool)
    free[: alive.size] = alive
    return choose_factors(terms, free, powers_of_two=False)[: alive.size]


def _descend(terms: list[Term], g: Array, free: npt.NDArray[np.bool_], powers_of_two: bool) -> Array:
    """Lower the noise step by step; never returns more of it than it was given."""
    present = noise(terms, g)
    for _ in range(_ROUNDS):
        new = _step(Bounds.of(terms, g), g, free, powers_of_two)
        found = noise(terms, new)
        if not found < present * (1 - 1e-4):
            break
        g, present = new, found
    return g


def _step(bounds: Bounds, g: Array, free: npt.NDArray[np.bool_], powers_of_two: bool) -> Array:
    """Minimise ``falling / g^2 + rising g^2`` inside the bounds, channel by channel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        best = (bounds.falling / bounds.rising) ** 0.25
    movable = free & (bounds.falling > 0) & (bounds.rising > 0)
    wanted = np.log2(np.where(movable, best, g))
    least, most = np.log2(np.maximum(bounds.least, 2.0**-60)), np.log2(np.minimum(bounds.most, 2.0**60))
    if powers_of_two:
        low = np.floor(wanted)
        cost = [bounds.falling * 4.0**-e + bounds.rising * 4.0**e for e in (low, low + 1)]
        wanted = np.where(cost[0] <= cost[1], low, low + 1)
        # Rounding noise of the logarithm must not shut out the present factor.
        least, most = np.ceil(least - 1e-9), np.floor(most + 1e-9)
    present = np.log2(g)
    wanted = np.clip(wanted, np.minimum(least, present), np.maximum(most, present))
    return np.where(movable, 2.0**wanted, g)


def _rounded(g: Array) -> Array:
    """Down to powers of two."""
    return np.asarray(2.0 ** np.floor(np.log2(g) + 1e-9))


def _octaves(share: Array) -> Array:
    """``-log2``; 0 where there is nothing to compare with."""
    return np.asarray(-np.log2(np.where(share > 0, np.minimum(share, 1.0), 1.0)))


def _sides(term: Term) -> list[Numbers]:
    """Channels that share a step or a row: of a layer with one step for all, its outputs do as well."""
    if isinstance(term, Span):
        return [term.ids]
    return [term.inputs, term.outputs] if term.shared else [term.inputs]


def _all_ids(term: Term) -> list[Numbers]:
    return [term.ids] if isinstance(term, Span) else [term.inputs, term.outputs]


def _renumbered(term: Term, ids: Numbers) -> Term:
    if isinstance(term, Span):
        return dataclasses.replace(term, ids=np.searchsorted(ids, term.ids))
    inputs, outputs = np.searchsorted(ids, term.inputs), np.searchsorted(ids, term.outputs)
    return dataclasses.replace(term, inputs=inputs, outputs=outputs)


def _connected(terms: Sequence[Term], free: npt.NDArray[np.bool_]) -> list[Numbers]:
    """Free channels by connected component, largest numbers of channels in no order."""
    label = np.arange(free.size)
    links = [side[free[side]] for term in terms for side in _sides(term)]
    links = [link for link in links if link.size]
    while True:
        before = label.copy()
        for link in links:
            label[link] = label[link].min()
        if (label == before).all():
            break
    linked = np.unique(np.concatenate([*links, np.zeros(0, np.int64)]))  # no term, no reason for a factor
    return [linked[label[linked] == root] for root in np.unique(label[linked])]
