from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from calib import ranges as ranges_file
from calib.choose import chosen_bounds
from calib.errors import CalibrationError, DataError
from calib.histogram import CHANNEL_BITS, histogram_of
from calib.inputs import model_inputs
from calib.merge import merge, shared_samples
from calib.meter import MASK
from calib.options import METHODS
from calib.ranges import EMPTY
from calib.run import calibrate
from calib.session import Session, with_outputs
from calib.shards import Shard
from calib.sources import open_source


def parse(text, opset=17):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')


def measure(model, data, **options):
    return calibrate(model, open_source(data, model_inputs(model)), **options)


def everything(model, feeds):
    """Every tensor of a model, by ONNX Runtime as it comes."""
    names = [o for node in model.graph.node for o in node.output if o]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(with_outputs(model, names).SerializeToString(), options)
    return {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


def random_cnn(seed, opset, dtype=TensorProto.FLOAT):
    """A random chain of convolutions with a residual sum, a pool and a Gemm; (N, 3, 8, 8)."""
    rng = np.random.default_rng(seed)
    np_type = helper.tensor_dtype_to_np_dtype(dtype)
    weights, nodes, data, channels = [], [], "x", 3

    def weight(*shape):
        weights.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np_type), f"w{len(weights)}"))
        return weights[-1].name

    for i in range(int(rng.integers(1, 4))):
        out = int(rng.integers(1, 7))
        nodes.append(
            helper.make_node("Conv", [data, weight(out, channels, 3, 3), weight(out)], [f"c{i}"], pads=[1] * 4)
        )
        nodes.append(helper.make_node(str(rng.choice(["Relu", "Sigmoid", "LeakyRelu", "Tanh"])), [f"c{i}"], [f"a{i}"]))
        nodes.append(helper.make_node("Add", [f"c{i}", f"a{i}"], [f"s{i}"]))
        data, channels = f"s{i}", out
    nodes.append(helper.make_node("MaxPool", [data], ["p"], kernel_shape=[8, 8]))
    nodes.append(helper.make_node("Flatten", ["p"], ["f"]))
    nodes.append(helper.make_node("Gemm", ["f", weight(channels, 5), weight(5)], ["y"]))
    ends = (
        [helper.make_tensor_value_info("x", dtype, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", dtype, ["N", 5])],
    )
    graph = helper.make_graph(nodes, "g", *ends, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), opset=st.sampled_from([7, 11, 13, 17, 18, 22]), count=st.integers(1, 9))
def test_extremes_are_those_of_numpy(seed, opset, count):
    model = random_cnn(seed, opset)
    data = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float32)
    found = measure(model, data)
    truth = everything(model, {"x": data})
    assert list(found.tensors) == list(truth)
    for name, value in truth.items():
        measured, rest = found.tensors[name], tuple(i for i in range(value.ndim) if i != 1)
        assert (measured.min, measured.max) == (value.min(), value.max())
        assert (measured.axis, measured.count, measured.dtype) == (1, count, "float32")
        assert np.array_equal(measured.channel_min, value.min(axis=rest))
        assert np.array_equal(measured.channel_max, value.max(axis=rest))
        assert measured.histogram is measured.channel_histograms is None


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 5), batch=st.integers(1, 3), half=st.booleans())
def test_counts_are_those_of_all_values(seed, count, batch, half):
    model = random_cnn(seed, 17, TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    data = np.random.default_rng(seed).standard_normal((count, 3, 8, 8)).astype(np.float16 if half else np.float32)
    found = measure(model, data, method="entropy", channels=True, batch_size=batch)
    assert (found.method, found.channels, found.percentile) == ("entropy", True, None)
    for name, value in everything(model, {"x": data}).items():
        assert found.tensors[name].histogram == histogram_of(value)
        counts = tuple(histogram_of(part, bits=CHANNEL_BITS) for part in np.moveaxis(value, 1, 0))
        assert found.tensors[name].channel_histograms == counts


OPTIONS = st.sampled_from(
    [{}, {"method": "mse"}, {"method": "entropy", "channels": True}, {"method": "percentile", "percentile": 99.0}]
)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(2, 11), random=st.randoms(), threads=st.sampled_from([1, 2]),
    options=OPTIONS, of=st.integers(1, 4),
)  # fmt: skip
def test_neither_batch_size_nor_order_nor_threads_nor_shards_change_a_bit(seed, batch, random, threads, options, of):
    model = random_cnn(seed, 17)
    data = np.random.default_rng(seed).standard_normal((10, 3, 8, 8)).astype(np.float32)
    one = measure(model, data, **options)
    order = random.sample(range(10), 10)
    assert measure(model, data[order], batch_size=batch, threads=threads, **options) == one
    shards = [measure(model, data, shard=Shard(i + 1, of), batch_size=batch, **options) for i in range(of)]
    assert merge(*random.sample(shards, of)) == one
    assert shared_samples(*shards) == 0


