"""Factors on the shores of float islands: the same function, finer codes, and nothing where nothing is gained."""

import hypothesis.extra.numpy as hnp
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from calib.inputs import model_inputs
from calib.ranges import TensorRange
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from relu_deploy.graph import count_ops, import_graph
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.formats import number_format
from relu_deploy.int8.islands import channels_of, even_factors, even_islands
from relu_deploy.int8.islands_spell import shorten_islands
from relu_deploy.int8.islands_tails import live_range
from relu_deploy.int8.place import place
from relu_deploy.int8.run import quantize
from relu_deploy.passes.region import find_regions

ORT = number_format("ort")
CHANNELS = 8


def network(body: str, *, rank: int = 4, output: str = "float[N, 8, 6, 6] y", **weights: np.ndarray) -> onnx.ModelProto:
    """Text of nodes over ``x`` to a model with these weights."""
    shape = ", ".join(("N", "8", "6", "6")[:rank]) if rank == 4 else "N, 5, 8"
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[{shape}] x) => ({output}) {{ {body} }}'
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return onnx.shape_inference.infer_shapes(model)


def uneven_convs() -> dict[str, np.ndarray]:
    """Two convolutions; the channels between them differ by a factor of 1,000."""
    rng = np.random.default_rng(0)
    sizes = np.logspace(-1.5, 1.5, CHANNELS)
    first = rng.normal(size=(CHANNELS, CHANNELS, 1, 1)) * sizes[:, None, None, None]
    second = rng.normal(size=(CHANNELS, CHANNELS, 1, 1)) / sizes[None, :, None, None]
    return {"w": first, "b": rng.normal(size=CHANNELS) * sizes, "v": second}


HARDSWISH = "c = Conv(x, w, b) a = HardSwish(c) y = Conv(a, v)"
PLAIN = network(HARDSWISH, **uneven_convs())
DATA = np.random.default_rng(1).normal(size=(16, CHANNELS, 6, 6)).astype(np.float32)


def measured(model: onnx.ModelProto, data: np.ndarray = DATA):
    return calibrate(model, open_source(data, model_inputs(model)))


def evened(model: onnx.ModelProto, data: np.ndarray = DATA):
    """The graph with its islands evened out, the report, and the bounds."""
    ranges = measured(model, data)
    graph = import_graph(model)
    bounds = {name: (r.min, r.max) for name, r in ranges.tensors.items()}
    channels = {name: channels_of(r, ranges.samples) for name, r in ranges.tensors.items()}
    channels = {name: seen for name, seen in channels.items() if seen is not None}
    result = even_islands(graph, place(graph, bounds, ORT), channels, bounds, ORT)
    return graph, result.report, bounds


def outputs(model: onnx.ModelProto, data: np.ndarray, *, optimise: bool = False) -> np.ndarray:
    (name,) = (spec.name for spec in model_inputs(model))
    return open_session(model, optimise=optimise, threads=1).run(None, {name: data})[0]


def db(reference: np.ndarray, found: np.ndarray) -> float:
    noise = float(np.sum((reference.astype(np.float64) - found) ** 2))
    return sqnr_db(float(np.sum(reference.astype(np.float64) ** 2)), noise) or np.inf


def test_both_shores_are_scaled_and_the_function_stays():
    graph, report, bounds = evened(PLAIN)
    assert report.changed == ("c", "a")
    after = gs.export_onnx(graph.cleanup())
    assert [node.op_type for node in after.graph.node] == ["Conv", "Mul", "HardSwish", "Mul", "Conv"]
    reference, found = outputs(PLAIN, DATA), outputs(after, DATA)
    np.testing.assert_allclose(found, reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())  # float32 sums
    assert "c" not in bounds, "only a float of it is left"
    assert {"c/even", "a/even"} <= set(bounds)


def test_the_pass_is_idempotent():
    graph, _, _ = evened(PLAIN)
    model = gs.export_onnx(graph.cleanup())
    again, report, _ = evened(onnx.shape_inference.infer_shapes(model))
    weights = {t.name: t.values for t in again.tensors().values() if isinstance(t, gs.Constant)}
    assert all(np.isfinite(values).all() for values in weights.values())
    # What is even stays even: a second run finds factors of little more than 1.
    assert sum(node.op == "Mul" for node in again.nodes) <= 4
    for name in report.changed:
        assert "even" in name or name in ("c", "a")


