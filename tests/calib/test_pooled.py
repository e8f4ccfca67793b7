"""Extremes that the runtime takes itself are those of the tensors that it makes."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

import calib.meter
import calib.network
from calib.blocks import BLOCK, in_blocks
from calib.errors import CalibrationError
from calib.inputs import model_inputs
from calib.merge import merge
from calib.options import METHODS
from calib.pooled import Extremes, with_pooling
from calib.run import calibrate
from calib.session import Session, open_session, with_outputs
from calib.shards import Shard
from calib.sources import open_source


def measure(model, data, **options):
    return calibrate(model, open_source(data, model_inputs(model)), **options)


def everything(model, feeds, *, optimise):
    """Every tensor of a model as an output; with optimisations on, put in the order of the file by the runtime."""
    names = [o for node in model.graph.node for o in node.output if o]
    if optimise:  # of what is added, only what settles the layout of sums matters here
        model = with_pooling(model, {names[0]: BLOCK}, {*feeds, *names}).model
    session = open_session(with_outputs(model, names), optimise=optimise)
    return {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


class Builder:
    """A random network of what convolutional networks are made of; (N, 3, 12, 10)."""

    def __init__(self, seed, opset=17):
        self.rng, self.opset, self.room_to_grow = np.random.default_rng(seed), opset, opset > 10
        self.nodes, self.weights, self.channels = [], [], {"x": 3}

    def weight(self, *shape):
        values = self.rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
        self.weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{len(self.weights)}"))
        return self.weights[-1].name

    def node(self, op, inputs, channels, **attributes):
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], **attributes))
        self.channels[name] = channels
        return name

    def conv(self, data, channels, kernel=3, group=1, stride=1):
        inputs = [data, self.weight(channels, self.channels[data] // group, kernel, kernel), self.weight(channels)]
        pads = [kernel // 2] * 4
        return self.node("Conv", inputs, channels, pads=pads, group=group, strides=[stride] * 2)

    def step(self, data):
        kind, count = self.rng.integers(0, 13), self.channels[data]
        wide = int(self.rng.choice([16, 32, 48, 8, 20]))
        if kind == 0:
            return self.conv(data, wide, kernel=int(self.rng.choice([1, 3, 5])))
        if kind == 1:
            return self.conv(data, count, group=count)
        if kind == 2:
            return self.conv(self.conv(data, 64), 64, group=2)
        if kind == 3:
            return self.node("Concat", [data, self.conv(data, wide)], count + wide, axis=1)
        if kind == 4:
            gate = self.node("Sigmoid", [self.conv(self.node("GlobalAveragePool", [data], count), count, 1)], count)
            return self.node("Mul", [data, gate], count)
        if kind == 5:
            return self.node("Add", [data, self.conv(data, count)], count)
        if kind == 6:
            return self.node("Mul", [data, self.node("Sigmoid", [data], count)], count)
        if kind == 7:
            return self.node("MaxPool", [data], count, kernel_shape=[3, 3], pads=[1] * 4)
        if kind == 8:
            return self.node("AveragePool", [data], count, kernel_shape=[2, 2], pads=[0, 0, 1, 1])
        if kind == 9:
            ends = [self.weight(count) for _ in range(4)]
            self.weights[-1].CopyFrom(numpy_helper.from_array(np.full(count, 0.5, np.float32), ends[-1]))
            return self.node("BatchNormalization", [data, *ends], count)
        if kind == 10 and self.room_to_grow:
            self.room_to_grow = False
            return self.resized(data)
        return self.node(str(self.rng.choice(["Relu", "Tanh", "LeakyRelu", "HardSigmoid"])), [data], count)

    def resized(self, data):
        for values in ([], [1, 1, 2, 3]):
            self.weights.append(numpy_helper.from_array(np.float32(values), f"w{len(self.weights)}"))
        how = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
        return self.node("Resize", [data, *(weight.name for weight in self.weights[-2:])], self.channels[data], **how)

    def model(self, batch="N"):
        data = self.conv("x", 16)
        for _ in range(int(self.rng.integers(1, 9))):
            data = self.step(data)
        value = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3, 12, 10])
        graph = helper.make_graph(self.nodes, "g", [value], [onnx.ValueInfoProto(name=data)], self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)


def pictures(count, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 3, 12, 10)).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), opset=st.sampled_from([7, 9, 11, 14, 17, 22]), batch=st.integers(1, 4))
def test_extremes_are_those_of_the_same_kernels_and_near_those_of_the_network_as_it_is_written(seed, opset, batch):
    model, data = Builder(seed, opset).model(), pictures(4, seed)
    found = measure(model, data, batch_size=batch).tensors
    for optimise in (True, False):
        truth = everything(model, {"x": data}, optimise=optimise)
        assert list(found) == list(truth)
        for name, value in truth.items():
            # Sums of up to 1600 products in another order, through up to 20 layers.
            near = 0 if optimise else 1e-4 * np.abs(value).max()
            low, high = value.min(axis=(0, 2, 3)), value.max(axis=(0, 2, 3))
            np.testing.assert_allclose(found[name].channel_min, low, rtol=0, atol=near)
            np.testing.assert_allclose(found[name].channel_max, high, rtol=0, atol=near)
            assert (found[name].axis, found[name].count) == (1, 4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), batch=st.integers(2, 7), random=st.randoms(), threads=st.sampled_from([1, 2]),
    options=st.sampled_from([{}, {"method": "mse"}]), of=st.integers(1, 3),
)  # fmt: skip
def test_neither_batch_size_nor_order_nor_threads_nor_shards_change_a_bit(seed, batch, random, threads, options, of):
    model, data = Builder(seed).model(), pictures(6, seed)
    one = measure(model, data, **options)
    order = random.sample(range(6), 6)
    assert measure(model, data[order], batch_size=batch, threads=threads, **options) == one
    assert measure(Builder(seed).model(batch=4), data, **options).tensors == one.tensors
    shards = [measure(model, data, shard=Shard(i + 1, of), batch_size=batch, **options) for i in range(of)]
    assert merge(*random.sample(shards, of)) == one


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), limit=st.integers(0, 30_000), options=st.sampled_from([{}, {"method": "mse"}]))
def test_where_a_network_is_cut_changes_no_bit(seed, limit, options):
    model, data = Builder(seed).model(), pictures(3, seed)
    whole = measure(model, data, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("calib.stages.STAGE_BYTES", limit)
        assert measure(model, data, batch_size=2, **options) == whole


@pytest.mark.parametrize("method", METHODS[1:])
def test_methods_that_count_have_the_same_extremes_but_for_rounding(residual_model, method):
    data = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    found, most = measure(residual_model(), data, method=method), measure(residual_model(), data)
    assert list(found.tensors) == list(most.tensors)
    for name, measured in found.tensors.items():
        near = 1e-5 * measured.absmax  # sums of up to 288 products in another order, through seven layers
        np.testing.assert_allclose(measured.channel_min, most.tensors[name].channel_min, rtol=0, atol=near)
        np.testing.assert_allclose(measured.channel_max, most.tensors[name].channel_max, rtol=0, atol=near)


def parse(text, opset=17):
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n{text}')


def identity(model, name="w"):
    """Add the weights of a convolution that changes nothing."""
    eye = np.eye(BLOCK, dtype=np.float32).reshape(BLOCK, BLOCK, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(eye, name))
    return model


FAULTY = """g (float[N, 16, H, W] x) => (float[N, 16, H, W] y)
{ c = Conv(x, w) [root] r = Sqrt(c) [next] d = Conv(r, w) n = Neg(d) [last] y = Conv(n, w) }"""


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_nan_names_first_tensor_node_and_sample(method, batch_size):
    data = np.ones((16, 16, 5, 3), np.float32)
    data[11, 7, 4, 2] = -1
    with pytest.raises(CalibrationError) as caught:
        measure(identity(parse(FAULTY)), data, batch_size=batch_size, method=method)
    assert "NaN in tensor 'r' (made by Sqrt node 'root') at sample 11 (" in str(caught.value)


@given(
    place=st.tuples(st.integers(0, 15), st.integers(0, 6), st.integers(0, 4)),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
)
@settings(max_examples=40, deadline=None)
def test_what_is_not_finite_is_found_wherever_it_lies(place, value):
    """Pooling for the largest value passes NaN over."""
    model = identity(parse("g (float[N, 16, 7, 5] x) => (float[N, 16, 7, 5] y) { c = Conv(x, w) y = Relu(c) }"))
    pooling = with_pooling(model, {"c": BLOCK}, {"x", "c", "y"})
    data = np.zeros((2, 16, 7, 5), np.float32)
    data[(1, *place)] = value
    output = pooling.made[-1]
    session = Session(with_outputs(pooling.model, [output]), optimise=True)
    (pooled,) = session.run([output], {"x": data}, "test")
    assert not np.isfinite(pooled[1]).all()
    assert np.isfinite(pooled[0]).all()


@given(st.integers(-44, 37), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_negation_changes_no_bit(exponent, seed):
    model = identity(parse("g (float[N, 16, 7, 5] x) => (float[N, 16, 7, 5] y) { y = Conv(x, w) }"))
    data = np.zeros((1, 16, 7, 5), np.float32)
    data[0, 3] = np.random.default_rng(seed).standard_normal((7, 5)) * 10.0**exponent
    found = measure(model, data).tensors["y"]
    assert found.channel_min[3] == data[0, 3].min()
    assert found.channel_max[3] == data[0, 3].max()
    assert not np.signbit([found.channel_min[0], found.channel_max[0]]).any()


def test_large_finite_values_are_no_false_alarm():
    """Their means are infinite, or NaN where the sums of both signs meet."""
    model = identity(parse("g (float[N, 16, H, W] x) => (float[N, 16, H, W] y) { y = Conv(x, w) }"))
    big = np.float32(3e38)
    data = np.zeros((2, 16, 4, 8), np.float32)
    data[0, 2], data[1, 2, :2], data[1, 2, 2:] = big, -big, big
    for batch_size in (1, 2):
        found = measure(model, data, batch_size=batch_size).tensors["y"]
        assert (found.channel_min[2], found.channel_max[2], found.count) == (-big, big, 2)


def test_infinity_that_only_the_quick_kernels_make_is_not_kept_quiet(monkeypatch):
    model = identity(parse("g (float[N, 16, H, W] x) => (float[N, 16, H, W] y) { a = Conv(x, w) y = Conv(a, w) }"))
    real = calib.network.Network.run

    def run(self, feeds, what):
        for name, value in real(self, feeds, what):
            if name == self.extremes:
                value[0, 2 * BLOCK - 1] = np.inf
            yield name, value

    monkeypatch.setattr(calib.network.Network, "run", run)
    with pytest.raises(CalibrationError, match=r"NaN or Inf in tensor 'y' .* for the samples 0 to 0 together"):
        measure(model, np.ones((1, 16, 2, 2), np.float32))


def test_a_failure_names_its_node_though_the_runtime_has_another():
    model = identity(
        parse("""g (float[N, 16, H, W] x) => (float[N, 16, H, W] y) <int64[1] seven = {7}>
    { a = Conv(x, w) [shape] b = Reshape(a, seven) [after] y = Relu(b) }""")
    )
    with pytest.raises(CalibrationError, match=r"fails on the data, at Reshape node 'shape': "):
        measure(model, np.ones((1, 16, 2, 2), np.float32))
    two = identity(
        parse("""g (float[N, 16, H, W] x, float[N, 16, K, L] z) => (float[N, 16, P, Q] y)
    { a = Conv(x, w) b = Conv(z, w) [sum] y = Add(a, b) }""")
    )
    data = {"x": np.ones((1, 16, 2, 2), np.float32), "z": np.ones((1, 16, 3, 3), np.float32)}
    with pytest.raises(CalibrationError, match=r"fails on the data, at Add node 'sum': "):
        measure(two, data)


def looked_at(model, data, monkeypatch, **options):
    """Names of tensors that are handed out, and of those that are pooled."""
    found = []
    real = calib.meter.Network

    def network(*args, **kwargs):
        found.append(real(*args, **kwargs))
        return found[-1]

    with monkeypatch.context() as patch:
        patch.setattr(calib.meter, "Network", network)
        measure(model, data, **options)
    names = [name for name, _ in found[0].run({"x": data}, "test") if name != found[0].extremes]
    return names, list(found[0].pooled)


def test_what_lies_in_blocks_is_pooled_and_the_rest_handed_out(monkeypatch):
    model = parse("""g (float[N, 3, 8, 8] x) => (float[N, 16, 8, 8] y)
    { a = Conv(x, w3) b = Sigmoid(a) c = Mul(a, b) r = Relu(c) d = LeakyRelu(c)
      g = GlobalAveragePool(c) y = Mul(c, g) }""")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 3, 1, 1), np.float32), "w3"))
    data = np.ones((2, 3, 8, 8), np.float32)
    assert looked_at(model, data, monkeypatch) == (["d", "y"], ["a", "b", "c", "g"])
    assert looked_at(model, data, monkeypatch, method="mse") == (["a", "b", "c", "d", "g", "y"], [])


def test_weights_may_be_constants_of_nodes(monkeypatch):
    model = identity(parse("g (float[N, 16, 2, 2] x) => (float[N, 16, 2, 2] y) { y = Conv(x, w) }"))
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    data = np.random.default_rng(0).standard_normal((2, 16, 2, 2)).astype(np.float32)
    assert looked_at(model, data, monkeypatch) == ([], ["y"])


def test_networks_without_blocks_run_as_they_are_written(monkeypatch):
    opened = []
    real = calib.session.open_session
    monkeypatch.setattr(
        calib.session, "open_session", lambda *a, **k: opened.append(k.get("optimise", False)) or real(*a, **k)
    )
    measure(parse("g (float[N, 4] x) => (float[N, 4] y) { y = Sigmoid(x) }"), np.ones((1, 4), np.float32))
    assert not any(opened)
    old = identity(parse("g (float[N, 16, 2, 2] x) => (float[N, 16, 2, 2] y) { y = Conv(x, w) }", opset=6))
    measure(old, np.ones((1, 16, 2, 2), np.float32))
    assert not any(opened)


def test_where_the_runtime_cannot_optimise_the_network_runs_as_it_is_written(residual_model, monkeypatch):
    data = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    with monkeypatch.context() as patch:
        patch.setattr("calib.discover.in_blocks", lambda *_: [])
        plain = measure(residual_model(), data)
    real = calib.session.open_session

    def failing(*args, optimise=False, **options):
        if optimise:
            raise ort.capi.onnxruntime_pybind11_state.Fail("no such layout")
        return real(*args, **options)

    monkeypatch.setattr(calib.session, "open_session", failing)
    assert measure(residual_model(), data) == plain


FOLDED = """g (float[N, 3, 4, 4] x) => (float[M, 16, 2, 4] y)
{ a = Conv(x, w3) f = Reshape(a, fold) y = Conv(f, w) }"""


def test_only_tensors_with_the_batch_of_the_inputs_are_pooled(monkeypatch):
    """Extremes are side by side, a row for each sample: what folds samples into another axis has other rows."""
    model = identity(parse(FOLDED))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((16, 3, 1, 1), np.float32), "w3"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 16, 2, 4]), "fold"))
    data = np.random.default_rng(0).standard_normal((4, 3, 4, 4)).astype(np.float32)
    found = measure(model, data, batch_size=2)
    monkeypatch.setattr("calib.discover.in_blocks", lambda *_: [])
    plain = measure(model, data, batch_size=2)
    assert list(found.tensors) == list(plain.tensors)
    for name, measured in plain.tensors.items():
        np.testing.assert_allclose(found.tensors[name].channel_max, measured.channel_max, rtol=1e-5, atol=1e-6)
        assert found.tensors[name].count == measured.count


def test_a_wrong_guess_at_the_layout_changes_nothing(residual_model, monkeypatch):
    """What is pooled need not lie in blocks: then the runtime puts it there, or pools it where it is."""
    data = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    found = measure(residual_model(activation="Silu"), data)
    monkeypatch.setattr("calib.discover.in_blocks", lambda _, channels, __: list(channels))
    guessed = measure(residual_model(activation="Silu"), data)
    assert list(guessed.tensors) == list(found.tensors)
    for name, measured in guessed.tensors.items():
        assert np.array_equal(measured.channel_min, found.tensors[name].channel_min)
        assert np.array_equal(measured.channel_max, found.tensors[name].channel_max)


def test_in_blocks_names_what_the_runtime_converts(tmp_path):
    """Against the network that the runtime makes of one whose tensors are all outputs."""
    named_convolutions = 0
    for seed in range(12):
        builder = Builder(seed)
        model = builder.model()
        channels = {name: count for name, count in builder.channels.items() if name != "x"}
        shapes = {name: value.shape for name, value in everything(model, {"x": pictures(1)}, optimise=False).items()}
        named = set(in_blocks(model, channels, shapes))
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / f"{seed}.onnx")
        ort.InferenceSession(with_outputs(model, channels).SerializeToString(), options)
        nodes = onnx.load(tmp_path / f"{seed}.onnx").graph.node
        converted = {node.name.removesuffix("_nchwc") for node in nodes if node.domain == "com.microsoft.nchwc"}
        if not converted:
            pytest.skip("this processor has no kernels in blocks")
        convolutions = {node.output[0] for node in model.graph.node if node.op_type == "Conv"} & named
        assert convolutions <= converted
        named_convolutions += len(convolutions)
    assert named_convolutions > 20


def test_extremes_are_empty_until_something_is_taken_in():
    extremes = Extremes({"a": 2})
    assert extremes.taken() == (0, {})
    extremes.update(np.float32([[1, 2, 3, 4, 0, 0], [5, 0, 0, 7, 0, 0]]).reshape(2, 6, 1, 1), 2)
    samples, found = extremes.taken()
    assert samples == 2
    assert [ends.tolist() for ends in found["a"]] == [[-3, -7], [5, 2]]
    assert extremes.taken() == (0, {})


def test_names_that_the_network_has_are_not_used_again():
    model = identity(parse("g (float[N, 16, 2, 2] calib) => (float[N, 16, 2, 2] y) { y = Conv(calib, w) }"))
    model.graph.node[0].output[0] = model.graph.output[0].name = "calib_/0/high"
    found = measure(model, np.full((1, 16, 2, 2), 3, np.float32))
    assert {name: measured.max for name, measured in found.tensors.items()} == {"calib": 3, "calib_/0/high": 3}
