"""What a node of a region reads, seen through the operators that only carry it there."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs

from relu_deploy.passes.operands import draw, fill, is_constant, table_and_coordinates
from relu_deploy.passes.spread import spread_sum


def read_inputs(node: gs.Node) -> list[gs.Tensor]:
    """Tensors whose values a node reads.

    Of CastLike's second input only the type counts, of an index its coordinates, of a sum over an added axis the tensor
    without it.
    """
    if node.op == "CastLike":
        return list(node.inputs[:1])
    read = table_and_coordinates(node)
    if read is not None:
        return read[1]
    spread = spread_sum(node)
    return [spread.source] if spread is not None else list(node.inputs)


def live_inputs(node: gs.Node) -> Iterator[gs.Tensor]:
    """Those of them that carry data of the network."""
    return (t for t in read_inputs(node) if not (t.is_empty() or is_constant(t) or draw(t) is not None or fill(t)))
