"""Fold BatchNormalization into the convolution or matrix product before it.

``bn(y) = s (y - mean) + shift`` with ``s = scale / sqrt(var + epsilon)``, hence for ``y = W x + b``: ``W' = s W``
along the output channels and ``b' = s (b - mean) + shift``. Computed in float64 and rounded once to the type of the
weights.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.region import constant_values
from relu_deploy.report import PassReport, Skip

Array = npt.NDArray[np.float64]


class _RefusedError(Exception):
    """Why a BatchNormalization stays."""


@dataclasses.dataclass(frozen=True)
class _Norm:
    """``factor * y + offset`` for each output channel, float64, shape ``(C,)``."""

    factor: Array
    offset: Array


def fold_batchnorm(graph: gs.Graph) -> PassReport:
    """Fold inference-mode BatchNormalization into the Conv, ConvTranspose or Gemm that alone feeds it.

    Args:
        graph: Edited in place. Weights that other nodes share are copied, never changed.

    Returns:
        Changed: the folded BatchNormalization nodes. Skipped: the others, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    outputs = {id(tensor) for tensor in graph.outputs}
    names = set(graph.tensors())
    for node in graph.nodes:
        if node.op != "BatchNormalization" or node.domain not in (None, "", "ai.onnx"):
            continue
        try:
            producer = _producer(node, outputs)
            weights = _folded(producer, _norm(node))
        except _RefusedError as error:
            skipped.append(Skip(node.name, str(error)))
            continue
        _connect(node, producer, weights, names)
        changed.append(node.name)
    drop_detached(graph)
    return PassReport("fold_batchnorm", tuple(changed), tuple(skipped))


def _producer(node: gs.Node, outputs: set[int]) -> gs.Node:
    tensor = node.inputs[0]
    if node.attrs.get("training_mode", 0) or any(t.outputs or id(t) in outputs for t in node.outputs[1:]):
        raise _RefusedError("it is in training mode")
    if len(tensor.inputs) != 1 or tensor.inputs[0].op not in ("Conv", "ConvTranspose", "Gemm"):
        raise _RefusedError("no Conv, ConvTranspose or Gemm is right before it")
    if tensor.inputs[0].domain not in (None, "", "ai.onnx"):
        raise _RefusedError("what is before it is not a standard operator")
    if len(tensor.outputs) != 1 or id(tensor) in outputs:
        raise _RefusedError(f"the output {tensor.name} of the layer before it is used elsewhere")
    producer: gs.Node = tensor.inputs[0]
    return producer


def _norm(node: gs.Node) -> _Norm:
    parts = [constant_values(tensor) for tensor in node.inputs[1:5]]
    if len(parts) != 4 or any(part is None for part in parts):
        raise _RefusedError("its statistics are not constants")
    scale, shift, mean, variance = (np.asarray(part, dtype=np.float64) for part in parts)
    epsilon = float(np.float32(node.attrs.get("epsilon", 1e-5)))
    if (variance + epsilon <= 0).any():
        raise _RefusedError("its variance is negative")
    factor = scale / np.sqrt(variance + epsilon)
    return _Norm(factor, shift - factor * mean)


def _folded(producer: gs.Node, norm: _Norm) -> dict[int, np.ndarray]:
    """New values of the producer's inputs, by position: weight 1, bias 2."""
    weight = constant_values(producer.inputs[1])
    if weight is None:
        raise _RefusedError("the weight before it is not a constant (quantised, or computed at run time)")
    has_bias = len(producer.inputs) > 2 and not producer.inputs[2].is_empty()
    bias = constant_values(producer.inputs[2]) if has_bias else np.zeros(norm.factor.size)
    if bias is None:
        raise _RefusedError("the bias before it is not a constant")
    if weight.dtype.kind != "f":
        raise _RefusedError(f"the weight before it is of type {weight.dtype}")
    alpha_bias = _gemm_bias(producer, bias, norm) if producer.op == "Gemm" else np.asarray(bias, dtype=np.float64)
    beta = float(producer.attrs.get("beta", 1.0)) if producer.op == "Gemm" else 1.0
    with np.errstate(over="ignore"):  # looked at right below
        new_weight = _scaled_weight(producer, np.asarray(weight, dtype=np.float64), norm.factor).astype(weight.dtype)
        new_bias = (norm.factor * alpha_bias + norm.offset / beta).astype(weight.dtype)
    if not (np.isfinite(new_weight).all() and np.isfinite(new_bias).all()):
        raise _RefusedError(f"the folded weights do not fit into {weight.dtype}")
    return {1: new_weight, 2: new_bias}


def _gemm_bias(producer: gs.Node, bias: np.ndarray, norm: _Norm) -> Array:
    if producer.attrs.get("beta", 1.0) == 0:
        raise _RefusedError("the Gemm before it ignores its bias (beta = 0)")
    if bias.ndim > 1 and any(size != 1 for size in bias.shape[:-1]):
        raise _RefusedError("the bias before it varies along the batch")
    return np.broadcast_to(np.asarray(bias, dtype=np.float64).reshape(-1), norm.factor.shape)


def _scaled_weight(producer: gs.Node, weight: Array, factor: Array) -> Array:
    """Multiply along the output channels: axis 0 of Conv, axis 1 within each group of ConvTranspose, N of Gemm's B."""
    if producer.op == "Gemm":
        return weight * (factor[:, None] if producer.attrs.get("transB", 0) else factor[None, :])
    spatial = (1,) * (weight.ndim - 2)
    if producer.op == "Conv":
        return weight * factor.reshape(-1, 1, *spatial)
    groups = int(producer.attrs.get("group", 1))
    split = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (split * factor.reshape(groups, 1, weight.shape[1], *spatial)).reshape(weight.shape)


def _connect(node: gs.Node, producer: gs.Node, weights: dict[int, np.ndarray], names: set[str]) -> None:
    """Give the producer its own new weights and the output of the BatchNormalization."""
    for position, values in weights.items():
        base = f"{producer.inputs[position].name if len(producer.inputs) > position else ''}" or f"{producer.name}/bias"
        name = f"{base}/bn"
        while name in names:
            name += "_"
        names.add(name)
        tensor = gs.Constant(name, np.ascontiguousarray(values))
        if len(producer.inputs) > position:
            producer.inputs[position] = tensor
        else:
            producer.inputs.append(tensor)
    target = node.outputs[0]
    node.inputs.clear()
    node.outputs.clear()
    producer.outputs[0] = target
