"""The float part of a quantised network in float16, where its values bear it; inputs and outputs stay float32.

Strongly typed networks compute in the types of the file, so what is to run in half has to be written in half. Left in
float32, with casts around it, is what float16 would get wrong: values past its range (by calibration, or by what the
weights allow), values and constants that vanish in it (the 1e-12 in a normalisation), sums that pass its range before a
mean, and operators that square or exponentiate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.half_scales import agree, carried, holds
from relu_deploy.int8.placement import MOVING_OPS, RECURRENT_OPS
from relu_deploy.report import PassReport, Skip

HALF, FLOAT = np.dtype(np.float16), np.dtype(np.float32)
# Half of float16's largest number: data in use goes past what calibration saw.
LARGEST = 65504.0 / 2
# Below float16's smallest normal number precision goes, and below 6e-8 all of it.
SMALLEST = 2.0**-14
_WIDE = frozenset({
    "Exp", "Log", "Pow", "Sqrt", "Reciprocal", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum",
    "ReduceLogSumExp", "ReduceProd", "CumSum", "InstanceNormalization", "GroupNormalization", "BatchNormalization",
    "LpNormalization", "MeanVarianceNormalization", "LSTM", "GRU", "RNN", "If", "Loop", "Scan", "NonMaxSuppression",
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Range",
    "Det", "Einsum", "Cast", "CastLike", "ConstantOfShape", "EyeLike", "GridSample", "RoiAlign", "QLinearConv",
    "Celu", "IsInf", "DynamicQuantizeLinear",
})  # fmt: skip
_SUMS = ("ReduceSum", "ReduceMean", "GlobalAveragePool")
# Operands that ONNX wants in float32, or as they are, whatever the type of the first one is.
_FIXED = ("Resize", "Upsample")
_FIRST_ONLY = (*_FIXED, "QuantizeLinear", "DequantizeLinear")
_UNIT = frozenset({"Sigmoid", "HardSigmoid", "Softmax", "Tanh", "Erf", "Sin", "Cos"})
_NO_LARGER = frozenset({
    "Relu", "Clip", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Reshape", "Transpose", "Flatten",
    "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "GatherElements", "GatherND", "Identity", "Resize", "Pad",
    "DepthToSpace", "SpaceToDepth", "Expand", "Tile", "Neg", "Abs", "HardSwish", "Gelu", "Mish", "ReduceMean",
    "ReduceMax", "ReduceMin", "QuantizeLinear", "Dropout",
})  # fmt: skip


def halve(graph: gs.Graph, bounds: Mapping[str, tuple[float, float]]) -> PassReport:
    """Turn float32 computation into float16, in place; the caller sorts and cleans up.

    Args:
        graph: Quantised, of opset 19 or newer, whose Q/DQ have scales that float16 holds.
        bounds: Tensor name -> smallest and largest value measured.

    Returns:
        ``changed``: nodes that compute in half; ``skipped``: those that stay float32, and why.
    """
    limits = _Limits(graph, bounds)
    kept = _captured(graph)
    before = _before_recurrence(graph)
    changed, skipped = [], []
    half: set[int] = set()
    for node in graph.nodes:
        if not _computes(node):
            continue
        if node.op not in ("QuantizeLinear", "DequantizeLinear"):
            reason = before.get(id(node)) or _why_float(node, limits, kept)
            if reason:
                skipped.append(Skip(node.name, reason))
                continue
            changed.append(node.name)
        half.add(id(node))
    skipped += agree(graph, half, kept)
    lost = {skip.name for skip in skipped}
    changed = [name for name in changed if name not in lost]
    _choose_dequantizers(graph, half, kept)
    _retype(graph, half)
    return PassReport("halve", tuple(changed), tuple(skipped))


def _computes(node: gs.Node) -> bool:
    """Whether a node reads or writes float32."""
    inputs = node.inputs[:1] if node.op in _FIXED else node.inputs
    return any(tensor.dtype == FLOAT for tensor in (*inputs, *node.outputs) if not _is_absent(tensor))


def _is_absent(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and tensor.is_empty()


def _why_float(node: gs.Node, limits: _Limits, kept: set[int]) -> str:
    """Why a node is left in float32; empty where it need not be."""
    if node.op in _WIDE or node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} is computed in float32"
    if any(id(tensor) in kept for tensor in (*node.inputs, *node.outputs)):
        return "a graph inside If, Loop or Scan reads its values"
    if node.attrs.get("reduction", "none") != "none":
        return "any number of values meet in one place"
    if node.op == "LayerNormalization" and node.attrs.get("stash_type", 1) != 1:
        return "its statistics would be float16"
    for operand in node.inputs[: 1 if node.op in _FIRST_ONLY else None]:
        if isinstance(operand, gs.Constant) and operand.dtype == FLOAT:
            largest = float(np.abs(operand.values).max(initial=0))
            if largest > LARGEST or 0 < largest < SMALLEST:
                return f"its constant {operand.name} is {largest:.3g} at most, which float16 does not hold well"
    for tensor in (*node.inputs, *node.outputs):
        if not (isinstance(tensor, gs.Constant) or _is_absent(tensor)) and (reason := _why_wide(tensor, limits)):
            return reason
    if node.op in _SUMS and (total := _total(node, limits)) is not None and total > LARGEST:
        return f"the sum before its mean may reach {total:.3g}"
    squared = node.op == "Mul" and node.inputs[0] is node.inputs[1]
    return "a square" if squared else ""


def _why_wide(tensor: gs.Variable, limits: _Limits) -> str:
    """Why float16 would not do for an activation; empty where it does, or where it is no float32."""
    if tensor.dtype is None:
        return f"the type of {tensor.name} is not known"
    if tensor.dtype != FLOAT:
        return ""
    limit = limits[tensor]
    if limit is None:
        return f"the range of {tensor.name} is not known"
    if limit > LARGEST:
        return f"{tensor.name} reaches {limit:.4g}, and float16 ends at 65504"
    return f"{tensor.name} is {limit:.3g} at most, which float16 does not hold well" if 0 < limit < SMALLEST else ""


def _total(node: gs.Node, limits: _Limits) -> float | None:
    """Largest sum that a mean or sum may pass through; None where extents are not known."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    known = before is not None and after is not None and all(isinstance(e, int) for e in (*before, *after))
    limit = limits[node.inputs[0]]
    if not known or limit is None:
        return None
    return float(limit * math.prod(before) / max(math.prod(after), 1))