@pytest.mark.parametrize("options", [{}, {"method": "mse", "channels": True}])
def test_a_fixed_batch_gives_what_a_dynamic_one_gives(residual_model, options):
    data = np.random.default_rng(0).standard_normal((7, 3, 16, 16)).astype(np.float32)
    found = [measure(residual_model(batch=batch), data, batch_size=3, **options) for batch in (1, 4, "N")]
    assert found[0].tensors == found[1].tensors == found[2].tensors
    assert found[0].data == found[1].data == found[2].data
    assert {r.count for f in found for r in f.tensors.values()} == {7}


def test_float16_is_exact():
    model = random_cnn(3, 17, TensorProto.FLOAT16)
    data = np.random.default_rng(3).standard_normal((4, 3, 8, 8)).astype(np.float16)
    found, truth = measure(model, data), everything(model, {"x": data})
    for name, value in truth.items():
        assert (found.tensors[name].min, found.tensors[name].max) == (value.min(), value.max())
        assert found.tensors[name].dtype == "float16"


def test_tokens_have_channels_last_and_lengths_may_vary():
    model = parse("""g (float[N, T, 4] x) => (float[N, T, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { t = Transpose<perm = [0, 2, 1]>(x) s = MatMul(x, t) p = Softmax(s) y = MatMul(x, w) }""")
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((1, length, 4)).astype(np.float32) for length in (5, 5, 3, 7)]
    found = measure(model, lambda: data, batch_size=8)
    assert (found.tensors["y"].axis, len(found.tensors["y"].channel_max)) == (2, 2)
    assert np.array_equal(found.tensors["x"].channel_max, np.max([d[0].max(0) for d in data], axis=0))
    assert found.tensors["s"].axis is None  # its last axis is as long as the sample
    assert found.tensors["s"].max == max(float((d[0] @ d[0].T).max()) for d in data)
    assert merge(*(measure(model, [d]) for d in data)).tensors["s"] == found.tensors["s"]


def test_constants_are_not_measured_and_scalars_and_vectors_are():
    model = parse("""g (float[2, 3] x) => (float[2, 3] y) <float k = {2.0}>
    { c = Constant<value = float {3.0}>() kk = Mul(k, c) m = ReduceMax<keepdims = 0>(x)
      first = Constant<value_ints = [0]>() v = ReduceSum<keepdims = 0>(x, first)
      z = Add(m, kk) i = Cast<to = 7>(x) y = Mul(x, z) }""")
    found = measure(model, np.array([[[1, -2, 3], [4, 5, -6]]], np.float32))
    assert set(found.tensors) == {"x", "m", "v", "z", "y"}
    assert (found.tensors["m"].max, found.tensors["m"].axis) == (5, None)
    assert (found.tensors["v"].min, found.tensors["v"].max, found.tensors["v"].axis) == (-3, 5, None)


