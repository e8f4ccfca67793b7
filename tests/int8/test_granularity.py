"""Which products get one weight scale: those that give queries, keys and values in one. What a compiler makes of it is
asked in tests/engines/test_quantizer_engines.py."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper

from relu_deploy.graph import import_graph
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.granularity import is_cut_for_attention, may_share, shares_scale

HEAD = '<ir_version: 8, opset_import: ["": 18]> g (float[2,8,16] x) => (float[2,8,16] y) '
TABLE = "<int64[2] two = {16, 16}, int64[4] heads = {0, 0, 4, 4}, float root = {0.5}, int64 i = {0}, int64 j = {1}>"
SCORES = "s = Softmax(c) y = MatMul(s, v) "
ATTENTION = {
    "Split": "[fc] g = MatMul(x, w) a, v = Split<axis=2>(g, two) k = Transpose<perm=[0,2,1]>(v) "
    "c = MatMul(a, k) " + SCORES,
    "Einsum": '[fc] g = MatMul(x, w) a, v = Split<axis=2>(g, two) c = Einsum<equation="nqd,nkd->nqk">(a, v) ' + SCORES,
    "Gemm": "r = Flatten<axis=2>(x) [fc] g = Gemm<transB=1>(r, w) a, v = Split<axis=1>(g, two) "
    "k = Transpose<perm=[1,0]>(v) c = MatMul(a, k) " + SCORES,
    "a factor and a bias in between": "[fc] p = MatMul(x, w) g = Add(p, b) a, v = Split<axis=2>(g, two) "
    "q = Mul(a, root) k = Transpose<perm=[0,2,1]>(v) c = MatMul(q, k) " + SCORES,
}
OTHERS = {
    "a gate": "[fc] g = MatMul(x, w) a, b0 = Split<axis=2>(g, two) s = Sigmoid(a) y = Mul(s, b0)",
    "parts for layers": "[fc] g = MatMul(x, w) a, b0 = Split<axis=2>(g, two) c = MatMul(a, u) d = MatMul(b0, u) "
    "y = Add(c, d)",
    "queries alone": "[fc] a = MatMul(x, u) k = Transpose<perm=[0,2,1]>(x) c = MatMul(a, k) s = Softmax(c) "
    "y = MatMul(s, x)",
    "what attention gives": "k = Transpose<perm=[0,2,1]>(x) c = MatMul(x, k) s = Softmax(c) o = MatMul(s, x) "
    "[fc] g = MatMul(o, w) y, z = Split<axis=2>(g, two)",
}


def layer(body, weight):
    model = onnx.parser.parse_model(f"{HEAD}{TABLE} {{ {body} }}")
    stored = {"w": weight, "u": np.eye(16), "b": np.ones(32)}
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in stored.items() if k in read
    )
    return next(node for node in import_graph(model).nodes if node.name == "fc")


@pytest.mark.parametrize(
    ("body", "cut"), [(b, True) for b in ATTENTION.values()] + [(b, False) for b in OTHERS.values()],
    ids=[*ATTENTION, *OTHERS],
)  # fmt: skip
def test_what_is_cut_for_attention(body, cut):
    weight = np.random.default_rng(0).normal(size=(32, 16) if "transB" in body else (16, 32))
    node, number = layer(body, weight), number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp16")
    assert is_cut_for_attention(node) is may_share(node, number) is shares_scale(node, number) is cut
    assert may_share(node, number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp32")) is cut
    assert not may_share(node, number_format("tensorrt-rtx", weight_granularity="channel", float_part="fp16"))
    assert not may_share(node, number_format("ort", weight_granularity="auto"))


@pytest.mark.parametrize("body", ATTENTION.values(), ids=ATTENTION)
def test_not_where_one_scale_loses_much(body):
    weight = np.random.default_rng(0).normal(size=(32, 16)) * np.where(np.arange(32) % 2, 1, 0.01)[:, None]
    node = layer(body, weight if "transB" in body else weight.T)
    number = number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp16")
    assert may_share(node, number)
    assert not shares_scale(node, number)


def test_in_float32_no_convolution_fuses_by_it():
    conv = gs.Node("Conv", "c", inputs=[gs.Variable("x"), gs.Constant("w", np.ones((4, 4, 1, 1), np.float32))])
    for part, shared in (("fp16", True), ("fp32", False)):
        number = number_format("tensorrt-rtx", weight_granularity="auto", float_part=part)
        assert may_share(conv, number) is shares_scale(conv, number) is shared
