"""Random networks: each node of the quantised one, alone, gives what the float node gives of the same inputs.

Wrong axes, wrong scales, lost clipping and lost constants show as an error of one node beyond half a step of its
output, whatever the network as a whole does with it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session, with_outputs
from calib.sources import open_source
from relu_deploy.int8.run import quantize

_SPEC = importlib.util.spec_from_file_location("random_graph", Path(__file__).with_name("random_graph.py"))
random_graph = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(random_graph)

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def all_values(model, feeds):
    """Every float tensor of a network, each operator computed as it is written."""
    names = [output for node in model.graph.node for output in node.output]
    return {
        **feeds,
        **dict(zip(names, open_session(with_outputs(model, names), threads=1).run(names, feeds), strict=True)),
    }


def node_alone(model, node, values, constants):
    """Outputs of one node of a network."""
    live = [name for name in dict.fromkeys(node.input) if name in values]
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info(name, 1, values[name].shape) for name in live],
        [onnx.ValueInfoProto(name=name) for name in node.output],
        [numpy_helper.from_array(constants[name], name) for name in dict.fromkeys(node.input) if name in constants],
    )  # fmt: skip
    alone = helper.make_model(graph, opset_imports=model.opset_import, ir_version=8)
    return open_session(alone, threads=1).run(None, {name: values[name] for name in live})


def allowed(model, node, values, constants, weight_max):
    """How far quantised weights and constants may move the outputs of a node."""
    stored = [name for name in node.input if name in constants]
    if node.op_type in LINEAR and node.input[1] in stored:
        # Half a step of the weights on each product; the bias has the far finer step s_x s_w, of which one is allowed.
        step = np.abs(constants[node.input[1]]).max() / weight_max
        coarse = {node.input[1]: np.full_like(constants[node.input[1]], step / 2)}
        if len(node.input) > 2:
            coarse[node.input[2]] = np.full_like(constants[node.input[2]], step * np.ptp(values[node.input[0]]) / 255)
        positive = onnx.NodeProto()
        positive.CopyFrom(node)
        for attribute in positive.attribute:
            if attribute.type == onnx.AttributeProto.FLOAT:
                attribute.f = abs(attribute.f)
        return node_alone(model, positive, {node.input[0]: np.abs(values[node.input[0]])}, coarse)[0]
    if node.op_type in ("Add", "Mul", "Concat") and stored:
        half = max(np.ptp(np.append(constants[name], 0)) for name in stored) / 255 / 2
        factor = max((np.abs(values[name]).max() for name in node.input if name in values), default=1)
        return half * (factor if node.op_type == "Mul" else 1)
    return 0.0


def complaints(model, quantized, report, ranges, feeds):
    """What is wrong with the quantised form of a network, node by node."""
    measured = all_values(quantized, feeds)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    values = {"x": measured.get("x/dequantized", feeds["x"])}
    slack = {}  # of tensors that fusion removed, and that are therefore computed here
    written = {node.name: node for node in quantized.graph.node}
    for node in model.graph.node:
        given = {name: values[name] for name in node.input if name in values}
        if (after := written.get(node.name)) is not None and after.op_type == node.op_type:
            # Some readers of a tensor take its codes, others its floats.
            given |= {
                a: measured[b] for a, b in zip(node.input, after.input, strict=False) if a in given and b in measured
            }
        weights = allowed(model, node, given, constants, 63 if report.target == "ort" else 127)
        carried = max((slack.get(name, 0.0) for name in node.input), default=0.0)
        for name, expected in zip(node.output, node_alone(model, node, given, constants), strict=True):
            observed = measured.get(f"{name}/dequantized", measured.get(name))
            if observed is None:
                values[name], slack[name] = expected, float(np.max(weights)) + carried
                continue
            values[name] = observed
            # float32 sums in another order: far below any step.
            tolerance = weights + carried + 1e-4 * max(1.0, float(np.abs(expected).max()))
            if (grid := report.activations.get(name)) is not None:
                # Half a step to the nearest code, and as much for a zero point that is rounded to a code itself.
                tolerance = tolerance + 0.51 * grid.scale
                span = ranges.tensors[name]
                if span.min < grid.lowest - grid.scale / 2 or span.max > grid.highest + 0.51 * grid.scale:
                    yield f"{name}: [{span.min}, {span.max}] lies outside of {grid}"
            inside = expected if grid is None else np.clip(expected, grid.lowest, grid.highest)
            if observed.shape != inside.shape or (np.abs(observed - inside) > tolerance).any():
                yield f"{node.op_type} {node.name}: {name} is off by {np.abs(observed - inside).max()}"


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
@pytest.mark.parametrize("seed", range(14))
def test_each_node_of_a_random_network(seed, target):
    model = random_graph.RandomGraph(seed).model()
    data = np.random.default_rng(seed).normal(size=(8, *random_graph.SHAPE[1:])).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(
        model, ranges, target=target, weight_bits=7 if target == "ort" else 8, channel_fusion="off", float_part="fp32"
    )
    feeds = {"x": data[:2]}
    assert list(complaints(model, quantized, report, ranges, feeds)) == []
    if target == "ort":
        names = [value.name for value in quantized.graph.output]
        assert names == [value.name for value in model.graph.output]
        exact = open_session(quantized, threads=1).run(None, feeds)
        fused = open_session(quantized, optimise=True, threads=1).run(None, feeds)
        for name, ours, theirs in zip(names, exact, fused, strict=True):
            # Integer kernels round the same sums; a code that lies on the border may fall to the other side, and what
            # follows amplifies it. A fusion that computes something else is off by the values themselves.
            assert np.abs(ours - theirs).mean() <= 0.01 * np.abs(ours).max() + 1e-6, name


def test_the_check_sees_what_it_is_for():
    """Negative case: a weight scale that is 10 % off is a complaint about that layer, and about no other."""
    model = random_graph.RandomGraph(0).model()
    data = np.random.default_rng(0).normal(size=(8, *random_graph.SHAPE[1:])).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(model, ranges, target="ort", weight_bits=7, channel_fusion="off")
    layer = report.layers[0].name
    (scale,) = (tensor for tensor in quantized.graph.initializer if tensor.name == f"{layer}/weight/scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.1), scale.name))
    found = list(complaints(model, quantized, report, ranges, {"x": data[:2]}))
    assert len(found) == 1
    assert layer in found[0] or "Relu" in found[0], "a fused ReLU is where the convolution's result is first seen"
