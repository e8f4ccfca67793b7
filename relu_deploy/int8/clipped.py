"""Which tensors may share the scale of a Concat without keeping the ReLU or Clip behind a layer alive.

A quantiser clips as ReLU does where its lowest code is 0.0, and as ``Clip(0, b)`` where its highest is no more than b.
A scale that is shared with a signed tensor, or with a wider one, has other codes; the ReLU or Clip then stands between
the layer and its quantiser, and ONNX Runtime computes the layer in float.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.placement import MOVING_OPS, clip_bounds, is_clipping

_UNIT = ("Sigmoid", "Softmax")
_POOLS = ("AveragePool", "GlobalAveragePool")
_ARITHMETIC = ("Add", "Mul")


def upper_bounds(graph: gs.Graph) -> dict[str, float]:
    """Tensors that are never negative, whatever the network is fed, and the largest value that they can take.

    Args:
        graph: Sorted topologically.

    Returns:
        Tensor name -> bound, possibly infinite.
    """
    bounds: dict[str, float] = {}
    for node in graph.nodes:
        bound = _bound(node, bounds)
        if bound is not None:
            bounds.update((tensor.name, bound) for tensor in node.outputs if not tensor.is_empty())
    return bounds


def _bound(node: gs.Node, bounds: Mapping[str, float]) -> float | None:
    """Bound of what a node makes; None where it may be negative."""
    if is_clipping(node):
        upper = clip_bounds(node)[1] if node.op == "Clip" else math.inf
        return math.inf if upper is None else min(upper, bounds.get(node.inputs[0].name, math.inf))
    if node.op in _UNIT:
        return 1.0
    if node.op in MOVING_OPS or node.op in _POOLS:
        return bounds.get(node.inputs[0].name)
    if node.op not in ("Concat", *_ARITHMETIC):
        return None
    constants = [t.values for t in node.inputs if isinstance(t, gs.Constant)]
    found = [bounds.get(t.name) for t in node.inputs if isinstance(t, gs.Variable)]
    if None in found or any(np.min(values, initial=0) < 0 for values in constants):
        return None
    if node.op in _ARITHMETIC or constants:
        return math.inf
    return max((bound for bound in found if bound is not None), default=None)


def keep_fusible(
    groups: Iterable[frozenset[str]], pairs: Iterable[tuple[str, str]], graph: gs.Graph, known: Iterable[str]
) -> list[tuple[str, str]]:
    """The pairs whose first tensor may share a scale with the second.

    Args:
        groups: What shares a scale if all pairs do.
        pairs: Operand and result of a Concat.
        graph: Sorted topologically.
        known: Names of the tensors that are quantised.
    """
    bounds, tensors = upper_bounds(graph), graph.tensors()
    reach: dict[str, float] = {}
    for names in groups:
        signed = any(name not in bounds for name in names)
        reach.update(dict.fromkeys(names, math.nan if signed else max(bounds[name] for name in names)))
    quantised = set(known)

    def fusible(name: str) -> bool:
        maker = tensors[name].inputs[0] if tensors[name].inputs else None
        if maker is None or not is_clipping(maker) or maker.inputs[0].name in quantised:
            return True
        upper = clip_bounds(maker)[1] if maker.op == "Clip" else math.inf
        return upper is not None and reach[name] <= upper  # no where it is NaN, that is, signed

    return [pair for pair in pairs if fusible(pair[0])]