def test_uneven_channels_keep_their_precision_in_int8():
    ranges = measured(PLAIN)
    fresh = np.random.default_rng(2).normal(size=DATA.shape).astype(np.float32)
    reference = outputs(PLAIN, fresh)
    found = {}
    for fusion in ("off", "pow2"):
        quantized, report = quantize(PLAIN, ranges, target="ort", weight_bits=8, channel_fusion=fusion)
        # Without VNNI integer kernels saturate on 8-bit weights; what Q/DQ say is what is looked at here.
        found[fusion] = db(reference, outputs(quantized, fresh))
        assert report.int8_layers == 2
    assert found["pow2"] > found["off"] + 10, found


@pytest.mark.parametrize("dead", [0.0, 1e-45, 6.9e-39, 1.3e-38, 1e-30, 1e-15])
@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_channels_that_pruning_took_out_do_not_drag_the_others_down(dead, target):
    """What is left of such a channel is no number that a factor could bring up to the size of the others."""
    weights = uneven_convs()
    for name, channels in (("w", 2), ("b", 2), ("w", 5), ("b", 5)):
        weights[name][channels] = dead * np.sign(weights[name][channels])
    model = network(HARDSWISH, **weights)
    quantized, _ = quantize(model, measured(model), target=target, float_part="fp32", weight_bits=8)
    for tensor in quantized.graph.initializer:
        assert np.isfinite(onnx.numpy_helper.to_array(tensor)).all(), tensor.name
    found = outputs(quantized, DATA)
    assert np.isfinite(found).all()
    assert db(outputs(model, DATA), found) > 30


@pytest.mark.parametrize("axes", ["1, T, 8", "N, 5, 8", "N, T, 8"])
def test_products_over_more_axes_get_factors_too_whatever_is_known_of_them(axes):
    """Where all axes but one are known such a product becomes a Gemm between Reshapes."""
    rng = np.random.default_rng(7)
    sizes = np.logspace(-1.5, 1.5, CHANNELS)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 20]> g (float[{axes}] x) => (float[{axes}] y) '
        "{ p = MatMul(x, w) h = Add(p, b) a = Gelu(h) q = MatMul(a, v) y = Add(q, b) }"
    )
    weights = {
        "w": rng.normal(size=(8, 8)) * sizes,
        "v": rng.normal(size=(8, 8)) / sizes[:, None],
        "b": np.full(8, 0.1),
    }
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in weights.items())
    for index, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{index}"
    model = onnx.shape_inference.infer_shapes(model)
    data = rng.normal(size=(16, 5, 8)).astype(np.float32)
    samples = [data[at : at + 1] for at in range(16)]
    ranges = calibrate(model, open_source(samples, model_inputs(model)))
    found = {}
    for fusion in ("off", "pow2"):
        quantized, report = quantize(model, ranges, target="ort", weight_bits=8, channel_fusion=fusion)
        pairs = [(outputs(model, sample), outputs(quantized, sample)) for sample in samples]
        found[fusion] = db(*(np.concatenate(part) for part in zip(*pairs, strict=True)))
    assert len(report.islands.changed) == 1
    assert found["pow2"] > found["off"] + 6


def test_even_channels_are_left_alone_by_the_inlet():
    rng = np.random.default_rng(3)
    even = network(HARDSWISH, w=np.eye(8)[:, :, None, None], b=np.zeros(8), v=rng.choice([-1, 1], (8, 8, 1, 1)))
    graph, _, _ = evened(even, rng.uniform(-3, 3, (64, 8, 6, 6)).astype(np.float32))
    factors = [node.inputs[1].values for node in graph.nodes if node.op == "Mul" and node.name.startswith("a/")]
    assert all(np.ptp(np.log2(each)) < 1 for each in factors)


def test_factors_go_into_the_arithmetic_that_an_island_ends_with():
    scaled = "c = Conv(x, w, b) h = HardSwish(c) m = Mul(h, k) a = Add(m, o) y = Conv(a, v)"
    model = network(scaled, **uneven_convs(), k=np.asarray(0.7), o=np.asarray(0.1))
    graph, report, _ = evened(model)
    assert "a" in report.changed
    after = gs.export_onnx(graph.cleanup())
    assert count_ops(after)["Mul"] == 2, "that in front of the island, and its own"
    reference = outputs(model, DATA)
    np.testing.assert_allclose(outputs(after, DATA), reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())


