"""What is left in float is computed in float: ONNX Runtime's optimiser is kept from quantising it."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from calib.session import open_session
from relu_deploy.graph import check_model, export_graph, import_graph
from relu_deploy.int8.run import quantize
from relu_deploy.int8.shield import shield_float_layers

# Weights of very different size in two channels: one scale for both leaves nothing of the smaller.
LAYERS = {
    "Conv": ("float[4, 4, 1, 1] w", "[kept] h = Conv(d, w)", (4, 4, 1, 1)),
    "Conv and ReLU": ("float[4, 4, 1, 1] w", "[kept] a = Conv(d, w) h = Relu(a)", (4, 4, 1, 1)),
    "with bias": ("float[4, 4, 1, 1] w, float[4] b = {1, 2, 3, 4}", "[kept] h = Conv(d, w, b)", (4, 4, 1, 1)),
    "depthwise": ("float[4, 1, 3, 3] w", "[kept] h = Conv <group = 4, pads = [1, 1, 1, 1]> (d, w)", (4, 1, 3, 3)),
    "ConvTranspose": ("float[4, 4, 1, 1] w", "[kept] h = ConvTranspose(d, w)", (4, 4, 1, 1)),
    "Gemm": (
        "float[36, 144] w",
        "f = Flatten(q) g = DequantizeLinear(f, s, z) [kept] i = Gemm <transB = 1> (g, w) h = Relu(i)", (36, 144),
    ),
}  # fmt: skip


def between_codes(declared: str, body: str, shape: tuple[int, ...], *, extent: int = 4) -> onnx.ModelProto:
    """A float layer between Q/DQ, its first channel a thousand times the others."""
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (float[1, {extent}, 6, 6] x) => (float[] y)
    <float s = {{0.05}}, uint8 z = {{100}}, float t = {{0.001}}, uint8 n = {{128}}, {declared}>
    {{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) {body}
       k = QuantizeLinear(h, t, n) y = DequantizeLinear(k, t, n) }}"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).normal(0, 1e-3, shape).astype(np.float32)
    weight[0] *= 1000
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "w"]
    del model.graph.initializer[:]
    model.graph.initializer.extend([*kept, numpy_helper.from_array(weight, "w")])
    return onnx.shape_inference.infer_shapes(model)


def optimised(model: onnx.ModelProto, tmp_path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(tmp_path / "optimised.onnx")


def shielded(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = import_graph(model)
    assert shield_float_layers(graph).changed == ("kept",)
    assert shield_float_layers(graph).changed == (), "a second time there is nothing to do"
    made = export_graph(graph, model)
    check_model(made, "it")
    return made


@pytest.mark.parametrize("case", LAYERS)
def test_a_float_layer_between_codes_keeps_its_weights(case, tmp_path):
    model = between_codes(*LAYERS[case])
    feeds = {"x": np.random.default_rng(1).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    exact = open_session(model, threads=1).run(None, feeds)[0]
    safe = shielded(model)
    assert np.array_equal(open_session(safe, threads=1).run(None, feeds)[0], exact), "as written it is the same"
    fast = open_session(safe, optimise=True, threads=1).run(None, feeds)[0]
    # A float sum in another order may turn a code; quantised weights of one scale would be nothing but zeros here.
    assert np.abs(fast - exact).max() <= 0.00101
    assert np.mean(fast != exact) < 0.02
    weights = {tensor.name: tensor.data_type for tensor in optimised(safe, tmp_path).graph.initializer}
    assert onnx.TensorProto.INT8 not in weights.values()


def test_onnx_runtime_does_quantise_float_weights_where_nothing_hinders_it():
    """Why all this is: without it most codes are others. When this fails, the pass has become needless."""
    model = between_codes(*LAYERS["Conv"])
    feeds = {"x": np.random.default_rng(1).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    exact, fast = (open_session(model, optimise=o, threads=1).run(None, feeds)[0] for o in (False, True))
    assert np.mean(exact != fast) > 0.5


def test_one_channel_takes_another_axis():
    declared, body = "float[4, 1, 1, 1] w", "[kept] h = Conv(d, w)"
    model = between_codes(declared, body, (4, 1, 1, 1), extent=1)
    feeds = {"x": np.random.default_rng(1).normal(0, 3, (1, 1, 6, 6)).astype(np.float32)}
    exact = open_session(model, threads=1).run(None, feeds)[0]
    fast = open_session(shielded(model), optimise=True, threads=1).run(None, feeds)[0]
    assert np.mean(fast != exact) < 0.02


def test_an_input_of_unknown_size_is_said_so():
    model = between_codes("float[4, 1, 1, 1] w", "[kept] h = Conv(d, w)", (4, 1, 1, 1), extent=1)
    del model.graph.value_info[:]
    report = shield_float_layers(import_graph(model))
    assert report.changed == ()
    assert "single channel" in report.skipped[0].reason


@pytest.mark.parametrize("layer", ["block.conv2", "depthwise", "fuse", "stem", "block.conv1"])
def test_keep_float_keeps_float_in_onnx_runtime(residual_model, measure, tmp_path, layer):
    """The layer that was asked for has float weights in the optimised graph, and only that one."""
    model = residual_model()
    quantized, _ = quantize(model, measure(model), target="ort", keep_float=[layer])
    found = {node.name: node.op_type for node in optimised(quantized, tmp_path).graph.node}
    assert found[layer] in ("Conv", "FusedConv")
    assert sum(op == "QLinearConv" for op in found.values()) == 4


def test_layers_in_int8_are_left_alone(residual_model, measure):
    model = residual_model()
    quantized, _ = quantize(model, measure(model), target="ort")
    assert shield_float_layers(import_graph(quantized)) == shield_float_layers(import_graph(model))
