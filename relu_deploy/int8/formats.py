"""The number formats of the targets, and the arithmetic of scales and zero points.

================================  ==================================  ====================================
what                              ``ort``                             ``tensorrt``, ``tensorrt-rtx``
================================  ==================================  ====================================
activation that is never < 0      uint8, zero point 0, s = max/255    int8, zero point 0, s = max/127
other activations                 uint8 with a zero point             int8, zero point 0, s = absmax/127
weights                           int8, symmetric, per out channel    the same; per tensor on request
bias                              int32, s = s_x s_w                  float
================================  ==================================  ====================================
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from relu_deploy.errors import QuantizationError
from relu_deploy.machine import lacks_vnni
from relu_deploy.targets import TARGETS, Target

Granularity = Literal["channel", "tensor", "auto"]
FloatPart = Literal["fp32", "fp16"]

# The scale of weights that are all zero. Any positive number will do, since their only code is 0; a scale of 0 would be
# a division by zero in every runtime (TensorRT#2498).
DEAD_SCALE = 1.0
# The scale of an activation that was always zero. A layer that reads it still has a bias, in steps of s_x s_w, so 1.0
# would round the bias to whole weight steps; this makes those steps 4096 times finer, and float16 still holds it.
DEAD_ACTIVATION_SCALE = 2.0**-12
# Scales below this are subnormal or close to it when multiplied (s_x s_w), and flush to zero in some kernels.
SMALLEST_SCALE = 2.0**-60
_INT32_MAX = (1 << 31) - 1
# Float16 scales of activations are normal numbers of which 128 steps do not overflow; weights may go lower, to where
# rounding is still under 1 %, since their codes are made for the rounded scale.
_HALF_NORMAL, _HALF_STEP, _HALF_LARGEST = 2.0**-14, 2.0**-24 * 50, 65504.0 / 128


@dataclasses.dataclass(frozen=True)
class NumberFormat:
    """How one target wants its numbers.

    Attributes:
        target: The runtime.
        unsigned: uint8 activations with a zero point; else int8 symmetric.
        weight_bits: 8, or 7 for x86 CPUs without VNNI: see :func:`number_format`.
        integer_bias: int32 bias with scale s_x s_w; else the bias stays float.
        weight_granularity: One weight scale for each output ``channel``, or one for a whole weight ``tensor``, or
            (``auto``) what pays on the target, layer by layer: :mod:`relu_deploy.int8.granularity`.
        float_part: What is left in float computes in ``fp32`` or ``fp16``.
    """

    target: Target
    unsigned: bool
    weight_bits: int
    integer_bias: bool
    weight_granularity: Granularity = "channel"
    float_part: FloatPart = "fp32"

    @property
    def half(self) -> bool:
        """Whether scales are to be numbers that float16 holds."""
        return self.float_part == "fp16"

    @property
    def merges(self) -> bool:
        """Whether siblings are merged: where it was measured to pay, in float16 networks for TensorRT-RTX."""
        return self.target == "tensorrt-rtx" and self.half

    @property
    def weight_max(self) -> int:
        """Largest weight code: 127 for 8 bits, 63 for 7. The most negative code stays unused."""
        return int(2 ** (self.weight_bits - 1)) - 1


@dataclasses.dataclass(frozen=True)
class QParams:
    """Scale and zero point of one tensor: ``real = scale * (code - zero_point)``.

    Attributes:
        scale: Tensor units per step, > 0, a float32 value.
        zero_point: Code of 0.0.
        dtype: ``uint8`` or ``int8``.
    """

    scale: float
    zero_point: int
    dtype: Literal["uint8", "int8"]

    @property
    def lowest(self) -> float:
        """Real value of the lowest code that is used."""
        return self.scale * ((0 if self.dtype == "uint8" else -128) - self.zero_point)

    @property
    def highest(self) -> float:
        """Real value of the highest code."""
        return self.scale * ((255 if self.dtype == "uint8" else 127) - self.zero_point)


def number_format(
    target: str, *, weight_bits: int = 8, weight_granularity: str = "channel", float_part: str = "fp32"
) -> NumberFormat:
    """The format of a target.

    Args:
        target: One of ``TARGETS``.
        weight_bits: 8 or 7. x86 CPUs with AVX2 but without VNNI multiply uint8 by int8 with ``vpmaddubsw``, which
            adds two products into a saturating int16: 255 * 127 * 2 does not fit, 255 * 63 * 2 does. Seven bits lose
            half a bit of weight precision on average and never saturate. Only ``ort`` runs on such CPUs.
        weight_granularity: ``channel`` keeps more precision. ``tensor`` lets the TensorRT-RTX compiler fuse bias and
            ReLU into its int8 convolutions and write the graph's own type: docs/placement.md has the measurement.
            ``auto`` does that where little is lost; for ``ort`` and ``tensorrt`` it is ``channel``.
        float_part: ``fp32`` or ``fp16``; ``auto`` is ``fp16`` for the TensorRT targets and ``fp32`` for ``ort``.

    Raises:
        QuantizationError: unknown target, granularity or float part, a width other than 7 and 8, or ``fp16`` for
            ``ort``.

    >>> number_format("ort").weight_max, number_format("ort", weight_bits=7).weight_max
    (127, 63)
    """
    if weight_bits not in (7, 8):
        raise QuantizationError(
            f"weights of {weight_bits} bits are not supported", hint="use 8, or 7 for CPUs without VNNI"
        )
    if weight_granularity not in ("channel", "tensor", "auto"):
        raise QuantizationError(f"unknown weight granularity {weight_granularity!r}", hint="channel, tensor or auto")
    if float_part not in ("fp32", "fp16", "auto"):
        raise QuantizationError(f"unknown float part {float_part!r}", hint="fp32, fp16 or auto")
    if float_part == "fp16" and target == "ort":
        raise QuantizationError(
            "for ort the float part cannot be float16: the integer kernels of ONNX Runtime give float32",
            hint="leave it at auto, or quantise for a TensorRT target",
        )
    floats: FloatPart = "fp32" if target == "ort" or float_part == "fp32" else "fp16"
    granularity: Granularity = "tensor" if weight_granularity == "tensor" else "channel"
    if weight_granularity == "auto" and target == "tensorrt-rtx":
        granularity = "auto"
    for known in TARGETS:
        if target == known:
            on_cpu = known == "ort"
            return NumberFormat(known, on_cpu, weight_bits if on_cpu else 8, on_cpu, granularity, floats)
    raise QuantizationError(f"unknown target {target!r}", hint=f"one of {', '.join(TARGETS)}")


def weight_bits_for_cpu(flags: Iterable[str]) -> int:
    """Width of ``ort`` weights that is exact on a CPU: 7 on x86 without VNNI, 8 everywhere else.

    Args:
        flags: CPU feature names as Linux tells them.

    >>> weight_bits_for_cpu(["avx2"]), weight_bits_for_cpu(["avx2", "avx512_vnni"]), weight_bits_for_cpu(["asimddp"])
    (7, 8, 8)
    """
    return 7 if lacks_vnni(flags) else 8


def activation_qparams(low: float, high: float, number: NumberFormat) -> QParams:
    """Scale and zero point that cover ``[low, high]``, always with an exact code for 0.0.

    Args:
        low: Smallest value seen, tensor units.
        high: Largest value seen.
        number: The target's format.

    Raises:
        QuantizationError: a bound is not finite, or ``low > high``.

    Source: equation 2 of "ReLU for inference acceleration" (s = max/255); Jacob et al. 2018, arXiv:1712.05877, eq. 1.

    >>> activation_qparams(0.0, 25.5, number_format("ort"))
    QParams(scale=0.10000000149011612, zero_point=0, dtype='uint8')
    >>> activation_qparams(-12.7, 6.0, number_format("tensorrt-rtx"))
    QParams(scale=0.10000000149011612, zero_point=0, dtype='int8')
    """
    if not (math.isfinite(low) and math.isfinite(high)) or low > high:
        raise QuantizationError(f"the range [{low}, {high}] is not a range")
    low, high = min(low, 0.0), max(high, 0.0)
    if number.unsigned:
        scale = _usable((high - low) / 255)
        zero_point = int(np.clip(np.rint(-low / scale), 0, 255))
        return QParams(scale, zero_point, "uint8")
    return QParams(_usable(max(-low, high) / 127, half=number.half), 0, "int8")


def weight_scales(weight: npt.NDArray[np.floating], axis: int | None, weight_max: int) -> npt.NDArray[np.float32]:
    """Symmetric scales of a weight tensor.

    Args:
        weight: Any shape, finite.
        axis: Output-channel axis, or None for one scale.
        weight_max: Largest code, 127 or 63.

    Returns:
        float32, shape ``(C,)`` or ``()``; an all-zero channel gets ``DEAD_SCALE``.

    >>> weight_scales(np.array([[1.27, 0.0], [0.0, 0.0]]), 0, 127)
    array([0.01, 1.  ], dtype=float32)
    """
    others = None if axis is None else tuple(i for i in range(weight.ndim) if i != axis)
    absmax = np.abs(weight.astype(np.float64)).max(axis=others, initial=0.0)
    scale = np.asarray(np.maximum(absmax / weight_max, SMALLEST_SCALE), dtype=np.float32)
    return np.where(absmax == 0, np.float32(DEAD_SCALE), scale).astype(np.float32)


def widen_for_bias(
    scales: npt.NDArray[np.float32], input_scale: float, bias: npt.NDArray[np.floating], alive: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Weight scales changed so that the int32 bias ``b / (s_x s_w)`` neither overflows nor vanishes.

    A channel of tiny weights with a large bias overflows int32: its scale grows until the bias takes 30 bits, so that
    accumulated products still fit beside it. A channel of zero weights has a free scale: it is chosen for the bias
    alone.

    Args:
        scales: Weight scales, shape ``(C,)`` or ``()``.
        input_scale: Scale of the layer's input.
        bias: Shape ``(C,)``.
        alive: Shape of ``scales``: False where all weights of the channel are zero.

    Returns:
        float32, shape of ``scales``, never smaller than it where the channel is alive.
    """
    magnitude = np.abs(bias.astype(np.float64))
    magnitude = magnitude if scales.ndim else magnitude.max(initial=0.0)
    needed = magnitude / input_scale / (_INT32_MAX / 2)
    # 20 bits for a lone bias: a relative error of 1e-6, below what any 8-bit output can show.
    for_bias_alone = np.maximum(magnitude / input_scale / (1 << 20), SMALLEST_SCALE)
    dead = np.where(magnitude > 0, for_bias_alone, DEAD_SCALE)
    return np.where(alive, np.maximum(scales, needed), dead).astype(np.float32)