def test_a_layer_norm_takes_the_factors_where_only_layers_read_it():
    rng = np.random.default_rng(4)
    gamma = np.logspace(-1.5, 1.5, 8)
    parts = {"g": gamma, "o": rng.normal(size=8), "w": rng.normal(size=(8, 8)) / gamma[:, None]}
    body = "n = LayerNormalization<axis = -1>(x, g, o) y = MatMul(n, w)"
    model = network(body, rank=3, output="float[N, 5, 8] y", **parts)
    data = rng.normal(size=(8, 5, 8)).astype(np.float32)
    graph, report, _ = evened(model, data)
    assert report.changed == ("n",)
    after = gs.export_onnx(graph.cleanup())
    assert [node.op_type for node in after.graph.node] == ["LayerNormalization", "MatMul"]
    np.testing.assert_allclose(outputs(after, data), outputs(model, data), rtol=1e-4, atol=1e-4)

    shared = network(f"{body} z = Relu(n)", rank=3, output="float[N, 5, 8] y, float[N, 5, 8] z", **parts)
    graph, _, _ = evened(shared, data)
    assert sorted(node.op for node in graph.nodes) == ["LayerNormalization", "MatMul", "Mul", "Relu"]


@pytest.mark.parametrize(
    ("body", "output", "tensor", "reason"),
    [
        ("c = Conv(x, w, b) a = HardSwish(c) y = Add(c, a)", "float[N, 8, 6, 6] y, float[N, 8, 6, 6] c", "c",
         "output of the network"),
        ("c = Conv(x, w, b) s = Sigmoid(c) a = Mul(c, s) y = Conv(a, v)", "float[N, 8, 6, 6] y", "c",
         "not only a float island"),
        ("a = HardSwish(x) p = MaxPool<kernel_shape = [1, 1]>(a) y = Conv(p, w, b)", "float[N, 8, 6, 6] y", "a",
         "without weights"),
    ],
)  # fmt: skip
def test_what_is_left_alone_says_why(body, output, tensor, reason):
    parts = {
        name: values
        for name, values in uneven_convs().items()
        if name in body.replace(",", " ").replace(")", " ").split()
    }
    _, report, _ = evened(network(body, output=output, **parts))
    assert reason in next(skip.reason for skip in report.skipped if skip.name == tensor)


def test_tensors_without_channels_are_left_alone():
    ranges = measured(PLAIN)
    graph = import_graph(PLAIN)
    bounds = {name: (r.min, r.max) for name, r in ranges.tensors.items()}
    report = even_islands(graph, place(graph, bounds, ORT), {}, bounds, ORT).report
    assert not report.changed
    assert {skip.reason for skip in report.skipped if skip.name in "ca"} == {"its range was not measured by channel"}


@example(np.array([0.0]), 5e-324, 0)
@example(np.array([0.0, 1.0]), 5e-324, 0)
@given(
    hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(0, 1e4)),
    st.floats(0, 1e4),
    st.integers(0, 2**31),
)
def test_even_factors_never_make_a_channel_leave_the_codes(high, depth, seed):
    low = -np.random.default_rng(seed).uniform(0, depth, high.size)
    factors = even_factors(low, high)
    assert (factors > 0).all()
    assert np.isfinite(factors).all()
    bottom, top = (low * factors).min(), (high * factors).max()
    plain = (high.max() - low.min()) / 255
    if top - bottom > 1e-30:  # what is smaller has no scale in float32 anyway
        step = (top - bottom) / 255 / factors
        alive = (low < 0) | (high > 0)
        # A zero point is a whole code: half a step at each end.
        assert (step[alive] <= plain * (1 + 2 / 255) * 256).all()
        together, alone = np.log(step[alive]).mean(), np.log(plain)
        assert together <= alone + 2 / 255 + 1e-9


def test_even_factors_of_dead_channels_are_one():
    assert even_factors(np.zeros(3), np.zeros(3)).tolist() == [1, 1, 1]
    assert even_factors(np.array([-1.0, 0.0]), np.array([1.0, 0.0]))[1] == 1


@pytest.mark.parametrize(
    ("activation", "low", "high"),
    [("HardSwish(c)", -3, 20), ("HardSigmoid<alpha = 0.16666667, beta = 0.5>(c)", -3, 3), ("Relu(c)", 0, 20)],
)
def test_codes_are_not_spent_where_a_function_is_flat(activation, low, high):
    graph = import_graph(network(f"c = Conv(x, w, b) y = {activation}", **{k: uneven_convs()[k] for k in "wb"}))
    wide = np.full(8, 20.0)
    found = live_range(find_regions(graph), graph.tensors()["c"], -wide, wide)
    # One of 2,049 points across [-20, 20].
    np.testing.assert_allclose(found[0], low, atol=0.1)
    np.testing.assert_allclose(found[1], high, atol=0.1)
    inside = live_range(find_regions(graph), graph.tensors()["c"], np.full(8, -1.0), np.full(8, 1.0))
    np.testing.assert_allclose(inside[1], 1.0, atol=0.01)


