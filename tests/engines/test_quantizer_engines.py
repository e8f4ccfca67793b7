"""Networks quantised by this package, built by the real TensorRT-RTX compiler without a GPU: is every promise kept?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.ranges import save as save_ranges
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.engines.base import BuildConfig, BuildReport, ShapeRange, get_backend
from relu_deploy.engines.promise import disagreements
from relu_deploy.errors import CheckFailedError, EngineError
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.graph import save_model
from relu_deploy.int8.lint import lint
from relu_deploy.int8.run import QuantReport, quantize

pytestmark = pytest.mark.engine
SMS = ("86", "89", "120")
Weights = Mapping[str, tuple[int, ...] | np.ndarray]
# The format with nothing chosen for this compiler: what it does with that, the choices rest on.
PLAINLY: Mapping[str, Any] = {"float_part": "fp32", "weight_granularity": "channel"}


def parse(text: str, weights: Weights, *, opset: int = 17) -> onnx.ModelProto:
    """A model from ONNX text; weights are seeded normal numbers of a shape, or given."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]> g {text}')
    random = np.random.default_rng(0)
    for name, given in weights.items():
        values = given
        if isinstance(values, tuple):
            spread = (2 / np.prod(values[1:])) ** 0.5 if len(values) > 1 else 0.1
            values = random.normal(0, spread, values).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.checker.check_model(model, full_check=True)
    return model


def measured(model: onnx.ModelProto) -> Ranges:
    (spec,) = model_inputs(model)
    shape = tuple(axis if isinstance(axis, int) else 1 for axis in spec.shape or ())[1:]
    data = np.random.default_rng(1).normal(size=(4, *shape)).astype(np.float32)
    return calibrate(model, open_source(data, (spec,)))


def build(model: onnx.ModelProto, folder: Path, *, sm: tuple[str, ...] = SMS[1:2], **config: object) -> BuildReport:
    settings = BuildConfig(target="tensorrt-rtx", sm=sm, **config)  # type: ignore[arg-type]
    return get_backend("tensorrt-rtx").build(model, folder / "e.plan", settings)


def broken_promises(report: QuantReport, quantized: onnx.ModelProto, built: BuildReport, *, student: bool) -> list[str]:
    """Everything in which quantiser, network, plan and build log do not say the same."""
    found = list(disagreements(quantized, built.audit, student=student))
    precision = {layer.name: layer.precision for layer in built.audit.linear}
    found += [
        f"{layer.name}: int8 {layer.int8} in the report, {precision.get(layer.name)} in the engine"
        for layer in report.layers
        if layer.int8 != (precision.get(layer.name) == "int8")
    ]
    extra = set(precision) - {layer.name for layer in report.layers}
    return found + [f"{name} is in the engine only" for name in sorted(extra)]


def check(
    model: onnx.ModelProto, folder: Path, *, student: bool = True, floats: tuple[str, ...] = (), **config: object
) -> BuildReport:
    """Quantise and build; every layer but ``floats`` has to be int8, in the report and in the engine."""
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    assert tuple(layer.name for layer in report.layers if not layer.int8) == floats
    built = build(quantized, folder, **config)
    assert broken_promises(report, quantized, built, student=student) == []
    assert built.audit.int8 == len(report.layers) - len(floats) > 0
    assert built.audit.source == "plan"
    # Extents that the compiler derives from a dynamic one (batch times tokens) it names without saying their size.
    assert all("bytes moved are not known" in note for note in built.audit.notes)
    assert "shapes" in config or built.audit.notes == ()
    return built


SEPARABLE = """(float[1,3,32,32] x) => (float[1,10] y) <float lo = {0}, float hi = {6}> {
  [stem] c0 = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w0, b0) r0 = Clip(c0, lo, hi)
  [depthwise1] c1 = Conv<pads=[1,1,1,1], group=32>(r0, w1, b1) r1 = Clip(c1, lo, hi)
  [pointwise1] c2 = Conv(r1, w2, b2) r2 = Clip(c2, lo, hi)
  [depthwise2] c3 = Conv<pads=[1,1,1,1], strides=[2,2], group=64>(r2, w3, b3) r3 = Clip(c3, lo, hi)
  [pointwise2] c4 = Conv(r3, w4, b4) r4 = Clip(c4, lo, hi)
  a = GlobalAveragePool(r4) f = Flatten(a) [fc] y = Gemm<transB=1>(f, w5, b5) }"""
