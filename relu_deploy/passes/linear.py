"""Layers with constant weights, and what scaling their channels does to the weights.

``y = W x + b`` of Conv, ConvTranspose, Gemm and MatMul (with the Add behind it). All arithmetic is float64, rounded
once to the type of the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import (
    Names,
    RefusedError,
    dims,
    float_values,
    given,
    is_standard,
    producer_of,
    set_input,
)

Array = npt.NDArray[np.float64]
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclasses.dataclass(frozen=True)
class Affine:
    """``factor * y + offset`` for each channel, float64, shape ``(C,)``."""

    factor: Array
    offset: Array


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer whose weights are known.

    Attributes:
        node: Conv, ConvTranspose, Gemm, or MatMul with the weights on the right.
        bias_add: The Add of a constant vector behind a MatMul.
        weight: Its values as they are stored.
        bias: ``(C,)``, zeros where it has none; before Gemm's beta.
    """

    node: gs.Node
    bias_add: gs.Node | None
    weight: np.ndarray
    bias: Array

    @property
    def last(self) -> gs.Node:
        """The node that gives its result, bias included."""
        return self.node if self.bias_add is None else self.bias_add

    @property
    def axis(self) -> int:
        """Axis of the channels in the output, counted from the end."""
        return 1 - self.weight.ndim if self.node.op.startswith("Conv") else -1

    @property
    def rank(self) -> int | None:
        """Axes of the output, where they are known."""
        if self.node.op != "MatMul":
            return int(self.weight.ndim)
        shape = dims(self.node.inputs[0]) or dims(self.last.outputs[0])
        return None if shape is None else len(shape)


@dataclasses.dataclass(frozen=True)
class Weights:
    """New values, of the type of the old ones; ``bias`` is ``(C,)``."""

    weight: np.ndarray
    bias: np.ndarray


def layer_of(tensor: gs.Tensor, pinned: set[str]) -> Layer:
    """The layer that makes a tensor, nothing else reading what is in between.

    Raises:
        RefusedError: there is none, it has no constant weights, or its result is used elsewhere.
    """
    node = producer_of(tensor)
    add = node if node is not None and is_standard(node, "Add") else None
    if add is not None:
        node = _product_below(add, pinned)
    if node is None or node.op not in LAYERS:
        raise RefusedError("no Conv, ConvTranspose, Gemm or MatMul is right before it")
    if not is_standard(node, *LAYERS):
        raise RefusedError("what is before it is not a standard operator")
    if len(tensor.outputs) != 1 or tensor.name in pinned:
        raise RefusedError(f"the output {tensor.name} of the layer before it is used elsewhere")
    return read_layer(node, add)


def read_layer(node: gs.Node, bias_add: gs.Node | None = None) -> Layer:
    """Weights and bias of a node of ``LAYERS``.

    Raises:
        RefusedError: they are not constants of a float type, or of a form that is not worked with.
    """
    weight = float_values(node.inputs[1])
    if weight is None:
        raise RefusedError(
            "the weight before it is not a constant of a float type (quantised, or computed at run time)"
        )
    if node.op in ("Gemm", "MatMul") and weight.ndim != 2:
        raise RefusedError(f"the weight before it has {weight.ndim} axes instead of 2")
    return Layer(node, bias_add, weight, _bias(node, bias_add, weight))


def bias_behind(node: gs.Node, pinned: set[str], *, past: Sequence[str] = ()) -> gs.Node | None:
    """The Add of a constant vector behind a MatMul with constant weights, where nothing else reads the product.

    Args:
        node: The MatMul, or another node.
        pinned: Names of tensors that have to stay.
        past: Operators that may stand between the two.
    """
    if not is_standard(node, "MatMul") or len(node.outputs) != 1:
        return None
    product, weight = node.outputs[0], node.inputs[1]
    while len(product.outputs) == 1 and product.name not in pinned and is_standard(product.outputs[0], *past):
        product = product.outputs[0].outputs[0]
    if len(product.outputs) != 1 or product.name in pinned:
        return None
    add = product.outputs[0]
    if not is_standard(add, "Add") or not isinstance(weight, gs.Constant) or len(weight.shape) != 2:
        return None
    values = float_values(add.inputs[1] if add.inputs[0] is product else add.inputs[0])
    if values is None or values.shape[-1:] != (weight.shape[1],) or values.size != weight.shape[1]:
        return None
    shape = dims(node.outputs[0]) or dims(node.inputs[0])
    return add if values.ndim == 1 or (shape is not None and values.ndim <= len(shape)) else None


def _product_below(add: gs.Node, pinned: set[str]) -> gs.Node | None:
    """The MatMul whose bias an Add adds; None where it is no such Add."""
    nodes = [node for tensor in add.inputs if (node := producer_of(tensor)) is not None]
    return next((node for node in nodes if bias_behind(node, pinned) is add), None)


def _channels(node: gs.Node, weight: np.ndarray) -> int:
    if node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0)):
        return int(weight.shape[0])
    groups = int(node.attrs.get("group", 1)) if node.op == "ConvTranspose" else 1
    return int(weight.shape[1]) * groups


def _bias(node: gs.Node, bias_add: gs.Node | None, weight: np.ndarray) -> Array:
    channels = _channels(node, weight)
    if bias_add is not None:
        stored = next(tensor for tensor in bias_add.inputs if tensor is not node.outputs[0])
    else:
        stored = given(node, 2)
    if stored is None:
        return np.zeros(channels)
    bias = float_values(stored)
    if bias is None:
        raise RefusedError("the bias before it is not a constant")
    if bias.ndim > 1 and any(size != 1 for size in bias.shape[:-1]):
        raise RefusedError("the bias before it varies along the batch")
    return np.broadcast_to(bias.astype(np.float64).reshape(-1), (channels,))


