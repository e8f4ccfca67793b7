"""The float formats of ONNX that regions are computed in."""

from __future__ import annotations

import dataclasses

import numpy as np
from onnx import TensorProto


@dataclasses.dataclass(frozen=True)
class FloatType:
    """One float format: largest finite value, unit roundoff, smallest normal, lowest exponent of a positive number."""

    name: str
    largest: float
    unit: float
    tiny: float
    lowest: int


FLOAT_TYPES: dict[int, FloatType] = {
    TensorProto.FLOAT: FloatType("float32", float(np.finfo(np.float32).max), 2.0**-24, 2.0**-126, -149),
    TensorProto.FLOAT16: FloatType("float16", 65504.0, 2.0**-11, 2.0**-14, -24),
    TensorProto.BFLOAT16: FloatType("bfloat16", 2.0**127 * (2 - 2.0**-7), 2.0**-8, 2.0**-126, -133),
    # The intervals themselves are computed in float64, so its unit here is eight of its own: the bound stays a bound.
    TensorProto.DOUBLE: FloatType("float64", float(np.finfo(np.float64).max), 2.0**-50, 2.0**-1022, -1074),
}
