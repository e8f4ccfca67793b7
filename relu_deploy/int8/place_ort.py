"""Where Q/DQ go for ONNX Runtime: around everything between two linear layers that has an integer kernel.

An operator is fused into its integer kernel when *all* its inputs and its output carry Q/DQ, so the body is quantised
as a whole and no float island is left in what can be integer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.clipped import keep_fusible
from relu_deploy.int8.placement import MOVING_OPS, STAND_IN, Layer, Placement, fused_relu, is_clipping
from relu_deploy.int8.unions import Unions

# ONNX Runtime has an integer kernel for these on the CPU (onnxruntime 1.20 to 1.31, QDQ transformer).
INTEGER_OPS = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
# Move no byte: what is a float in front of them is quantised behind them, where a layer's factors can stand.
_NAMES_ONLY = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")
# Quantised after the last linear layer too, when their inputs are: their output range is their inputs' own.
TAIL_OPS = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Relu", "Clip")


class _Wanted:
    """Tensors to quantise, and the pairs that must share a scale, while they are being found."""

    def __init__(self, graph: gs.Graph, known: set[str], coded: set[str]) -> None:
        self.graph, self.known, self.coded = graph, known, coded
        self.names: dict[str, gs.Variable] = {}
        self.pairs: list[tuple[str, str]] = []
        self.joined: list[tuple[str, str]] = []  # by a Concat: these may have scales of their own
        self.constants: set[str] = set()
        self._queue: list[gs.Variable] = []

    def add(self, tensor: gs.Variable) -> bool:
        """Want a tensor, or the ReLU behind it that it fuses with. False where it has no range."""
        if (relu := fused_relu(tensor, self.graph)) is not None and relu.outputs[0].name in self.known:
            tensor = relu.outputs[0]
        if tensor.name not in self.known:
            return False
        if tensor.name not in self.names:
            self.names[tensor.name] = tensor
            self._queue.append(tensor)
        return True

    def spread(self) -> None:
        """Walk from what is wanted towards the inputs, through every operator that has an integer kernel."""
        while self._queue:
            tensor = self._queue.pop()
            node = tensor.inputs[0] if tensor.inputs else None
            if node is not None and is_clipping(node):
                if fused_relu(node.inputs[0], self.graph) is None:
                    self.add(node.inputs[0])
                    continue
                node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
            if node is not None and not self._renames_a_float(node):
                self._spread_through(node, tensor)

    def _spread_through(self, node: gs.Node, output: gs.Variable) -> None:
        if node.op in MOVING_OPS:
            data = node.inputs[0]
            if isinstance(data, gs.Variable) and _keeps_codes(node) and self.add(data):
                self.pairs.append((data.name, output.name))
                for other in node.outputs:
                    if other.name in self.known and not other.is_empty() and self.add(other):
                        self.pairs.append((other.name, output.name))
        elif node.op == STAND_IN:
            self.add(node.inputs[0])
        elif node.op in INTEGER_OPS:
            live = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
            constant = any(isinstance(t, gs.Constant) for t in node.inputs)
            if node.op != "Concat" and output.name not in self.coded:
                return  # computed in float from what is float anyway
            if all(t.name in self.known for t in live) and _float_constants(node):
                for tensor in live:
                    self.add(tensor)
                if node.op == "Concat":
                    self.joined += [(t.name, output.name) for t in live if self._ends_in(t, node)]
                if constant:
                    self.constants.add(node.name)

    def _renames_a_float(self, node: gs.Node) -> bool:
        if node.op not in _NAMES_ONLY or node.inputs[0].name in self.coded:
            return False
        maker = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        return maker is None or not is_clipping(maker)  # that may be the clipping of a layer's quantiser

    def _ends_in(self, tensor: gs.Variable, concat: gs.Node) -> bool:
        """Whether a tensor is only there to be concatenated: a scale of its own would then be a second rounding.

        ONNX Runtime looks every code up in a table where the scales differ, and copies where they do not
        (benchmarks/shared_scales.py). What others read too keeps the finer scale.
        """
        others = any(reader is not concat for reader in tensor.outputs)
        moved = bool(tensor.inputs) and tensor.inputs[0].op in MOVING_OPS
        return not (others or moved or any(tensor is output for output in self.graph.outputs))


def place_ort(graph: gs.Graph, known: set[str], chosen: set[str], layers: tuple[Layer, ...]) -> Placement:
    """The placement for ONNX Runtime.

    Args:
        graph: Sorted topologically, constants folded.
        known: Names of the tensors that have a range.
        chosen: Names of the layers that become INT8.
        layers: All layers, for the placement.
    """
    coded = _coded(graph, known, chosen)
    wanted = _Wanted(graph, known, coded)
    for node in graph.nodes:
        if node.name in chosen:
            wanted.add(node.inputs[0])
            # The integer convolution has no float output; Gemm and MatMul have one.
            if node.op == "Conv" or _becomes_float_gemm(node):
                wanted.add(node.outputs[0])
    wanted.spread()
    for node in graph.nodes:
        live = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        if (
            node.op in TAIL_OPS
            and live
            and all(t.name in wanted.names and t.name in coded for t in live)
            and not (len(live) < len(node.inputs) and _follows_matmul(live))  # as in _coded
            and _float_constants(node)
        ):
            if node.op == "MaxPool":
                wanted.pairs.append((live[0].name, node.outputs[0].name))
            if wanted.add(node.outputs[0]) and any(isinstance(t, gs.Constant) for t in node.inputs):
                wanted.constants.add(node.name)
    pairs, joined = (
        [pair for pair in found if pair[0] in wanted.names and pair[1] in wanted.names]
        for found in (wanted.pairs, wanted.joined)
    )
    placed = Placement(
        dict.fromkeys(wanted.names),
        _merge([*pairs, *keep_fusible(_merge([*pairs, *joined]), joined, graph, wanted.names)]),
        layers,
        frozenset(wanted.constants - {n.name for n in graph.nodes if n.op == "Clip"}),
        frozenset(coded),
    )
    readers = {name: _code_readers(tensor, placed, graph) for name, tensor in wanted.names.items()}
    return dataclasses.replace(placed, uses=readers)


def _coded(graph: gs.Graph, known: set[str], chosen: set[str]) -> set[str]:
    """Names of the tensors that exist as codes without a quantiser of their own: inputs, and what integer kernels make.

    An operator that has an integer kernel uses it where all it reads is in codes. One that reads a float (what a
    HardSwish, a LayerNormalization or a gate makes) is computed in float, and so is all behind it up to the next layer:
    every quantiser between two float operators would add noise and save no work.
    """
    coded = {tensor.name for tensor in graph.inputs}
    for node in graph.nodes:
        live = [t for t in node.inputs if isinstance(t, gs.Variable) and not t.is_empty()]
        constant = len(live) < len(node.inputs)
        if node.name in chosen:
            summed = any(_adds_constant(reader, node) for reader in node.outputs[0].outputs)
            own = node.op == "Conv" or not summed or _becomes_float_gemm(node)
        elif node.op in MOVING_OPS:
            own = bool(live) and live[0].name in coded
        else:
            kernel = node.op in (*INTEGER_OPS, "Softmax", STAND_IN) or is_clipping(node)
            in_codes = bool(live) and all(t.name in coded for t in live)
            own = kernel and in_codes and not (constant and _follows_matmul(live))
        if own and all(t.name in known for t in live):
            coded.update(output.name for output in node.outputs if output.name in known)
    return coded


def _adds_constant(reader: gs.Node, product: gs.Node) -> bool:
    """Whether a node adds the bias of a matrix product, whose integer kernel gives float: the sum stays there."""
    return reader.op == "Add" and product.op == "MatMul" and any(isinstance(t, gs.Constant) for t in reader.inputs)


def _code_readers(tensor: gs.Variable, placed: Placement, graph: gs.Graph) -> frozenset[str] | None:
    """Who reads the INT8 form of a tensor: None, everybody, where codes are all there is of it.

    Where a float exists, operators that compute in float read that.
    """
    if tensor.name in placed.coded:
        return None
    readers = [node for node in tensor.outputs if placed.takes_codes(node)]
    everybody = len(readers) == len(tensor.outputs) and not any(tensor is output for output in graph.outputs)
    return None if everybody else frozenset(node.name for node in readers)


def _keeps_codes(node: gs.Node) -> bool:
    """Whether a moving operator has an 8-bit kernel whose output stays inside the range of its input."""
    if node.op == "Gather":
        return isinstance(node.inputs[0], gs.Variable)
    if node.op == "Resize":
        return node.attrs.get("mode", "nearest") in ("nearest", "linear")
    return node.op != "MaxPool" or len(node.outputs) == 1


def _becomes_float_gemm(node: gs.Node) -> bool:
    """Whether ONNX Runtime would fuse a MatMul and the Add behind it to a Gemm, whose unquantised addend is float.

    A quantiser between the two prevents it. :func:`relu_deploy.passes.gemm.products_to_gemm` has taken the additions
    of constant vectors; what is left are sums with live tensors, or with matrices. ONNX Runtime fuses for two axes,
    and for more, all fixed, where the addend is a vector; where we know no shapes it may know more.
    """
    product, shape = node.outputs[0], node.outputs[0].shape
    if node.op != "MatMul" or len(product.outputs) != 1 or product.outputs[0].op != "Add":
        return False
    addend = next((t for t in product.outputs[0].inputs if t is not product), product)
    if shape is None or len(shape) == 2:
        return True
    return all(isinstance(size, int) for size in shape) and (addend.shape is None or len(addend.shape) == 1)


def _follows_matmul(live: list[gs.Variable]) -> bool:
    return len(live) == 1 and bool(live[0].inputs) and live[0].inputs[0].op == "MatMul"


def _float_constants(node: gs.Node) -> bool:
    """Whether every constant operand of an arithmetic operator is a finite float tensor."""
    if node.op not in ("Add", "Mul", "Concat"):
        return True
    constants = [t.values for t in node.inputs if isinstance(t, gs.Constant)]
    return all(v.dtype in (np.float32, np.float16) and bool(np.isfinite(v).all()) for v in constants)


def _merge(pairs: Iterable[tuple[str, str]]) -> tuple[frozenset[str], ...]:
    """Union of overlapping pairs.

    >>> sorted(map(sorted, _merge([("a", "b"), ("c", "d"), ("b", "e")])))
    [['a', 'b', 'e'], ['c', 'd']]
    """
    unions = Unions()
    for left, right in pairs:
        unions.join(left, right)
    return tuple(frozenset(names) for names in unions.sets() if len(names) > 1)
