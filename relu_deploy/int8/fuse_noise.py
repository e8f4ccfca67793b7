"""How much noise rounding to INT8 makes, as a function of the channels' factors: what channel fusion minimises.

Factors g multiply the channels of activations; the producer's weights are multiplied and the consumer's divided, so in
units of the original network

* an activation with one step for the whole tensor, D(g) = max g_c M_c / codes, has noise D^2 / (12 g_c^2) on channel c;
* a layer whose weights have a step r_o for each output channel, r_o(g) = max_c |W_oc| / g_c / codes, makes noise
  sum_c r_o^2 g_c^2 E[x_c^2] / 12 on output o; with one step for the layer it is max_o (g_o r_o) / g_o instead.

Evening out the activations (g_c = 1/M_c) makes the first as small as it can be and leaves the consumer's weights uneven
within a row, which makes the second larger; the sum of both, each at the outputs of the layers where it arrives and
relative to the signal there, is what counts.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Numbers = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Span:
    """A tensor that is rounded with one step.

    Attributes:
        ids: Numbers of its channels, ``(C,)``.
        below: How far each reaches below 0, ``(C,)``, tensor units.
        above: How far above.
        gain: What noise of power 1 on a channel does to the layers that read it, ``(C,)``.
        codes: Steps in the range: 255 unsigned, 127 on each side signed.
        signed: Steps are symmetric around 0.
    """

    ids: Numbers
    below: Array
    above: Array
    gain: Array
    codes: int
    signed: bool

    def step(self, g: Array) -> float:
        """Tensor units per code."""
        below, above = float((g[self.ids] * self.below).max()), float((g[self.ids] * self.above).max())
        return (max(below, above) if self.signed else below + above) / self.codes

    def noise(self, g: Array) -> float:
        """Noise over signal that arrives at the readers."""
        return self.step(g) ** 2 / 12 * float((self.gain / g[self.ids] ** 2).sum())

    def bend(self, g: Array, bounds: Bounds) -> None:
        """Add what :class:`Bounds` collects, at these factors."""
        bounds.falling += np.bincount(self.ids, self.step(g) ** 2 / 12 * self.gain, bounds.falling.size)
        here = g[self.ids]
        below, above = (here * self.below).max(), (here * self.above).max()
        if self.signed:
            below = above = max(below, above)
        with np.errstate(divide="ignore", invalid="ignore"):
            np.minimum.at(bounds.most, self.ids, np.where(self.below > 0, below / self.below, np.inf))
            np.minimum.at(bounds.most, self.ids, np.where(self.above > 0, above / self.above, np.inf))


@dataclasses.dataclass(frozen=True)
class Product:
    """A layer whose weights are rounded.

    Attributes:
        inputs: Numbers of its input channels, ``(1, J)``, or ``(O, J)`` where it has groups.
        outputs: Numbers of its output channels, ``(O,)``.
        peak: Largest weight from J to O, ``(O, J)``.
        energy: Second moment of the input times kernel positions, shape of ``inputs``.
        weight: How much noise on an output counts, ``(O,)``.
        codes: Largest weight code.
        shared: One step for the whole layer.
    """

    inputs: Numbers
    outputs: Numbers
    peak: Array
    energy: Array
    weight: Array
    codes: int
    shared: bool

    def noise(self, g: Array) -> float:
        """Noise over signal, from its own weights."""
        return float(self._each(g).sum())

    def bend(self, g: Array, bounds: Bounds) -> None:
        """Add what :class:`Bounds` collects, at these factors."""
        steps, rows = self._steps(g), self._rows(g)
        shares = self.weight * steps**2 / (12 * self.codes**2)
        # Without groups all rows have the same columns.
        rising = shares.sum() * self.energy if len(self.inputs) == 1 else shares[:, None] * self.energy
        least = self.peak / np.maximum(steps, np.finfo(np.float64).tiny)[:, None]
        least = least.max(axis=0, keepdims=True) if len(self.inputs) == 1 else least
        bounds.rising += np.bincount(self.inputs.reshape(-1), rising.reshape(-1), bounds.rising.size)
        np.maximum.at(bounds.least, self.inputs.reshape(-1), least.reshape(-1))
        if self.shared:
            bounds.falling += np.bincount(self.outputs, self._each(g) * g[self.outputs] ** 2, bounds.falling.size)
            top = float((g[self.outputs] * rows).max())
            with np.errstate(divide="ignore", invalid="ignore"):
                np.minimum.at(bounds.most, self.outputs, np.where(rows > 0, top / rows, np.inf))

    def _rows(self, g: Array) -> Array:
        """Largest weight of each row."""
        return np.asarray((self.peak * (1 / g[self.inputs])).max(axis=1))

    def _steps(self, g: Array) -> Array:
        """Largest weight that decides the step of each row, in units of that row's output."""
        rows = self._rows(g)
        return (g[self.outputs] * rows).max() / g[self.outputs] if self.shared else rows

    def _each(self, g: Array) -> Array:
        signal = (g[self.inputs] ** 2 * self.energy).sum(axis=1)
        return np.asarray(self.weight * self._steps(g) ** 2 / (12 * self.codes**2) * signal)


@dataclasses.dataclass
class Bounds:
    """Noise as a sum of ``falling / g^2 + rising g^2`` by channel, right as long as every factor is in its bounds.

    Within them no step grows, so the sum bounds the noise from above, and meets it at the present factors: whatever
    makes the sum smaller makes the noise smaller.

    Attributes:
        falling: ``(n,)``.
        rising: ``(n,)``.
        least: Smallest factor for which no weight step grows.
        most: Largest for which no activation's, or layer's, does.
    """

    falling: Array
    rising: Array
    least: Array
    most: Array

    @classmethod
    def of(cls, terms: list[Span | Product], g: Array) -> Bounds:
        """Collected over all terms at the factors ``g``, ``(n,)``."""
        bounds = cls(np.zeros(g.size), np.zeros(g.size), np.zeros(g.size), np.full(g.size, np.inf))
        for term in terms:
            term.bend(g, bounds)
        return bounds


def noise(terms: list[Span | Product], g: Array) -> float:
    """Sum over the terms: the predicted noise over signal."""
    return sum(term.noise(g) for term in terms)