SEPARABLE_WEIGHTS: Weights = {
    "w0": (32, 3, 3, 3), "b0": (32,), "w1": (32, 1, 3, 3), "b1": (32,), "w2": (64, 32, 1, 1), "b2": (64,),
    "w3": (64, 1, 3, 3), "b3": (64,), "w4": (64, 64, 1, 1), "b4": (64,), "w5": (10, 64), "b5": (10,),
}  # fmt: skip

UNET = """(float[1,3,32,32] x) => (float[1,2,32,32] y) <float[4] scales = {1, 1, 2, 2}> {
  [e1] c1 = Conv<pads=[1,1,1,1]>(x, w1, b1) r1 = Relu(c1)
  m1 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r1)
  [e2] c2 = Conv<pads=[1,1,1,1]>(m1, w2, b2) r2 = Relu(c2)
  m2 = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r2)
  [e3] c3 = Conv<pads=[1,1,1,1]>(m2, w3, b3) r3 = Relu(c3)
  [up] t = ConvTranspose<strides=[2,2]>(r3, wt, bt) rt = Relu(t)
  j2 = Concat<axis=1>(rt, r2) [d2] c4 = Conv<pads=[1,1,1,1]>(j2, w4, b4) r4 = Relu(c4)
  u = Resize<mode="nearest">(r4, , scales)
  j1 = Concat<axis=1>(u, r1) [d1] c5 = Conv<pads=[1,1,1,1]>(j1, w5, b5) r5 = Relu(c5)
  [head] y = Conv(r5, w6, b6) }"""
UNET_WEIGHTS: Weights = {
    "w1": (32, 3, 3, 3), "b1": (32,), "w2": (32, 32, 3, 3), "b2": (32,), "w3": (64, 32, 3, 3), "b3": (64,),
    "wt": (64, 32, 2, 2), "bt": (32,), "w4": (32, 64, 3, 3), "b4": (32,), "w5": (32, 64, 3, 3), "b5": (32,),
    "w6": (2, 32, 1, 1), "b6": (2,),
}  # fmt: skip

ENCODER = """(float[%s,32,64] x) => (float[%s,32,64] y)
<int64[4] heads = {0, 0, 4, 16}, int64[3] flat = {0, 0, 64}, float scale = {0.25}> {
  [q] q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, heads) q3 = Transpose<perm=[0,2,1,3]>(q2)
  [k] k0 = MatMul(x, wk) k1 = Add(k0, bk) k2 = Reshape(k1, heads) k3 = Transpose<perm=[0,2,3,1]>(k2)
  [v] v0 = MatMul(x, wv) v1 = Add(v0, bv) v2 = Reshape(v1, heads) v3 = Transpose<perm=[0,2,1,3]>(v2)
  [scores] s0 = MatMul(q3, k3) s1 = Mul(s0, scale) p = Softmax<axis=-1>(s1)
  [mix] o0 = MatMul(p, v3) o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, flat)
  [proj] o3 = MatMul(o2, wo) o4 = Add(o3, bo) r1 = Add(o4, x)
  n1 = LayerNormalization<axis=-1>(r1, gamma, beta)
  [ffn1] f0 = MatMul(n1, w1) f1 = Add(f0, b1) %s
  [ffn2] f3 = MatMul(f2, w2) f4 = Add(f3, b2) r2 = Add(f4, n1)
  y = LayerNormalization<axis=-1>(r2, gamma, beta) }"""
