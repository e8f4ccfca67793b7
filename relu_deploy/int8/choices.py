"""Outputs that a network chooses by values: lists of detections, numbers of classes. They jump, and cannot be compared.

Where two boxes or tokens are nearly equal, the least noise changes which of them is first, or how many there are. What
is compared in their place are the floats that were chosen from and by.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.placement import LINEAR_OPS, MOVING_OPS, RECURRENT_OPS
from relu_deploy.passes.edit import is_standard

_CHOOSERS = ("ArgMax", "ArgMin", "TopK", "NonMaxSuppression", "NonZero", "Compress", "Unique")
_COMPARISONS = ("Greater", "GreaterOrEqual", "Less", "LessOrEqual")


def chosen_tensors(graph: gs.Graph) -> set[str]:
    """Names of the tensors that depend on a choice, with no layer in between.

    Args:
        graph: Sorted topologically.
    """
    found: set[str] = set()
    for node in graph.nodes:
        layer = node.op in (*LINEAR_OPS, *RECURRENT_OPS)
        if is_standard(node, *_CHOOSERS) or (not layer and any(tensor.name in found for tensor in node.inputs)):
            found.update(tensor.name for tensor in node.outputs)
    return found


def comparable(tensor: gs.Tensor, chosen: set[str]) -> list[gs.Variable]:
    """What to compare of an output: itself, or the floats that it is chosen from and by; may be nothing.

    Args:
        tensor: An output.
        chosen: From :func:`chosen_tensors`.
    """
    if tensor.name in chosen:
        return list({id(found): found for found in _entering(tensor, chosen, set())}.values())
    while not _is_float(tensor):
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_standard(node, *_COMPARISONS, *MOVING_OPS, "Cast"):
            return []
        tensor = node.inputs[0]
    return [tensor] if isinstance(tensor, gs.Variable) else []


def _entering(tensor: gs.Tensor, chosen: set[str], seen: set[int]) -> Iterator[gs.Variable]:
    """Floats that do not depend on a choice and are read by what does."""
    for node in tensor.inputs:
        if id(node) in seen:
            continue
        seen.add(id(node))
        for read in node.inputs:
            if read.name in chosen:
                yield from _entering(read, chosen, seen)
            elif isinstance(read, gs.Variable) and _is_float(read) and read.inputs:
                yield read


def _is_float(tensor: gs.Tensor) -> bool:
    return tensor.dtype in (np.float32, np.float16, np.float64)
