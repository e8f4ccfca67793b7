from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import helper, numpy_helper

from calib.errors import CalibrationError, first_line, message_of
from calib.graph import refuse_quantized
from calib.model import first_quantized, fits_one_message, opset, tensor_bytes


def parse(text: str, *, domains: str = '"": 17') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{domains}]>\n{text}")


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("QuantizeLinear", ""), ("DequantizeLinear", ""), ("DynamicQuantizeLinear", ""), ("ConvInteger", ""),
        ("MatMulInteger", ""), ("QLinearConv", ""), ("QLinearMatMul", ""), ("QLinearAdd", "com.microsoft"),
        ("QGemm", "com.microsoft"), ("QAttention", "com.microsoft"), ("MatMulIntegerToFloat", "com.microsoft"),
        ("DynamicQuantizeMatMul", "com.microsoft"), ("DynamicQuantizeLSTM", "com.microsoft"),
    ],
)  # fmt: skip
def test_every_integer_operator_is_quantised(op, domain):
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node(op, ["r"], ["y"], "it", domain=domain)]
    model = helper.make_model(helper.make_graph(nodes, "g", [], []))
    assert first_quantized(model).name == "it"
    with pytest.raises(CalibrationError, match="quantised already: node 'it'"):
        refuse_quantized(model)


def test_float_networks_are_not_quantised(residual_model):
    assert first_quantized(residual_model()) is None
    # Packed weights, float activations: there is something to calibrate.
    node = helper.make_node("MatMulNBits", ["x", "b", "s"], ["y"], domain="com.microsoft")
    assert first_quantized(helper.make_model(helper.make_graph([node], "g", [], []))) is None


def test_branches_are_looked_into():
    model = parse("""g (float[2] x, bool c) => (float[2] y) <float s = {0.5}, int8 z = {0}>
    { y = If (c) <then_branch = t () => (float[2] a) { a = Relu(x) },
                  else_branch = e () => (float[2] b) { q = QuantizeLinear(x, s, z)
                                                       b = DequantizeLinear(q, s, z) }> }""")
    assert first_quantized(model).op_type == "QuantizeLinear"


def test_size_is_told_by_tensors_alone(residual_model, monkeypatch):
    model = residual_model()
    assert fits_one_message(model)
    size = tensor_bytes(model)
    # Past 2 GiB protobuf's ByteSize raises; what is asked about such a model must not call it.
    monkeypatch.setattr(onnx.ModelProto, "ByteSize", lambda self: 1 / 0, raising=False)
    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", (1 << 24) + size + 1)
    assert fits_one_message(model)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.uint8), "one more"))
    assert not fits_one_message(model)


def test_opset_is_that_of_the_default_domain():
    assert opset(parse("g (float[1] x) => (float[1] y) { y = Relu(x) }", domains='"mine": 30, "ai.onnx": 13')) == 13
    assert opset(parse("g (float[1] x) => (float[1] y) { y = mine.Relu(x) }", domains='"mine": 30')) == 0


def test_messages_of_libraries_lose_codes_and_stacks():
    error = RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : no kernel : for it\n  at x.cc:1")
    assert message_of(error) == "no kernel : for it\n  at x.cc:1"
    assert first_line(error) == "no kernel : for it"
    assert first_line(ValueError("\n\n  later  \n")) == "later"
    assert first_line(ValueError("x" * 500), limit=7) == "x" * 7
    assert first_line(AssertionError()) == "no reason given"
