"""Factors between scales as integers: ``M = s_x s_w / s_y`` becomes a 31-bit mantissa and a right shift.

An accelerator without floats multiplies its int32 sum by the mantissa in 64 bits and shifts right, with rounding:

    code = clip(z_y + round(sum * mantissa / 2^shift))

Scales are float32 numbers, so every factor is a rational number, and the error of its mantissa is known exactly.

Source: Jacob et al. 2018, arXiv:1712.05877, section 2.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fractions import Fraction

# Mantissas take 31 bits, so that one and a sign fit int32.
MANTISSA_BITS = 31
_LOWEST, _HIGHEST = 1 << (MANTISSA_BITS - 1), (1 << MANTISSA_BITS) - 1
# Terms of a sum are brought to one shift, the larger one, but not further from the smaller than this: a code less its
# zero point takes 9 bits, a mantissa 31, and 9 + 31 + 22 bits leave room for two terms in 64.
SUM_SPREAD = 22


@dataclasses.dataclass(frozen=True)
class Multiplier:
    """A factor as integers: ``mantissa * 2**-shift``.

    Attributes:
        mantissa: Magnitude in ``[2^30, 2^31)`` with the sign of the factor; 0 for a factor of 0.
        shift: How far right, >= 0. Past 62 every product of an int32 sum gives 0.
        relative_error: ``mantissa * 2**-shift / factor - 1``, exact up to the rounding of this one number.
    """

    mantissa: int
    shift: int
    relative_error: float

    @property
    def value(self) -> Fraction:
        """The factor that the integers stand for."""
        return Fraction(self.mantissa, 1 << self.shift)


def multiplier(factor: Fraction) -> Multiplier:
    """The integers nearest to a factor.

    A factor of 2^31 and more, which only a nearly dead output has, becomes ``2^31 - 1`` without a shift: any sum but 0
    is then beyond every code, as it would be with the factor itself.

    >>> multiplier(Fraction(3, 4))
    Multiplier(mantissa=1610612736, shift=31, relative_error=0.0)
    >>> multiplier(Fraction(-1, 10)).mantissa, multiplier(Fraction(-1, 10)).shift
    (-1717986918, 34)
    >>> multiplier(Fraction(0))
    Multiplier(mantissa=0, shift=0, relative_error=0.0)
    """
    if factor == 0:
        return Multiplier(0, 0, 0.0)
    size, sign = abs(factor), 1 if factor > 0 else -1
    shift = MANTISSA_BITS - 1 - _exponent(size)
    mantissa = round(size * (1 << shift)) if shift >= 0 else _HIGHEST
    if mantissa > _HIGHEST and shift:  # rounded up to the next power of two
        mantissa, shift = _LOWEST, shift - 1
    shift, mantissa = max(shift, 0), min(mantissa, _HIGHEST)
    return Multiplier(sign * mantissa, shift, float(Fraction(mantissa, 1 << shift) / size - 1))


def multipliers(factors: Iterable[Fraction]) -> tuple[Multiplier, ...]:
    """One for each factor."""
    return tuple(multiplier(factor) for factor in factors)


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """What an integer sum can reach for any input whatever.

    Attributes:
        low: Smallest value, also of a part of the sum in any order.
        high: Largest value.
        bits: Width of a two's complement number that holds both.
        int32: Whether 32 bits are enough.
    """

    low: int
    high: int
    bits: int
    int32: bool


def accumulator(low: int, high: int) -> Accumulator:
    """Width of an accumulator for sums between two bounds.

    >>> accumulator(-128, 127).bits, accumulator(-129, 127).bits, accumulator(0, 255).bits
    (8, 9, 9)
    >>> accumulator(0, 1 << 31)
    Accumulator(low=0, high=2147483648, bits=33, int32=False)
    """
    bits = 1 + max(high.bit_length() if high >= 0 else (~high).bit_length(), (~low if low < 0 else low).bit_length())
    return Accumulator(low, high, bits, bits <= 32)


def _exponent(value: Fraction) -> int:
    """Largest e with ``2^e <= value``.

    >>> _exponent(Fraction(1)), _exponent(Fraction(7, 8)), _exponent(Fraction(9, 2))
    (0, -1, 2)
    """
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if value >= Fraction(2) ** guess else guess - 1