ENCODER_WEIGHTS: Weights = {
    **{f"w{name}": (64, 64) for name in "qkvo"}, **{f"b{name}": (64,) for name in "qkvo"}, "w1": (64, 256),
    "b1": (256,), "w2": (256, 64), "b2": (64,), "gamma": np.ones(64, np.float32), "beta": np.zeros(64, np.float32),
}  # fmt: skip
GELU = """half = Constant<value_float=0.5>() one = Constant<value_float=1.0>() root = Constant<value_float=1.4142135>()
  g0 = Div(f1, root) g1 = Erf(g0) g2 = Add(g1, one) g3 = Mul(f1, g2) f2 = Mul(g3, half)"""

PLAIN = """(float[1,16,16,16] x) => (float[1,16,16,16] y) {
  [c1] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a) [c2] b = Conv<pads=[1,1,1,1]>(r, w2, b2) y = Relu(b) }"""
PLAIN_WEIGHTS: Weights = {"w1": (16, 16, 3, 3), "b1": (16,), "w2": (16, 16, 3, 3), "b2": (16,)}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("activation", ["Relu", "Silu"])
def test_a_residual_network(residual_model: Callable, tmp_path: Path, sm: str, activation: str) -> None:
    built = check(residual_model(activation=activation), tmp_path, sm=(sm,), student=activation == "Relu")
    assert built.audit.activation_counts() == {activation.lower(): 5}


@pytest.mark.parametrize("sm", SMS)
def test_separable_convolutions_with_relu6(tmp_path: Path, sm: str) -> None:
    built = check(parse(SEPARABLE, SEPARABLE_WEIGHTS), tmp_path, sm=(sm,))
    assert built.audit.activation_counts() == {"clip": 5}


