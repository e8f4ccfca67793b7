"""From what was measured to the range that a quantiser covers: the extremes, or narrower where clipping costs less.

===============  =======================================================================================================
``max``          the extremes, as equation 2 of the paper has it: nothing is clipped
``percentile``   the narrowest range of bins with P of 100 values in it (99.99 by default); both tails are cut alike
``entropy``      the least Kullback-Leibler divergence between the values and their quantised form (TensorRT's choice)
``mse``          the least mean squared error between them
===============  =======================================================================================================

The last two depend on the number format, which calibration does not know: so a ranges file keeps histograms, and the
choice is made when a network is quantised, for any target from the same file.

Source: "ReLU for inference acceleration", eq. 2; S. Migacz, "8-bit inference with TensorRT", GTC 2017 (entropy).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from calib.clipping import least_divergence, least_error
from calib.errors import CalibrationError, RangesError
from calib.histogram import Histogram
from calib.options import METHODS, PERCENTILE
from calib.ranges import Ranges, TensorRange

Bounds = tuple[float, float]
_Found = TypeVar("_Found")


def choose_range(
    measured: TensorRange, method: str, *, unsigned: bool, percentile: float | None = None, name: str = "the tensor"
) -> Bounds:
    """The range of one tensor that a quantiser is to cover.

    Args:
        measured: Extremes and histogram.
        method: One of :data:`calib.options.METHODS`.
        unsigned: 256 codes from the lowest to the highest value with a zero point among them (uint8 of ``ort``); else
            255 codes symmetric around zero (int8 of TensorRT).
        percentile: For the method of that name; None: 99.99.
        name: For messages.

    Returns:
        Lowest and highest value, float32 exactly, within the extremes.

    Raises:
        RangesError: the method needs a histogram, and there is none.
        CalibrationError: an unknown method or an impossible percentile.

    >>> from calib.histogram import histogram_of
    >>> values = np.append(np.linspace(0, 1, 100_000), 1000)
    >>> seen = TensorRange(0.0, 1000.0, "float32", 1, histogram=histogram_of(values))
    >>> [round(choose_range(seen, method, unsigned=True)[1], 2) for method in ("max", "percentile", "entropy")]
    [1000.0, 1.0, 1.0]
    """
    check_method(method, percentile)
    if method == "max":
        return measured.min, measured.max
    histogram = _needed(measured.histogram, f"histogram of {name}", method)
    return _chosen(histogram, (measured.min, measured.max), method, unsigned, percentile)


def choose_channels(
    measured: TensorRange, method: str, *, unsigned: bool, percentile: float | None = None, name: str = "the tensor"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The ranges of all channels of one tensor, float32 ``(C,)`` each. As :func:`choose_range`, channel by channel.

    Raises:
        RangesError: it has no channels, or the method needs their histograms, and there are none.
        CalibrationError: an unknown method or an impossible percentile.
    """
    check_method(method, percentile)
    if measured.channel_min is None or measured.channel_max is None:
        raise RangesError(f"{name} has no channels")
    if method == "max":
        return measured.channel_min, measured.channel_max
    histograms = _needed(measured.channel_histograms, f"histograms of the channels of {name}", f"{method} --channels")
    rows = zip(histograms, measured.channel_min, measured.channel_max, strict=True)
    chosen = [_chosen(counts, (float(a), float(b)), method, unsigned, percentile) for counts, a, b in rows]
    lows, highs = np.array(chosen, np.float32).T
    return lows, highs


def chosen_bounds(ranges: Ranges, *, unsigned: bool, method: str | None = None) -> dict[str, Bounds]:
    """The range of every tensor, by the method that the ranges were measured for, or another one.

    Args:
        ranges: What was measured.
        unsigned: As in :func:`choose_range`.
        method: Instead of ``ranges.method``. A file with histograms serves every method.

    Raises:
        RangesError: the method needs histograms, and there are none.
    """
    return {
        name: choose_range(r, method or ranges.method, unsigned=unsigned, percentile=ranges.percentile, name=name)
        for name, r in ranges.tensors.items()
    }


def check_method(method: str, percentile: float | None) -> None:
    """Refuse what cannot be chosen by. Raises: CalibrationError."""
    if method not in METHODS:
        raise CalibrationError(f"there is no calibration method {method!r}", hint=f"methods are {', '.join(METHODS)}")
    if percentile is not None and not 0 < percentile <= 100:
        raise CalibrationError(f"a percentile of {percentile} is none", hint="above 0, at most 100; 99.99 is usual")


def _needed(found: _Found | None, what: str, how: str) -> _Found:
    """What was measured with ``--method HOW``. Raises: RangesError: it was not."""
    if found is None:
        raise RangesError(
            f"the ranges file has no {what}, which the method {how.partition(' ')[0]} needs",
            hint=f"calibrate again with: --method {how}",
        )
    return found


def _chosen(histogram: Histogram, extremes: Bounds, method: str, unsigned: bool, percentile: float | None) -> Bounds:
    """Choose, and keep to the extremes: the outermost bins reach past them."""
    if extremes[0] == extremes[1]:
        return extremes
    if method == "percentile":
        low, high = _percentile(histogram, PERCENTILE if percentile is None else percentile, unsigned)
    else:
        low, high = (least_error if method == "mse" else least_divergence)(histogram, extremes, unsigned=unsigned)
    within = np.clip(np.array([low, high]), *extremes).astype(np.float32)
    return float(within[0]), float(within[1])


def _percentile(histogram: Histogram, percentile: float, unsigned: bool) -> Bounds:
    """Outer ends of the bins in which the quantiles lie.

    Symmetric codes cover magnitudes, so that the tails are cut together; values of one sign have one tail.
    """
    allowed = int((100 - percentile) / 100 * histogram.total)  # values that may lie outside
    both = bool(histogram.bins[0] < 0 < histogram.bins[-1])
    if both and unsigned:
        low, _ = histogram.edges()
        _, high = histogram.edges()
        below, above = np.cumsum(histogram.counts), np.cumsum(histogram.counts[::-1])
        first = int(np.searchsorted(below, allowed // 2, side="right"))
        last = len(above) - 1 - int(np.searchsorted(above, allowed // 2, side="right"))
        return float(low[first]), float(high[last])
    sizes = histogram.magnitudes()
    above = np.cumsum(sizes.counts[::-1])
    size = float(sizes.edges()[1][len(above) - 1 - int(np.searchsorted(above, allowed, side="right"))])
    return -size, size
