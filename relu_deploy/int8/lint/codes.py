"""Rules about the numbers of a quantiser: types of codes, zero points, and scales that are no scales.

What TensorRT-RTX 1.7.1 and ONNX Runtime 1.31 do with each was asked of them: tests/int8/test_lint_rtx.py and
tests/int8/test_lint_ort.py ask again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import Network, Quantizer
from relu_deploy.machine import describe_machine, lacks_vnni
from relu_deploy.targets import Target

BYTES = (TensorProto.INT8, TensorProto.UINT8)
WHOLE = (*BYTES, TensorProto.INT16, TensorProto.UINT16)
FP8 = (
    TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E4M3FNUZ, TensorProto.FLOAT8E5M2, TensorProto.FLOAT8E5M2FNUZ,
)  # fmt: skip
# A float16 below its smallest normal number keeps fewer bits the smaller it is; below this it is off by over 1 %.
_COARSE_HALF = 2.0**-24 * 50
_SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
# 255 * 63 * 2 fits the saturating sum of two products of CPUs without VNNI; 255 * 64 * 2 may not.
_SAFE_WEIGHT = 64


def int32_bias(net: Network, target: Target) -> Iterator[Finding]:
    """``int32-bias``: a bias stored as int32 behind a DequantizeLinear, as ONNX Runtime's quantiser writes it."""
    if target == "ort":
        return
    for dq in net.dequantizers:
        if dq.codes == TensorProto.INT32:
            yield Finding(
                "int32-bias", dq.node.name, "rejected",
                like_rtx(target, "the parser refuses int32 in a DequantizeLinear"),
                "store the bias in float", automatic=net.is_constant(dq.source),
            )  # fmt: skip


def zero_point(net: Network, target: Target) -> Iterator[Finding]:
    """``zero-point``: asymmetric codes."""
    if target == "ort":
        return
    made = {q.output: q for q in net.quantizers if q.shifted}
    read_only = [dq for dq in net.dequantizers if net.quantizer(dq.source) is not None and dq.source not in made]
    for q in (*_first_of_pairs(net), *read_only):
        if q.shifted and q.codes in BYTES:
            yield Finding(
                "zero-point", q.node.name, "rejected", like_rtx(target, "the parser takes zero points of 0 only"),
                "int8 with zero point 0 and a scale that covers the same range", automatic=q not in read_only,
            )  # fmt: skip


def unsigned(net: Network, target: Target) -> Iterator[Finding]:
    """``unsigned``: uint8 codes with zero point 0, also because no zero point is given."""
    if target == "ort":
        return
    for q in _first_of_pairs(net):
        if q.codes != TensorProto.UINT8 or q.shifted:
            continue
        if q.node.op_type == "QuantizeLinear":
            yield Finding(
                "unsigned", q.node.name, "wrong",
                like_rtx(target, "read as int8: everything above 127 steps, the upper half of the range, saturates"),
                "int8 with twice the step", automatic=True,
            )  # fmt: skip
        else:
            yield Finding(
                "unsigned", q.node.name, "rejected", like_rtx(target, "the parser takes no uint8 here"),
                "store int8 codes", automatic=net.is_constant(q.source),
            )  # fmt: skip


def code_type(net: Network, target: Target) -> Iterator[Finding]:
    """``code-type``: codes that are not 8-bit integers."""
    for q in _first_of_pairs(net):
        if q.codes in (*BYTES, TensorProto.INT32, 0):
            continue
        name = TensorProto.DataType.Name(q.codes).lower()
        product = _only_read_by(net, q, "MatMul")
        wide = q.codes in WHOLE and (q.node.op_type == "QuantizeLinear" or net.is_constant(q.source))
        if target == "ort":
            if q.node.op_type == "DequantizeLinear" and product and q.codes in (TensorProto.INT4, TensorProto.UINT4):
                continue  # packed weights of MatMulNBits
            yield Finding(
                "code-type", q.node.name, "float", f"no integer kernel takes {name}: what reads it runs in float",
                "quantise to 8 bits", automatic=wide,
            )  # fmt: skip
        elif q.codes in (TensorProto.INT4, *FP8) and product:
            continue  # compiled, as what it says
        else:
            how = "no convolution takes" if q.codes in (TensorProto.INT4, *FP8) else "the parser does not know"
            yield Finding(
                "code-type", q.node.name, "rejected", like_rtx(target, f"{how} {name}"), "quantise to int8",
                automatic=wide,
            )  # fmt: skip


