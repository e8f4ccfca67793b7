"""Sums over an axis that a network adds for the purpose: ``sum_h k_h relu(x - b_h)`` as one expression.

``Unsqueeze(x, -1)``, elementwise operators whose constants vary along the new axis, and ``ReduceSum`` over it, or
``MatMul`` with a vector: a function of each element of ``x`` again, with as many terms as the axis is long.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.lower import LOWERINGS
from relu_deploy.passes.operands import (
    STANDARD,
    adds_last_axis,
    constant_shape,
    constant_values,
    is_constant,
    one_axis,
    rank_or,
)

# Terms of a sum, and nodes of one term: a learned unit has as many as intervals, and four nodes.
_MOST_TERMS, _MOST_NODES = 512, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Spread:
    """One such sum.

    Attributes:
        source: The tensor that is given another axis.
        column: Its tensor with that axis.
        nodes: The operators of a term, producers first.
        summand: What is summed.
        weights: Of the terms; None where all count once.
        terms: How many there are.
    """

    source: gs.Tensor
    column: gs.Tensor
    nodes: tuple[gs.Node, ...]
    summand: gs.Tensor
    weights: np.ndarray | None
    terms: int


def spread_sum(node: gs.Node) -> Spread | None:
    """The sum that a node ends; None for any other node."""
    if node.domain not in STANDARD or node.op not in ("ReduceSum", "MatMul") or not node.inputs:
        return None
    summand = node.inputs[0]
    vector = constant_shape(node.inputs[1]) if node.op == "MatMul" else None
    if is_constant(summand) or not (_sums_last_axis(node) if vector is None else len(vector) == 1):
        return None
    found = _term(summand)
    if found is None:
        return None
    column, nodes = found
    constants = [t for n in nodes for t in n.inputs if is_constant(t)]
    shapes = [constant_shape(t) or () for t in constants]
    weights = None if vector is None else constant_values(node.inputs[1])
    lengths = {s[-1] for s in shapes if s and s[-1] != 1} | ({len(weights)} if weights is not None else set())
    if len(lengths) != 1 or not all(one_axis(s[:-1]) for s in shapes):
        return None
    (terms,) = lengths
    return (
        Spread(column.inputs[0].inputs[0], column, tuple(nodes), summand, weights, terms)
        if terms <= _MOST_TERMS
        else None
    )


def _sums_last_axis(node: gs.Node) -> bool:
    axes = constant_values(node.inputs[1]) if len(node.inputs) > 1 else np.asarray(node.attrs.get("axes", ()))
    last = axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) in (-1, rank_or(node.inputs[0], 0) - 1)
    return last and node.op == "ReduceSum" and not node.attrs.get("keepdims", 1)


def _term(summand: gs.Tensor) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """The column that a summand is made of, and the nodes between, producers first."""
    column: gs.Tensor | None = None
    order: list[gs.Node] = []
    seen: set[int] = set()
    stack = [(summand, False)]
    while stack:
        tensor, done = stack.pop()
        if done:
            order.append(tensor.inputs[0])
            continue
        if id(tensor) in seen or is_constant(tensor) or tensor.is_empty():
            continue
        seen.add(id(tensor))
        maker = tensor.inputs[0] if len(tensor.inputs) == 1 else None
        if maker is None or maker.domain not in STANDARD or len(seen) > _MOST_NODES:
            return None
        if maker.op == "Unsqueeze" and adds_last_axis(maker) and column in (None, tensor):
            column = tensor
            continue
        if maker.op not in LOWERINGS:
            return None
        stack.append((tensor, True))
        stack.extend((other, False) for other in maker.inputs)
    return (column, order) if column is not None and order else None
