"""Fold BatchNormalization into the convolution or matrix product before it, or behind it.

``bn(y) = s (y - mean) + shift`` with ``s = scale / sqrt(var + epsilon)``, hence for ``y = W x + b``: ``W' = s W``
along the output channels and ``b' = s (b - mean) + shift``. In front of a layer, ``W (s x + t) + b`` is ``W' = W s``
along the input channels and ``b' = b + W t``, where no padding stands in between. Computed in float64 and rounded once
to the type of the weights.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import (
    Names,
    RefusedError,
    detach,
    float_values,
    is_standard,
    make_instead,
    pinned_names,
    redirect,
)
from relu_deploy.passes.linear import LAYERS, Affine, Layer, after, before, bias_behind, layer_of, read_layer, write
from relu_deploy.report import PassReport, Skip

# A layer behind it takes the mean out of its own sum instead of out of the input: rounding errors of the size of the
# mean, in units of what the normalisation gives, reach the output. Up to this many, two decimal digits.
MOST_AMPLIFIED = 64.0


def fold_batchnorm(graph: gs.Graph) -> PassReport:
    """Fold inference-mode BatchNormalization into the layer that alone feeds it, else into the layers that read it.

    Args:
        graph: Edited in place. Weights that other nodes share are copied, never changed.

    Returns:
        Changed: the folded BatchNormalization nodes. Skipped: the others, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    pinned, names = pinned_names(graph), Names(graph)
    for node in graph.nodes:
        if not is_standard(node, "BatchNormalization"):
            continue
        try:
            _fold(node, pinned, names)
        except RefusedError as error:
            skipped.append(Skip(node.name, str(error)))
            continue
        changed.append(node.name)
    drop_detached(graph)
    return PassReport("fold_batchnorm", tuple(changed), tuple(skipped))


def _fold(node: gs.Node, pinned: set[str], names: Names) -> None:
    """Fold one node into what is before it; where that is refused, into what is behind it."""
    # Before opset 14 it is the outputs for new statistics, read or not, that put it in training mode.
    if node.attrs.get("training_mode", 0) or any(not tensor.is_empty() for tensor in node.outputs[1:]):
        raise RefusedError("it is in training mode")
    try:
        layer = layer_of(node.inputs[0], pinned)
        _check_axis(layer)
        write(layer, after(layer, _norm(node)), names, "bn")
    except RefusedError:
        if not _fold_forwards(node, pinned, names):
            raise
        return
    make_instead(layer.last, node)


def _check_axis(layer: Layer) -> None:
    """A BatchNormalization normalises axis 1; a product of more than two axes has its channels last."""
    if layer.node.op == "MatMul" and layer.rank != 2:
        raise RefusedError("it normalises axis 1, and the channels of the MatMul are not known to be there")


def _norm(node: gs.Node) -> Affine:
    parts = [float_values(tensor) for tensor in node.inputs[1:5]]
    if len(parts) != 4 or any(part is None for part in parts):
        raise RefusedError("its statistics are not constants")
    scale, shift, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
    if not scale.ndim == 1 or not scale.shape == shift.shape == mean.shape == variance.shape:
        raise RefusedError("its statistics are not one number a channel")
    epsilon = float(np.float32(node.attrs.get("epsilon", 1e-5)))
    if (variance + epsilon <= 0).any():
        raise RefusedError("its variance is negative")
    factor = scale / np.sqrt(variance + epsilon)
    return Affine(factor, shift - factor * mean)


def _fold_forwards(node: gs.Node, pinned: set[str], names: Names) -> bool:
    """Fold into all readers, or into none; whether it was done."""
    output, source = node.outputs[0], node.inputs[0]
    if output.name in pinned or not output.outputs:
        return False
    try:
        norm = _norm(node)
        if _amplification(node, norm) > MOST_AMPLIFIED:
            return False
        layers = [_reader(reader, output, pinned) for reader in output.outputs]
        new = [before(layer, norm) for layer in layers]
    except RefusedError:
        return False
    for layer, weights in zip(layers, new, strict=True):
        write(layer, weights, names, "bn")
    detach(node)
    redirect(output, source)
    return True


def _amplification(node: gs.Node, norm: Affine) -> float:
    """Size of the mean that is taken out, in units of the normalised values."""
    scale, _, mean, _ = (np.asarray(float_values(tensor), dtype=np.float64) for tensor in node.inputs[1:5])
    return float(np.abs(norm.factor * mean).max() / max(np.abs(scale).max(), np.finfo(np.float64).tiny))


def _reader(node: gs.Node, data: gs.Tensor, pinned: set[str]) -> Layer:
    """The layer that takes ``data`` as its one live input."""
    if not is_standard(node, *LAYERS) or node.inputs[0] is not data or any(t is data for t in node.inputs[1:]):
        raise RefusedError("not all that reads it is a layer")
    layer = read_layer(node, bias_behind(node, pinned))
    _check_axis(layer)
    return layer