def scalar_constant(net: Network, target: Target) -> Iterator[Finding]:
    """``scalar-constant``: a stored number without axes as a code, as ONNX Runtime writes the factor of a Mul."""
    if target == "ort":
        return
    for dq in net.dequantizers:
        if dq.codes in BYTES and net.is_constant(dq.source) and net.dims(dq.source) == ():
            yield Finding(
                "scalar-constant", dq.node.name, "rejected",
                like_rtx(target, "the compiler takes a code without axes for no quantised value"),
                "store the number in float", automatic=True,
            )  # fmt: skip


def scale(net: Network, target: Target) -> Iterator[Finding]:
    """``scale``: a scale that is 0, negative, NaN or infinite (dead channels give zeros in several tools)."""
    for q in _first_of_pairs(net):
        if q.scale is None:
            continue
        values = q.scale.astype(np.float64)
        bad = ~(values > 0) | ~np.isfinite(values)
        if not bad.any():
            continue
        first = float(values[bad].flat[0])
        infinite = not (~(values > 0)).any()
        what = f"{int(bad.sum())} of {values.size} scales are not positive, the first is {first:g}"
        if target == "ort":
            yield Finding(
                "scale", q.node.name, "float", f"{what}: what reads it runs in float, on values that may not be finite",
                "a positive scale", automatic=_mendable(values),
            )  # fmt: skip
        else:
            done = "taken as it is, and 0 times infinity is NaN" if infinite else "the parser refuses it"
            yield Finding(
                "scale", q.node.name, "wrong" if infinite else "rejected", f"{what}: {like_rtx(target, done)}",
                "a positive scale", automatic=_mendable(values),
            )  # fmt: skip


def tiny_scale(net: Network, _target: Target) -> Iterator[Finding]:
    """``tiny-scale``: a scale so small that its type hardly holds it."""
    for q in _first_of_pairs(net):
        if q.scale is None:
            continue
        values = q.scale.astype(np.float64)
        half = q.scale.dtype == np.float16
        limit = _COARSE_HALF if half else _SMALLEST_NORMAL
        small = (values > 0) & (values < limit)
        if small.any():
            why = (
                "float16 holds it with an error of over 1 %" if half else "subnormal: flushed to zero by some hardware"
            )
            yield Finding(
                "tiny-scale", q.node.name, "less accurate", f"{float(values[small].flat[0]):.3g} as a scale: {why}",
                "a larger scale; what it quantises is as good as zero",
            )  # fmt: skip


def saturating(net: Network, target: Target) -> Iterator[Finding]:
    """``saturating-weights``: 8-bit weights on an x86 CPU without VNNI."""
    if target != "ort" or not lacks_vnni(describe_machine().flags):
        return
    for layer in net.layers:
        if layer.data is None or layer.weight is None or layer.data.codes != TensorProto.UINT8:
            continue
        codes = net.constant(layer.weight.source)
        if codes is not None and codes.size and int(np.abs(_centred(codes, layer.weight)).max()) > _SAFE_WEIGHT:
            yield Finding(
                "saturating-weights", layer.node.name, "wrong",
                "this CPU has no VNNI: sums of two products of uint8 with 8-bit weights saturate at 16 bits",
                "quantise the float model again with 7-bit weights (--weight-bits 7, reduce_range)",
            )  # fmt: skip


def _centred(codes: np.ndarray, weight: Quantizer) -> np.ndarray:
    zero = 0 if weight.zero_point is None else weight.zero_point.astype(np.int64).reshape(-1)[0]
    return np.asarray(codes.astype(np.int64) - zero)


def _mendable(values: np.ndarray) -> bool:
    """Whether a scale's fault leaves no doubt about what it should be: NaN and infinity do."""
    return bool(np.isfinite(values).all())


def _first_of_pairs(net: Network) -> Iterator[Quantizer]:
    """Each Q, and each DQ that no Q feeds: one finding a pair is enough."""
    yield from net.quantizers
    for dq in net.dequantizers:
        if net.quantizer(dq.source) is None:
            yield dq


def _only_read_by(net: Network, q: Quantizer, op: str) -> bool:
    """Whether the values behind a quantiser all go to one operator, at once or through a DequantizeLinear."""
    readers = net.readers(q.output)
    if q.node.op_type == "QuantizeLinear":
        readers = [reader for dq in readers for name in dq.output for reader in net.readers(name)]
    return bool(readers) and all(reader.op_type == op for reader in readers)
