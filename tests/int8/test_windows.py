"""Rows of windows times the weights as a matrix are what ONNX Runtime computes."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from relu_deploy.int8.windows import as_matrix, from_matrix, windows_of

CONVS = {
    "plain": ("", (1, 4, 9, 8), (6, 4, 3, 3)),
    "padded, strided": ("<pads = [1, 0, 2, 1], strides = [2, 3]>", (1, 4, 9, 8), (6, 4, 3, 2)),
    "dilated": ("<dilations = [2, 3], pads = [2, 3, 2, 3]>", (1, 4, 9, 11), (6, 4, 3, 3)),
    "grouped": ("<group = 2, pads = [1, 1, 1, 1]>", (1, 4, 6, 5), (6, 2, 3, 3)),
    "depthwise": ("<group = 4, strides = [2, 2]>", (1, 4, 7, 7), (4, 1, 3, 3)),
    "same, to the end": ('<auto_pad = "SAME_UPPER", strides = [2, 2]>', (1, 3, 8, 7), (5, 3, 4, 3)),
    "same, to the front": ('<auto_pad = "SAME_LOWER", strides = [2, 1]>', (1, 3, 8, 7), (5, 3, 4, 4)),
    "valid": ('<auto_pad = "VALID">', (1, 3, 8, 7), (5, 3, 4, 3)),
    "one axis": ("<pads = [2, 0], dilations = [2]>", (2, 3, 10), (5, 3, 3)),
    "three axes": ("<pads = [1, 0, 0, 1, 0, 1]>", (1, 2, 4, 5, 4), (3, 2, 2, 3, 2)),
}
PRODUCTS = {
    "MatMul": ("MatMul(x, w)", (2, 5, 8), (8, 6)), "Gemm": ("Gemm(x, w)", (5, 8), (8, 6)),
    "Gemm, transposed": ("Gemm<transB = 1>(x, w)", (5, 8), (6, 8)),
}  # fmt: skip


def run(call, x, w):
    """The node, and what it gives."""
    text = f'<ir_version: 8, opset_import: ["": 17]> g (float{list(x)} x) => (float[] y) {{ [n] y = {call} }}'
    model = onnx.parser.parse_model(text.replace("float[] y", f"float[{','.join('abcde'[: max(len(x), 2)])}] y"))
    rng = np.random.default_rng(0)
    weight = rng.normal(size=w).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    data = rng.normal(size=x).astype(np.float32)
    (found,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": data})
    return gs.import_onnx(model).nodes[0], data, weight, found


@pytest.mark.parametrize("name", CONVS)
def test_a_convolution_is_a_product_over_its_windows(name):
    attributes, x, w = CONVS[name]
    node, data, weight, found = run(f"Conv{attributes}(x, w)", x, w)
    windows = windows_of(node)
    rows = windows.rows(data, 10**6, 0)
    product = rows @ as_matrix(node, weight, windows.groups).transpose(0, 2, 1)  # (groups, n, R)
    wanted = np.moveaxis(found, 1, -1).reshape(-1, w[0])
    # The same products in another order: float32 sums of at most 36 numbers near 1.
    np.testing.assert_allclose(product.transpose(1, 0, 2).reshape(-1, w[0]), wanted, atol=1e-5)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_matrices_is_one_too(name):
    call, x, w = PRODUCTS[name]
    node, data, weight, found = run(call, x, w)
    windows = windows_of(node)
    product = windows.rows(data, 10**6, 0)[0] @ as_matrix(node, weight, 1)[0].T
    np.testing.assert_allclose(product, found.reshape(-1, 6), atol=1e-5)


@pytest.mark.parametrize("name", [*CONVS, *PRODUCTS])
def test_matrices_go_back_to_weights(name):
    call, x, w = {n: (f"Conv{c[0]}(x, w)", *c[1:]) for n, c in CONVS.items()}.get(name) or PRODUCTS[name]
    node, _, weight, _ = run(call, x, w)
    matrix = as_matrix(node, weight, windows_of(node).groups)
    assert (from_matrix(node, matrix, weight) == weight).all()


def test_rows_are_picked_alike_for_equal_shapes():
    node, data, _, _ = run("Conv(x, w)", (1, 4, 9, 8), (6, 4, 3, 3))
    windows = windows_of(node)
    once, twice = windows.rows(data, 5, 3), windows.rows(2 * data, 5, 3)
    assert once.shape == (1, 5, 36)
    assert (2 * once == twice).all()
    assert not np.array_equal(once, windows.rows(data, 5, 4))


@pytest.mark.parametrize("text", ["MatMul(x, v)", "ConvTranspose(x, w)", "Gemm<transA = 1>(x, u)"])
def test_what_is_no_product_over_windows_is_none(text):
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, 4, 9, 8] x) => (float[a, b, c, d] y) {{ y = {text} }}'
    )
    for name, shape in (("v", (4, 8, 6)), ("w", (4, 6, 3, 3)), ("u", (9, 6))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert windows_of(gs.import_onnx(model).nodes[0]) is None
