"""Move Q/DQ to where they are of use: not in front of a ReLU, not twice, not where a target computes in float."""

from __future__ import annotations

import numpy as np
import onnx

from relu_deploy.int8.lint.codes import BYTES
from relu_deploy.int8.lint.edit import add_constant, dtype_of, insert_before, pair, replace_input, replace_readers
from relu_deploy.int8.lint.fix_weights import stored_values
from relu_deploy.int8.lint.network import Network, Quantizer, carried
from relu_deploy.int8.lint.pairs import is_chain, is_second
from relu_deploy.int8.lint.places import BOUNDED, drops_before_relu, squares_deviation
from relu_deploy.report import PassReport, Skip
from relu_deploy.targets import Target


def drop_before_relu(model: onnx.ModelProto) -> PassReport:
    """Remove Q/DQ between a layer and its ReLU where the ReLU is followed by a quantiser of its own."""
    net = Network(model)
    changed = []
    for q, _, automatic in drops_before_relu(net):
        if automatic:
            for dq in net.dequantizers:
                if dq.source == q.output:
                    replace_readers(model.graph, dq.output, q.source)
            changed.append(q.node.name)
    return PassReport("drop_before_relu", tuple(changed), (), {"": "one rounding less"} if changed else {})


def drop_twice(model: onnx.ModelProto) -> PassReport:
    """Of two pairs of Q/DQ, one behind the other, keep the second."""
    net = Network(model)
    changed = []
    for dq in net.dequantizers:
        inner = net.quantizer(dq.source)
        outer = next((q for q in net.quantizers if q.source == dq.output), None)
        if inner is None or outer is None or not is_second(inner, outer) or not is_chain(net, inner, dq):
            continue
        replace_readers(model.graph, dq.output, inner.source)
        changed.append(inner.node.name)
    return PassReport("drop_twice", tuple(changed), (), {"": "one rounding, and one clipping, less"} if changed else {})


def quantize_behind(model: onnx.ModelProto, target: Target) -> PassReport:
    """Put Q/DQ between a quantised layer and an operator through which codes do not pass, where its range is known.

    A ReLU, an average and an interpolation give nothing larger than they are given, a Sigmoid nothing above 1.
    """
    net = Network(model)
    changed: list[str] = []
    skipped: list[Skip] = []
    for layer in net.layers:
        if layer.weight is None or layer.data is not None or layer.node.op_type == "ConvTranspose":
            continue
        tensor = layer.node.input[0]
        maker = net.maker(tensor)
        if maker is None or net.codes_reach(tensor, carried(target), rtx=target != "ort"):
            continue
        largest = _largest(net, maker)
        if largest is None:
            skipped.append(Skip(layer.node.name, f"the range of {maker.op_type} {maker.name} is not known"))
            continue
        dtype = np.float32 if layer.weight.scale is None else layer.weight.scale.dtype
        scale = add_constant(model.graph, f"{layer.node.name}/input/scale", np.asarray(largest / 127, dtype))
        zero = add_constant(model.graph, f"{layer.node.name}/input/zero_point", np.asarray(0, np.int8))
        made = pair(f"{layer.node.name}/input", tensor, scale, zero, f"{layer.node.name}/input/dequantized")
        insert_before(model.graph, layer.node, made)
        layer.node.input[0] = f"{layer.node.name}/input/dequantized"
        changed.append(layer.node.name)
    note = {"": "the layer's input is rounded to 8 bits, over the range that its own input can have"}
    return PassReport("quantize_behind", tuple(changed), tuple(skipped), note if changed else {})


def quantize_shortcuts(model: onnx.ModelProto) -> PassReport:
    """Let residual sums read the codes that exist of their shortcut."""
    net = Network(model)
    changed = []
    for node in net.nodes:
        if node.op_type != "Add" or len(node.input) != 2 or any(map(net.is_constant, node.input)):
            continue
        if (found := net.fused_layer(node)) is None or net.dequantizer(node.input[1 - found[0]]) is not None:
            continue
        shortcut = node.input[1 - found[0]]
        readers = [
            dq for q in net.quantizers if q.source == shortcut for dq in net.dequantizers if dq.source == q.output
        ]
        if readers:
            replace_input(node, shortcut, readers[0].output)
            changed.append(node.name)
    _sort(model.graph)
    note = {"": "the shortcut is rounded to 8 bits"} if changed else {}
    return PassReport("quantize_shortcuts", tuple(changed), (), note)


