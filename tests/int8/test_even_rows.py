"""Rows of convolution weights evened out and undone behind: the same function, and one scale fits all channels."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from calib.inputs import model_inputs
from calib.ranges import Ranges
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.graph import import_graph
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.even_rows import even_rows, row_factors
from relu_deploy.int8.formats import NumberFormat, number_format
from relu_deploy.int8.granularity import MOST_NOISE, shared_noise, shares_scale
from relu_deploy.int8.half import LARGEST
from relu_deploy.int8.place import place
from relu_deploy.int8.run import quantize
from relu_deploy.report import PassReport

RTX = number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp16")
RANDOM = np.random.default_rng(0)
DATA = RANDOM.normal(size=(16, 8, 6, 6)).astype(np.float32)
# Output channels whose weights differ by a factor of 100.
UNEVEN = (RANDOM.normal(size=(8, 8, 1, 1)) * np.logspace(-1, 1, 8)[:, None, None, None]).astype(np.float32)
BIAS = RANDOM.normal(size=8).astype(np.float32)
# The same by a factor of 8: one scale is good enough, and not as good as it can be.
ROUGH = (RANDOM.normal(size=(8, 8, 1, 1)) * np.logspace(-0.9, 0, 8)[:, None, None, None]).astype(np.float32)
EVEN = RANDOM.choice([-1.0, 1.0], size=(8, 8, 1, 1)).astype(np.float32)


def network(body: str, outputs: str = "float[N, 8, 6, 6] y", **weights: np.ndarray) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[N, 8, 6, 6] x) => ({outputs}) {{ {body} }}'
    )
    stored = {"w": UNEVEN, "b": BIAS, "v": EVEN, **weights}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in stored.items())
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


def measured(model: onnx.ModelProto) -> Ranges:
    return calibrate(model, open_source(DATA, model_inputs(model)))


def evened(
    model: onnx.ModelProto, number: NumberFormat = RTX
) -> tuple[gs.Graph, PassReport, dict[str, tuple[float, float]]]:
    graph, ranges = import_graph(model), measured(model)
    bounds = {name: (each.min, each.max) for name, each in ranges.tensors.items()}
    return graph, even_rows(graph, place(graph, bounds, number), ranges, bounds, number), bounds


def run(model: onnx.ModelProto) -> np.ndarray:
    return np.asarray(open_session(model).run(None, {"x": DATA})[0], dtype=np.float64)


# What reads the convolution, and after which node the factors are taken back.
BODIES = {
    "Relu": ("[c] t = Conv(x, w, b) [a] r = Relu(t) [d] y = Conv(r, v)", "a"),
    "HardSwish": ("[c] t = Conv(x, w, b) [a] r = HardSwish(t) [d] y = Conv(r, v)", "c"),
    "SiLU": ("[c] t = Conv(x, w, b) g = Sigmoid(t) r = Mul(t, g) [d] y = Conv(r, v)", "c"),
    "none": ("[c] t = Conv(x, w, b) [d] y = Conv(t, v)", "c"),
    "without bias": ("[c] t = Conv(x, w) [a] r = Relu(t) [d] y = Conv(r, v)", "a"),
    "residual sum": ("[c] t = Conv(x, w, b) [a] s = Add(t, x) [d] y = Conv(s, v)", "c"),
    "ReLU in a residual sum": ("[c] t = Conv(x, w, b) [a] r = Relu(t) s = Add(r, x) [d] y = Conv(s, v)", "a"),
    "MaxPool": ("[c] t = Conv(x, w, b) [a] r = Relu(t) m = MaxPool<kernel_shape=[1,1]>(r) [d] y = Conv(m, v)", "a"),
    "Concat": ("[c] t = Conv(x, w, b) [a] r = Relu(t) j = Concat<axis=0>(r, x) [d] y = Conv(j, v)", "a"),
}


@pytest.mark.parametrize("name", BODIES)
def test_the_function_stays_and_the_rows_are_even(name: str) -> None:
    body, last = BODIES[name]
    model = network(body)
    graph, report, bounds = evened(model)
    assert report.changed == ("c",)
    assert report.notes == {"c": "7 of 8 channels scaled"}
    nodes = {node.name: node for node in graph.nodes}
    assert not shares_scale(import_graph(model).nodes[0], RTX)
    assert shares_scale(nodes["c"], RTX)
    assert [reader.op for reader in nodes[last].outputs[0].outputs] == ["Mul"]
    before, after = run(model), run(gs.export_onnx(graph.cleanup()))
    # The factors are no powers of two: each costs a rounding of float32.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-6 * np.abs(before).max() * 8)
    inner = nodes[last].outputs[0]
    largest = np.abs(open_session(_watched(graph, inner.name)).run([inner.name], {"x": DATA})[0]).max()
    assert largest == pytest.approx(max(map(abs, bounds[inner.name])), rel=1e-4)


def _watched(graph: gs.Graph, name: str) -> onnx.ModelProto:
    model = gs.export_onnx(graph)
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model


@pytest.mark.parametrize("name", BODIES)
def test_again_nothing_changes(name: str) -> None:
    graph, _, _ = evened(network(BODIES[name][0]))
    _, report, _ = evened(onnx.shape_inference.infer_shapes(gs.export_onnx(graph.cleanup())))
    assert report.changed == ()


REFUSED = {
    "an output": ("[c] y = Conv(x, w, b)", "it is an output of the network: a multiplication there is a kernel"),
    "an output as well": (
        "[c] t = Conv(x, w, b) z = HardSwish(t) [d] y = Conv(z, v)",
        "it is an output of the network: a multiplication there is a kernel",
    ),
    "a float layer": (
        "[c] t = Conv(x, w, b) r = Relu(t) [up] y = ConvTranspose(r, v)", "ConvTranspose up reads it in float",
    ),
    "a Transpose": (
        "[c] t = Conv(x, w, b) r = Relu(t) [m] z = Transpose<perm=[0,1,3,2]>(r) [d] y = Conv(z, v)",
        "Transpose m moves its values",
    ),
    "a layer and a Concat": (
        "[c] t = Conv(x, w, b) r = Relu(t) [d] h = Conv(r, v) j = Concat<axis=0>(r, h) [e] y = Conv(j, v)",
        "a layer and a Concat read it, as one tensor of codes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_left_alone(name: str) -> None:
    body, reason = REFUSED[name]
    extra = ", float[N, 8, 6, 6] t" if name == "an output as well" else ""
    model = network(body, f"float[N, 8, A, B] y{extra}", w=ROUGH)
    assert MOST_NOISE / 10 < shared_noise(ROUGH, 127) < MOST_NOISE
    _, report, _ = evened(model)
    assert {skip.name: skip.reason for skip in report.skipped} == {"c": reason}
    assert report.changed == ()


@pytest.mark.parametrize("name", [name for name in REFUSED if "output" not in name])
def test_where_one_scale_is_too_coarse_nothing_is_left_alone(name: str) -> None:
    """With a scale for each channel the compiler adds the bias in a kernel of its own, which may multiply as well."""
    _, report, _ = evened(network(REFUSED[name][0], "float[N, 8, A, B] y"))
    assert report.changed[0] == "c"


@pytest.mark.parametrize(
    "number",
    [
        number_format("tensorrt-rtx", weight_granularity="channel", float_part="fp16"),
        number_format("tensorrt-rtx", weight_granularity="auto", float_part="fp32"),
        number_format("tensorrt", weight_granularity="auto", float_part="fp16"),
    ],
    ids=["a scale for each channel", "a float32 network", "another compiler"],
)
def test_nothing_is_done_for(number: NumberFormat) -> None:
    assert evened(network(BODIES["Relu"][0]), number)[1] == PassReport("even_rows")


def test_even_rows_stay() -> None:
    _, report, _ = evened(network(BODIES["Relu"][0], w=EVEN))
    assert report == PassReport("even_rows")


def test_grouped_convolutions_keep_a_scale_for_each_channel() -> None:
    _, report, _ = evened(network("[c] t = Conv<group=4>(x, w, b) r = Relu(t) [d] y = Conv(r, v)", w=UNEVEN[:, :2]))
    assert report == PassReport("even_rows")


def test_shared_weights_are_copied() -> None:
    model = network("[c] t = Conv(x, w, b) r = Relu(t) [d] y = Conv(r, w, b)")
    graph, report, _ = evened(model)
    assert report.changed == ("c",)
    nodes = {node.name: node for node in graph.nodes}
    np.testing.assert_array_equal(nodes["d"].inputs[1].values, UNEVEN)
    np.testing.assert_array_equal(nodes["d"].inputs[2].values, BIAS)


def test_one_scale_is_as_fine_as_one_for_each_channel() -> None:
    """Of the weights only: what is read is the same in all three."""
    model = network(BODIES["HardSwish"][0])
    wanted, ranges = run(model), measured(model)

    def ratio(**options: str) -> float:
        made, _ = quantize(model, ranges, target="tensorrt-rtx", **options)  # type: ignore[arg-type]
        found = sqnr_db(float((wanted**2).sum()), float(((wanted - run(made)) ** 2).sum()))
        assert found is not None
        return found

    plain = ratio(weight_granularity="tensor", channel_fusion="off")
    assert ratio(weight_granularity="tensor") > plain + 6
    assert ratio(weight_granularity="tensor") > ratio(weight_granularity="channel") - 1


@example(np.float32([[1.0], [0.0], [1e-30]]), np.array([1.0, 0.0, 1e9]))
@given(
    hnp.arrays(np.float32, (3, 1), elements=st.floats(-1e3, 1e3, width=32)),
    hnp.arrays(np.float64, 3, elements=st.floats(0, 1e6)),
)
def test_factors_leave_room_in_float16(weight: np.ndarray, extent: np.ndarray) -> None:
    factors = row_factors(weight, extent)
    rows = np.abs(weight.astype(np.float64)).max(axis=1)
    assert (factors >= 1).all()
    assert np.isfinite(factors).all()
    assert (factors * rows <= max(rows.max(), 1e-38) * (1 + 1e-12)).all()
    grown = factors > 1
    assert (factors * extent <= np.minimum(64 * extent.max(), LARGEST) * (1 + 1e-12))[grown].all()
    assert (factors[rows == 0] == 1).all()


def test_factors_make_rows_as_even_as_they_can_be() -> None:
    factors = row_factors(UNEVEN, np.ones(8))
    assert shared_noise(UNEVEN * factors[:, None, None, None], 127) <= MOST_NOISE / 10
    assert shared_noise(UNEVEN, 127) > MOST_NOISE