def test_ranks_that_no_inference_knows_are_seen_by_running():
    model = parse("""g (float[N, 2, 6] x, int64[R] shape) => (float y)
    { r = Reshape(x, shape) e = Relu(r) y = ReduceMax<keepdims = 0>(e) }""")
    data = {"x": np.arange(12, dtype=np.float32).reshape(1, 2, 6), "shape": np.array([[1, 3, 2, 2]])}
    found = measure(model, data).tensors["e"]
    assert found.axis == 1
    assert found.channel_max.tolist() == [3, 7, 11]


def test_the_shape_that_a_file_claims_of_an_output_is_not_believed():
    """torch wrote ``(1, width)`` for an output of three axes; the runtime only warns, so it was measured wrongly."""
    model = parse("g (float[1, 4, 6] x) => (float[1, 6] y) <int64[3] s = {-1, 1, 6}> { y = Reshape(x, s) }")
    ranges = measure(model, np.arange(48, dtype=np.float32).reshape(2, 4, 6))
    y = ranges.tensors["y"]
    assert (y.min, y.max, y.axis) == (0.0, 47.0, 2)
    assert np.array_equal(y.channel_max, np.arange(42.0, 48.0))


def test_tensors_without_elements():
    model = parse("""g (float[N, 3] x) => (float[M, 3] z, float[N, 3] y)
    { nine = Constant<value_float = 9.0>() y = Relu(x) c = ReduceMax<axes = [1], keepdims = 0>(x)
      k = Greater(c, nine) z = Compress<axis = 0>(x, k) }""")
    data = np.array([[1, 2, 3], [4, 5, 60], [7, 8, 9]], np.float32)
    found = measure(model, data)
    assert found.tensors["z"].count == 1
    assert found.tensors["z"].channel_max.tolist() == [4, 5, 60]
    nothing = measure(model, data[:1])
    assert nothing.skipped == {"z": EMPTY}
    assert merge(nothing, measure(model, data[1:])) == found


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_shapes_that_depend_on_values_are_run_one_by_one(batch_size):
    model = parse("""g (float[N, 3] x) => (float[M, 3] z, float[N, 3] y)
    { nine = Constant<value_float = 9.0>() y = Relu(x) c = ReduceMax<axes = [1], keepdims = 0>(x)
      k = Greater(c, nine) z = Compress<axis = 0>(x, k) }""")
    data = np.array([[1, 2, 3], [4, 5, 60], [7, 8, 9]], np.float32)
    found = measure(model, data, batch_size=batch_size, method="mse")
    assert found.tensors["z"].count == 1
    assert found == measure(model, data[::-1], batch_size=1, method="mse")


@pytest.mark.parametrize("batch", ["N", 2, 3])
def test_what_depends_on_shapes_alone_counts_once_a_sample(batch):
    model = parse(f"""g (float[{batch}, 4] x) => (float[{batch}, 4] y) <int64 one = {{1}}, int64 zero = {{0}}>
    {{ s = Shape<start = 1>(x) e = Squeeze(s) p = Range(zero, e, one) f = Cast<to = 1>(p) y = Add(x, f) }}""")
    data = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    found = measure(model, data, batch_size=4, method="mse")
    assert found.tensors["f"].histogram == histogram_of(np.repeat(np.arange(4, dtype=np.float32), 6))
    assert found.tensors["y"].histogram.total == 24


def test_variable_shapes_are_counted():
    """Calibrators that keep arrays of all batches side by side fail where shapes differ."""
    model = parse("g (float[N, C, H, W] x) => (float[N, C, H, W] y) { y = Relu(x) }")
    rng = np.random.default_rng(0)
    data = [rng.standard_normal((1, 3, height, 5)).astype(np.float32) for height in (2, 9, 4, 4)]
    every = np.concatenate([array.reshape(3, -1) for array in data], 1)
    for method in METHODS:
        found = measure(model, lambda: data, method=method, batch_size=8)
        assert (found.tensors["x"].min, found.tensors["x"].max) == (every.min(), every.max())
        assert np.array_equal(found.tensors["x"].channel_max, every.max(1))
        assert method == "max" or found.tensors["y"].histogram == histogram_of(np.maximum(every, 0))


