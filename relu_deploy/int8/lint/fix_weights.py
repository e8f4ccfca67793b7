"""Mend stored weights and biases: symmetric int8 codes with positive scales along the output channels."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from relu_deploy.int8.formats import DEAD_SCALE, quantize_symmetric, weight_scales
from relu_deploy.int8.lint.codes import BYTES, WHOLE
from relu_deploy.int8.lint.edit import (
    add_constant,
    dtype_of,
    forget_type,
    insert_before,
    replace_readers,
    set_attribute,
)
from relu_deploy.int8.lint.network import Network, Quantizer, attribute, channel_axis
from relu_deploy.int8.lint.pairs import is_bias_scale
from relu_deploy.report import PassReport, Skip


def store_codes(model: onnx.ModelProto) -> PassReport:
    """Compute quantisers of stored tensors: the file then holds the codes."""
    net = Network(model)
    changed = []
    for q in net.quantizers:
        values = net.constant(q.source)
        if values is None or q.scale is None or q.codes not in BYTES or not _fits(q, values.shape):
            continue
        if not (q.scale.astype(np.float64) > 0).all() or not np.isfinite(q.scale).all():
            continue
        limits = np.iinfo(dtype_of(q.codes))
        scale, zero = _along(q, q.scale, values.ndim), _along(q, _zeros(q), values.ndim)
        # As ONNX Runtime computes it: in float32, of float16 weights too, ties to even.
        codes = np.clip(np.rint(values.astype(np.float32) / scale.astype(np.float32)) + zero, limits.min, limits.max)
        name = add_constant(model.graph, f"{q.output}/stored", codes.astype(dtype_of(q.codes)))
        replace_readers(model.graph, q.output, name)
        changed.append(q.node.name)
    return PassReport("store_codes", tuple(changed), (), {"": "the same numbers"} if changed else {})


def float_constants(model: onnx.ModelProto) -> PassReport:
    """Store in float what a DequantizeLinear makes of int32 codes, of a layer's small bias, of a single number."""
    net = Network(model)
    of_layers = {layer.bias.output for layer in net.layers if layer.bias is not None}
    changed, skipped = [], []
    for dq in net.dequantizers:
        small = dq.codes in WHOLE and (dq.output in of_layers or net.dims(dq.source) == ())
        if dq.codes != TensorProto.INT32 and not (small and net.is_constant(dq.source)):
            continue
        codes = net.constant(dq.source)
        if codes is None or dq.scale is None or not _fits(dq, codes.shape):
            skipped.append(Skip(dq.node.name, "its codes or scales are computed at run time, or do not fit together"))
            continue
        values = _values(dq, codes).astype(dq.scale.dtype)
        replace_readers(model.graph, dq.output, add_constant(model.graph, f"{dq.output}/stored", values))
        changed.append(dq.node.name)
    return PassReport(
        "float_constants",
        tuple(changed),
        tuple(skipped),
        {"": "the values that the codes stand for"} if changed else {},
    )


def integer_biases(model: onnx.ModelProto) -> PassReport:
    """For ``ort``: biases of layers with quantised operands in int32 with scale s_x s_w, which is what fuses.

    A Conv may keep a float bias; a Gemm may not.
    """
    net = Network(model)
    changed, skipped = [], []
    for layer in net.layers:
        name = layer.node.input[2] if len(layer.node.input) > 2 else ""
        data, weight, old = layer.data, layer.weight, layer.bias
        if not name or data is None or weight is None or data.scale is None or weight.scale is None:
            continue
        if (old is None and layer.node.op_type != "Gemm") or (
            old is not None and old.codes == TensorProto.INT32 and is_bias_scale(old, data, weight)
        ):
            continue
        bias = net.constant(name) if old is None else stored_values(net, old)
        scale = data.scale.astype(np.float64).reshape(-1)[0] * weight.scale.astype(np.float64)
        beta = float(attribute(layer.node, "beta", 1.0))
        if bias is None or data.scale.size != 1 or not (scale > 0).all() or beta != 1.0:
            skipped.append(Skip(layer.node.name, "its bias or scales are not known, or its bias has a factor"))
            continue
        flat = np.asarray(bias, np.float64).reshape(-1)
        codes = np.clip(np.rint(flat / scale.reshape(-1)), -(2**31) + 1, 2**31 - 1).astype(np.int32)
        parts = {"codes": codes, "scale": scale.astype(np.float32), "zero": np.zeros(scale.shape, np.int32)}
        inputs = [add_constant(model.graph, f"{layer.node.name}/bias/{key}", value) for key, value in parts.items()]
        output = f"{layer.node.name}/bias/dequantized"
        axis: dict[str, Any] = {"axis": 0} if scale.ndim else {}
        made = helper.make_node("DequantizeLinear", inputs, [output], f"{output}/DequantizeLinear", **axis)
        insert_before(model.graph, layer.node, [made])
        layer.node.input[2] = output
        changed.append(layer.node.name)
    note = {"": "biases are rounded to steps of s_x s_w"} if changed else {}
    return PassReport("integer_biases", tuple(changed), tuple(skipped), note)


def stored_values(net: Network, dq: Quantizer) -> npt.NDArray[Any] | None:
    """What a DequantizeLinear makes of stored codes; None where they are not stored, or its scales do not fit."""
    codes = net.constant(dq.source)
    if codes is None or dq.scale is None or not _fits(dq, codes.shape):
        return None
    return _values(dq, codes).astype(dq.scale.dtype)


