"""Carry out a placement: Q/DQ around activations, INT8 weights, int32 biases, and clip fusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.formats import NumberFormat, QParams, activation_qparams, quantize_symmetric
from relu_deploy.int8.place import Placement, clip_bounds, is_clipping
from relu_deploy.int8.store import Stored, alive, bias_place, integer_bias, store, weight_axis
from relu_deploy.passes.edit import set_input

_INT32 = (1 << 31) - 1


@dataclasses.dataclass
class Written:
    """What was written, for the report.

    Attributes:
        activations: Tensor name -> its scale and zero point.
        dropped: Names of ReLU and Clip nodes that the quantiser behind them replaces.
        dead: Tensors that were zero in every sample, whose scale is therefore arbitrary.
        dead_channels: Layer name -> number of output channels whose weights are all zero.
        faint: Tensors that are not zero, but below half a step of the smallest usable scale.
    """

    activations: dict[str, QParams] = dataclasses.field(default_factory=dict)
    dropped: list[str] = dataclasses.field(default_factory=list)
    dead: list[str] = dataclasses.field(default_factory=list)
    dead_channels: dict[str, int] = dataclasses.field(default_factory=dict)
    faint: list[str] = dataclasses.field(default_factory=list)


def write(
    graph: gs.Graph, placement: Placement, bounds: Mapping[str, tuple[float, float]], number: NumberFormat,
    chosen: Mapping[str, Stored] = MappingProxyType({}),
) -> Written:  # fmt: skip
    """Put Q/DQ into a graph, in place; the caller cleans up and sorts.

    Args:
        graph: What ``placement`` was made from.
        placement: From :func:`relu_deploy.int8.place.place`.
        bounds: Tensor name -> smallest and largest value measured, tensor units.
        number: The target's format.
        chosen: Layer -> its weights, where they are not simply the nearest codes.
    """
    written = Written(activation_grids(placement, bounds, number))
    written.dead = [name for name in placement.uses if bounds[name] == (0.0, 0.0)]
    written.faint = [
        name for name in placement.uses if 0 < max(map(abs, bounds[name])) < written.activations[name].scale / 2
    ]
    nodes = {node.name: node for node in graph.nodes}
    tensors = graph.tensors()
    for name, readers in placement.uses.items():
        qparams = written.activations[name]
        clips = number.unsigned and readers is None
        source = _without_clipping(tensors[name], qparams, written) if clips else tensors[name]
        _wrap(graph, tensors[name], source, qparams, readers)
    for name in sorted(placement.constants):
        _quantize_constants(graph, nodes[name], number)
    for layer in placement.layers:
        if layer.name in placement.chosen:
            node = nodes[layer.name]
            scale = _scale_read(node) if number.integer_bias else 1.0
            stored = chosen.get(layer.name) or store(node, number, scale)
            _quantize_layer(graph, node, stored, number, written)
    return written


def activation_grids(
    placement: Placement, bounds: Mapping[str, tuple[float, float]], number: NumberFormat
) -> dict[str, QParams]:
    """Scale and zero point of every quantised tensor; one for a whole group, from the union of its ranges."""
    shared: dict[str, tuple[float, float]] = {}
    for group in placement.groups:
        union = min(bounds[name][0] for name in group), max(bounds[name][1] for name in group)
        shared.update(dict.fromkeys(group, union))
    return {name: activation_qparams(*shared.get(name, bounds[name]), number) for name in placement.uses}


def _scale_read(node: gs.Node) -> float:
    """Scale of what a layer reads, behind its DequantizeLinear."""
    return float(node.inputs[0].inputs[0].inputs[1].values)


def _without_clipping(tensor: gs.Variable, qparams: QParams, written: Written) -> gs.Variable:
    """Clip fusion: a quantiser whose lowest code is 0.0 clips as ReLU does, so it may read the ReLU's input.

    A Clip with an upper bound goes too when no code lies above the bound. Returns what the quantiser reads.
    """
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not is_clipping(node) or qparams.lowest < 0:
        return tensor
    upper = clip_bounds(node)[1] if node.op == "Clip" else np.inf
    # Rounding the scale to float32 can put the highest code a unit in the last place above the bound, never a step.
    if upper is None or qparams.highest > upper * (1 + 2**-22):
        return tensor
    source: gs.Variable = node.inputs[0]
    node.inputs.clear()
    node.outputs.clear()
    written.dropped.append(node.name)
    return source


def _wrap(
    graph: gs.Graph, tensor: gs.Variable, source: gs.Variable, qparams: QParams, readers: frozenset[str] | None
) -> None:
    """Quantise ``source``, dequantise it, and hand the result to the readers of ``tensor`` (None: to all of them)."""
    consumers = [node for node in list(tensor.outputs) if readers is None or node.name in readers]
    real = gs.Variable(f"{tensor.name}/dequantized", dtype=tensor.dtype, shape=tensor.shape)
    is_output = any(tensor is output for output in graph.outputs)
    if is_output and readers is None and (source is not tensor or tensor.inputs):
        real = tensor  # an output keeps its name, so the float value behind the quantiser takes another
        if source is tensor:
            source = gs.Variable(f"{tensor.name}/float", dtype=tensor.dtype, shape=tensor.shape)
            producer = tensor.inputs[0]
            producer.outputs = [source if output is tensor else output for output in producer.outputs]
    codes = gs.Variable(f"{tensor.name}/quantized", dtype=np.dtype(qparams.dtype), shape=tensor.shape)
    scale = gs.Constant(f"{tensor.name}/scale", np.asarray(qparams.scale, dtype=tensor.dtype or np.float32))
    zero_point = gs.Constant(f"{tensor.name}/zero_point", np.asarray(qparams.zero_point, dtype=qparams.dtype))
    _append(graph, "QuantizeLinear", tensor.name, [source, scale, zero_point], codes)
    _append(graph, "DequantizeLinear", tensor.name, [codes, scale, zero_point], real)
    if real is not tensor:
        for node in consumers:
            node.inputs = [real if operand is tensor else operand for operand in node.inputs]


def _quantize_constants(graph: gs.Graph, node: gs.Node, number: NumberFormat) -> None:
    """Store the constant operands of an arithmetic operator as codes."""
    for index, operand in enumerate(node.inputs):
        if isinstance(operand, gs.Constant):
            values = operand.values
            qparams = activation_qparams(float(values.min(initial=0)), float(values.max(initial=0)), number)
            low, high = (0, 255) if qparams.dtype == "uint8" else (-127, 127)
            codes = np.clip(np.rint(values.astype(np.float64) / qparams.scale) + qparams.zero_point, low, high)
            node.inputs[index] = _dequantized(
                graph, f"{node.name}/operand_{index}", np.asarray(codes, qparams.dtype), np.asarray(qparams.scale,
                values.dtype), np.asarray(qparams.zero_point, qparams.dtype), None,
            )  # fmt: skip


def _quantize_layer(graph: gs.Graph, node: gs.Node, stored: Stored, number: NumberFormat, written: Written) -> None:
    """Put the stored weights of one linear layer in its place and, where the target wants it, its bias as int32."""
    dtype = node.inputs[1].values.dtype
    if dead := int((~alive(node.inputs[1].values, weight_axis(node))).sum()):
        written.dead_channels[node.name] = dead
    if stored.bias is not None and integer_bias(node, number):
        scales = np.asarray(stored.scales * np.float32(_scale_read(node)), dtype=np.float32)
        codes = quantize_symmetric(stored.bias, scales, 0, _INT32).astype(np.int32)
        bias = _dequantized(graph, f"{node.name}/bias", codes, scales, np.zeros_like(scales, dtype=np.int32), 0)
        set_input(node, 2, bias)
    elif stored.bias is not None and (place := bias_place(node)) is not None:
        set_input(*place, gs.Constant(f"{node.name}/bias", stored.bias.astype(dtype)))
    node.attrs.pop("alpha", None)  # they are in what is stored
    if stored.bias is not None:
        node.attrs.pop("beta", None)
    node.inputs[1] = _dequantized(
        graph, f"{node.name}/weight", stored.codes, stored.scales.astype(dtype),
        np.zeros_like(stored.scales, dtype=np.int8), stored.axis,
    )  # fmt: skip


def _dequantized(
    graph: gs.Graph,
    name: str,
    codes: npt.NDArray[Any],
    scale: npt.NDArray[Any],
    zero: npt.NDArray[Any],
    axis: int | None,
) -> gs.Variable:
    """A constant stored as codes, and the DequantizeLinear that gives its value."""
    output = gs.Variable(f"{name}/dequantized", dtype=scale.dtype, shape=codes.shape)
    inputs = [
        gs.Constant(f"{name}/quantized", codes), gs.Constant(f"{name}/scale", scale),
        gs.Constant(f"{name}/zero_point", zero),
    ]  # fmt: skip
    _append(graph, "DequantizeLinear", name, inputs, output, {} if axis is None or not scale.ndim else {"axis": axis})
    return output


def _append(
    graph: gs.Graph, op: str, name: str, inputs: list[Any], output: gs.Variable, attrs: dict[str, Any] | None = None
) -> None:
    graph.nodes.append(gs.Node(op, f"{name}/{op}", attrs=attrs or {}, inputs=inputs, outputs=[output]))