def test_a_channel_that_lies_in_the_flat_part_keeps_a_range():
    graph = import_graph(network("c = Conv(x, w, b) y = HardSwish(c)", **{k: uneven_convs()[k] for k in "wb"}))
    low, high = np.full(8, -9.0), np.array([-5.0, *[9.0] * 7])
    first, last = live_range(find_regions(graph), graph.tensors()["c"], low, high)
    assert (first <= last).all()
    assert first[0] <= -2.9


def test_what_reads_more_than_one_tensor_is_no_function():
    text = "c = Conv(x, w, b) y = Mul(c, x)"
    graph = import_graph(network(text, **{k: uneven_convs()[k] for k in "wb"}))
    wide = np.full(8, 20.0)
    found = live_range(find_regions(graph), graph.tensors()["c"], -wide, wide)
    np.testing.assert_array_equal(found, [-wide, wide])


def test_a_spelled_out_hardswish_becomes_two_operators():
    spelled = "s = Add(c, k3) d = Add(s, k3) e = Clip(d, zero, k6) m = Mul(s, e) a = Div(m, k6)"
    text = f"c = Conv(x, w, b) {spelled} y = Conv(a, v)"
    model = network(text, **uneven_convs(), k3=np.asarray(3.0), zero=np.asarray(0.0), k6=np.asarray(6.0))
    graph = import_graph(model)
    shorten_islands(graph)
    after = gs.export_onnx(graph)
    assert [node.op_type for node in after.graph.node] == ["Conv", "HardSigmoid", "Mul", "Conv"]
    reference = outputs(model, DATA)
    np.testing.assert_allclose(outputs(after, DATA), reference, rtol=1e-4, atol=1e-4 * np.abs(reference).max())
    shorten_islands(graph)
    assert len(graph.nodes) == 4, "idempotent"


def test_a_silu_in_integers_spends_no_codes_on_its_tail():
    model = network("c = Conv(x, w, b) s = Sigmoid(c) a = Mul(c, s) y = Conv(a, v)", **uneven_convs())
    ranges = measured(model)
    _, report = quantize(model, ranges, target="ort", weight_bits=8)
    grid, silu = report.activations["c"], lambda x: x / (1 + np.exp(-x))
    assert ranges.tensors["c"].min < grid.lowest - 5, "the convolution reaches much further down"
    step = report.activations["a"].scale
    assert abs(silu(grid.lowest)) < step / 2
    assert grid.highest == pytest.approx(ranges.tensors["c"].max, rel=0.02)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_channels_get_room_that_falls_with_the_samples_seen(few, more):
    few, more = sorted((few, more))
    low, high = np.array([-1, 0, -4], np.float32), np.array([2, 0.5, 30], np.float32)
    range_ = TensorRange(-4, 30, "float32", more, axis=1, channel_min=low, channel_max=high)
    wide, near = (channels_of(range_, samples) for samples in (few, more))
    for wider, closer, seen in ((-wide.low, -near.low, -low), (wide.high, near.high, high)):
        assert (wider >= closer).all()
        assert (closer >= seen).all(), "never less than what was measured"
        assert (wider <= 3 * seen + 1e-6).all(), "and no room without end for few samples"
    assert near.low.min() == -4, "nor past the tensor's own range"
    assert near.high.max() == 30


def test_room_pays_with_few_samples_and_costs_with_many():
    """Against ranges as they were seen, on other samples of the same kind: what decided how much room there is."""
    rng = np.random.default_rng(3)
    values = rng.exponential(size=(4096, 64)) * np.logspace(-1, 1, 64)

    def noise(samples: int, start: int, room: float) -> float:
        seen = values[start : start + samples].max(axis=0) * room
        others = np.delete(values, slice(start, start + samples), axis=0)
        grid = np.clip(np.rint(others / seen * 255), 0, 255) / 255 * seen
        return float((((others - grid) / others.std(axis=0)) ** 2).mean())

    def room(samples: int) -> float:
        seen = np.ones(1, np.float32)
        range_ = TensorRange(0, 100, "float32", samples, axis=1, channel_min=0 * seen, channel_max=seen)
        return float(channels_of(range_, samples).high[0])

    few, many = ([noise(n, 500 * at, room(n)) / noise(n, 500 * at, 1.0) for at in range(4)] for n in (4, 400))
    assert max(few) < 0.5
    assert max(many) < 1.1
