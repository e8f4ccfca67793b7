"""Fold a constant Add, Sub, Mul or Div for each channel into the layer before it.

Exporters spell a bias as ``Add`` behind a Conv (PaddlePaddle does), and a folded BatchNormalization as ``Mul`` and
``Add``. ``f (W x + b) + o`` is ``W' = f W`` along the output channels and ``b' = f b + o``; computed in float64 and
rounded once to the type of the weights.

A scalar in front of a curved function belongs to that function (``x + 3`` of a HardSigmoid, ``1.702 x`` of a quick
GELU) and stays, so that the function is still recognised for what it is.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import (
    Names,
    RefusedError,
    float_values,
    is_standard,
    make_instead,
    pinned_names,
    producer_of,
)
from relu_deploy.passes.linear import LAYERS, Affine, Layer, after, bias_behind, layer_of, write
from relu_deploy.report import PassReport, Skip

# First nodes of activations that may start with a scalar: HardSigmoid and ReLU6 spelled out, GELU, Mish, and so on.
_CURVED = (
    "Clip", "Min", "Max", "Sigmoid", "HardSigmoid", "Tanh", "Erf", "Exp", "Softplus", "Pow", "Mul", "Where", "Log",
    "Sqrt", "Reciprocal", "Abs", "Gelu", "Swish", "HardSwish", "Elu", "Celu", "Selu", "Mish",
)  # fmt: skip


def fold_affine(graph: gs.Graph, *, into_curved: bool = False) -> PassReport:
    """Fold per-channel arithmetic with constants into the Conv, ConvTranspose, Gemm or MatMul that alone feeds it.

    Args:
        graph: Sorted topologically; edited in place. Weights that other nodes share are copied, never changed.
        into_curved: Also take a scalar from in front of a curved function, where nobody has to recognise it any more.

    Returns:
        Changed: the folded nodes. Skipped: those behind a layer that stay, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    pinned, names = pinned_names(graph), Names(graph)
    for node in graph.nodes:
        if not is_standard(node, "Add", "Sub", "Mul", "Div"):
            continue
        if (position := _live(node, into_curved=into_curved)) is None:
            continue
        try:
            layer = layer_of(node.inputs[position], pinned)
            write(layer, after(layer, _affine(node, position, layer)), names, "affine")
        except RefusedError as error:
            skipped.extend([Skip(node.name, str(error))] if _is_behind_layer(node, position) else [])
            continue
        make_instead(layer.last, node)
        changed.append(node.name)
    drop_detached(graph)
    return PassReport("fold_affine", tuple(changed), tuple(skipped))


def _live(node: gs.Node, *, into_curved: bool) -> int | None:
    """Position of the one live input beside a constant; None also for what belongs where it is."""
    stored = [float_values(tensor) for tensor in node.inputs]
    constants = [values for values in stored if values is not None]
    if len(stored) != 2 or len(constants) != 1 or (not into_curved and _starts_activation(node, constants[0])):
        return None
    position = 0 if stored[0] is None else 1
    product = producer_of(node.inputs[position])
    return None if product is not None and bias_behind(product, set()) is node else position


def _starts_activation(node: gs.Node, values: np.ndarray) -> bool:
    """Whether a node is the scalar that the function behind it starts with."""
    return values.size == 1 and any(is_standard(reader, *_CURVED) for reader in node.outputs[0].outputs)


def _is_behind_layer(node: gs.Node, position: int) -> bool:
    """A product of two live tensors, as in attention, is no layer."""
    producer = producer_of(node.inputs[position])
    if producer is None or not is_standard(producer, *LAYERS):
        return False
    return producer.op != "MatMul" or isinstance(producer.inputs[1], gs.Constant)


def _affine(node: gs.Node, position: int, layer: Layer) -> Affine:
    """The node as factor and offset of the layer's channels, float64."""
    stored = float_values(node.inputs[1 - position])
    assert stored is not None  # noqa: S101 - _live has looked
    values = _per_channel(stored.astype(np.float64), layer)
    one, none = np.ones_like(values), np.zeros_like(values)
    if node.op == "Add":
        return Affine(one, values)
    if node.op == "Mul":
        return Affine(values, none)
    if node.op == "Sub":
        return Affine(one, -values) if position == 0 else Affine(-one, values)
    if position == 1 or not values.all():
        raise RefusedError("it divides by the layer, or by zero")
    return Affine(1 / values, none)


def _per_channel(values: np.ndarray, layer: Layer) -> np.ndarray:
    """Values for each channel, ``(C,)``, of a constant that changes neither the shape nor anything along other axes."""
    if values.size == 1:
        wide = -1
    else:
        (wide, *others) = [axis - values.ndim for axis, size in enumerate(values.shape) if size != 1]
        if others or wide != layer.axis or values.size != layer.bias.size:
            raise RefusedError("its constant varies along other axes than the channels of the layer before it")
    if values.ndim > 1 and (layer.rank is None or values.ndim > layer.rank):
        raise RefusedError("its constant may have more axes than the layer before it gives")
    return np.broadcast_to(values.reshape(-1), layer.bias.shape)