def test_channels_that_vary_in_number_have_no_histograms():
    model = parse("g (float[N, C, H] x) => (float[N, C, H] y) { y = Relu(x) }")
    data = [np.ones((1, 2, n), np.float32) for n in (3, 4)]
    found = measure(model, lambda: data, method="mse", channels=True).tensors["x"]
    assert (found.axis, found.channel_histograms, found.histogram.total) == (None, None, 14)


def test_the_sign_of_zero_does_not_depend_on_order():
    model = parse("g (float[N, 1] x) => (float[N, 1] y) { y = Identity(x) }")
    data = np.array([[0.0], [-0.0]], np.float32)
    for rows in (data, data[::-1]):
        found = measure(model, rows).tensors["x"]
        assert not np.signbit([found.min, found.max, *found.channel_min, *found.channel_max]).any()


@pytest.mark.parametrize("method", METHODS)
def test_ranges_at_the_ends_of_floats(method):
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Identity(x) }")
    data = np.array([[1e30, 1e-3, -1e-3, 0], [3e38, -3e38, 1e-45, -1e-45]], np.float32)
    for rows in (data, data[:1], data[1:], np.zeros_like(data), np.full_like(data, 2.5), data[1:, [2, 2, 3, 3]]):
        found = measure(model, rows, method=method)
        assert (found.tensors["y"].min, found.tensors["y"].max) == (rows.min(), rows.max())
        for unsigned in (True, False):
            low, high = chosen_bounds(found, unsigned=unsigned)["y"]
            assert rows.min() <= low <= high <= rows.max()


def test_subgraphs_are_run_and_their_results_measured():
    model = parse("""g (float[N, 2] x) => (float[N, 2] y)
    { m = ReduceMax<keepdims = 0>(x) zero = Constant<value_float = 0.0>() c = Greater(m, zero)
      y = If<then_branch = t () => (float[N, 2] a) { a = Relu(x) },
             else_branch = e () => (float[N, 2] b) { b = Neg(x) }>(c) }""")
    found = measure(model, np.array([[-3, -2], [-1, 5]], np.float32))
    assert set(found.tensors) == {"x", "m", "y"}
    assert (found.tensors["y"].min, found.tensors["y"].max) == (0, 5)


NAN = """g (float[N, 2] x) => (float[N, 2] y)
{ h = Mul(x, x) [root] r = Sqrt(x) q = Identity(r) z = Relu(q) y = Add(z, h) }"""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_nan_names_first_tensor_node_and_sample(batch_size, method):
    data = np.ones((50, 2), np.float32)
    data[37, 1] = -1
    for shard in (None, Shard(2, 4)):  # samples are counted in the whole of the data
        with pytest.raises(CalibrationError) as caught:
            measure(parse(NAN), data, batch_size=batch_size, method=method, shard=shard)
        assert "NaN in tensor 'r' (made by Sqrt node 'root') at sample 37 (" in str(caught.value)
    assert measure(parse(NAN), data, batch_size=batch_size, method=method, shard=Shard(1, 4)).samples == 13


@pytest.mark.parametrize("method", ["max", "mse"])
def test_nan_in_a_fixed_batch_names_the_sample(method):
    model = parse(NAN.replace("N", "4").replace("Na4", "NaN"))
    data = np.ones((10, 2), np.float32)
    for bad in (0, 3, 6, 8, 9):
        data[:] = 1
        data[bad, 1] = -1
        with pytest.raises(CalibrationError, match=f"at sample {bad} "):
            measure(model, data, method=method)


