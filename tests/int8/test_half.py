"""The float part in float16: what becomes half, what does not, and that interfaces and scales stay exact."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, numpy_helper

from calib.session import open_session
from relu_deploy import graph as files
from relu_deploy.errors import ModelError, QuantizationError
from relu_deploy.int8.formats import half_scales
from relu_deploy.int8.half import halve
from relu_deploy.int8.half_scales import holds_scale
from relu_deploy.int8.run import quantize


def parse(text: str, opset: int = 19, **stored: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}]> g {text}')
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in stored.items())
    return onnx.shape_inference.infer_shapes(model)


def halved(model: onnx.ModelProto, bounds: dict[str, tuple[float, float]]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The network with its float part in half, checked; and why nodes stay float32."""
    graph = files.import_graph(model)
    report = halve(graph, bounds)
    after = files.export_graph(graph, model)
    files.check_model(after, "the halved model")
    for before, now in ((model.graph.input, after.graph.input), (model.graph.output, after.graph.output)):
        assert [(v.name, v.type.tensor_type.elem_type) for v in before] == [
            (v.name, v.type.tensor_type.elem_type) for v in now
        ]
    again = files.import_graph(onnx.shape_inference.infer_shapes(after))
    assert halve(again, bounds).changed == ()
    return after, {skip.name: skip.reason for skip in report.skipped}


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model)
    return {v.name: v.type.tensor_type.elem_type for v in inferred.graph.value_info}


UNIT = dict.fromkeys("xabcdefghy", (-4.0, 4.0))
CHAIN = """(float[2,8] x) => (float[2,8] y) {
  [fc] a = MatMul(x, w) [add] b = Add(a, v) [act] c = Relu(b) [out] y = Mul(c, c2) }"""
STORED = {"w": np.eye(8) * 0.5, "v": np.ones(8), "c2": np.full((), 2.0)}


def test_everything_between_input_and_output_is_half():
    model = parse(CHAIN, **STORED)
    after, kept = halved(model, UNIT)
    assert kept == {}
    assert Counter(node.op_type for node in after.graph.node) == {"Cast": 2, "MatMul": 1, "Add": 1, "Relu": 1, "Mul": 1}
    assert set(types(after).values()) == {TensorProto.FLOAT16}
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    wanted, got = (open_session(m, threads=1).run(None, {"x": x})[0] for m in (model, after))
    np.testing.assert_allclose(got, wanted, rtol=4e-3, atol=4e-3)  # a few roundings to 11 bits


def test_a_tensor_past_the_range_stays_float32_with_both_its_nodes():
    _, kept = halved(parse(CHAIN, **STORED), UNIT | {"b": (-1.0, 40000.0)})
    assert set(kept) == {"add", "act"}
    assert "b reaches 4e+04" in kept["add"]


def test_what_was_not_measured_follows_from_its_operands():
    bounds = {"x": (-4.0, 4.0)}
    _, kept = halved(parse(CHAIN, **STORED), bounds)
    assert kept == {}
    # The rows of the weights sum up to 20000 times the input.
    _, kept = halved(parse(CHAIN, **{**STORED, "w": np.eye(8) * 2e4}), bounds)
    assert set(kept) == {"fc", "add", "act", "out"}


def test_what_follows_from_nothing_stays_float32():
    text = "(float[2,8] x, float[8,8] z) => (float[2,8] y) { [fc] a = MatMul(x, z) [act] y = Relu(a) }"
    _, kept = halved(parse(text), {"x": (-1.0, 1.0), "z": (-1.0, 1.0)})
    assert "the range of a is not known" in kept["fc"]


@pytest.mark.parametrize("value", [1e-12, 1e5])
def test_constants_that_float16_does_not_hold(value):
    _, kept = halved(parse(CHAIN, **{**STORED, "v": np.full(8, value)}), UNIT)
    assert "which float16 does not hold well" in kept["add"]


def test_a_normalisation_that_is_spelled_out_stays_float32():
    text = """(float[2,8] x) => (float[2,8] y) { [mean] m = ReduceMean<axes=[1]>(x) [sub] d = Sub(x, m)
      [square] p = Mul(d, d) [var] v = ReduceMean<axes=[1]>(p) [eps] e = Add(v, tiny) [root] s = Sqrt(e)
      [div] n = Div(d, s) [act] y = Relu(n) }"""
    bounds = dict.fromkeys("xmdpvesny", (-4.0, 4.0))
    after, kept = halved(parse(text, 17, tiny=np.full((), 1e-12)), bounds)
    assert {"square", "eps", "root"} <= set(kept)
    assert {"act", "sub"}.isdisjoint(kept)
    x = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    x[1] = 3.0  # no variance: float16 would divide by 0
    assert np.isfinite(open_session(after, threads=1).run(None, {"x": x})[0]).all()


