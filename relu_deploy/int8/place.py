"""Which tensors of a graph become INT8, and which layers therefore compute in integers.

Two rules, because two kinds of runtime read the result:

* ``ort``: ONNX Runtime fuses an operator into its integer kernel when *all* its inputs and its output carry Q/DQ. So
  the body, everything between two linear layers that has an integer kernel, is quantised as a whole and no float
  island is left.
* ``tensorrt``, ``tensorrt-rtx``: the compiler moves and fuses by itself and wants Q/DQ in front of every quantised
  layer, none between a convolution and its ReLU, and on a residual Add the shortcut quantised (TensorRT#1992).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.granularity import shares_scale
from relu_deploy.int8.unions import Unions

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
RECURRENT_OPS = ("LSTM", "GRU", "RNN")
# Move or select values and do not compute: input and output share one scale, so no requantisation is left.
MOVING_OPS = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
    "Resize", "DepthToSpace", "SpaceToDepth", "Expand", "Tile",
)  # fmt: skip
# ONNX Runtime has an integer kernel for these on the CPU (onnxruntime 1.20 to 1.31, QDQ transformer).
INTEGER_OPS = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "Sigmoid", "LeakyRelu")
# What stands for an activation that will be a table of codes; no file ever holds one.
STAND_IN = "Table"
# Quantised after the last linear layer too, when their inputs are: their output range is their inputs' own.
TAIL_OPS = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Relu", "Clip")
_POOLS = ("GlobalAveragePool", "ReduceMean")
# TensorRT-RTX 1.7.1 reads a ConvTranspose with Q/DQ, then silently multiplies in float. Tried: SM 89 and 120; kernels
# of 1 to 4, strides 1 and 2, with and without groups; weights per channel and per tensor; float32 and float16. Part is
# in tests/engines/test_quantizer_engines.py. The data-centre library was not tried: it keeps its Q/DQ.
_FLOAT_CONV_TRANSPOSE: dict[str, str] = {
    "ort": "ONNX Runtime has no integer ConvTranspose",
    "tensorrt-rtx": "TensorRT-RTX 1.7 computes every ConvTranspose in float, also one with Q/DQ",
}


@dataclasses.dataclass(frozen=True)
class Layer:
    """One linear layer and what becomes of it.

    Attributes:
        name: Node.
        op: Conv, ConvTranspose, Gemm or MatMul.
        int8: Whether it is given INT8 inputs.
        reason: Why it stays float; empty when it does not.
    """

    name: str
    op: str
    int8: bool
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Placement:
    """The plan that :mod:`relu_deploy.int8.write` carries out.

    Attributes:
        uses: Tensor name -> names of the nodes that read its INT8 form; ``None`` means every reader.
        groups: Sets of tensor names that share one scale; only sets of two and more.
        layers: Every linear layer of the graph.
        constants: Names of nodes whose constant operand is quantised like an activation.
        coded: ``ort``: names of the tensors that integer kernels make, so that no float of them exists.
    """

    uses: dict[str, frozenset[str] | None]
    groups: tuple[frozenset[str], ...]
    layers: tuple[Layer, ...]
    constants: frozenset[str] = frozenset()
    coded: frozenset[str] = frozenset()

    @property
    def chosen(self) -> frozenset[str]:
        """Names of the linear layers that become INT8."""
        return frozenset(layer.name for layer in self.layers if layer.int8)

    def takes_codes(self, node: gs.Node) -> bool:
        """``ort``: whether a node reads the codes of what it reads, and not a float."""
        if any(layer.name == node.name for layer in self.layers):
            return node.name in self.chosen
        # A ReLU behind an integer operator is the clipping of its quantiser.
        clipped = [reader.outputs[0] for tensor in node.outputs for reader in tensor.outputs if is_clipping(reader)]
        made = [tensor.name for tensor in (*node.outputs, *clipped) if tensor.name in self.uses]
        return bool(made) and (node.op in MOVING_OPS or node.op == "Concat" or any(n in self.coded for n in made))


def place(
    graph: gs.Graph, measured: Iterable[str], number: NumberFormat, *, keep_float: Iterable[str] = (),
    half: Mapping[str, str] = MappingProxyType({}), splits: Iterable[str] = (),
) -> Placement:  # fmt: skip
    """Decide where INT8 goes.

    Args:
        graph: Sorted topologically, constants folded.
        measured: Names of the tensors that have a range.
        number: The target's format.
        keep_float: Names of linear layers that the user wants left alone.
        half: Layer -> why it is left in float16, from :mod:`relu_deploy.int8.cheaper`.
        splits: Names of the nodes that cut up what siblings, merged to one layer, give.
    """
    known, kept = set(measured), dict.fromkeys(keep_float, "kept in float on request") | dict(half)
    layers = tuple(_judge(node, known, kept, number) for node in graph.nodes if node.op in LINEAR_OPS)
    layers += tuple(_float_layers(graph))
    chosen = {layer.name for layer in layers if layer.int8}
    if number.unsigned:
        return _place_ort(graph, known, chosen, layers)
    return _before_splits(graph, _place_tensorrt(graph, known, chosen, layers, number), set(splits), known)


def with_pooled(graph: gs.Graph, placement: Placement, outputs: Iterable[str], measured: Iterable[str]) -> Placement:
    """Also quantise what a pool over all positions reads of a learned activation.

    TensorRT-RTX 1.7 makes one kernel of such an activation, Q/DQ and the mean. Without Q/DQ, behind a layer with a
    scale for each output channel, it cuts the activation in two and writes floats in between (benchmarks/pwlu.py).

    Args:
        graph: What ``placement`` was made from.
        placement: For a TensorRT target.
        outputs: Names of the tensors that learned activations make.
        measured: Names of the tensors that have a range.
    """
    uses, made = dict(placement.uses), set(outputs) & set(measured)
    for node in graph.nodes:
        name = node.inputs[0].name if node.inputs else ""
        if node.op in _POOLS and name in made:
            uses[name] = (uses.get(name) or frozenset()) | {node.name}
    return dataclasses.replace(placement, uses=uses)


def quantised_behind(tensor: gs.Variable, placement: Placement) -> bool:
    """Whether a tensor is quantised, or all that reads it only moves or selects values that are then quantised."""
    if tensor.name in placement.uses:
        return True
    readers = list(tensor.outputs)
    return bool(readers) and all(
        node.op in MOVING_OPS and node.inputs[0] is tensor and quantised_behind(node.outputs[0], placement)
        for node in readers
    )


def fused_relu(tensor: gs.Variable, graph: gs.Graph) -> gs.Node | None:
    """The ReLU or Clip(0, .) that is the only reader of a tensor, so that both become one quantised output."""
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    if not tensor.inputs or tensor.inputs[0].op in MOVING_OPS:  # its codes are its input's: it has no quantiser to clip
        return None
    reader = tensor.outputs[0]
    return reader if is_clipping(reader) and reader.inputs[0] is tensor else None


def is_clipping(node: gs.Node) -> bool:
    """Whether a node is Relu, or Clip with lower bound 0: what an unsigned quantiser does by itself."""
    return node.op == "Relu" or (node.op == "Clip" and clip_bounds(node)[0] == 0)


def clip_bounds(node: gs.Node) -> tuple[float | None, float | None]:
    """Constant bounds of a Clip; ``-inf``/``inf`` where absent, None where computed at run time."""
    bounds: list[float | None] = []
    for index, (attribute, default) in enumerate((("min", -np.inf), ("max", np.inf)), start=1):
        operand = node.inputs[index] if len(node.inputs) > index else None
        if operand is None or (isinstance(operand, gs.Variable) and operand.is_empty()):
            bounds.append(float(node.attrs.get(attribute, default)))
        else:
            bounds.append(float(operand.values) if isinstance(operand, gs.Constant) else None)
    return bounds[0], bounds[1]


def _judge(node: gs.Node, known: set[str], kept: Mapping[str, str], number: NumberFormat) -> Layer:
    reason = _why_float(node, known, number) or kept.get(node.name, "")
    return Layer(node.name, node.op, not reason, reason)


def _float_layers(graph: gs.Graph) -> Iterator[Layer]:
    """Layers that multiply and are never quantised: recurrent ones, and all inside If, Loop and Scan."""
    for node in graph.nodes:
        if node.op in RECURRENT_OPS:
            yield Layer(node.name, node.op, False, "a recurrent layer computes in float")
        for inner in node.subgraphs(recursive=True):
            for layer in inner.nodes:
                if layer.op in (*LINEAR_OPS, *RECURRENT_OPS):
                    yield Layer(layer.name, layer.op, False, f"it lies in a graph inside {node.op} {node.name}")


def _why_float(node: gs.Node, known: set[str], number: NumberFormat) -> str:
    """Reason why a linear layer cannot be quantised; empty when it can."""
    data, weight = node.inputs[0], node.inputs[1]
    if not isinstance(weight, gs.Constant):
        return (
            "both operands are computed at run time" if node.op == "MatMul" else "its weights are computed at run time"
        )
    if isinstance(data, gs.Constant):
        return "its left operand is the constant one"
    if weight.values.dtype not in (np.float32, np.float16):
        return f"its weights are {weight.values.dtype}"
    if number.unsigned and weight.values.dtype == np.float16:
        return "ONNX Runtime's integer kernels give float32, not float16: export the network in float32"
    if node.op == "ConvTranspose" and number.target in _FLOAT_CONV_TRANSPOSE:
        return _FLOAT_CONV_TRANSPOSE[number.target]
    if data.name not in known:
        return f"its input {data.name} has no range"
    if node.op == "Gemm" and number.unsigned and node.attrs.get("transA", 0):
        return "ONNX Runtime has no integer Gemm with transA"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.op == "Gemm" and isinstance(bias, gs.Constant) and not _is_row(bias.values.shape, node):
        return "its addend differs from row to row, so it is no bias"
    if number.integer_bias and isinstance(bias, gs.Variable) and not bias.is_empty():
        return "its bias is computed at run time"
    return ""


def _is_row(shape: tuple[int, ...], gemm: gs.Node) -> bool:
    """Whether the third operand of a Gemm is one number, or one for each column."""
    columns = gemm.inputs[1].values.shape[0 if gemm.attrs.get("transB", 0) else 1]
    return shape in ((), (1,), (1, 1), (columns,), (1, columns))


class _Wanted:
    """Tensors to quantise, and the pairs that must share a scale, while they are being found."""

    def __init__(self, graph: gs.Graph, known: set[str], coded: set[str]) -> None:
        self.graph, self.known, self.coded = graph, known, coded
        self.names: dict[str, gs.Variable] = {}
        self.pairs: list[tuple[str, str]] = []
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
            if node is not None:
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
                    self.pairs += [(t.name, output.name) for t in live if self._ends_in(t, node)]
                if constant:
                    self.constants.add(node.name)

    def _ends_in(self, tensor: gs.Variable, concat: gs.Node) -> bool:
        """Whether a tensor is only there to be concatenated: a scale of its own would then be a second rounding.

        ONNX Runtime looks every code up in a table where the scales differ, and copies where they do not
        (benchmarks/shared_scales.py). What others read too keeps the finer scale.
        """
        others = any(reader is not concat for reader in tensor.outputs)
        moved = bool(tensor.inputs) and tensor.inputs[0].op in MOVING_OPS
        return not (others or moved or any(tensor is output for output in self.graph.outputs))


def _place_ort(graph: gs.Graph, known: set[str], chosen: set[str], layers: tuple[Layer, ...]) -> Placement:
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
            and _float_constants(node)
        ):
            if node.op == "MaxPool":
                wanted.pairs.append((live[0].name, node.outputs[0].name))
            if wanted.add(node.outputs[0]) and any(isinstance(t, gs.Constant) for t in node.inputs):
                wanted.constants.add(node.name)
    placed = Placement(
        dict.fromkeys(wanted.names),
        _merge(pair for pair in wanted.pairs if pair[0] in wanted.names and pair[1] in wanted.names),
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


def _place_tensorrt(
    graph: gs.Graph, known: set[str], chosen: set[str], layers: tuple[Layer, ...], number: NumberFormat
) -> Placement:
    uses: dict[str, set[str]] = {}
    order = {id(node): index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.name in chosen:
            uses.setdefault(node.inputs[0].name, set()).add(node.name)
    for node in graph.nodes:
        for tensor in _residual_operands(node, chosen, order, number):
            if tensor.name in known:
                uses.setdefault(tensor.name, set()).add(node.name)
    return Placement({name: frozenset(nodes) for name, nodes in uses.items()}, (), layers)


def _before_splits(graph: gs.Graph, placement: Placement, splits: set[str], known: set[str]) -> Placement:
    """Quantise what siblings give as a whole, before it is cut up, where all parts are wanted as codes.

    One kernel then quantises and cuts; behind the cut it would be one for each part, all of which read the whole.
    """
    uses = dict(placement.uses)
    for node in graph.nodes:
        whole = node.inputs[0].name if node.name in splits else ""
        if whole in known and all(_wanted_as_codes(part, uses) for part in node.outputs):
            uses[whole] = (uses.get(whole) or frozenset()) | {node.name}
            for part in node.outputs:
                uses.pop(part.name, None)
    return dataclasses.replace(placement, uses=uses)


def _wanted_as_codes(part: gs.Variable, uses: Mapping[str, frozenset[str] | None]) -> bool:
    """Whether a layer reads a tensor as codes, at once or as a part of a concatenation."""
    return part.name in uses or any(r.op == "Concat" and r.outputs[0].name in uses for r in part.outputs)


def _residual_operands(
    node: gs.Node, chosen: set[str], order: dict[int, int], number: NumberFormat
) -> list[gs.Variable]:
    """Operands of a residual Add that are read as INT8: the shortcut.

    With a single weight scale a layer it is both, because TensorRT-RTX would then fuse the sum into the convolution and
    dequantise the shortcut in a kernel of its own; docs/placement.md has the bytes.
    """
    if node.op != "Add" or (shortcut := _shortcut(node, chosen, order)) is None:
        return []
    main = next(t for t in node.inputs if t is not shortcut)
    return list(node.inputs) if shares_scale(main.inputs[0], number) else [shortcut]


def _shortcut(node: gs.Node, chosen: set[str], order: dict[int, int]) -> gs.Variable | None:
    """The operand of a residual Add that does not come straight from the layer that the Add is fused into."""
    if len(node.inputs) != 2 or not all(isinstance(t, gs.Variable) for t in node.inputs):
        return None
    fused = [
        (order[id(t.inputs[0])], index)
        for index, t in enumerate(node.inputs)
        if t.inputs
        and t.inputs[0].name in chosen
        and len(t.outputs) == 1
        and t.inputs[0].op in ("Conv", "ConvTranspose")
    ]
    if not fused:
        return None
    shortcut: gs.Variable = node.inputs[1 - max(fused)[1]]
    return shortcut


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
