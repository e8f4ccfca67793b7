"""What INT8 layers of TensorRT-RTX read, scaled and centred by channel: the same function, finer codes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.graph import import_graph
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.even_inputs import LARGEST_FACTOR, EvenInputs, even_inputs
from relu_deploy.int8.evidence import Evidence
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.place import place
from relu_deploy.int8.run import QuantReport, quantize
from relu_deploy.int8.settle import offset_error, settle, steady
from relu_deploy.int8.store import Stored, store

RTX = number_format("tensorrt-rtx")
RANDOM = np.random.default_rng(0)
# Channels that differ in size, and that are never negative: what one symmetric scale serves badly.
SIZES = np.logspace(-1, 1, 8)


def network(body: str, x: str, y: str = "float[N, 8, 6, 6] y", **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g (float[{x}] x) => ({y}) {{ {body} }}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape)


IMAGES = np.abs(normal(16, 8, 6, 6) * SIZES[:, None, None]).astype(np.float32)
TOKENS = np.abs(normal(16, 5, 8) * SIZES).astype(np.float32)
ROWS = np.abs(normal(16, 8) * SIZES).astype(np.float32)
CONV = {"w": normal(8, 8, 1, 1), "b": normal(8)}
# What stands after the tensor s, which Sigmoid times x makes; and the samples.
NETWORKS: dict[str, tuple[onnx.ModelProto, np.ndarray]] = {
    "Conv": (network("g = Sigmoid(x) s = Mul(x, g) [c] y = Conv(s, w, b)", "N, 8, 6, 6", **CONV), IMAGES),
    "Conv without bias": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] y = Conv(s, w)", "N, 8, 6, 6", w=normal(8, 8, 1, 1)), IMAGES,
    ),
    "two layers": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] h = Conv(s, w, b) [d] k = Conv(s, w, b) y = Add(h, k)", "N, 8, 6, 6",
                **CONV), IMAGES,
    ),
    "grouped": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] y = Conv<group=4>(s, w, b)", "N, 8, 6, 6", w=normal(8, 2, 1, 1),
                b=normal(8)), IMAGES,
    ),
    "strided": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] y = Conv<strides=[2, 2]>(s, w, b)", "N, 8, 6, 6",
                "float[N, 8, 2, 2] y", w=normal(8, 8, 3, 3), b=normal(8)), IMAGES,
    ),
    "Gemm": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] y = Gemm<transB=1, alpha=0.5, beta=2.0>(s, w, b)", "N, 8",
                "float[N, 4] y", w=normal(4, 8), b=normal(4)), ROWS,
    ),
    "MatMul of matrices": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] y = MatMul(s, w)", "N, 8", "float[N, 4] y", w=normal(8, 4)), ROWS,
    ),
    "MatMul and Add": (
        network("g = Sigmoid(x) s = Mul(x, g) [c] h = MatMul(s, w) y = Add(b, h)", "N, 5, 8", "float[N, 5, 4] y",
                w=normal(8, 4), b=normal(4)), TOKENS,
    ),
}  # fmt: skip
PADDED = network("g = Sigmoid(x) s = Mul(x, g) [c] y = Conv<pads=[1,1,1,1]>(s, w, b)", "N, 8, 6, 6",
                 w=normal(8, 8, 3, 3), b=normal(8))  # fmt: skip
NO_BIAS = network("g = Sigmoid(x) s = Mul(x, g) [c] y = MatMul(s, w)", "N, 5, 8", "float[N, 5, 4] y", w=normal(8, 4))


def measured(model: onnx.ModelProto, data: np.ndarray) -> Ranges:
    return calibrate(model, open_source(data, model_inputs(model)))


def evened(model: onnx.ModelProto, data: np.ndarray) -> tuple[gs.Graph, EvenInputs, dict[str, tuple[float, float]]]:
    graph, ranges = import_graph(model), measured(model, data)
    bounds = {name: (each.min, each.max) for name, each in ranges.tensors.items()}
    return graph, even_inputs(graph, place(graph, bounds, RTX), ranges, bounds, RTX), bounds


def run(model: onnx.ModelProto, data: np.ndarray) -> np.ndarray:
    return np.asarray(open_session(model).run(None, {"x": data})[0], dtype=np.float64)


def reports(found: EvenInputs) -> dict[str, str]:
    return {skip.name: skip.reason for skip in found.report.skipped}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_all_codes_are_used(name: str) -> None:
    model, data = NETWORKS[name]
    graph, found, bounds = evened(model, data)
    assert found.report.changed == ("s",)
    assert found.report.notes["s"] == "8 channels scaled, and centred"
    after, before = run(gs.export_onnx(graph.cleanup()), data), run(model, data)
    # Rounding of float32 in sums of a few dozen products, some of which cancel the offset.
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max() * 8)
    layer = next(node for node in graph.nodes if node.name == "c")
    low, high = bounds[layer.inputs[0].name]
    assert -low == pytest.approx(high, rel=0.02)
    assert high == pytest.approx(bounds["s"][1], rel=0.02)


@pytest.mark.parametrize("name", NETWORKS)
def test_again_nothing_changes(name: str) -> None:
    model, data = NETWORKS[name]
    graph, _, bounds = evened(model, data)
    again = even_inputs(graph, place(graph, bounds, RTX), measured(model, data), bounds, RTX)
    assert again.report.changed == ()
    assert again.centres == {}


@pytest.mark.parametrize("model", [PADDED, NO_BIAS], ids=["a padded Conv", "a MatMul with no place for an offset"])
def test_factors_only(model: onnx.ModelProto) -> None:
    data = IMAGES if model is PADDED else TOKENS
    graph, found, _ = evened(model, data)
    assert found.report.notes == {"s": "8 channels scaled"}
    assert found.centres == {}
    after, before = run(gs.export_onnx(graph.cleanup()), data), run(model, data)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max() * 8)


REFUSED: dict[str, tuple[str, str, str]] = {
    "residual sum": ("[c] h = Conv(s, w, b) y = Add(s, h)", "s", "an operator without weights reads its codes"),
    "Concat": ("[j] t = Concat<axis=0>(s, s) [c] y = Conv(t, w, b)", "t", "its quantiser moves through Concat j"),
    "MaxPool": (
        "[m] t = MaxPool<kernel_shape=[1,1]>(s) [c] y = Conv(t, w, b)", "t", "its quantiser moves through MaxPool m",
    ),
    "MaxPool, moved": (
        "[m] p = MaxPool<kernel_shape=[1,1]>(s) t = Identity(p) [c] y = Conv(t, w, b)", "t",
        "its quantiser moves through MaxPool m",
    ),
    "attention": (
        "[p] t = MatMul(s, s) [c] y = Conv(t, w, b)", "t",
        "its quantiser is part of the kernel of attention that p is in",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone(name: str) -> None:
    body, tensor, reason = REFUSED[name]
    model = network(f"g = Sigmoid(x) s = Mul(x, g) {body}", "N, 8, 6, 6", **CONV)
    found = evened(model, IMAGES)[1]
    assert reports(found)[tensor] == reason


def test_a_tensor_without_a_range() -> None:
    model, data = NETWORKS["Conv"]
    graph, ranges = import_graph(model), measured(model, data)
    del ranges.tensors["s"]
    bounds = {"s": (0.0, 1.0)}
    found = even_inputs(graph, place(graph, bounds, RTX), ranges, bounds, RTX)
    assert reports(found) == {"s": "its range was not measured by channel"}


def test_channels_on_another_axis() -> None:
    """A convolution and a product read it, whose channels are on different axes of one extent."""
    model = network("g = Sigmoid(x) s = Mul(x, g) [c] h = Conv(s, w, b) [d] k = MatMul(s, v) y = Add(h, k)",
                    "N, 8, 8, 8", "float[N, 8, 8, 8] y", **CONV, v=normal(8, 8))  # fmt: skip
    found = evened(model, np.abs(normal(4, 8, 8, 8)).astype(np.float32))[1]
    assert reports(found)["s"] == "its channels lie on another axis"


def test_a_dead_tensor() -> None:
    model, data = NETWORKS["Conv"]
    found = evened(model, 0 * data)[1]
    assert reports(found) == {"s": "it is always 0"}


def test_a_dead_channel_stays_finite() -> None:
    model, data = NETWORKS["Conv"]
    data = data * (np.arange(8) > 0)[:, None, None].astype(np.float32)
    graph, found, _ = evened(model, data)
    assert found.report.changed == ("s",)
    after, before = run(gs.export_onnx(graph.cleanup()), data), run(model, data)
    np.testing.assert_allclose(after, before, rtol=0, atol=2e-6 * np.abs(before).max() * 8)


def test_a_tiny_channel_of_a_float16_network_stays_finite() -> None:
    """Its factor would be past what float16 holds."""
    text = """<ir_version: 8, opset_import: ["": 17]> g (float16[N, 8, 6, 6] x) => (float16[N, 8, 6, 6] y) {
      g = Sigmoid(x) s = Mul(x, g) [c] y = Conv(s, w) }"""
    model = onnx.parser.parse_model(text)
    weight = np.random.default_rng(0).normal(size=(8, 8, 1, 1)).astype(np.float16)
    weight[:, 3] = 3e4  # small as it is, it counts
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = onnx.shape_inference.infer_shapes(model)
    data = IMAGES.astype(np.float16)
    data[:, 3] *= np.float16(1e-6)
    made, report = quantize(model, measured(model, data), target="tensorrt-rtx")
    assert report.islands is not None
    assert report.islands.changed == ("s",)
    (factors,) = (numpy_helper.to_array(t) for t in made.graph.initializer if t.name == "s/even/constant")
    assert factors.max() == LARGEST_FACTOR
    wanted, got = run(model, data), run(made, data)
    assert np.isfinite(got).all()
    ratio = sqnr_db(float((wanted**2).sum()), float(((wanted - got) ** 2).sum()))
    assert ratio is not None
    assert ratio > 30


def test_shared_weights_are_copied() -> None:
    """Another layer of the same initialiser reads another tensor, and keeps it."""
    model = network("g = Sigmoid(x) s = Mul(x, g) [c] h = Conv(s, w, b) [d] y = Conv(h, w, b)", "N, 8, 6, 6", **CONV)
    graph, found, _ = evened(model, IMAGES)
    assert found.report.changed[0] == "s"
    np.testing.assert_allclose(run(gs.export_onnx(graph.cleanup()), IMAGES), run(model, IMAGES), rtol=1e-4, atol=1e-3)


def quantised(model: onnx.ModelProto, data: np.ndarray, **options: str) -> tuple[float, QuantReport]:
    """SQNR of the Q/DQ network on its own samples."""
    made, report = quantize(model, measured(model, data), target="tensorrt-rtx", **options)  # type: ignore[arg-type]
    wanted, got = run(model, data), run(made, data)
    ratio = sqnr_db(float((wanted**2).sum()), float(((wanted - got) ** 2).sum()))
    assert ratio is not None
    return ratio, report


@pytest.mark.parametrize("name", NETWORKS)
def test_codes_are_finer(name: str) -> None:
    """Half of the codes were empty (6 dB), and the small channels had few of the others."""
    model, data = NETWORKS[name]
    plain, _ = quantised(model, data, channel_fusion="off")
    ratio, report = quantised(model, data)
    assert report.islands is not None
    assert "s" in report.islands.changed
    assert ratio > plain + 3


@pytest.mark.parametrize("name", NETWORKS)
def test_rounded_weights_do_not_see_the_offset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values near 0 with rare peaks: the rounded weights times the offset would be more than the signal is worth."""
    model, data = NETWORKS[name]
    data = np.random.default_rng(1).uniform(size=data.shape).astype(np.float32) ** 20 * 10
    ratio, _ = quantised(model, data)
    monkeypatch.setattr("relu_deploy.int8.run.settle", lambda graph, placement, centres, chosen, number: dict(chosen))
    unsettled, _ = quantised(model, data)
    assert ratio > unsettled + 1