class _Limits:
    """Largest magnitude of each tensor: as measured, else as follows from what it is computed of; None: not known."""

    def __init__(self, graph: gs.Graph, bounds: Mapping[str, tuple[float, float]]) -> None:
        self._known: dict[int, float | None] = {}
        for tensor in graph.inputs:
            self._known[id(tensor)] = self._measured(tensor, bounds)
        for node in graph.nodes:  # sorted, so that operands come first
            for tensor in node.outputs:
                measured = self._measured(tensor, bounds)
                self._known[id(tensor)] = self._follow(node) if measured is None else measured

    def __getitem__(self, tensor: gs.Tensor) -> float | None:
        if isinstance(tensor, gs.Constant):
            return float(np.abs(tensor.values).max(initial=0)) if tensor.dtype == FLOAT else None
        return self._known.get(id(tensor))

    @staticmethod
    def _measured(tensor: gs.Tensor, bounds: Mapping[str, tuple[float, float]]) -> float | None:
        return max(map(abs, bounds[tensor.name])) if tensor.name in bounds else None

    def _follow(self, node: gs.Node) -> float | None:
        """Bound of an operator's result by those of its operands."""
        if node.op in _UNIT:
            return 1.0
        if node.op == "DequantizeLinear":
            scale = node.inputs[1]
            return float(np.max(scale.values)) * 128 if isinstance(scale, gs.Constant) else None
        live = [t for t in node.inputs if not _is_absent(t) and t.dtype == FLOAT]
        if node.op in _FIRST_ONLY or node.op in _NO_LARGER:
            live = live[:1]
        operands = [self[tensor] for tensor in live]
        if not operands or any(limit is None for limit in operands):
            return None
        found = [limit for limit in operands if limit is not None]
        if node.op in _NO_LARGER or node.op in ("Concat", "Max", "Min", "Where"):
            return max(found)
        if node.op in ("Add", "Sub", "Sum"):
            return sum(found)
        if node.op in ("PRelu", "LeakyRelu"):
            return found[0] * max(1.0, *found[1:], abs(float(node.attrs.get("alpha", 0.01))))
        return math.prod(found) if node.op == "Mul" else self._product(node)

    def _product(self, node: gs.Node) -> float | None:
        """Bound of a linear layer with stored weights: the largest sum of magnitudes of a channel."""
        if node.op not in ("Conv", "Gemm", "MatMul") or not isinstance(node.inputs[1], gs.Constant):
            return None
        data = self[node.inputs[0]]
        weight = np.abs(node.inputs[1].values.astype(np.float64))
        rows = node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0))
        sums = weight.reshape(weight.shape[0], -1).sum(axis=1) if rows else weight.sum(axis=-2)
        bias = self[node.inputs[2]] if len(node.inputs) > 2 and not _is_absent(node.inputs[2]) else 0.0
        if data is None or bias is None:
            return None
        return float(data * sums.max(initial=0) + bias)