def after(layer: Layer, affine: Affine) -> Weights:
    """Weights of the layer with ``affine`` behind it.

    Raises:
        RefusedError: they do not fit into their type, or the layer has no place for a bias.
    """
    if affine.factor.shape != layer.bias.shape:
        raise RefusedError("it has another number of channels than the layer before it")
    factor, offset = affine.factor, affine.offset
    beta = _beta(layer)
    with np.errstate(over="ignore", invalid="ignore"):  # _rounded looks at what came of it
        return _rounded(layer, _scaled(layer, factor, outputs=True), factor * layer.bias + offset / beta)


def before(layer: Layer, affine: Affine) -> Weights:
    """Weights of the layer with ``affine`` in front of its data input.

    Raises:
        RefusedError: as :func:`after`; or the layer pads its input, and the padding is not what ``affine`` gives.
    """
    node = layer.node
    if node.op == "Gemm" and node.attrs.get("transA", 0):
        raise RefusedError("the Gemm behind it transposes its input")
    if affine.offset.any() and node.op == "ConvTranspose":
        raise RefusedError("at the borders of a ConvTranspose its offset does not count in full")
    if affine.offset.any() and node.op == "Conv" and (any(node.attrs.get("pads", ())) or _is_same(node)):
        raise RefusedError("the Conv behind it pads with zeros, which it does not change")
    alpha = float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        shift = alpha * response(layer, affine.offset)
        bias = layer.bias + (shift / _beta(layer) if shift.any() else 0.0)
        return _rounded(layer, _scaled(layer, affine.factor, outputs=False), bias)


def write(layer: Layer, weights: Weights, names: Names, suffix: str) -> None:
    """Give the layer new weights of its own, and a bias where it had one or needs one."""
    node = layer.node
    if (weights.weight != layer.weight).any():
        set_input(node, 1, names.constant(f"{node.inputs[1].name}/{suffix}", weights.weight))
    old = given(node, 2)
    if layer.bias_add is not None:
        position = next(i for i, tensor in enumerate(layer.bias_add.inputs) if tensor is not node.outputs[0])
        base = f"{layer.bias_add.inputs[position].name}/{suffix}"
        set_input(layer.bias_add, position, names.constant(base, weights.bias))
    elif old is not None or weights.bias.any():
        base = f"{old.name if old is not None else f'{node.name}/bias'}/{suffix}"
        set_input(node, 2, names.constant(base, weights.bias))
        node.op = "Gemm" if node.op == "MatMul" else node.op


def _is_same(node: gs.Node) -> bool:
    return str(node.attrs.get("auto_pad", "NOTSET")).startswith("SAME")


def _beta(layer: Layer) -> float:
    beta = float(layer.node.attrs.get("beta", 1.0)) if layer.node.op == "Gemm" else 1.0
    if beta == 0:
        raise RefusedError("the Gemm before it ignores its bias (beta = 0)")
    return beta


def _scaled(layer: Layer, factor: Array, *, outputs: bool) -> Array:
    """Weights multiplied along the output channels, or along the input channels.

    Output channels are axis 0 of Conv, axis 1 within each group of ConvTranspose, and N of a matrix; input channels are
    those axes of the other convolution, and K of a matrix.
    """
    weight, node = layer.weight.astype(np.float64), layer.node
    if node.op in ("Gemm", "MatMul"):
        return weight * (factor[:, None] if _is_transposed(node) == outputs else factor[None, :])
    spatial = (1,) * (weight.ndim - 2)
    if node.op == ("Conv" if outputs else "ConvTranspose"):
        return weight * factor.reshape(-1, 1, *spatial)
    groups = int(node.attrs.get("group", 1))
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (split * factor.reshape(groups, 1, weight.shape[1], *spatial)).reshape(weight.shape)


def response(layer: Layer, offset: Array) -> Array:
    """What each output channel becomes where every position of the input is ``offset``, ``(C_in,)``."""
    if not offset.any():
        return np.zeros(layer.bias.size)
    weight, node = layer.weight.astype(np.float64), layer.node
    if node.op in ("Gemm", "MatMul"):
        product: Array = offset @ (weight.T if _is_transposed(node) else weight)
        return product
    groups = int(node.attrs.get("group", 1))
    kernels = weight.sum(axis=tuple(range(2, weight.ndim))).reshape(groups, weight.shape[0] // groups, weight.shape[1])
    return np.asarray((kernels * offset.reshape(groups, 1, -1)).sum(axis=2).reshape(-1), dtype=np.float64)


def _is_transposed(node: gs.Node) -> bool:
    return node.op == "Gemm" and bool(node.attrs.get("transB", 0))


def _rounded(layer: Layer, weight: Array, bias: Array) -> Weights:
    """Into the type of the old weights, if they fit and there is a place for the bias."""
    kind = layer.weight.dtype
    new = Weights(weight.astype(kind), bias.astype(kind))
    if not (np.isfinite(new.weight).all() and np.isfinite(new.bias).all()):
        raise RefusedError(f"the folded weights do not fit into {kind}")
    if layer.node.op == "MatMul" and layer.bias_add is None and bias.any() and layer.rank != 2:
        raise RefusedError("the MatMul has no bias that could take it, and is not known to be a product of matrices")
    return new