@given(st.integers(0, 2**32 - 1), st.sampled_from(["Conv", "Gemm", "MatMul"]))
def test_a_settled_bias_is_exact(seed: int, op: str) -> None:
    """``Q (x - c) + bias`` is ``Q x + b``, for the bias ``b + W c`` that was settled."""
    rng = np.random.default_rng(seed)
    weight, bias, centre = rng.normal(size=(4, 8)), rng.normal(size=4), rng.normal(size=8)
    attrs = {"transB": 1, "alpha": 0.5} if op == "Gemm" else {}
    stored = {"Conv": weight[:, :, None, None], "Gemm": weight, "MatMul": weight.T}[op]
    alpha = 0.5 if op == "Gemm" else 1.0
    inputs = [gs.Variable("x", np.float32), gs.Constant("w", stored.astype(np.float32))]
    node = gs.Node(op, "c", attrs, inputs, [gs.Variable("y", np.float32)])
    codes = store(node, RTX, 1.0)
    matrix = codes.weight.reshape(4, 8) if op != "MatMul" else codes.weight.T
    x = rng.normal(size=8)
    moved = bias + alpha * weight.astype(np.float32).astype(np.float64) @ centre
    given_ = matrix @ (x - centre) + moved + offset_error(node, codes.weight, centre)
    np.testing.assert_allclose(given_, matrix @ x + bias, rtol=0, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["Conv", "grouped Conv", "Gemm", "MatMul"]))
