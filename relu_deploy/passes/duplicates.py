"""Merge initializers of equal bytes, and nodes that compute the same from the same tensors.

Equal means the same type, shape and bytes: 0.0 and -0.0 are two values, and so are two NaNs of different bits.
Initializers that the file also lists as inputs of the network are constants here, as they are for every other pass.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import detach, is_standard, pinned_names, redirect
from relu_deploy.passes.region import onnx_type
from relu_deploy.report import PassReport

# Draws differ from run to run; Q/DQ stand where a runtime wants them, one for each layer; control flow holds graphs.
_NEVER = (
    "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout",
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "If", "Loop", "Scan", "SequenceMap", "Constant",
)  # fmt: skip


def merge_duplicates(graph: gs.Graph) -> PassReport:
    """Keep the first of equal initializers and of equal nodes.

    Args:
        graph: Sorted topologically; edited in place. The graphs inside it are not entered, but read what is kept.

    Returns:
        Changed: names of the initializers and nodes whose readers now read an equal one.
    """
    pinned = pinned_names(graph)
    changed = [*_merge_constants(graph, pinned), *_merge_nodes(graph, pinned)]
    drop_detached(graph)
    return PassReport("merge_duplicates", tuple(changed))


def _merge_constants(graph: gs.Graph, pinned: set[str]) -> Iterator[str]:
    """Of each set of equal initializers keep the first."""
    found = {id(t): t for node in graph.nodes for t in node.inputs if isinstance(t, gs.Constant)}
    alike: dict[tuple[int, tuple[int, ...]], list[gs.Constant]] = {}
    for constant in found.values():
        alike.setdefault((onnx_type(constant), tuple(constant.shape)), []).append(constant)
    for constants in alike.values():
        kept: dict[bytes, gs.Constant] = {}
        for constant in constants if len(constants) > 1 else ():  # most weights have a shape of their own
            content = _content(constant._values)  # noqa: SLF001 - lazy values keep types that numpy has not
            if content is None:
                continue
            first = kept.setdefault(content, constant)
            if first is not constant and constant.name not in pinned:
                redirect(constant, first)
                yield constant.name


def _content(values: np.ndarray | LazyValues) -> bytes | None:
    """What tells tensors of one type and shape apart: the bytes, or of more than a few their hash."""
    if isinstance(values, SparseValues):
        return None
    array = np.asarray(onnx.numpy_helper.to_array(values.tensor) if isinstance(values, LazyValues) else values)
    if array.dtype.kind in "OSU":  # strings: their bytes are addresses
        return None
    content = np.ascontiguousarray(array).tobytes()
    return content if len(content) <= hashlib.blake2b.MAX_DIGEST_SIZE else hashlib.blake2b(content).digest()


def _merge_nodes(graph: gs.Graph, pinned: set[str]) -> Iterator[str]:
    """Of nodes that do the same to the same tensors keep the first; those behind them then are the same, too."""
    kept: dict[Hashable, gs.Node] = {}
    for node in graph.nodes:
        key = _work(node)
        if key is None:
            continue
        first = kept.setdefault(key, node)
        if first is node or any(tensor.name in pinned for tensor in node.outputs):
            continue
        for old, new in zip(node.outputs, first.outputs, strict=True):
            if not old.is_empty():
                redirect(old, new)
        detach(node)
        yield node.name


def _work(node: gs.Node) -> Hashable | None:
    """What a node does, and to what; None where two of the kind may give different results."""
    if node.op in _NEVER or not is_standard(node, node.op) or not node.outputs:
        return None
    attributes = []
    for name, value in sorted(node.attrs.items()):
        part = _attribute(value)
        if part is None:
            return None
        attributes.append((name, part))
    inputs = tuple(None if tensor.is_empty() else id(tensor) for tensor in node.inputs)
    return node.op, tuple(attributes), inputs, tuple(tensor.is_empty() for tensor in node.outputs)


def _attribute(value: object) -> Hashable | None:
    """An attribute as something to compare; None for graphs and what else has no plain value."""
    if isinstance(value, gs.Constant):
        content = _content(value._values)  # noqa: SLF001
        return None if content is None else (onnx_type(value), tuple(value.shape), content)
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    if isinstance(value, (list, tuple)):
        parts = tuple(_attribute(item) for item in value)
        return None if any(part is None for part in parts) else parts
    plain = isinstance(value, (str, bytes, int, float, np.generic, np.dtype, type))
    return (type(value).__name__, repr(value)) if plain else None