def symmetric_weights(model: onnx.ModelProto, *, asymmetric: bool = False) -> PassReport:
    """Store weights as int8 with zero point 0 and positive scales, along the output channels of their layers.

    Args:
        model: Edited in place.
        asymmetric: Leave alone what is faulty only for being uint8 or having a zero point.
    """
    net = Network(model)
    changed, skipped, coarser = [], [], 0
    for dq in net.dequantizers:
        codes = net.constant(dq.source) if dq.codes in WHOLE else None
        if codes is None or dq.scale is None or dq.block:
            continue
        axis = _wanted_axis(net, dq, codes.ndim)
        if _is_sound(dq, axis, codes, asymmetric=asymmetric):
            continue
        mended = _mend(dq, codes, axis)
        if mended is None:
            skipped.append(Skip(dq.node.name, "its scales are not finite, or are no scales of any of its axes"))
            continue
        coarser += not mended.exact
        _store(model.graph, dq, mended, axis)
        changed.append(dq.node.name)
    note = f"{len(changed) - coarser} keep every value, {coarser} are rounded to new steps"
    return PassReport("symmetric_weights", tuple(changed), tuple(skipped), {"": note} if changed else {})


@dataclasses.dataclass(frozen=True)
class _Mended:
    """New codes and scales, and whether they stand for the same values."""

    codes: npt.NDArray[np.int8]
    scale: npt.NDArray[Any]
    exact: bool


def _mend(dq: Quantizer, codes: npt.NDArray[Any], axis: int | None) -> _Mended | None:
    """Symmetric codes for what a DequantizeLinear makes; None where that is not known."""
    scale = dq.scale
    if scale is None or not np.isfinite(scale).all():
        return None
    if not _fits(dq, codes.shape):
        # Scales for no axis of the tensor: for its output channels, if they are as many.
        if (
            axis is None
            or scale.size != codes.shape[axis]
            or (dq.zero_point is not None and dq.zero_point.size not in (1, scale.size))
        ):
            return None
        dq = dataclasses.replace(dq, axis=axis)
    centred = codes.astype(np.int64) - _along(dq, _zeros(dq), codes.ndim).astype(np.int64)
    if not dq.per_channel or axis is None or dq.axis % codes.ndim == axis:
        signed = centred * np.where(_along(dq, scale, codes.ndim) < 0, -1, 1)
        dead = np.broadcast_to(_along(dq, scale, codes.ndim) == 0, codes.shape)
        signed = np.where(dead, 0, signed)
        if np.abs(signed).max(initial=0) <= 127 or (signed.min() >= -128 and signed.max() <= 127):
            positive = np.where(scale == 0, scale.dtype.type(DEAD_SCALE), np.abs(scale)).astype(scale.dtype)
            return _Mended(signed.astype(np.int8), positive, True)
    values = _values(dq, codes)
    scales = weight_scales(values, axis, 127).astype(scale.dtype)
    return _Mended(quantize_symmetric(values, scales, axis, 127).astype(np.int8), scales, False)


def _store(graph: onnx.GraphProto, dq: Quantizer, mended: _Mended, axis: int | None) -> None:
    """Let a DequantizeLinear read new codes, scales and zero points of its own."""
    base = dq.output
    names = (("mended", mended.codes), ("scale", mended.scale), ("zero_point", np.zeros(mended.scale.shape, np.int8)))
    node = dq.node
    node.input[:] = [add_constant(graph, f"{base}/{name}", values) for name, values in names]
    if mended.scale.ndim and mended.scale.size > 1:
        set_attribute(node, "axis", dq.axis if axis is None else axis)
    forget_type(graph, dq.output)


def _wanted_axis(net: Network, dq: Quantizer, rank: int) -> int | None:
    """Output-channel axis of the layers that read these weights; None where there is none, or they disagree."""
    axes = {channel_axis(layer, rank) for layer in net.layers if layer.weight is dq}
    return axes.pop() if len(axes) == 1 else None


def _is_sound(dq: Quantizer, axis: int | None, codes: npt.NDArray[Any], *, asymmetric: bool) -> bool:
    """Whether nothing needs mending."""
    if dq.scale is None or not _fits(dq, codes.shape):
        return False
    if not asymmetric and (dq.codes != TensorProto.INT8 or dq.shifted):
        return False
    if not ((dq.scale > 0) & np.isfinite(dq.scale)).all():
        return False
    if dq.zero_point is not None and dq.zero_point.size != dq.scale.size:
        return False
    return not dq.per_channel or axis is None or dq.axis % codes.ndim == axis


def _fits(q: Quantizer, shape: tuple[int, ...]) -> bool:
    """Whether scales and zero points are one, or one for each index of their axis."""
    if q.scale is None or q.scale.size == 1:
        return q.scale is not None
    if q.scale.ndim != 1 or not -len(shape) <= q.axis < len(shape) or shape[q.axis] != q.scale.size:
        return False
    return q.zero_point is None or q.zero_point.size in (1, q.scale.size)


def _zeros(q: Quantizer) -> npt.NDArray[Any]:
    return np.zeros((), np.int64) if q.zero_point is None else q.zero_point.astype(np.int64)


def _along(q: Quantizer, values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
    """Scales or zero points, shaped to broadcast along their axis."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * rank
    shape[q.axis] = values.size
    return values.reshape(shape)


def _values(dq: Quantizer, codes: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """What a DequantizeLinear makes of codes."""
    assert dq.scale is not None  # noqa: S101 - callers have looked
    scale, zero = (_along(dq, part, codes.ndim) for part in (dq.scale.astype(np.float64), _zeros(dq)))
    return np.asarray((codes.astype(np.float64) - zero) * scale)