def test_steady_weights_fit_the_bias_of_the_float_ones(seed: int, op: str) -> None:
    rng = np.random.default_rng(seed)
    shape = {"Conv": (4, 6, 3, 2), "grouped Conv": (4, 3, 3, 2), "Gemm": (4, 6), "MatMul": (6, 4)}[op]
    weight, centre = rng.normal(size=shape).astype(np.float32), rng.normal(size=6) * (rng.random(6) < 0.7)
    attrs = {"Gemm": {"transB": 1, "alpha": 0.5}, "grouped Conv": {"group": 2}}.get(op, {})
    inputs = [gs.Variable("x", np.float32), gs.Constant("w", weight)]
    node = gs.Node(op.removeprefix("grouped "), "c", attrs, inputs, [gs.Variable("y", np.float32)])
    rounded = store(node, RTX, 1.0).weight
    made = steady(node, rounded, centre)
    if not centre.any():
        np.testing.assert_array_equal(made, rounded)
        return
    np.testing.assert_allclose(offset_error(node, made, centre), 0, atol=1e-5)
    # Nothing is moved more than the sum of all errors asks for.
    assert (
        np.abs(made - rounded).max() <= np.abs(offset_error(node, rounded, centre)).max() / np.abs(centre).max() + 1e-6
    )