@pytest.mark.parametrize("groups", [2, 16])
def test_grouped_convolutions(tmp_path: Path, groups: int) -> None:
    text = """(float[1,3,32,32] x) => (float[1,64,32,32] y) {
      [stem] a = Conv<pads=[1,1,1,1]>(x, w1, b1) r = Relu(a)
      [grouped] b = Conv<pads=[1,1,1,1], group=%d>(r, w2, b2) r2 = Relu(b)
      [last] c = Conv(r2, w3, b3) y = Relu(c) }"""
    weights: Weights = {"w1": (64, 3, 3, 3), "b1": (64,), "w2": (64, 64 // groups, 3, 3), "b2": (64,),
                        "w3": (64, 64, 1, 1), "b3": (64,)}  # fmt: skip
    check(parse(text % groups, weights), tmp_path)


@pytest.mark.parametrize("sm", SMS)
def test_a_unet_keeps_its_conv_transpose_in_float_and_says_so(tmp_path: Path, sm: str) -> None:
    model = parse(UNET, UNET_WEIGHTS)
    _, report = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    (left,) = [layer for layer in report.layers if not layer.int8]
    assert "TensorRT-RTX 1.7 computes every ConvTranspose in float" in left.reason
    check(model, tmp_path, sm=(sm,), floats=("up",))


@pytest.mark.parametrize(("groups", "stride", "size"), [(1, 2, 2), (1, 2, 4), (32, 2, 2), (1, 1, 3)])
def test_the_compiler_does_ignore_qdq_on_conv_transpose(tmp_path: Path, groups: int, stride: int, size: int) -> None:
    """What placement says of this compiler. When this fails with a newer one, the quantiser may promise int8 there."""
    text = f"""(float[1,32,8,8] x) => (float[1,32,H,W] y) {{
      [c1] a = Conv(x, w1) r = Relu(a) [up] b = ConvTranspose<strides=[{stride},{stride}], group={groups}>(r, w2)
      y = Relu(b) }}"""
    model = parse(text, {"w1": (32, 32, 1, 1), "w2": (32, 32 // groups, size, size)})
    # The data-centre library gets the same number format, and Q/DQ on its ConvTranspose.
    quantized, report = quantize(model, measured(model), target="tensorrt", **PLAINLY)
    assert report.int8_layers == 2
    built = build(quantized, tmp_path)
    assert [(layer.name, layer.precision) for layer in built.audit.linear] == [("c1", "int8"), ("up", "fp32")]
    with pytest.raises(CheckFailedError, match=r"ConvTranspose 'up' has quantised operands, but runs in fp32"):
        build(quantized, tmp_path, require_int8=True)


@pytest.mark.parametrize("sm", SMS)
def test_a_perceptron(tmp_path: Path, sm: str) -> None:
    text = """(float[4,64] x) => (float[4,10] y) {
      [fc1] h = Gemm<transB=1>(x, w1, b1) r = Relu(h) [fc2] h2 = Gemm(r, w2, b2) r2 = Relu(h2)
      [fc3] y = Gemm<transB=1, alpha=2.0>(r2, w3, b3) }"""
    weights: Weights = {"w1": (128, 64), "b1": (128,), "w2": (128, 96), "b2": (96,), "w3": (10, 96), "b3": (10,)}
    check(parse(text, weights), tmp_path, sm=(sm,))


def test_gemm_of_a_transposed_input(tmp_path: Path) -> None:
    """ONNX Runtime has no integer kernel for it; this compiler has."""
    text = "(float[64,4] x) => (float[4,10] y) { [fc1] h = Gemm<transA=1>(x, w1) r = Relu(h) [fc2] y = Gemm(r, w2) }"
    model = parse(text, {"w1": (64, 128), "w2": (128, 10)})
    check(model, tmp_path)
    reasons = {layer.name: layer.reason for layer in quantize(model, measured(model), target="ort")[1].layers}
    assert reasons == {"fc1": "ONNX Runtime has no integer Gemm with transA", "fc2": ""}


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize(("activation", "kind"), [("f2 = Relu(f1)", "relu"), (GELU, "erf")])
def test_a_transformer_encoder(tmp_path: Path, activation: str, kind: str, sm: str) -> None:
    model = parse(ENCODER % (2, 2, activation), ENCODER_WEIGHTS)
    built = check(model, tmp_path, student=kind == "relu", sm=(sm,))
    assert built.audit.activation_counts() == {kind: 1}


def test_a_transformer_encoder_of_any_batch(tmp_path: Path) -> None:
    model = parse(ENCODER % ("B", "B", "f2 = Relu(f1)"), ENCODER_WEIGHTS)
    shapes = {"x": ShapeRange((1, 32, 64), (2, 32, 64), (4, 32, 64))}
    built = check(model, tmp_path, shapes=shapes)
    assert built.audit.activation_counts() == {"relu": 1}


def test_one_dimensional_convolutions(tmp_path: Path) -> None:
    text = """(float[1,16,128] x) => (float[1,32,64] y) {
      [c1] a = Conv<pads=[2,2]>(x, w1, b1) r = Relu(a) [c2] b = Conv<strides=[2], pads=[1,1]>(r, w2, b2) r2 = Relu(b)
      [depthwise] c = Conv<pads=[1,1], group=32>(r2, w3, b3) r3 = Relu(c) [c4] y = Conv(r3, w4, b4) }"""
    weights: Weights = {"w1": (32, 16, 5), "b1": (32,), "w2": (32, 32, 3), "b2": (32,), "w3": (32, 1, 3), "b3": (32,),
                        "w4": (32, 32, 1), "b4": (32,)}  # fmt: skip
    check(parse(text, weights), tmp_path)


PRODUCTS = """(float[2,8,64] x) => (float[2,8,64] y, float[2,8,64] z) {
  [m1] a = MatMul(x, w1) r = Relu(a) [m2] b = MatMul(r, w2) s = Relu(b)
  [m3] y = MatMul(s, w3) [m4] z = MatMul(s, w4) }"""


@pytest.mark.parametrize(("inside", "last"), [(1, 1), (1e-3, 1), (1e-5, 1), (1, 1e5)])
def test_products_of_values_that_float16_does_not_hold(tmp_path: Path, inside: float, last: float) -> None:
    """Behind a cast to float16 the scale of an operand stays float32, and the compiler ended with an internal error.

    So it did where one of two products of a tensor had to be float32, and with a cast the other way that one was float.
    """
    random = np.random.default_rng(0)
    sizes = {"w1": inside, "w2": 1.0, "w3": 1 / inside, "w4": last}
    weights: Weights = {k: (random.normal(0, 0.125, (64, 64)) * size).astype(np.float32) for k, size in sizes.items()}
    assert_promises_kept(parse(PRODUCTS, weights), tmp_path)


def assert_promises_kept(model: onnx.ModelProto, folder: Path) -> BuildReport:
    """Quantise as it is done where nothing is asked for, and build; the report and the engine say the same."""
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx")
    assert report.float_part == "fp16"
    built = build(quantized, folder)
    assert broken_promises(report, quantized, built, student=False) == []
    return built


FUSED = """(float[1,16,64] x) => (float[1,16,64] y) <int64[3] parts = {64, 64, 64}, int64[4] heads = {0, 0, 4, 16},
  int64[5] five = {0, 0, 3, 4, 16}, int64[3] flat = {0, 0, 64}, int64 first = {0}, int64 second = {1},
  int64 third = {2}, float root = {0.25}> {
  [qkv] p0 = MatMul(x, w) p = Add(p0, b) %s s1 = Mul(s0, root) s = Softmax<axis=-1>(s1) [mix] o0 = MatMul(s, v)
  o1 = Transpose<perm=[0,2,1,3]>(o0) o2 = Reshape(o1, flat) [out] y = MatMul(o2, wo) }"""
CUT = {
    "Split": """q0, k0, v0 = Split<axis=2>(p, parts) q1 = Reshape(q0, heads) q = Transpose<perm=[0,2,1,3]>(q1)
      k1 = Reshape(k0, heads) k2 = Transpose<perm=[0,2,1,3]>(k1)
      v1 = Reshape(v0, heads) v = Transpose<perm=[0,2,1,3]>(v1)
      k = Transpose<perm=[0,1,3,2]>(k2) [scores] s0 = MatMul(q, k)""",
    "Gather": """h = Reshape(p, five) t = Transpose<perm=[2,0,3,1,4]>(h)
      q = Gather<axis=0>(t, first) k2 = Gather<axis=0>(t, second) v = Gather<axis=0>(t, third)
      [scores] s0 = Einsum<equation="nhqd,nhkd->nhqk">(q, k2)""",
}
FUSED_WEIGHTS: Weights = {"w": (64, 192), "b": (192,), "wo": (64, 64)}


@pytest.mark.parametrize("cut", CUT)
def test_queries_keys_and_values_in_one_product(tmp_path: Path, cut: str) -> None:
    built = assert_promises_kept(parse(FUSED % CUT[cut], FUSED_WEIGHTS), tmp_path)
    assert built.audit.int8 == (4 if cut == "Split" else 2)  # attention too, where its products are MatMul


@pytest.mark.parametrize("cut", CUT)
def test_queries_keys_and_values_in_one_product_of_a_float32_network(tmp_path: Path, cut: str) -> None:
    model = parse(FUSED % CUT[cut], FUSED_WEIGHTS)
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx", float_part="fp32")
    assert "cut-for-attention" not in lint(quantized, "tensorrt-rtx").counts()
    precision = {layer.name: layer.precision for layer in build(quantized, tmp_path).audit.linear}
    assert {precision[layer.name] for layer in report.layers if layer.int8} == {"int8"}
    assert precision["qkv"] == "int8"


@pytest.mark.parametrize("cut", CUT)
def test_with_a_scale_for_each_channel_they_are_float(tmp_path: Path, cut: str) -> None:
    """Why they get one scale. When this fails with a newer compiler, that is no longer needed."""
    model = parse(FUSED % CUT[cut], FUSED_WEIGHTS)
    quantized, _ = quantize(model, measured(model), target="tensorrt-rtx", weight_granularity="channel")
    precision = {layer.name: layer.precision for layer in build(quantized, tmp_path).audit.linear}
    assert (precision["qkv"], precision["out"]) == ("fp16", "int8")


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("activation", ["Relu", "Identity"])
def test_a_recurrent_layer_behind_and_before_int8(
    tmp_path: Path, op: str, gates: int, direction: str, activation: str
) -> None:
    """Its input, batch first, is what a float16 network would cast to float32 for it."""
    both = 2 if direction == "bidirectional" else 1
    text = f"""(float[1,9,32] x) => (float[1,9,16] y) <int64[3] flat = {{0, 0, -1}}> {{
      [in] e = MatMul(x, w1) r = {activation}(e) t = Transpose<perm=[1,0,2]>(r)
      [rnn] l = {op}<hidden_size=16, direction="{direction}">(t, w, u) s = Transpose<perm=[2,0,1,3]>(l)
      f = Reshape(s, flat) [out] y = MatMul(f, w2) }}"""
    weights: Weights = {
        "w1": (32, 32), "w": (both, 16 * gates, 32), "u": (both, 16 * gates, 16), "w2": (16 * both, 16),
    }  # fmt: skip
    model = parse(text, weights)
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx")
    assert [layer.name for layer in report.layers if layer.int8] == ["in", "out"]
    precision = {layer.name: layer.precision for layer in build(quantized, tmp_path).audit.linear}
    assert (precision["in"], precision["out"]) == ("int8", "int8")


def test_dynamic_batch(residual_model: Callable, tmp_path: Path) -> None:
    shapes = {"x": ShapeRange((1, 3, 16, 16), (4, 3, 16, 16), (8, 3, 16, 16))}
    built = check(residual_model(batch="N"), tmp_path, shapes=shapes)
    assert built.inputs[0].shape == ("N", 3, 16, 16)
    single = check(residual_model(), tmp_path).audit.bytes_moved
    assert built.audit.bytes_moved is not None
    assert single is not None
    # Counted at the optimum, 4: activations four times, weights once.
    assert 3 * single < built.audit.bytes_moved < 4 * single


@pytest.mark.parametrize("opset", [11, 13, 17, 21])
def test_opsets(residual_model: Callable, tmp_path: Path, opset: int) -> None:
    check(residual_model(opset=opset), tmp_path)


@pytest.mark.parametrize("sm", SMS)
def test_half_weights(residual_model: Callable, tmp_path: Path, sm: str) -> None:
    model = residual_model()
    ranges = measured(model)
    for tensor in model.graph.initializer:
        if tensor.name not in ("scales", "roi"):  # operands of Resize are float32 in every network
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    quantized, report = quantize(model, ranges, target="tensorrt-rtx", check_ranges=False, **PLAINLY)
    built = build(quantized, tmp_path, sm=(sm,))
    assert broken_promises(report, quantized, built, student=True) == []
    assert built.audit.int8 == 6


def test_prelu_is_int8_and_no_relu(tmp_path: Path) -> None:
    text = PLAIN.replace("Relu(a)", "PRelu(a, s)").replace("Relu(b)", "PRelu(b, s)")
    slopes = np.full((16, 1, 1), 0.2, np.float32)
    built = check(parse(text, {**PLAIN_WEIGHTS, "s": slopes}), tmp_path, student=False)
    assert built.audit.activation_counts() == {"prelu": 2}
    assert len(built.audit.left) == 2


@pytest.mark.parametrize("zeros", [slice(5, 6), slice(None)])
def test_channels_without_weights(tmp_path: Path, zeros: slice) -> None:
    kernel = np.random.default_rng(3).normal(0, 0.1, (16, 16, 3, 3)).astype(np.float32)
    kernel[zeros] = 0
    check(parse(PLAIN, {**PLAIN_WEIGHTS, "w1": kernel}), tmp_path)


@pytest.mark.parametrize("channels", [1, 3, 5, 33])
def test_channels_that_fill_no_tile(tmp_path: Path, channels: int) -> None:
    text = f"""(float[1,{channels},16,16] x) => (float[1,{channels},16,16] y) {{
      [c1] a = Conv<pads=[1,1,1,1]>(x, w1) r = Relu(a) [c2] b = Conv(r, w2) y = Relu(b) }}"""
    weights: Weights = {"w1": (channels, channels, 3, 3), "w2": (channels, channels, 1, 1)}
    check(parse(text, weights), tmp_path)


@pytest.mark.parametrize("sm", SMS)
def test_one_weight_scale_a_layer_lets_the_compiler_fuse(residual_model: Callable, tmp_path: Path, sm: str) -> None:
    model = residual_model()
    ranges = measured(model)
    fused = {}
    for granularity in ("channel", "tensor"):
        quantized, report = quantize(
            model, ranges, target="tensorrt-rtx", float_part="fp32", weight_granularity=granularity
        )
        assert report.weight_granularity == granularity
        scales = [t for t in quantized.graph.initializer if t.name.endswith("/weight/scale")]
        assert len(scales) == 6
        assert all((numpy_helper.to_array(scale).ndim == 0) == (granularity == "tensor") for scale in scales)
        built = build(quantized, tmp_path, sm=(sm,))
        assert broken_promises(report, quantized, built, student=True) == []
        fused[granularity] = [layer.name for layer in built.audit.linear if layer.relu]
    assert fused["channel"] == []
    # Not block.conv2, whose ReLU stands behind the residual Add, nor the last layer, which has none.
    assert {"stem", "block.conv1", "fuse"} <= set(fused["tensor"])


def residual(width: int = 64, size: int = 56) -> onnx.ModelProto:
    """Two basic blocks of a residual network, wide enough for bytes to count."""
    text = f"""(float[1,{width},{size},{size}] x) => (float[1,{width},{size},{size}] y) {{
      [c1] a1 = Conv<pads=[1,1,1,1]>(x, w1, b) r1 = Relu(a1) [c2] a2 = Conv<pads=[1,1,1,1]>(r1, w2, b)
      [sum1] s1 = Add(a2, x) r2 = Relu(s1)
      [c3] a3 = Conv<pads=[1,1,1,1]>(r2, w3, b) r3 = Relu(a3) [c4] a4 = Conv<pads=[1,1,1,1]>(r3, w4, b)
      [sum2] s2 = Add(a4, r2) y = Relu(s2) }}"""
    return parse(text, {**{f"w{i}": (width, width, 3, 3) for i in range(1, 5)}, "b": (width,)})


def without_qdq(model: onnx.ModelProto, reader: str, operand: str) -> onnx.ModelProto:
    """A copy in which one node reads the float tensor in place of its dequantised codes."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    (node,) = (node for node in copied.graph.node if node.name == reader)
    assert f"{operand}/dequantized" in node.input
    node.input[:] = [operand if name == f"{operand}/dequantized" else name for name in node.input]
    return copied


def test_the_quantised_shortcut_saves_bytes(tmp_path: Path) -> None:
    model = residual()
    quantized, _ = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    float_shortcut = without_qdq(without_qdq(quantized, "sum1", "x"), "sum2", "r2")
    ours, other = (build(each, tmp_path).audit for each in (quantized, float_shortcut))
    assert (ours.int8, other.int8) == (4, 4)
    assert ours.bytes_moved is not None
    assert other.bytes_moved is not None
    assert ours.bytes_moved < other.bytes_moved
    assert (ours.kernels or 0) <= (other.kernels or 0)


def test_with_one_weight_scale_both_operands_of_a_sum_are_quantised(tmp_path: Path) -> None:
    model = residual()
    quantized, _ = quantize(
        model, measured(model), target="tensorrt-rtx", float_part="fp32", weight_granularity="tensor"
    )
    sums = [node for node in quantized.graph.node if node.op_type == "Add"]
    assert [sorted(node.input) for node in sums] == [
        ["a2/dequantized", "x/dequantized"], ["a4/dequantized", "r2/dequantized"]]  # fmt: skip
    shortcut_only = without_qdq(without_qdq(quantized, "sum1", "a2"), "sum2", "a4")
    ours, other = (build(each, tmp_path).audit for each in (quantized, shortcut_only))
    assert (ours.int8, other.int8) == (4, 4)
    assert ours.bytes_moved is not None
    assert other.bytes_moved is not None
    assert ours.bytes_moved < other.bytes_moved
    assert (ours.kernels or 0) <= (other.kernels or 0)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("activation", ["r = Relu(a)", "r = Clip(a, lo, hi)", "r = Identity(a)"])
def test_no_int8_layer_of_this_compiler_writes_int8(tmp_path: Path, granularity: str, activation: str) -> None:
    """What docs/placement.md says: quantising is a kernel of its own. When this fails, there are bytes to be saved."""
    text = PLAIN.replace("y) {", "y) <float lo = {0}, float hi = {6}> {").replace("r = Relu(a)", activation)
    model = parse(text, PLAIN_WEIGHTS)
    quantized, _ = quantize(
        model, measured(model), target="tensorrt-rtx", float_part="fp32", weight_granularity=granularity
    )
    audit = build(quantized, tmp_path).audit
    assert [(layer.precision, layer.output) for layer in audit.linear] == [("int8", "fp32")] * 2
    assert audit.kernels == 5  # quantise, convolve, quantise, convolve, and back to the output's own order of axes


@pytest.mark.parametrize("sm", [("75",), ("89", "75")])
def test_turing_convolves_in_float_and_pulls_other_cards_along(tmp_path: Path, sm: tuple[str, ...]) -> None:
    """What the flow warns of before it builds for SM 75."""
    model = parse(PLAIN, PLAIN_WEIGHTS)
    save_model(model, tmp_path / "model.onnx")
    save_ranges(measured(model), tmp_path / "ranges.json")
    config = BuildConfig(target="tensorrt-rtx", sm=sm)
    plan = Int8Plan(ranges=tmp_path / "ranges.json")
    built = build_engine(tmp_path / "model.onnx", tmp_path / "e.plan", config, int8=plan)
    assert built.quantize is not None
    assert any("with SM 75 among the targets" in warning for warning in built.quantize.warnings)
    assert [layer.precision for layer in built.engine.audit.linear] == ["fp16", "fp16"]
    assert all("for SM 75, alone or among others" in line for line in built.engine.disagreements)
    assert len(built.engine.disagreements) == 2
    other = build_engine(tmp_path / "model.onnx", tmp_path / "o.plan", BuildConfig(target="tensorrt-rtx"), int8=plan)
    assert other.quantize is not None
    assert other.quantize.warnings == ()
    assert other.engine.disagreements == ()


def test_turing_takes_no_float32_matrix_product(tmp_path: Path) -> None:
    text = "(float[4,64] x) => (float[4,10] y) { [fc1] h = Gemm(x, w1) r = Relu(h) [fc2] y = Gemm(r, w2) }"
    model = parse(text, {"w1": (64, 32), "w2": (32, 10)})
    quantized, _ = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    with pytest.raises(EngineError, match="FP32 GEMM is not supported") as caught:
        build(quantized, tmp_path, sm=("75",))
    assert "SM 80 or newer" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


# What follows shows that the checks above can fail.


def test_a_layer_without_qdq_is_seen(residual_model: Callable, tmp_path: Path) -> None:
    model = residual_model()
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    conv = next(node for node in quantized.graph.node if node.name == "fuse")
    source = {output: node for node in quantized.graph.node for output in node.output}
    quantizer = source[source[conv.input[0]].input[0]]
    conv.input[0] = quantizer.input[0]
    found = broken_promises(report, quantized, build(quantized, tmp_path), student=True)
    assert found == ["fuse: int8 True in the report, fp32 in the engine"]


def test_a_report_that_is_too_modest_is_seen(residual_model: Callable, tmp_path: Path) -> None:
    model = residual_model()
    ranges = measured(model)
    quantized, _ = quantize(model, ranges, target="tensorrt-rtx", **PLAINLY)
    _, modest = quantize(model, ranges, target="tensorrt-rtx", keep_float=["fuse"], **PLAINLY)
    found = broken_promises(modest, quantized, build(quantized, tmp_path), student=True)
    assert found == ["fuse: int8 False in the report, int8 in the engine"]


def test_an_activation_left_in_is_seen(residual_model: Callable, tmp_path: Path) -> None:
    model = residual_model(activation="Silu")
    quantized, report = quantize(model, measured(model), target="tensorrt-rtx", **PLAINLY)
    found = broken_promises(report, quantized, build(quantized, tmp_path), student=True)
    assert len(found) == 5
    assert all(line.startswith("silu ") for line in found)