def _captured(graph: gs.Graph) -> set[int]:
    """Tensors that a graph inside If, Loop or Scan reads by name: they keep name and type."""
    tensors = graph.tensors()
    inner = {
        tensor.name
        for node in graph.nodes
        for subgraph in node.subgraphs(recursive=True)
        for inside in subgraph.nodes
        for tensor in inside.inputs
    }
    return {id(tensors[name]) for name in inner if name in tensors}


def _before_recurrence(graph: gs.Graph) -> dict[int, str]:
    """What makes and what moves the inputs of a recurrent layer, which is float32, and that as a reason.

    TensorRT-RTX 1.7 cannot build one whose input is cast from float16, directly or before it is moved
    (tests/engines/test_quantizer_engines.py asks it). It can where something is computed in between.
    """
    found: dict[int, str] = {}
    for layer in graph.nodes:
        waiting = list(layer.inputs) if layer.op in RECURRENT_OPS else []
        while waiting:
            for maker in waiting.pop().inputs:
                if id(maker) not in found and maker.op not in ("QuantizeLinear", "DequantizeLinear"):
                    found[id(maker)] = f"{layer.op} {layer.name}, which is computed in float32, reads what it makes"
                    waiting += maker.inputs[:1] if maker.op in MOVING_OPS else []
    return found


def _choose_dequantizers(graph: gs.Graph, half: set[int], kept: set[int]) -> None:
    """Q takes the type that it is given, DQ gives the type that most of its readers want; in place."""
    for node in graph.nodes:
        if node.op == "DequantizeLinear" and id(node) in half:
            readers = node.outputs[0].outputs
            wanted = sum(1 if id(reader) in half else -1 for reader in readers)
            layers = carried(node)[1]
            if (wanted < 0 and not layers) or not holds(node) or id(node.outputs[0]) in kept:
                half.discard(id(node))
        elif node.op == "QuantizeLinear" and id(node) in half:
            maker = node.inputs[0].inputs
            if not holds(node) or not maker or id(maker[0]) not in half:
                half.discard(id(node))


@dataclasses.dataclass
class _Casts:
    """Tensors and constants in the other type, each made once."""

    graph: gs.Graph
    made: dict[tuple[int, np.dtype[Any]], gs.Tensor] = dataclasses.field(default_factory=dict)

    def of(self, tensor: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
        """The tensor in a type; itself where it is of that type."""
        if tensor.dtype == dtype:
            return tensor
        found = self.made.get((id(tensor), dtype))
        if found is None:
            found = self._make(tensor, dtype)
            self.made[id(tensor), dtype] = found
        return found

    def _make(self, tensor: gs.Tensor, dtype: np.dtype[Any]) -> gs.Tensor:
        name = f"{tensor.name}/{dtype.name}"
        if isinstance(tensor, gs.Constant):
            return gs.Constant(name, tensor.values.astype(dtype))
        cast = gs.Variable(name, dtype, tensor.shape)
        attrs = {"to": 10 if dtype == HALF else 1}
        self.graph.nodes.append(gs.Node("Cast", f"{name}/Cast", attrs, [tensor], [cast]))
        return cast


def _retype(graph: gs.Graph, half: set[int]) -> None:
    """Give tensors the type of the node that makes them, and casts to readers of the other type; in place."""
    nodes = list(graph.nodes)
    outputs = {id(tensor) for tensor in graph.outputs}
    casts = _Casts(graph)
    for node in nodes:
        if id(node) in half:
            for index, tensor in enumerate(node.outputs):
                if tensor.dtype == FLOAT and not _is_absent(tensor):
                    if id(tensor) in outputs:
                        node.outputs[index] = _behind_a_cast(graph, tensor)
                    else:
                        tensor.dtype = HALF
    for node in nodes:
        wanted = HALF if id(node) in half else FLOAT
        fixed = 1 if node.op in _FIXED else None
        for index, tensor in enumerate(list(node.inputs)):
            if _is_absent(tensor) or tensor.dtype not in (HALF, FLOAT) or (fixed is not None and index >= fixed):
                continue
            if node.op != "Cast":  # one that was there takes any type
                node.inputs[index] = casts.of(tensor, wanted)


def _behind_a_cast(graph: gs.Graph, output: gs.Variable) -> gs.Variable:
    """An output of the network keeps name and type; what computes it in half gets a tensor of its own.

    Other readers of the output then read the new one.
    """
    made = gs.Variable(f"{output.name}/float16", HALF, output.shape)
    for reader in list(output.outputs):
        reader.inputs = [made if tensor is output else tensor for tensor in reader.inputs]
    graph.nodes.append(gs.Node("Cast", f"{output.name}/Cast", {"to": 1}, [made], [output]))
    return made