def test_nan_that_samples_make_together_is_no_secret():
    model = parse("g (float[N, 1] x) => (float[N, 1] y) { a = CumSum(x, k) y = Reciprocal(a) }")
    model.graph.initializer.append(numpy_helper.from_array(np.array(0), "k"))
    with pytest.raises(CalibrationError, match=r"'y' .* for the samples 0 to 1 together, and for none of them alone"):
        measure(model, np.array([[3], [-3]], np.float32), batch_size=2)


def test_nan_hidden_among_many_values_is_found():
    # ReduceMin and ReduceMax pass it over; where it lies in the tensor must not matter.
    model = parse("g (float[N, 5, 40] x) => (float[N, 5, 40] y) { r = Sqrt(x) y = Relu(r) }")
    for position in (0, 1, 7, 100, 198, 199):
        data = np.ones((2, 200), np.float32)
        data[1, position] = -1
        with pytest.raises(CalibrationError, match=r"NaN in tensor 'r' .* at sample 1 "):
            measure(model, data.reshape(2, 5, 40), batch_size=2)


@pytest.mark.parametrize("value", [0.0, -0.0])
def test_infinity_is_named(value):
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { i = Reciprocal(x) y = Sigmoid(i) }")
    with pytest.raises(CalibrationError, match=r"Inf in tensor 'i' .* at sample 1 "):
        measure(model, np.array([[1, 2], [1, value]], np.float32))


def test_large_finite_values_are_no_false_alarm():
    model = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Neg(x) }")
    big = np.float32(3e38)
    data = np.array([[big, big, big, 0], [big, big, -big, -big], [-big, -big, -big, 1]], np.float32)
    for batch_size in (1, 3):
        found = measure(model, data, batch_size=batch_size)
        assert (found.tensors["x"].min, found.tensors["x"].max) == (-big, big)


def test_a_nan_in_the_data_is_the_datas_fault():
    data = np.ones((3, 2), np.float32)
    data[2, 0] = np.nan
    with pytest.raises(DataError, match="sample 2: input 'x' contains NaN"):
        measure(parse(NAN), data)


def masked(more=""):
    model = parse(f"""g (float[N, 3] x, float low) => (float[N, 3] y) <float zero = {{0.0}}>
    {{ c = Less(x, zero) m = Where(c, low, zero) a = Add(x, m) {more} y = Softmax(a) }}""")
    model.graph.input.pop()
    model.graph.initializer.append(numpy_helper.from_array(np.array(-np.inf, np.float32), "low"))  # has no text form
    return model


def test_attention_masks_are_skipped_and_said_so():
    data = np.array([[1, 2, 3], [-1, 2, 3]], np.float32)
    found = measure(masked(), data)
    assert found.skipped == {"a": MASK, "m": MASK}
    assert found.tensors["y"].min == 0
    with pytest.raises(CalibrationError, match="Inf in tensor 'm'"):
        measure(masked("b = Relu(a)"), data)


@pytest.mark.parametrize("op", ["QuantizeLinear", "QLinearConv", "DynamicQuantizeLinear", "ConvInteger"])
def test_a_quantised_model_is_refused(op):
    model = parse("g (float[N] x) => (float[N] y) { [q] y = Relu(x) }")
    model.graph.node[0].op_type = op
    with pytest.raises(CalibrationError, match=f"quantised already: node 'q' is a {op}"):
        measure(model, np.ones((1,), np.float32))


def test_networks_that_cannot_be_run_name_the_node():
    broken = parse("g (float[N, 2] x) => (float[N, M] y) <int64[1] s = {7}> { [shape] y = Reshape(x, s) }")
    with pytest.raises(CalibrationError, match=r"fails on the data, at Reshape node 'shape': "):
        measure(broken, np.ones((1, 2), np.float32))
    unknown = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    unknown.graph.node[0].op_type = "NoSuchOp"
    with pytest.raises(CalibrationError, match=r"onnxruntime cannot load the model: .*NoSuchOp"):
        measure(unknown, np.ones((1, 2), np.float32))