def test_a_sum_past_the_range_before_a_mean():
    text = "(float[1,4,64,64] x) => (float[1,4,1,1] y) { [a] a = Relu(x) [pool] y = GlobalAveragePool(a) }"
    _, kept = halved(parse(text), {"x": (-20.0, 20.0), "a": (0.0, 20.0), "y": (0.0, 20.0)})
    assert "the sum before its mean may reach 8.19e+04" in kept["pool"]
    _, kept = halved(parse(text), {"x": (-2.0, 2.0), "a": (0.0, 2.0), "y": (0.0, 2.0)})
    assert kept == {}


def test_operands_that_onnx_wants_in_float32_stay():
    text = """(float[1,2,4,4] x) => (float[1,2,8,8] y) { [a] a = Relu(x) [up] y = Resize<mode="nearest">(a, , s) }"""
    after, kept = halved(parse(text, s=np.array([1, 1, 2, 2])), {"x": (-1.0, 1.0), "a": (0.0, 1.0), "y": (0.0, 1.0)})
    assert kept == {}
    assert {t.name: t.data_type for t in after.graph.initializer} == {"s": TensorProto.FLOAT}


def test_values_that_an_inner_graph_reads_keep_their_type():
    text = """(float[2,8] x, bool c) => (float[2,8] y) { [a] a = Relu(x)
      [if] b = If(c) <then_branch = t () => (float[2,8] u) { u = Neg(a) },
                      else_branch = e () => (float[2,8] v) { v = Abs(a) }> [out] y = Relu(b) }"""
    after, kept = halved(parse(text), {"x": (-1.0, 1.0), "a": (0.0, 1.0), "b": (-1.0, 1.0), "y": (0.0, 1.0)})
    assert "a graph inside If, Loop or Scan reads its values" in kept["a"]
    feeds = {"x": np.ones((2, 8), np.float32), "c": np.array(False)}
    np.testing.assert_array_equal(open_session(after, threads=1).run(None, feeds)[0], 1)


@pytest.mark.parametrize("opset", [19, files.MAX_OPSET])
def test_what_onnx_has_no_float16_for_is_left_in_float32(opset):
    """Every operator that takes float32 and not float16, read from ONNX itself."""
    known = [s for s in onnx.defs.get_all_schemas_with_history() if not s.domain and s.since_version <= opset]
    newest = {schema.name: schema for schema in sorted(known, key=lambda schema: schema.since_version)}
    first = {name: s.inputs[0].types for name, s in newest.items() if s.inputs and not s.deprecated}
    lacking = {name for name, types in first.items() if "tensor(float)" in types and "tensor(float16)" not in types}
    assert "Celu" in lacking
    for name in sorted(lacking):
        x, y = (gs.Variable(each, np.dtype(np.float32), (2,)) for each in "xy")
        node = gs.Node(name, "n", inputs=[x], outputs=[y])
        report = halve(gs.Graph([node], [x], [y], opset=opset), {"x": (-1.0, 1.0), "y": (-1.0, 1.0)})
        assert [skip.name for skip in report.skipped] == ["n"], name


def test_values_that_are_added_up_in_places_stay_float32():
    text = """(float[4,8] x) => (float[4,8] y) <int64[3,1] at = {0, 1, 0}> {
      [a] a = Relu(x) [b] b = Slice(a, zero, three)
      [add] c = ScatterND<reduction="add">(a, at, b) [out] y = Relu(c) }"""
    model = parse(text)
    model.graph.initializer.extend(numpy_helper.from_array(np.array([v]), k) for k, v in (("zero", 0), ("three", 3)))
    after, kept = halved(onnx.shape_inference.infer_shapes(model), dict.fromkeys("xabcy", (-4.0, 4.0)))
    assert kept == {"add": "any number of values meet in one place"}
    open_session(after).run(None, {"x": np.ones((4, 8), np.float32)})  # ONNX Runtime has no such kernel for float16


def test_values_that_vanish_in_float16_stay_float32():
    """A head of tiny weights: 2e-8 is 0 in float16."""
    model = parse("(float[2,8] x) => (float[2,8] y) { [a] a = Relu(x) [fc] b = MatMul(a, w) [out] y = Relu(b) }",
                  w=np.eye(8) * 1e-3)  # fmt: skip
    after, kept = halved(model, {"x": (-4.0, 4.0), "a": (0.0, 4.0), "b": (0.0, 2e-8), "y": (0.0, 2e-8)})
    assert kept == {name: f"{tensor} is 2e-08 at most, which float16 does not hold well"
                    for name, tensor in (("fc", "b"), ("out", "b"))}  # fmt: skip
    assert types(after)["a"] == TensorProto.FLOAT16


