"""The noise model of one tensor that layers read: its own rounding, and that of their weights."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_noise import Array, Product, Span
from relu_deploy.passes.edit import RefusedError
from relu_deploy.passes.linear import Layer

_CODES = 255
_TINY = float(np.finfo(np.float32).tiny)


def inlet_terms(
    layers: Sequence[Layer], low: Array, high: Array, power: Array, number: NumberFormat
) -> list[Product | Span]:
    """Terms of a tensor and of the layers that read it.

    Noise counts relative to the signal of the output that it arrives at.

    Args:
        layers: All of them.
        low: Smallest value of each channel, ``(C,)``, not above 0.
        high: Largest, not below 0.
        power: Mean square.
        number: The target's format.

    Raises:
        RefusedError: a layer has another number of input channels.
    """
    gain, products, start = np.zeros(low.size), list[Product | Span](), low.size
    for layer in layers:
        kernel = _kernels(layer)
        rows, columns, positions = kernel.shape
        groups = int(layer.node.attrs.get("group", 1)) if layer.node.op == "Conv" else 1
        if groups * columns != low.size:
            raise RefusedError("its channels lie on another axis")
        inputs = np.arange(low.size).reshape(groups, columns)
        inputs = inputs.repeat(rows // groups, axis=0) if groups > 1 else inputs
        energy = (kernel**2).sum(axis=2)
        weight = 1 / np.maximum((energy * power[inputs]).sum(axis=1), _TINY)
        arriving = energy * weight[:, None]
        np.add.at(gain, np.broadcast_to(inputs, arriving.shape), arriving)
        outputs = np.arange(start, start + rows)
        shared = number.weight_granularity == "tensor"
        peak = np.abs(kernel).max(axis=2)
        products.append(Product(inputs, outputs, peak, positions * power[inputs], weight, number.weight_max, shared))
        start += rows
    return [*products, Span(np.arange(low.size), -low, high, gain, _CODES, False)]


def _kernels(layer: Layer) -> Array:
    """Weights as ``(outputs, inputs of a group, positions)``."""
    weight, node = layer.weight.astype(np.float64), layer.node
    if node.op == "Conv":
        return weight.reshape(*weight.shape[:2], -1)
    if node.op not in ("Gemm", "MatMul"):
        raise RefusedError(f"{node.op} reads it")
    return (weight if node.op == "Gemm" and node.attrs.get("transB", 0) else weight.T)[:, :, None]