def test_nothing_to_measure_and_bad_options():
    with pytest.raises(CalibrationError, match="nothing to measure"):
        measure(parse("g (int64[N] x) => (int64[N] y) { y = Abs(x) }"), np.ones(2, np.int64))
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    with pytest.raises(CalibrationError, match="no calibration method 'magic'"):
        measure(model, np.ones((1, 2), np.float32), method="magic")
    with pytest.raises(CalibrationError, match="a percentile of 0"):
        measure(model, np.ones((1, 2), np.float32), method="percentile", percentile=0)
    with pytest.raises(CalibrationError, match="no use to the method max"):
        measure(model, np.ones((1, 2), np.float32), channels=True)
    with pytest.raises(DataError, match="at least 1"):
        measure(model, np.ones((1, 2), np.float32), batch_size=0)
    with pytest.raises(DataError, match="is empty"):
        measure(model, list)


def test_a_batch_axis_of_minus_one_is_dynamic():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    assert model_inputs(model)[0].shape == (None, 2)
    assert measure(model, np.ones((3, 2), np.float32), batch_size=2).samples == 3


def test_max_samples_and_progress():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { y = Relu(x) }")
    data = np.arange(20, dtype=np.float32).reshape(10, 2)
    seen = []
    found = measure(model, data, max_samples=7, batch_size=3, progress=lambda *args: seen.append(args))
    assert seen == [("calibrate", 3, 7), ("calibrate", 6, 7), ("calibrate", 7, 7)]
    assert (found.samples, found.tensors["y"].max) == (7, 13)
    assert found == measure(model, data[:7])
    assert measure(model, data, max_samples=99).samples == 10


def test_the_model_is_not_changed(residual_model):
    model = residual_model()
    before = model.SerializeToString(deterministic=True)
    measure(model, np.zeros((1, 3, 16, 16), np.float32))
    assert model.SerializeToString(deterministic=True) == before


def test_a_double_activation_is_reported():
    model = parse("g (float[N, 2] x) => (float[N, 2] y) { d = Cast<to = 11>(x) e = Exp(d) y = Cast<to = 1>(e) }")
    assert measure(model, np.ones((1, 2), np.float32)).skipped == {
        "d": "its type is float64",
        "e": "its type is float64",
    }


def test_what_is_too_large_for_a_message_goes_through_files(residual_model, monkeypatch):
    model = with_outputs(residual_model(), ["stem.out"])
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)}
    direct = Session(model).run(["stem.out", "y"], feeds, "test")
    written, save = [], onnx.save_model

    def saving(stored: onnx.ModelProto, path: Path, **options: object) -> None:
        save(stored, path, **options)
        written.extend(sorted(file.name for file in path.parent.iterdir()))

    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", 10)
    monkeypatch.setattr(onnx, "save_model", saving)
    filed = Session(model).run(["stem.out", "y"], feeds, "test")
    assert written == ["model.onnx", "weights"]
    assert all(np.array_equal(a, b) for a, b in zip(direct, filed, strict=True))


@pytest.mark.models
def test_a_real_detector_on_photos(common_det, photos, tmp_path):
    model = onnx.load(common_det)
    found = calibrate(model, open_source(photos[:3], model_inputs(model)))
    floats = {o for node in model.graph.node for o in node.output}
    assert len(found.tensors) > 0.9 * len(floats)
    assert found.skipped == {}
    assert (found.tensors["images"].min, found.tensors["images"].max) == (photos[:3].min(), photos[:3].max())
    name = next(node.output[0] for node in model.graph.node if node.op_type == "Conv")
    runner = Session(with_outputs(model, [name]), optimise=True)
    truth = np.concatenate([runner.run([name], {"images": photo[None]}, "photo")[0] for photo in photos[:3]])
    assert np.array_equal(found.tensors[name].channel_max, truth.max(axis=(0, 2, 3)))
    ranges_file.save(found, tmp_path / "r.json")
    again = ranges_file.load(tmp_path / "r.json")
    assert again == found
    ranges_file.check_fresh(again, model)