def quantize_symmetric(
    values: npt.NDArray[np.floating], scales: npt.NDArray[np.floating], axis: int | None, limit: int
) -> npt.NDArray[np.int64]:
    """Codes ``rint(v / s)`` clipped to ``[-limit, limit]``; ties to even, as ONNX QuantizeLinear rounds.

    >>> quantize_symmetric(np.array([[0.5, 2.0]]), np.array([0.1]), 0, 15)
    array([[ 5, 15]])
    """
    shape = [1] * values.ndim
    if axis is not None and scales.ndim:
        shape[axis] = scales.size
    divided = values.astype(np.float64) / scales.astype(np.float64).reshape(shape if scales.ndim else ())
    return np.clip(np.rint(divided), -limit, limit).astype(np.int64)


def half_scales(scales: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Weight scales as float16 holds them, as float32; those that are too small for it grow to the smallest usable one.

    >>> float(half_scales(np.float32([0.1, 1e-9]))[1]) == 2.0**-24 * 50
    True
    """
    return np.asarray(np.maximum(scales, _HALF_STEP), np.float16).astype(np.float32)


def _usable(scale: float, *, half: bool = False) -> float:
    """A float32 scale that is positive: dead tensors get ``DEAD_ACTIVATION_SCALE``, subnormal ones the smallest.

    With ``half`` it is a float16 number too, unless it is too large or too small to be one; such a tensor's Q/DQ stay
    in float32.
    """
    if scale == 0:
        return DEAD_ACTIVATION_SCALE
    usable = float(np.float32(max(scale, SMALLEST_SCALE)))
    return float(np.float16(usable)) if half and _HALF_NORMAL <= usable <= _HALF_LARGEST else usable
