"""What of a network is measured: its float activations, and the axis that their channels are on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx

from calib.errors import CalibrationError
from calib.model import STANDARD_DOMAINS, first_quantized

_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")
_CHANNELS_SECOND = (
    "Conv", "ConvTranspose", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN",
    "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth",
)  # fmt: skip
_CHANNELS_LAST = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization")
_ELEMENTWISE = (
    "Abs", "Add", "Cast", "Celu", "Clip", "Concat", "Div", "Dropout", "Elu", "Erf", "Exp", "Gelu",
    "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max", "Min", "Mish", "Mul", "Neg", "PRelu",
    "Pad", "Pow", "Reciprocal", "Relu", "Resize", "Selu", "Sigmoid", "Slice", "Softplus", "Softsign", "Sqrt",
    "Sub", "Swish", "Tanh", "ThresholdedRelu", "Upsample", "Where",
)  # fmt: skip
_KEEPS_INFINITY = (
    "Add", "Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Max", "Min",
    "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
_ENDS_INFINITY = ("ArgMax", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "LogSoftmax", "Softmax")
_POSITIVE = ("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt")
_KEEPS_SIGN = (
    "AveragePool", "Cast", "Dropout", "Expand", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity",
    "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
_POSITIVE_OF_POSITIVE = ("Add", "Concat", "Max", "Mean", "Min", "Mul", "Sum")
_SHAPED_BY_VALUES = ("Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique")


def refuse_quantized(model: onnx.ModelProto) -> None:
    """Refuse a network that is quantised already: its activations are codes, and their ranges are settled.

    Raises:
        CalibrationError: names the first quantised operator.
    """
    node = first_quantized(model)
    if node is not None:
        raise CalibrationError(
            f"the model is quantised already: node {node.name or node.output[0]!r} is a {node.op_type}",
            hint="calibrate the float model that it was made from",
        )


def activations(model: onnx.ModelProto) -> list[str]:
    """Every tensor of the main graph that depends on an input, in topological order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    constants |= {sparse.values.name for sparse in model.graph.sparse_initializer}
    names = [value.name for value in model.graph.input if value.name not in constants]
    live = set(names)
    for node in model.graph.node:
        if node.op_type in _RANDOM or not live.isdisjoint(uses(node)):
            new = [output for output in node.output if output and output not in live]
            names.extend(new)
            live.update(new)
    return names


def unused_prefix(model: onnx.ModelProto) -> str:
    """A beginning that no tensor of the network has, for the names of tensors that are added to it."""
    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    names.update(tensor.name for tensor in model.graph.initializer)
    names.update(value.name for value in (*model.graph.input, *model.graph.output))
    prefix = "calib"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


def producer(model: onnx.ModelProto, tensor: str) -> str:
    """Say where a tensor comes from."""
    for node in model.graph.node:
        if tensor in node.output:
            return f"made by {node.op_type} node {node.name!r}" if node.name else f"made by a {node.op_type} node"
    return "an input of the model"


def uses(node: onnx.NodeProto) -> Iterator[str]:
    """Names that a node reads, those that its subgraphs capture among them."""
    yield from node.input
    for attribute in node.attribute:
        graphs = [attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs
        for graph in graphs:
            for inner in graph.node:
                yield from uses(inner)
            # A branch may hand an outer tensor straight through.
            yield from (value.name for value in graph.output)


def is_mask(model: onnx.ModelProto, tensor: str) -> bool:
    """Whether a tensor ends, by ways that keep -inf as it is, in Softmax, ArgMax or comparisons and nowhere else.

    There -inf says that a place is not to be chosen, as in an attention mask or around the best of several scores.
    """
    names, ends = {tensor}, 0
    outputs = {value.name for value in model.graph.output}
    for node in model.graph.node:
        if names.isdisjoint(uses(node)):
            continue
        if node.op_type in _ENDS_INFINITY:
            ends += 1
        elif node.op_type in _KEEPS_INFINITY:
            names.update(node.output)
        else:
            return False
    return ends > 0 and names.isdisjoint(outputs)


def shaped_only(model: onnx.ModelProto) -> frozenset[str]:
    """Activations whose values depend on nothing but the shapes of the inputs (positions of tokens, say)."""
    valued = {value.name for value in model.graph.input}
    live = set(activations(model))
    for node in model.graph.node:
        if node.op_type in _RANDOM or (node.op_type not in ("Shape", "Size") and not valued.isdisjoint(uses(node))):
            valued.update(node.output)
    return frozenset(live - valued)


def never_negative(model: onnx.ModelProto) -> frozenset[str]:
    """Activations that cannot be below zero, as their operators show: ReLU and the like, and what keeps their sign.

    Clip is none of them: its bounds may be anywhere.
    """
    found: set[str] = set()
    for node in model.graph.node:
        inputs = [name for name in node.input if name]
        if node.domain not in STANDARD_DOMAINS or not inputs:
            continue
        kept = node.op_type in _KEEPS_SIGN and inputs[0] in found
        joined = node.op_type in _POSITIVE_OF_POSITIVE and found.issuperset(inputs)
        if node.op_type in _POSITIVE or kept or joined:
            found.update(node.output)
    return frozenset(found)


def mixes_samples(model: onnx.ModelProto) -> bool:
    """Whether a tensor's shape, or which branch is run, may depend on values: then no batch may hold two samples."""
    return any(node.op_type in _SHAPED_BY_VALUES for node in model.graph.node)


def channel_axes(model: onnx.ModelProto, ranks: Mapping[str, int]) -> dict[str, int | None]:
    """Tell which axis of each tensor holds channels.

    Convolutions, pooling and batch norms have channels on axis 1; products with constant weights and layer norms on
    the last axis; elementwise neighbours of the same rank have them where those have. Where no neighbour tells: axis
    1, and the last axis for rank 3 (batch, tokens, channels). Scalars and vectors have none.

    Args:
        model: The network.
        ranks: Number of axes by tensor name.

    Returns:
        Axis from 0, or None, by tensor name.
    """
    axes: dict[str, int] = {}
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {name for node in model.graph.node if node.op_type == "Constant" for name in node.output}
    for node in model.graph.node:
        ends = [name for name in (*node.input[:1], *node.output[:1]) if ranks.get(name, 0) >= 2]
        if node.op_type in _CHANNELS_SECOND:
            axes.update(dict.fromkeys(ends, 1))
        elif node.op_type in _CHANNELS_LAST or (node.op_type in ("MatMul", "Gemm") and node.input[1] in weights):
            axes.update({name: ranks[name] - 1 for name in ends})
    for _ in range(2):  # forwards and backwards, twice: residual branches meet
        for node in (*model.graph.node, *reversed(model.graph.node)):
            _spread(node, axes, ranks)
    return {name: axes.get(name, _usual_axis(rank)) for name, rank in ranks.items()}


def _spread(node: onnx.NodeProto, axes: dict[str, int], ranks: Mapping[str, int]) -> None:
    """Carry a known axis across an elementwise node."""
    if node.op_type not in _ELEMENTWISE:
        return
    around = [
        name for name in (*node.input, *node.output[:1]) if name in ranks and ranks[name] == ranks.get(node.output[0])
    ]
    known = next((axes[name] for name in around if name in axes), None)
    if known is not None:
        for name in around:
            axes.setdefault(name, known)


def _usual_axis(rank: int) -> int | None:
    """The axis of channels where nothing else tells."""
    return None if rank < 2 else 2 if rank == 3 else 1
