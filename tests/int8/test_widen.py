"""Float16 networks for ONNX Runtime: the same numbers in float32, between inputs and outputs of their own types."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.model import all_nodes
from calib.ranges import Ranges, TensorRange
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.int8.run import quantize
from relu_deploy.int8.widen import widen, with_names

RNG = np.random.default_rng(0)
HALF = onnx.TensorProto.FLOAT16


def parse(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}')
    for name, values in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(values.astype(np.float16), name))
    return model


def run(model: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return open_session(model, threads=1).run(None, feeds)


def halves(model: onnx.ModelProto) -> list[str]:
    """What of a network is still float16, inputs, outputs and what casts to them aside."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    found = [tensor.name for tensor in model.graph.initializer if tensor.data_type == HALF]
    found += [v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == HALF]
    ends = {value.name for value in model.graph.output}
    return found + [node.name for node in all_nodes(model.graph) for a in node.attribute if a.i == HALF and not (
        node.op_type == "Cast" and node.output[0] in ends
    )]  # fmt: skip


# The text of a float16 tensor is that of its bits: 15360 is 1.0.
NETWORKS = {
    "chain": "(float16[N, 4] x) => (float16[N, 4] y) { a = MatMul(x, w) b = Relu(a) y = Add(b, c) }",
    "constants": """(float16[N, 4] x) => (float16[N, 4] y)
    { k = Constant<value = float16[4] {15360, 16384, 16896, 17408}>() s = Shape(x)
      z = ConstantOfShape<value = float16[1] {14336}>(s) a = Mul(x, k) y = Add(a, z) }""",
    "casts": """(float16[N, 4] x) => (float16[N, 4] y)
    { f = Cast<to = 1>(x) e = Exp(f) h = Cast<to = 10>(e) y = Mul(h, w0) }""",
    "branches": """(float16[N, 4] x, bool p) => (float16[N, 4] y)
    { y = If<then_branch = t () => (float16[N, 4] u) { h = Cast<to = 10>(p) u = Mul(x, h) },
             else_branch = e () => (float16[N, 4] v) { v = Identity(x) }>(p) }""",
    "ends": "(float16[N, 4] x) => (float16[N, 4] a, float16[N, 4] y, float16[N, 4] x) { a = Relu(x) y = MatMul(a, w) }",
    "names": "(float16[N, 4] x) => (float16[N, 4] y) { q = Relu(x) y = Neg(q) }",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_nothing_inside_is_float16(name):
    weights = {"w": RNG.normal(size=(4, 4)), "w0": RNG.normal(size=4), "c": RNG.normal(size=4)}
    model = parse(NETWORKS[name], **{k: v for k, v in weights.items() if f"{k})" in NETWORKS[name]})
    if name == "names":  # taken by somebody else
        model.graph.node[0].output[0] = model.graph.node[1].input[0] = "x/float32"
    before = model.SerializeToString(deterministic=True)
    wide, names = widen(model)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(wide, full_check=True)
    assert halves(wide) == []
    for kind in ("input", "output"):
        assert list(getattr(wide.graph, kind)) == list(getattr(model.graph, kind))
    assert set(names.values()) <= {"x", "y", "a"}
    x = RNG.normal(size=(3, 4)).astype(np.float16)
    for p in (False, True) if name == "branches" else (None,):
        feeds = {"x": x} if p is None else {"x": x, "p": np.array(p)}
        for wanted, found in zip(run(model, **feeds), run(wide, **feeds), strict=True):
            assert found.dtype == np.float16
            # Four products and a sum in float16, against one rounding at the end: a few units in the last place.
            np.testing.assert_allclose(found, wanted, rtol=2**-8, atol=2**-9)


def test_a_float32_network_is_left_as_it_is():
    model = parse("(float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    wide, names = widen(model)
    assert wide == model
    assert names == {}


def test_new_tensors_get_the_ranges_of_those_whose_values_they_have():
    seen = TensorRange(-1.0, 2.0, "float16", 3)
    found = with_names(Ranges({"x": seen}, "0" * 64, "0" * 64, "max", 3), {"x/float32": "x", "y/float32": "y"})
    assert found.tensors == {"x": seen, "x/float32": seen}


def test_a_float16_network_is_quantised_for_onnx_runtime():
    model = parse(
        "(float16[N, 3, 8, 8] x) => (float16[N, 5, 8, 8] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, v) }",
        w=RNG.normal(size=(6, 3, 1, 1)), b=RNG.normal(size=6), v=RNG.normal(size=(5, 6, 1, 1)),
    )  # fmt: skip
    data = RNG.normal(size=(8, 3, 8, 8)).astype(np.float16)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    quantized, report = quantize(model, ranges, target="ort", weight_bits=8)
    assert [layer.int8 for layer in report.layers] == [True, True]
    assert any("the network is float16" in warning for warning in report.warnings)
    (wanted,), (found,) = run(model, x=data), run(quantized, x=data)
    assert found.dtype == np.float16
    noise = np.mean((wanted.astype(np.float64) - found) ** 2)
    assert 10 * np.log10(np.mean(wanted.astype(np.float64) ** 2) / noise) > 30
