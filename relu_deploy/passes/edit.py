"""What every pass that rewires a graph needs: who may be touched, and names that nobody has."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.region import constant_values

# Axes that an operator's result has at least; and operators whose result has no fewer than their first input.
_AT_LEAST = {
    "Conv": 3, "ConvTranspose": 3, "MaxPool": 3, "AveragePool": 3, "GlobalAveragePool": 3, "BatchNormalization": 2,
    "Gemm": 2, "Flatten": 2,
}  # fmt: skip
_KEEP_RANK = (
    "Relu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Tanh",
    "Clip",
    "Identity",
    "Cast",
    "Add",
    "Mul",
    "Transpose",
)
_FAR = 8


class RefusedError(Exception):
    """Why a pass leaves a node alone, in words for its report."""


def is_standard(node: gs.Node, *ops: str) -> bool:
    """Whether a node is one of these operators, of ONNX's own domain."""
    return node.op in ops and node.domain in (None, "", "ai.onnx")


def pinned_names(graph: gs.Graph) -> set[str]:
    """Names of tensors that must go on existing as they are: outputs of the network and of the graphs inside it."""
    return {tensor.name for inner in (graph, *graph.subgraphs(recursive=True)) for tensor in inner.outputs}


def producer_of(tensor: gs.Tensor) -> gs.Node | None:
    """The node that makes a tensor; None for inputs of the network, initializers and left-out inputs."""
    return tensor.inputs[0] if len(tensor.inputs) == 1 else None


def given(node: gs.Node, position: int) -> gs.Tensor | None:
    """An optional input; None where it is left out."""
    tensor = node.inputs[position] if len(node.inputs) > position else None
    return None if tensor is None or tensor.is_empty() else tensor


def array_values(tensor: gs.Tensor | None) -> np.ndarray | None:
    """Values of a constant of one of numpy's own types; None for anything else.

    Graphsurgeon keeps the others (bfloat16, int4) as they are in the file until somebody looks at them, and as what
    numpy makes of them afterwards.
    """
    lazy = tensor if isinstance(tensor, gs.Constant) else None
    if tensor is None or (lazy is not None and isinstance(lazy.dtype, int)):
        return None
    return constant_values(tensor)


def float_values(tensor: gs.Tensor | None) -> np.ndarray | None:
    """Values of a constant of numpy's own float types; None for anything else."""
    values = array_values(tensor)
    return values if values is not None and values.dtype.kind == "f" else None


def int_values(node: gs.Node, name: str, position: int) -> list[int] | None:
    """Integers that are an attribute in older opsets and an input in newer ones; None where absent or computed."""
    tensor = given(node, position)
    values = node.attrs.get(name) if tensor is None else constant_values(tensor)
    return None if values is None else [int(value) for value in np.asarray(values).reshape(-1)]


def known_shape(tensor: gs.Tensor) -> tuple[int, ...] | None:
    """Shape of a tensor whose every extent is known beforehand; None otherwise."""
    shape = dims(tensor)
    if shape is None or any(size is None for size in shape):
        return None
    return tuple(size for size in shape if size is not None)


def dims(tensor: gs.Tensor) -> tuple[int | None, ...] | None:
    """Extents of a tensor, None for those that are open; None altogether where not even the rank is known."""
    shape = tensor.shape
    if shape is None or (isinstance(tensor, gs.Variable) and not shape and tensor.dtype is None):
        return None  # graphsurgeon writes an unknown shape of an untyped tensor as ()
    return tuple(int(size) if isinstance(size, (int, np.integer)) and size >= 0 else None for size in shape)


def least_rank(tensor: gs.Tensor) -> int:
    """How many axes a tensor has at least, where its shape is not known: what its producers say."""
    for _ in range(_FAR):
        shape, node = dims(tensor), producer_of(tensor)
        if shape is not None:
            return len(shape)
        if node is None or not is_standard(node, *_AT_LEAST, *_KEEP_RANK):
            return 0
        if node.op in _AT_LEAST:
            return _AT_LEAST[node.op]
        tensor = node.inputs[0]
    return 0


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all readers of ``old`` read ``new``, those inside subgraphs too.

    Graphsurgeon's own lists find a reader by comparing nodes field by field, from the first reader on, which is
    quadratic for a tensor of many readers; hence the lists underneath.
    """
    readers = {id(reader): reader for reader in old.outputs}
    list.clear(old.outputs)
    for reader in readers.values():
        for position, tensor in enumerate(list(reader.inputs)):
            if tensor is old:
                list.__setitem__(reader.inputs, position, new)
                list.append(new.outputs, reader)


def set_input(node: gs.Node, position: int, tensor: gs.Tensor) -> None:
    """Give a node another input; positions up to it that the node has not are left out."""
    while len(node.inputs) <= position:
        node.inputs.append(gs.Variable.empty())
    _forget(node.inputs[position], node)
    list.__setitem__(node.inputs, position, tensor)
    list.append(tensor.outputs, node)


def detach(node: gs.Node) -> None:
    """Cut a node off; ``drop_detached`` takes it out of the graph, and out of the readers of its constants."""
    for tensor in node.inputs:
        if not isinstance(tensor, gs.Constant):
            _forget(tensor, node)
    kept = [tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)]
    list.__setitem__(node.inputs, slice(None), kept)
    node.outputs.clear()


def make_instead(producer: gs.Node, node: gs.Node) -> None:
    """Let ``producer`` make what ``node``, its only reader, makes of its result; ``node`` is cut off."""
    target = node.outputs[0]
    detach(node)
    producer.outputs.clear()
    producer.outputs.append(target)


def _forget(tensor: gs.Tensor, reader: gs.Node) -> None:
    """Take one entry of a reader out of a tensor's list."""
    index = next(i for i, node in enumerate(tensor.outputs) if node is reader)
    list.__delitem__(tensor.outputs, index)


class Names:
    """Names for new tensors that no tensor of the graph has, nor of the graphs inside it."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = set(_all_names(graph))
        self._next: dict[str, int] = {}  # or thousands of layers that share a weight try the same numbers again

    def new(self, base: str) -> str:
        """``base``, or what comes closest to it."""
        number = self._next.get(base, 0)
        name = f"{base}_{number}" if number else base
        while name in self._taken:
            number += 1
            name = f"{base}_{number}"
        self._taken.add(name)
        self._next[base] = number + 1
        return name

    def constant(self, base: str, values: np.ndarray) -> gs.Constant:
        """A new initializer."""
        return gs.Constant(self.new(base), np.ascontiguousarray(values).reshape(values.shape))


def _all_names(graph: gs.Graph) -> Iterator[str]:
    for inner in (graph, *graph.subgraphs(recursive=True)):
        yield from inner.tensors()