def test_what_has_no_type_stays_float32():
    """What stands behind an operator of another domain, whose result nobody can infer."""
    model = onnx.parser.parse_model("""<ir_version: 9, opset_import: ["": 19, "com.microsoft": 1]>
      g (float[2,8] x) => (float[2,8] y) {
        [a] a = Relu(x) [f] b = com.microsoft.Gelu(a) [c] c = Mul(b, k) [d] y = Relu(c) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.float32(2), "k"))
    model = onnx.shape_inference.infer_shapes(model)
    graph = files.import_graph(model)
    report = halve(graph, dict.fromkeys("xabcy", (-4.0, 4.0)))
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert (report.changed, reasons["c"]) == (("a",), "the type of b is not known")
    x = np.linspace(-2, 2, 16, dtype=np.float32).reshape(2, 8)
    wanted, got = (open_session(m).run(None, {"x": x})[0] for m in (model, files.export_graph(graph, model)))
    np.testing.assert_allclose(got, wanted, rtol=1e-3, atol=1e-3)  # the first ReLU rounds to 11 bits


PRODUCTS = """(float[8,8] x) => (float[8,8] y, float[8,8] z) {
  [q] q = QuantizeLinear(x, s, zero) [dq] d = DequantizeLinear(q, s, zero) %s
  [w1] v1 = DequantizeLinear(w, ws, zero) [w2] v2 = DequantizeLinear(w, ws, zero)
  [one] y = MatMul(%s, v1) [two] z = MatMul(d, v2) }"""


def products(scale: float, *, moved: str = "", operand: str = "d") -> onnx.ModelProto:
    model = parse(PRODUCTS % (moved, operand), s=np.float32(scale), ws=np.float32(0.5))
    codes = {"w": np.eye(8, dtype=np.int8), "zero": np.int8(0)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in codes.items())
    return model


def operand_types(model: onnx.ModelProto, product: str) -> list[int]:
    """Types of the scales of a product's operands."""
    makers = {output: node for node in model.graph.node for output in node.output}
    found = []
    for tensor in next(node for node in model.graph.node if node.name == product).input:
        maker = makers[tensor]
        while maker.op_type != "DequantizeLinear":
            assert maker.op_type != "Cast"
            maker = makers[maker.input[0]]
        found.append(next(t.data_type for t in model.graph.initializer if t.name == maker.input[1]))
    return found


@pytest.mark.parametrize(("move", "operand"), [("", "d"), ("[move] t = Transpose<perm=[1,0]>(d)", "t")])
@pytest.mark.parametrize("scale", [1e-5, 2.0**-7])
def test_both_operands_of_a_product_have_scales_of_one_type(scale, move, operand):
    model = products(scale, moved=move, operand=operand)
    bounds = {"x": (-1e4 * scale, 1e4 * scale), "y": (-1.0, 1.0), "z": (-1.0, 1.0)}
    graph = files.import_graph(model)
    kept = {skip.name: skip.reason for skip in halve(graph, bounds).skipped}
    after = files.export_graph(graph, model)
    files.check_model(after, "the halved model")
    whole = TensorProto.FLOAT16 if scale == 2.0**-7 else TensorProto.FLOAT
    assert operand_types(after, "one") == operand_types(after, "two") == [whole, whole]
    if whole == TensorProto.FLOAT:
        assert kept["one"] == kept["two"] == "float16 does not hold the scale of d"


def test_one_product_that_has_to_be_float32_takes_those_of_its_operand_along():
    model = products(2.0**-7)
    graph = files.import_graph(model)
    report = halve(graph, {"x": (-1.0, 1.0), "y": (-1.0, 1.0), "z": (-1.0, 1e6)})
    assert {skip.name: skip.reason for skip in report.skipped} == {
        "two": "z reaches 1e+06, and float16 ends at 65504", "one": "two, which reads d too, stays float32"
    }  # fmt: skip
    assert report.changed == ()
    after = files.export_graph(graph, model)
    assert operand_types(after, "one") == operand_types(after, "two") == [TensorProto.FLOAT] * 2


def test_what_a_recurrent_layer_reads_is_not_cast_from_float16():
    """TensorRT-RTX cannot build that, whether it is moved in between or not."""
    text = """(float[2,9,8] x) => (float[9,1,2,4] y) {
      [a] a = Relu(x) [b] b = Neg(a) [move] t = Transpose<perm=[1,0,2]>(b)
      [again] u = Identity(t) [rnn] y = LSTM<hidden_size=4>(u, w, r) }"""
    model = parse(text, w=np.ones((1, 16, 8)) * 0.1, r=np.ones((1, 16, 4)) * 0.1)
    after, kept = halved(model, dict.fromkeys("xabtu", (-4.0, 4.0)) | {"y": (-1.0, 1.0)})
    assert set(kept) == {"b", "move", "again", "rnn"}
    assert kept["move"] == kept["b"] == "LSTM rnn, which is computed in float32, reads what it makes"
    found = types(after)
    assert (found["a"], found["b"]) == (TensorProto.FLOAT16, TensorProto.FLOAT)


def test_an_output_that_is_also_read_inside():
    text = "(float[2,8] x) => (float[2,8] y, float[2,8] z) { [a] y = Relu(x) [b] z = Neg(y) }"
    after, kept = halved(parse(text), {"x": (-1.0, 1.0), "y": (0.0, 1.0), "z": (-1.0, 0.0)})
    assert kept == {}
    one, other = open_session(after, threads=1).run(None, {"x": np.ones((2, 8), np.float32)})
    np.testing.assert_array_equal(one, -other)


def test_scales_are_exact_and_equal_in_both_types(residual_model, measure):
    model = residual_model()
    quantized, report = quantize(model, measure(model), target="tensorrt-rtx")
    assert report.float_part == "fp16"
    assert report.half is not None
    assert report.half.skipped == ()
    scales = {t.name: numpy_helper.to_array(t) for t in quantized.graph.initializer if "scale" in t.name}
    assert all(holds_scale(values) for values in scales.values())
    pairs = {}
    for node in quantized.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in scales:
            values = scales[node.input[1]].astype(np.float64)
            pairs.setdefault(node.input[0] if node.op_type[0] == "D" else node.output[0], []).append(values)
    assert any(len(both) > 1 for both in pairs.values())
    assert all(np.array_equal(both[0], other) for both in pairs.values() for other in both)
    # What the report tells is what the file holds.
    told = {
        name: np.float16(qparams.scale) == np.float32(qparams.scale) for name, qparams in report.activations.items()
    }
    assert all(told.values())


def test_the_network_is_as_good_as_with_a_float32_part(residual_model, measure):
    model = residual_model()
    ranges, x = measure(model), np.random.default_rng(5).normal(size=(1, 3, 16, 16)).astype(np.float32)
    (name,) = [value.name for value in model.graph.input]
    wanted = open_session(model).run(None, {name: x})[0]
    errors = {}
    for part in ("fp32", "fp16"):
        quantized, _ = quantize(model, ranges, target="tensorrt-rtx", float_part=part, weight_granularity="channel")
        errors[part] = float(np.abs(open_session(quantized).run(None, {name: x})[0] - wanted).max())
    assert errors["fp16"] < 1.5 * errors["fp32"] + 1e-3 * float(np.abs(wanted).max())


def test_small_weight_scales_grow_to_what_float16_holds():
    scales = half_scales(np.array([0.1, 1e-5, 1e-9], np.float32))
    assert holds_scale(scales)
    assert abs(scales[1] / 1e-5 - 1) < 0.01
    assert scales[2] > 1e-6


def test_ort_has_no_float16_part(residual_model, measure):
    model = residual_model()
    with pytest.raises(QuantizationError, match="for ort the float part cannot be float16"):
        quantize(model, measure(model), float_part="fp16")
    assert quantize(model, measure(model), weight_bits=8)[1].float_part == "fp32"


def test_an_opset_that_cannot_be_lifted_keeps_float32_and_says_so(residual_model, measure, monkeypatch):
    model, lift = residual_model(opset=17), files.convert_opset

    def refuse(given, *, lowest, source="the model"):
        if lowest > 17:
            raise ModelError("no rule for this operator")
        return lift(given, lowest=lowest, source=source)

    monkeypatch.setattr(files, "convert_opset", refuse)
    quantized, report = quantize(model, measure(model), target="tensorrt-rtx")
    assert (report.float_part, report.opset, report.weight_granularity) == ("fp32", 17, "channel")
    assert any("the float part stays float32: no rule" in warning for warning in report.warnings)
    assert not any(t.data_type == TensorProto.FLOAT16 for t in quantized.graph.initializer)
    with pytest.raises(ModelError, match="no rule"):
        quantize(model, measure(model), target="tensorrt-rtx", float_part="fp16")
