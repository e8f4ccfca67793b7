"""Tensors of one name that are not one tensor: a pass made one, and the network had it already.

A file knows tensors by name only, so the second of two would silently become the first: a network in which ``conv`` is
a tensor and ``conv/scale`` a weight of its own is no rarity.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_graphsurgeon as gs


def make_distinct(graph: gs.Graph) -> tuple[str, ...]:
    """Rename what has the name of another tensor, in place.

    The first keeps its name: inputs and outputs of the graph, then what nodes make, in the order of the nodes, then
    constants. Constants of equal values are left alone: as one in the file they are what they were.

    Args:
        graph: Of which new nodes stand behind those that were there before, so that old tensors keep their names.

    Returns:
        The names that were given.
    """
    defined: dict[str, gs.Tensor] = {}
    twins = [tensor for tensor in _definitions(graph) if not _is_same(defined.setdefault(tensor.name, tensor), tensor)]
    if not twins:
        return ()
    taken = {tensor.name for tensor in (*_all_tensors(graph), *defined.values())}
    given: dict[int, str] = {}
    for tensor in twins:
        if id(tensor) not in given:
            number = 1
            while (name := f"{tensor.name}_{number}") in taken:
                number += 1
            taken.add(name)
            given[id(tensor)] = tensor.name = name
    return tuple(given.values())


def _definitions(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """Every tensor where it gets its value, also inside nodes; what only refers to one further out is none."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    for part in graphs:
        yield from part.inputs
    yield from (tensor for tensor in graph.outputs if tensor.inputs)
    for part in graphs:
        yield from (tensor for node in part.nodes for tensor in node.outputs if not tensor.is_empty())
    for tensor in _all_tensors(graph):
        if isinstance(tensor, gs.Constant):
            yield tensor


def _all_tensors(graph: gs.Graph) -> Iterator[gs.Tensor]:
    """What nodes read and make, here and inside nodes; most of them several times."""
    for part in (graph, *graph.subgraphs(recursive=True)):
        for node in part.nodes:
            yield from node.inputs
            yield from node.outputs
        yield from part.outputs


def _is_same(first: gs.Tensor, second: gs.Tensor) -> bool:
    """Whether two tensors of one name may be one in a file."""
    if first is second:
        return True
    if not (isinstance(first, gs.Constant) and isinstance(second, gs.Constant)):
        return False
    a, b = first.values, second.values
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
