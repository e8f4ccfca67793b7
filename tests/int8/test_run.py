"""Quantised networks as ONNX Runtime really runs them, and as their Q/DQ says."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from relu_deploy.errors import QuantizationError, RangesError
from relu_deploy.graph import count_ops
from relu_deploy.int8.run import quantize


def optimised(model, tmp_path, level=ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED):
    """The graph that ONNX Runtime makes of a model, and a session on it."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node), session


def run_plain(model, feeds):
    """Outputs with every graph optimisation off: Q/DQ in float arithmetic, as ONNX defines it."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def sqnr(reference, value):
    return 10 * np.log10(np.sum(reference**2) / np.sum((reference - value) ** 2))


def images(batch=1, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, 3, 16, 16)).astype(np.float32)


def test_relu_network_is_fully_integer_in_onnx_runtime(residual_model, measure, tmp_path):
    model = residual_model()
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    before, (after, session) = count_ops(model), optimised(quantized, tmp_path)
    assert after["QLinearConv"] == before["Conv"] == 5
    assert after["QGemm"] == 1
    assert after["Relu"] == after["Clip"] == after["Conv"] == after["Add"] == after["Concat"] == 0
    assert after["QuantizeLinear"] == 1, "one at the input"
    assert after["DequantizeLinear"] == 0, "QGemm gives float by itself"
    assert report.int8_layers == len(report.layers) == 6
    assert len(report.dropped_activations) == before["Relu"] == 5
    x = images()
    # 35 dB: what 5 layers of 7-bit weights and 8-bit activations with random weights leave (measured 40 dB).
    assert sqnr(run_plain(model, {"x": x})[0], session.run(None, {"x": x})[0]) > 35


def test_kernels_agree_with_the_definition_of_qdq(residual_model, measure, tmp_path):
    """Seven-bit weights do not saturate: integer kernels differ from float Q/DQ only where a code rounds otherwise."""
    model = residual_model()
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    _, session = optimised(quantized, tmp_path)
    x = images(seed=3)
    exact, fast = run_plain(quantized, {"x": x})[0], session.run(None, {"x": x})[0]
    # One code of the features changes a logit by its scale times a weight; the weights of the last layer are below 1.
    assert np.abs(exact - fast).max() <= 16 * report.activations["features"].scale


def test_silu_network_has_no_float_island(residual_model, measure, tmp_path):
    model = residual_model(activation="Silu")
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    after, _ = optimised(quantized, tmp_path)
    assert after["QLinearConv"] == after["QLinearSigmoid"] == after["QLinearMul"] == 5
    assert after["Sigmoid"] == after["Mul"] == 0
    assert not report.dropped_activations


@pytest.mark.parametrize("target", ["tensorrt-rtx", "tensorrt"])
def test_tensorrt_placement(residual_model, measure, target):
    model = residual_model()
    quantized, report = quantize(model, measure(model), target=target, float_part="fp32", weight_granularity="channel")
    nodes = {node.name: node for node in quantized.graph.node}
    producer = {name: node for node in quantized.graph.node for name in node.output}
    assert count_ops(quantized)["Relu"] == count_ops(model)["Relu"]
    for layer in report.layers:
        node = nodes[layer.name]
        assert [producer[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2, layer
        if len(node.input) > 2:
            assert node.input[2] not in producer, "the bias stays a float initializer"
        readers = [reader for reader in quantized.graph.node if node.output[0] in reader.input]
        assert not any(reader.op_type == "QuantizeLinear" for reader in readers), "no Q between Conv and its ReLU"
    sum_inputs = [producer[name].op_type for name in nodes["block.add"].input]
    assert sum_inputs == ["Conv", "DequantizeLinear"], "the shortcut is quantised"
    for tensor in quantized.graph.initializer:
        assert tensor.data_type != onnx.TensorProto.INT32
        if tensor.name.endswith("zero_point"):
            assert not numpy_helper.to_array(tensor).any(), "the parser rejects other zero points"
        if tensor.name.endswith("/scale") and "weight" not in tensor.name:
            assert list(tensor.dims) == [], "activation scales are per tensor"


def test_moving_operators_share_the_scale_of_their_input(residual_model, measure):
    model = residual_model()
    _, report = quantize(model, measure(model), target="ort")
    scales = report.activations
    assert scales["block.act2.out"] == scales["pooled"]
    assert scales["depthwise.act.out"] == scales["upsampled"]
    assert scales["averaged"] == scales["features"]


def test_output_names_types_and_dynamic_batch_survive(residual_model, measure, tmp_path):
    model = residual_model(batch="N")
    quantized, _ = quantize(model, measure(model), target="ort", weight_bits=7)
    assert [o.name for o in quantized.graph.output] == ["y"]
    _, session = optimised(quantized, tmp_path)
    together = session.run(None, {"x": images(5)})[0]
    one_by_one = np.concatenate([session.run(None, {"x": x[None]})[0] for x in images(5)])
    assert together.shape == (5, 10)
    assert np.array_equal(together, one_by_one), "an integer network must not depend on its batch"


@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
def test_opsets(residual_model, measure, tmp_path, opset):
    model = residual_model(opset=opset)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    assert report.opset == max(opset, 13)
    assert optimised(quantized, tmp_path)[0]["QLinearConv"] == 5


def test_the_model_given_is_not_changed(residual_model, measure):
    model = residual_model()
    before = model.SerializeToString(deterministic=True)
    quantize(model, measure(model), target="ort")
    assert model.SerializeToString(deterministic=True) == before


def small(text, **weights):
    model = onnx.parser.parse_model(text)
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    onnx.checker.check_model(model, full_check=True)
    return model


HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 8, 8] x) => '
RNG = np.random.default_rng(5)
KERNEL = RNG.normal(size=(4, 4, 1, 1))


def test_relu_that_is_the_graph_output_keeps_its_name(measure, tmp_path):
    model = small(HEAD + "(float[1, 4, 8, 8] y) { c = Conv(x, w) y = Relu(c) }", w=KERNEL)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    after, session = optimised(quantized, tmp_path)
    assert after["QLinearConv"] == 1
    assert after["Relu"] == 0
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    error = np.abs(session.run(["y"], {"x": x})[0] - run_plain(model, {"x": x})[0]).max()
    assert (
        error < 4 * report.activations["y"].scale
    )  # the input's code, the weights' and the output's, each half a step


def test_tensor_that_is_an_output_and_read_on_is_right_in_both_places(measure, tmp_path):
    text = "(float[1, 4, 8, 8] m, float[1, 4, 8, 8] y) { c = Conv(x, w) m = Relu(c) d = Conv(m, v) y = Relu(d) }"
    model = small(HEAD + text, w=KERNEL, v=KERNEL[::-1].copy())
    quantized, _ = quantize(model, measure(model), target="ort", weight_bits=7)
    after, session = optimised(quantized, tmp_path)
    assert after["QLinearConv"] == 2
    assert after["Relu"] == 0
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    for got, wanted in zip(session.run(["m", "y"], {"x": x}), run_plain(model, {"x": x}), strict=True):
        assert sqnr(wanted, got) > 30  # two layers of 8 bits: measured 40 dB


def test_relu6_becomes_clipping_only_where_no_code_lies_above_six(measure):
    text = (
        "(float[1, 4, 8, 8] y) <float lo = {0}, float hi = {%s}> { c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }"
    )
    for bound, dropped in ((0.5, 1), (1e6, 1)):
        model = small(HEAD + text % bound, w=KERNEL, v=KERNEL)
        assert len(quantize(model, measure(model), target="ort")[1].dropped_activations) == dropped
    model = small(HEAD + text % 0.5, w=KERNEL, v=KERNEL)
    ranges = measure(model)
    stretched = {**ranges.tensors, "r": type(ranges.tensors["r"])(0.0, 2.0, "float32", 1)}
    kept = type(ranges)(stretched, ranges.model, ranges.data, ranges.method, ranges.samples)
    assert not quantize(model, kept, target="ort")[1].dropped_activations, (
        "codes reach 2.0, so the bound 0.5 still acts"
    )


def test_clip_with_a_negative_bound_stays(measure, tmp_path):
    text = "(float[1, 4, 8, 8] y) <float lo = {-0.5}, float hi = {9}> "
    text += "{ c = Conv(x, w) r = Clip(c, lo, hi) y = Conv(r, v) }"
    model = small(HEAD + text, w=KERNEL, v=KERNEL)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    assert not report.dropped_activations
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    assert sqnr(run_plain(model, {"x": x})[0], optimised(quantized, tmp_path)[1].run(None, {"x": x})[0]) > 30


def test_relu_with_two_readers_of_its_input(measure, tmp_path):
    text = "(float[1, 4, 8, 8] y) { c = Conv(x, w) r = Relu(c) d = Conv(r, v) y = Add(d, c) }"
    model = small(HEAD + text, w=KERNEL, v=KERNEL)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    after, session = optimised(quantized, tmp_path)
    assert after["QLinearConv"] == 2
    assert after["Relu"] == 0
    assert len(report.dropped_activations) == 1
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    assert sqnr(run_plain(model, {"x": x})[0], session.run(None, {"x": x})[0]) > 30


def test_shared_weights_are_quantised_for_each_layer(measure, tmp_path):
    model = small(HEAD + "(float[1, 4, 8, 8] y) { c = Conv(x, w) r = Relu(c) y = Conv(r, w) }", w=KERNEL)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    assert report.int8_layers == 2
    assert optimised(quantized, tmp_path)[0]["QLinearConv"] == 2


def test_gemm_with_alpha_beta_and_either_layout(measure, tmp_path):
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[2, 4] x) => (float[2, 3] y)'
        "{ h = Gemm<alpha=2.0, beta=0.5>(x, a, b) r = Relu(h) y = Gemm<transB=1>(r, c) }"
    )
    model = small(text, a=RNG.normal(size=(4, 5)), b=RNG.normal(size=(1, 5)), c=RNG.normal(size=(3, 5)))
    data = RNG.normal(size=(16, 4)).astype(np.float32)
    from calib.inputs import model_inputs
    from calib.run import calibrate
    from calib.sources import open_source

    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(model, ranges, target="ort", weight_bits=7)
    after, session = optimised(quantized, tmp_path)
    assert after["QGemm"] == report.int8_layers == 2
    assert sqnr(run_plain(model, {"x": data[:2]})[0], session.run(None, {"x": data[:2]})[0]) > 25


def test_matmul_and_bias_become_one_integer_gemm(tmp_path):
    text = (
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 5] y)'
        "{ h = MatMul(x, a) s = Add(b, h) r = Relu(s) y = MatMul(r, c) }"
    )
    model = small(text, a=RNG.normal(size=(4, 5)), b=RNG.normal(size=5), c=RNG.normal(size=(5, 5)))
    from calib.inputs import model_inputs
    from calib.run import calibrate
    from calib.sources import open_source

    data = RNG.normal(size=(16, 4)).astype(np.float32)
    quantized, _ = quantize(
        model, calibrate(model, open_source(data, model_inputs(model))), target="ort", weight_bits=7
    )
    after, session = optimised(quantized, tmp_path)
    assert after["QGemm"] + after["MatMulIntegerToFloat"] + after["QLinearMatMul"] == 2
    assert after["Gemm"] == after["MatMul"] == after["Relu"] == 0
    assert sqnr(run_plain(model, {"x": data})[0], session.run(None, {"x": data})[0]) > 25


@pytest.mark.parametrize(("axes", "keepdims"), [([2, 3], 1), ([-1, -2], 0)])
def test_spatial_mean_becomes_an_integer_pool(measure, tmp_path, axes, keepdims):
    tail = "f = Flatten(m)" if keepdims else "f = Identity(m)"
    text = (
        HEAD + f"(float[1, 2] y) {{ c = Conv(x, w) r = Relu(c) m = ReduceMean<axes=[{axes[0]}, {axes[1]}], "
        f"keepdims={keepdims}>(r) {tail} y = Gemm(f, a) }}"
    )
    model = small(text, w=KERNEL, a=RNG.normal(size=(4, 2)))
    quantized, _ = quantize(model, measure(model), target="ort", weight_bits=7)
    after, session = optimised(quantized, tmp_path)
    assert after["QLinearGlobalAveragePool"] == 1
    assert after["ReduceMean"] == 0
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    assert sqnr(run_plain(model, {"x": x})[0], session.run(None, {"x": x})[0]) > 20  # four averaged features


def test_float16_network_for_tensorrt_gets_float16_scales(residual_model, measure):
    model = residual_model()
    ranges = measure(model)
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for tensor in half.graph.initializer:
        if tensor.name.endswith(("weight", "bias")):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    onnx.checker.check_model(half, full_check=True)
    quantized, report = quantize(half, ranges, target="tensorrt-rtx", check_ranges=False)
    assert report.opset >= 19, "the first opset whose QuantizeLinear takes float16"
    scales = [t for t in quantized.graph.initializer if t.name.endswith("/scale")]
    assert {t.data_type for t in scales} == {onnx.TensorProto.FLOAT16}
    onnx.checker.check_model(quantized, full_check=True)


def test_dead_channels_do_not_give_zero_scales(measure, tmp_path):
    kernel = KERNEL.copy()
    kernel[1] = 0
    text = "(float[1, 4, 8, 8] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }"
    model = small(HEAD + text, w=kernel, b=[0.0, 0.25, 1e-3, 7.0], v=KERNEL)
    quantized, report = quantize(model, measure(model), target="ort", weight_bits=7)
    scales = [numpy_helper.to_array(t) for t in quantized.graph.initializer if t.name.endswith("/scale")]
    assert all((scale > 0).all() and np.isfinite(scale).all() for scale in scales)
    assert any("only zero weights" in warning for warning in report.warnings)
    x = RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)
    assert sqnr(run_plain(model, {"x": x})[0], optimised(quantized, tmp_path)[1].run(None, {"x": x})[0]) > 30


def test_tensor_that_is_always_zero_is_warned_of(measure):
    model = small(HEAD + "(float[1, 4, 8, 8] y) { c = Conv(x, w) y = Conv(c, v) }", w=KERNEL * 0, v=KERNEL)
    report = quantize(model, measure(model), target="tensorrt-rtx")[1]
    assert any("zero in every sample" in warning for warning in report.warnings)


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_one_weight_scale_a_layer(residual_model, measure, target):
    """Every layer stays int8, with a scalar scale; a channel of zeros is still counted and does no harm."""
    model = residual_model()
    for tensor in model.graph.initializer:
        if tensor.name == "fuse.weight":
            values = numpy_helper.to_array(tensor).copy()
            values[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    quantized, report = quantize(
        model, measure(model), target=target, weight_bits=7, float_part="fp32", weight_granularity="tensor",
        channel_fusion="off",
    )  # fmt: skip
    assert (report.weight_granularity, report.int8_layers) == ("tensor", 6)
    scales = [numpy_helper.to_array(t) for t in quantized.graph.initializer if t.name.endswith("/weight/scale")]
    assert [scale.shape for scale in scales] == [()] * 6
    assert "1 output channels in 1 layers have only zero weights" in report.warnings
    x = images()
    # Measured 32 dB with 7-bit weights and one scale a layer; with a scale for each channel it is 40 dB.
    assert sqnr(run_plain(model, {"x": x})[0], run_plain(quantized, {"x": x})[0]) > 28


def test_keep_float_and_its_mistakes(residual_model, measure):
    model = residual_model()
    ranges = measure(model)
    _, report = quantize(model, ranges, target="ort", keep_float=["fuse"])
    (left,) = [layer for layer in report.layers if not layer.int8]
    assert (left.name, left.reason) == ("fuse", "kept in float on request")
    with pytest.raises(QuantizationError, match="no linear layer named 'fusee'"):
        quantize(model, ranges, target="ort", keep_float=["fusee"])


def test_quantised_model_is_refused(residual_model, measure):
    model = residual_model()
    ranges = measure(model)
    quantized, _ = quantize(model, ranges, target="ort")
    with pytest.raises(QuantizationError, match=r"quantised already: node '.*' is a (Quantize|Dequantize)Linear"):
        quantize(quantized, ranges, target="ort")


def test_stale_ranges_are_refused(residual_model, measure):
    ranges = measure(residual_model())
    with pytest.raises(RangesError, match="another network"):
        quantize(residual_model(seed=1), ranges, target="ort")


def test_network_without_linear_layer(measure):
    model = small(HEAD + "(float[1, 4, 8, 8] y) { y = Relu(x) }")
    with pytest.raises(QuantizationError, match="no Conv, ConvTranspose, Gemm or MatMul"):
        quantize(model, measure(model), target="ort")


def test_layers_that_cannot_be_int8_say_why(measure):
    rng = np.random.default_rng(0)
    text = HEAD + (
        "(float[1, 4, 16, 16] y, float[1, 4, 8, 8] z) <int64[4] axes = {0, 1, 3, 2}> "
        "{ c = Conv(x, w) y = ConvTranspose<strides=[2, 2]>(c, t) "
        "p = Transpose<perm=[0, 1, 3, 2]>(c) z = MatMul(c, p) }"
    )
    model = small(text, w=KERNEL, t=rng.normal(size=(4, 4, 2, 2)))
    reasons = {layer.op: layer.reason for layer in quantize(model, measure(model), target="ort")[1].layers}
    assert reasons["Conv"] == ""
    assert "no integer ConvTranspose" in reasons["ConvTranspose"]
    assert "both operands" in reasons["MatMul"]
    reasons = {layer.op: layer.reason for layer in quantize(model, measure(model), target="tensorrt-rtx")[1].layers}
    assert reasons["Conv"] == ""
    assert "computes every ConvTranspose in float" in reasons["ConvTranspose"]
    quantized, report = quantize(model, measure(model), target="tensorrt")
    assert {layer.op: layer.int8 for layer in report.layers} == {"Conv": True, "ConvTranspose": True, "MatMul": False}
    assert any("not tried with tensorrt" in warning for warning in report.warnings)
    weight = next(n for n in quantized.graph.node if n.op_type == "DequantizeLinear" and "ConvTranspose" in n.name)
    assert helper.get_attribute_value(weight.attribute[0]) == 1, "output channels of ConvTranspose are on axis 1"


@pytest.mark.parametrize(
    ("flags", "asked", "bits", "warned"),
    [
        (("avx2",), None, 7, True), (("avx2",), 8, 8, True), (("avx2",), 7, 7, False),
        (("avx2", "avx512_vnni"), None, 8, False), (("avx2", "avx512_vnni"), 7, 7, False),
        (("asimddp",), None, 8, False),
    ],
)  # fmt: skip
def test_width_of_weights_follows_the_cpu_and_says_so(residual_model, measure, monkeypatch, flags, asked, bits, warned):
    import dataclasses

    from relu_deploy.int8 import run

    machine = dataclasses.replace(run.describe_machine(), flags=flags)
    monkeypatch.setattr(run, "describe_machine", lambda: machine)
    model = residual_model()
    report = quantize(model, measure(model), target="ort", weight_bits=asked)[1]
    assert report.weight_bits == bits
    assert any("VNNI" in warning for warning in report.warnings) == warned
    assert quantize(model, measure(model), target="tensorrt-rtx", weight_bits=asked)[1].weight_bits == 8
