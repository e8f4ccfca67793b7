"""Rules about a quantiser and its way back: do they belong together, and is there one of each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import Network, Quantizer
from relu_deploy.targets import Target

_FLOAT_BIAS = "leave the bias in float, or in int32 with scale s_x s_w"


def computed_scale(net: Network, target: Target) -> Iterator[Finding]:
    """``computed-scale``: a scale or zero point that is computed at run time (dynamic quantisation), or an input."""
    if target == "ort":
        return
    for q in (*net.quantizers, *net.dequantizers):
        zero = q.node.input[2] if len(q.node.input) > 2 else ""
        done = (
            "the compiler ends by a segmentation fault" if q.scale is None else
            "the builder wants a stored zero point" if zero and q.zero_point is None else ""
        )  # fmt: skip
        if done:
            yield Finding(
                "computed-scale", q.node.name, "rejected", like_rtx(target, done),
                "quantise statically: calibrate, and store the scales",
            )  # fmt: skip


def scales_differ(net: Network, target: Target) -> Iterator[Finding]:
    """``scales-differ``: codes that are read with another scale or zero point than they were written with."""
    for q, dq in _pairs(net):
        if q.scale is None or dq.scale is None or same_grid(q, dq):
            continue
        told = "as the file says: all values are multiplied" if target != "ort" else "what reads it runs in float"
        yield Finding(
            "scales-differ", dq.node.name, "float" if target == "ort" else "note",
            f"written with {_told(q)}, read with {_told(dq)}: {told if target == 'ort' else like_rtx(target, told)}",
            "one scale and zero point for both",
        )  # fmt: skip


def twice(net: Network, _target: Target) -> Iterator[Finding]:
    """``twice``: a tensor quantised, dequantised and quantised again on another grid, with nothing between."""
    for dq in net.dequantizers:
        for reader in net.readers(dq.output):
            outer = net.quantizer(reader.output[0]) if reader.op_type == "QuantizeLinear" else None
            inner = net.quantizer(dq.source)
            if outer is None or inner is None or not is_second(inner, outer):
                continue
            yield Finding(
                "twice", outer.node.name, "less accurate",
                f"rounded to {_told(inner)}, then to {_told(outer)}: two errors for one", "keep one pair of the two",
                automatic=is_chain(net, inner, dq),
            )  # fmt: skip


def is_second(inner: Quantizer, outer: Quantizer) -> bool:
    """Whether an outer quantiser only rounds again: an unsigned one over a smaller range is a Clip as well."""
    if same_grid(inner, outer):
        return False
    smaller = lowest(outer) > lowest(inner) or lowest(outer, top=True) < lowest(inner, top=True)
    return not (smaller and lowest(outer) == 0)


def lowest(q: Quantizer, *, top: bool = False) -> float:
    """Lowest, or highest, value of a grid of 8 or 16 bits, in tensor units; 0 where its scale is computed."""
    if q.scale is None or not q.scale.size:
        return 0.0
    zero = 0.0 if q.zero_point is None else float(q.zero_point.astype(np.float64).reshape(-1)[0])
    bits = 16 if q.codes in (TensorProto.INT16, TensorProto.UINT16) else 8
    bottom = -(1 << (bits - 1)) if q.codes in (TensorProto.INT8, TensorProto.INT16) else 0
    end = bottom + (1 << bits) - 1 if top else bottom
    return float((end - zero) * q.scale.astype(np.float64).reshape(-1)[0])


def two_scales(net: Network, _target: Target) -> Iterator[Finding]:
    """``two-scales``: one tensor quantised with several scales, by a kernel and in bytes of its own for each.

    Several pairs of one scale are nothing to fear: both runtimes make one of them.
    """
    first: dict[str, Quantizer] = {}
    for q in net.quantizers:
        if q.scale is None:
            continue
        other = first.setdefault(q.source, q)
        if not same_grid(q, other):
            yield Finding(
                "two-scales", q.node.name, "slower",
                f"{q.source} is also quantised by {other.node.name}, with {_told(other)} instead of {_told(q)}: "
                "a kernel and a copy more",
                "one scale for all readers",
            )  # fmt: skip


def scale_types(net: Network, target: Target) -> Iterator[Finding]:
    """``scale-types``: a product of codes with a float32 and with a float16 scale, behind a cast of one of them.

    With two axes and nothing but the cast in between the compiler takes it.
    """
    if target == "ort":
        return
    for layer in net.layers:
        if layer.node.op_type not in ("MatMul", "Gemm"):
            continue
        operands = [net.dequantizer_behind(name) for name in layer.node.input[:2]]
        types = {None if dq is None or dq.scale is None else dq.scale.dtype for dq, _ in operands}
        if None in types or len(types) == 1:
            continue
        moved = any(between != "Cast" for _, operators in operands for between in operators)
        if moved or not _has_two_axes(net, operands[0][0], layer.node.input[0]):
            yield Finding(
                "scale-types", layer.node.name, "rejected",
                like_rtx(target, "its operands have scales of float32 and of float16: the compiler ends with an error"),
                "scales of one type, with the cast behind both or neither",
            )  # fmt: skip


def _has_two_axes(net: Network, dq: Quantizer | None, operand: str) -> bool:
    """Whether an operand of a product, behind a DQ or a cast of what that gives, is known to have two axes."""
    q = None if dq is None else net.quantizer(dq.source)
    names = [operand, *([dq.output, dq.source] if dq is not None else []), *([q.source] if q is not None else [])]
    known = [dims for name in names if (dims := net.dims(name)) is not None]
    return bool(known) and len(known[0]) == 2


def stored_float(net: Network, _target: Target) -> Iterator[Finding]:
    """``stored-float``: weights that the file holds in float, with a quantiser in front."""
    for q in net.quantizers:
        if net.is_constant(q.source):
            yield Finding(
                "stored-float", q.node.name, "note",
                "weights stored in float and quantised when the file is loaded: four times the size, the same engine",
                "store the codes", automatic=q.codes in (TensorProto.INT8, TensorProto.UINT8),
            )  # fmt: skip


def small_bias(net: Network, target: Target) -> Iterator[Finding]:
    """``bias``: for ``ort`` a bias whose scale is not s_x s_w, or that is no int32; elsewhere one of 8 bits."""
    for layer in net.layers:
        bias, data, weight = layer.bias, layer.data, layer.weight
        if bias is None or bias.scale is None:
            continue
        eight = bias.codes in (TensorProto.INT8, TensorProto.UINT8)
        if target != "ort":
            if eight:
                yield Finding(
                    "bias", bias.node.name, "less accurate", "a bias of 8 bits: compiled, and rounded to 256 values",
                    _FLOAT_BIAS, automatic=net.is_constant(bias.source),
                )  # fmt: skip
            continue
        if data is None or weight is None or data.scale is None or weight.scale is None:
            continue
        if eight or not is_bias_scale(bias, data, weight):
            why = "8 bits" if eight else "its scale is not that of the input times that of the weights"
            yield Finding(
                "bias", bias.node.name, "float",
                f"{layer.node.op_type} {layer.node.name} runs in float: {why}", _FLOAT_BIAS, automatic=True,
            )  # fmt: skip


def _pairs(net: Network) -> Iterator[tuple[Quantizer, Quantizer]]:
    for dq in net.dequantizers:
        q = net.quantizer(dq.source)
        if q is not None:
            yield q, dq


def same_grid(one: Quantizer, other: Quantizer) -> bool:
    """Whether both map the same values to the same codes; unknown scales are taken to."""
    if one.scale is None or other.scale is None or one.codes != other.codes:
        return one.codes == other.codes
    scales = [q.scale.astype(np.float64).reshape(-1) for q in (one, other) if q.scale is not None]
    if scales[0].size != scales[1].size:  # as many equal scales as there are channels are one scale
        scales = [np.unique(values) for values in scales]
    if not np.array_equal(scales[0], scales[1]):
        return False
    zeros = [0.0 if q.zero_point is None else q.zero_point.astype(np.float64) for q in (one, other)]
    return bool(np.all(zeros[0] == zeros[1]))


def _told(q: Quantizer) -> str:
    """A quantiser's grid in words."""
    name = TensorProto.DataType.Name(q.codes).lower() if q.codes else "codes"
    if q.scale is None:
        return f"{name}, a computed scale"
    zero = "" if not q.shifted or q.zero_point is None else f", zero point {int(q.zero_point.reshape(-1)[0])}"
    return f"{name}, scale {float(q.scale.reshape(-1)[0]):.6g}{zero}" if q.scale.size else name


def is_chain(net: Network, inner: Quantizer, dq: Quantizer) -> bool:
    """Whether only the outer quantiser reads what the inner pair makes."""
    return len(net.readers(inner.output)) == 1 and len(net.readers(dq.output)) == 1 and dq.output not in net.outputs


def is_bias_scale(bias: Quantizer, data: Quantizer, weight: Quantizer) -> bool:
    """Whether the scale of a bias is that of data times that of weights, to float32 rounding."""
    if bias.scale is None or data.scale is None or weight.scale is None:
        return True
    product = np.asarray(data.scale, np.float64).reshape(-1)[:1] * np.asarray(weight.scale, np.float64).reshape(-1)
    found = np.asarray(bias.scale, np.float64).reshape(-1)
    # ONNX Runtime compares with its own rounding; a scale that is off by more is another scale.
    return product.size in (found.size, 1) and bool(np.allclose(found, product, rtol=1e-5, atol=0))