def test_a_bias_chosen_on_data_is_not_settled_again() -> None:
    model, data = NETWORKS["Conv"]
    graph, found, bounds = evened(model, data)
    placement = place(graph, bounds, RTX)
    node = next(node for node in graph.nodes if node.name == "c")
    chosen = {"c": Stored(np.zeros((8, 8, 1, 1), np.int8), np.ones((), np.float32), None, np.ones(8, np.float32))}
    assert settle(graph, placement, found.centres, chosen, RTX) == chosen
    (settled,) = settle(graph, placement, found.centres, {}, RTX).values()
    assert settled.bias is not None
    off = offset_error(node, settled.weight, found.centres["c"])
    np.testing.assert_array_equal(settled.bias, (store(node, RTX, 1.0).bias + off).astype(np.float32))


@pytest.mark.parametrize("op", ["Conv", "MatMul"])
def test_an_offset_that_cancels_until_the_weights_are_codes(op: str) -> None:
    """Float weights of sum 0 on equal offsets need no bias; their codes do."""
    weight = np.float32([[1, -1 / 3, -1 / 3, -1 / 3]])
    stored = weight[:, :, None, None] if op == "Conv" else weight.T
    inputs = [gs.Variable("x", np.float32, ["N", 4]), gs.Constant("w", stored)]
    node = gs.Node(op, "c", {}, inputs, [gs.Variable("y", np.float32, ["N", 1])])
    graph = gs.Graph([node], inputs=[inputs[0]], outputs=list(node.outputs), opset=17)
    placement = place(graph, {"x": (0.0, 1.0)}, RTX)
    settled = settle(graph, placement, {"c": np.full(4, 10.0)}, {}, RTX)["c"]
    assert settled.bias is not None
    np.testing.assert_allclose(settled.bias, 10 * settled.weight.astype(np.float64).sum(), rtol=1e-6, atol=1e-6)
    assert abs(settled.bias[0]) > 1e-3
    assert node.op == ("Conv" if op == "Conv" else "Gemm")


@pytest.mark.parametrize(("target", "options"), [("tensorrt", {}), ("tensorrt-rtx", {"channel_fusion": "off"})])
def test_only_where_it_was_measured_to_be_free(target: str, options: dict[str, str]) -> None:
    model, data = NETWORKS["Conv"]
    _, report = quantize(model, measured(model, data), target=target, **options)  # type: ignore[arg-type]
    assert report.islands is None
    assert report.rows is None


def test_a_range_chosen_inside_the_extremes_cuts_each_channel() -> None:
    """A percentile spends no codes on what it leaves out."""
    model, data = NETWORKS["Conv"]
    data = data.copy()
    data[0, 7, 0, 0] = 1e3
    ranges = calibrate(model, open_source(data, model_inputs(model)), method="percentile", percentile=99.0)
    _, report = quantize(model, ranges, target="tensorrt-rtx")
    reach = max(report.activations[name].highest for name in report.activations if name.startswith("s/"))
    assert reach < 100


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_measured_on_data_knows_of_the_offset(name: str) -> None:
    """Correcting begins with the network as it is written, not with what unsettled weights would make of it."""
    model, data = NETWORKS[name]
    data = np.random.default_rng(1).uniform(size=(24, *data.shape[1:])).astype(np.float32) ** 20 * 10
    source = open_source(data, model_inputs(model))
    ranges = calibrate(model, source)
    plain, _ = quantize(model, ranges, target="tensorrt-rtx", float_part="fp32")
    corrected, report = quantize(model, ranges, target="tensorrt-rtx", float_part="fp32", evidence=Evidence(source))
    wanted, before, after = run(model, data), run(plain, data), run(corrected, data)
    reached = sqnr_db(float((wanted**2).sum()), float(((wanted - before) ** 2).sum()))
    better = sqnr_db(float((wanted**2).sum()), float(((wanted - after) ** 2).sum()))
    assert report.correction is not None
    assert reached is not None
    assert better is not None
    # Measured on 8 of the 24 samples, which hold a few peaks each.
    assert report.correction.before_db == pytest.approx(reached, abs=4)
    assert better > reached - 0.5