def drop_in_float(model: onnx.ModelProto) -> PassReport:
    """Remove Q/DQ in front of a Softmax or a normalisation, and inside one that is spelled out."""
    net = Network(model)
    changed = []
    for node in net.nodes:
        if not node.input or not (
            node.op_type in ("Softmax", "LogSoftmax", "LayerNormalization") or squares_deviation(net, node)
        ):
            continue
        dq = net.dequantizer(node.input[0])
        q = None if dq is None else net.quantizer(dq.source)
        if dq is not None and q is not None:
            replace_input(node, dq.output, q.source)
            changed.append(node.name)
    return PassReport("drop_in_float", tuple(changed), (), {"": "one rounding less"} if changed else {})


def float_transposed(model: onnx.ModelProto) -> PassReport:
    """Take Q/DQ away from ConvTranspose, which TensorRT-RTX computes in float: its weights are stored in float."""
    net = Network(model)
    changed = []
    for layer in net.layers:
        if layer.node.op_type != "ConvTranspose":
            continue
        before = list(layer.node.input)
        if layer.data is not None and (q := net.quantizer(layer.data.source)) is not None:
            replace_input(layer.node, layer.data.output, q.source)
        values = None if layer.weight is None else stored_values(net, layer.weight)
        if layer.weight is not None and values is not None:
            name = add_constant(model.graph, f"{layer.weight.output}/stored", values)
            replace_input(layer.node, layer.weight.output, name)
        if list(layer.node.input) != before:
            changed.append(layer.node.name)
    note = {"": "one rounding less; the weights stay those that the codes stand for"} if changed else {}
    return PassReport("float_transposed", tuple(changed), (), note)


def _largest(net: Network, node: onnx.NodeProto) -> float | None:
    """Largest magnitude that a bounded operator can give, from the grids in front of it; None where not known."""
    if node.op_type in ("Sigmoid", "Softmax", "HardSigmoid"):
        return 1.0
    if node.op_type not in BOUNDED:
        return None
    names = list(node.input) if node.op_type == "Concat" else [node.input[0]]
    ends = [_end(net.dequantizer(name)) for name in names]
    if any(end is None for end in ends):
        return None
    return max(end for end in ends if end is not None)


def _end(dq: Quantizer | None) -> float | None:
    """Largest magnitude on a grid of 8-bit codes with one scale."""
    if dq is None or dq.scale is None or dq.scale.size != 1 or dq.codes not in BYTES:
        return None
    limits, zero = np.iinfo(dtype_of(dq.codes)), 0 if dq.zero_point is None else int(dq.zero_point.reshape(-1)[0])
    lowest = limits.min + 1 if limits.min < 0 and not zero else limits.min  # -128 stays unused in symmetric codes
    return float(dq.scale.reshape(-1)[0]) * max(abs(lowest - zero), abs(limits.max - zero))


def _sort(graph: onnx.GraphProto) -> None:
    """Put nodes in an order in which each comes behind what it reads."""
    made_by = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    done: set[int] = set()
    order: list[int] = []
    for start in range(len(graph.node)):
        waiting = [start]
        while waiting:
            index = waiting[-1]
            needed = [
                made_by[name] for name in _reads(graph.node[index]) if name in made_by and made_by[name] not in done
            ]
            if index in done:
                waiting.pop()
            elif needed:
                waiting += needed
            else:
                done.add(index)
                order.append(index)
                waiting.pop()
    nodes = [graph.node[index] for index in order]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)


def _reads(node: onnx.NodeProto) -> list[str]:
    """What a node reads, also inside its graphs."""
    found = list(node.input)
    for entry in node.attribute:
        for inner in (entry.g, *entry.graphs):
            found += [name for other in inner.node for name in _reads(other)]
    return found
