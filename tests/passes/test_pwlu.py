"""Learned activations: gathered from spellings, folded to what is cheapest, spelled for a target."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import ops
from relu_deploy.graph import check_model, count_ops, export_graph, import_graph
from relu_deploy.int8.run import quantize
from relu_deploy.passes.affine import fold_affine
from relu_deploy.passes.pwlu import Bound, fold_pwlu, largest_error, polylines
from relu_deploy.passes.pwlu_spell import spell_pwlu
from relu_deploy.passes.recognise import recognise_pwlu
from relu_deploy.passes.run import rewrite, spell
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.survey import survey

NAMES = ("left", "right", "values", "slope_left", "slope_right")


def unit(channels, intervals=16, seed=0):
    """A function whose parameters float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    left, right = -2 + draw(channels) / 4, 2 + draw(channels) / 4
    return ops.PwluFunction(left, right, draw(channels, intervals + 1), draw(channels), draw(channels))


def like_relu(channels, *, values=0.0, left=0.0, right=1.0, intervals=16):
    """ReLU with something added to its parameters."""
    points = np.tile(np.linspace(-2, 2, intervals + 1), (channels, 1))
    ones = np.ones(channels)
    return ops.PwluFunction(-2 * ones, 2 * ones, np.maximum(points, 0) + values, left * ones, right * ones)


def network(text, shape, out, weights, opset=18, kind="float"):
    """A network in ONNX's own text, between the tensors x and y."""
    head = f'<ir_version: 9, opset_import: ["": {opset}, "relu_deploy": 1]>'
    model = onnx.parser.parse_model(f"{head} g ({kind}[{shape}] x) => ({kind}[{out}] y) {{ {text} }}")
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(values, np.float32), name) for name, values in weights.items()
    )
    ops.define_operators(model, opset)
    return model


def alone(function, shape="N, 6, H, W", axis=1, **options):
    parameters = {name: getattr(function, name) for name in NAMES}
    text = f"y = relu_deploy.PWLU <channel_axis: int = {axis}> (x, {', '.join(NAMES)})"
    return network(text, shape, shape, parameters, **options)


def behind_conv(function, tail="y = Identity(a)", out="N, 6, 8, 8", **weights):
    rng = np.random.default_rng(1)
    own = {"w": rng.normal(size=(6, 3, 1, 1)), "b": rng.normal(size=6), **weights}
    own |= {name: getattr(function, name) for name in NAMES}
    text = f"c = Conv(x, w, b) a = relu_deploy.PWLU <channel_axis: int = 1> (c, {', '.join(NAMES)}) {tail}"
    return network(text, "N, 3, 8, 8", out, own)


def applied(model, *passes):
    """The model after some passes, and their reports."""
    graph = import_graph(model)
    annotate(graph, model)
    reports = []
    for function in passes:
        reports.append(function(graph))
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
    result = export_graph(graph, model)
    check_model(result, "the result")
    return result, reports


def run(model, x):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


def sample(*shape, seed=2, scale=3.0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


# ----------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize("intervals", [2, 16])
def test_a_unit_that_never_trained_is_relu(intervals):
    model = alone(like_relu(6, intervals=intervals))
    result, (report,) = applied(model, fold_pwlu)
    assert count_ops(result) == {"Relu": 1}
    assert not result.functions
    assert report.notes[report.changed[0]] == "ReLU, within 0 everywhere"
    x = sample(2, 6, 5, 5)
    np.testing.assert_array_equal(run(result, x), np.maximum(x, 0))


@pytest.mark.parametrize(
    ("change", "bound", "folds"),
    [
        ({"values": 0.01}, Bound(0.02, -2, 2), True),
        ({"values": 0.01}, Bound(0.009, -2, 2), False),
        ({"values": 0.01}, None, False),
        # Its slope goes wrong only beyond the boundary: inside the calibrated range it is ReLU, everywhere it is not.
        ({"left": 0.5}, Bound(0.001, -2, 2), True),
        ({"left": 0.5}, Bound(0.001), False),
        ({"right": 1.1}, Bound(0.001, -2, 2.5), False),
        ({"right": 1.1}, Bound(0.06, -2, 2.5), True),
    ],
)
def test_relu_within_a_bound_on_a_domain(change, bound, folds):
    model = alone(like_relu(6, **change))
    graph = import_graph(model)
    report = fold_pwlu(graph, {} if bound is None else {"y": bound}, two_pieces=False)
    assert bool(report.changed) == folds
    assert bool(report.skipped) != folds
    if folds:
        x = np.linspace(bound.low, bound.high, 1001)
        function = like_relu(6, **change)
        error = np.abs(function(np.repeat(x[:, None], 6, 1)) - np.maximum(x, 0)[:, None]).max()
        stated = float(report.notes[report.changed[0]].split("within ")[1].split()[0])
        assert error <= stated * 1.001, "the note gives the largest error"


def test_one_channel_that_is_not_relu_keeps_all():
    values = np.zeros((6, 17))
    values[3, 9] = 0.01
    report = fold_pwlu(import_graph(alone(like_relu(6, values=values))))
    assert not report.changed
    assert "6 channels and 18 pieces" in report.skipped[0].reason


def two_pieces(scale=1.0):
    """``b PRelu_s(x - t) + c`` with all four different in each channel, as a PWLU of 4 intervals."""
    rng = np.random.default_rng(5)
    shift, slope, offset = rng.normal(size=6), rng.normal(size=6), rng.normal(size=6)
    steep = scale * (0.5 + rng.random(6))
    left, right = shift - 2, shift + 2
    values = np.stack([np.where(d < 0, slope * d, steep * d) + offset for d in (-2, -1, 0, 1, 2)], 1)
    return ops.PwluFunction(left, right, values, slope, steep)


def test_two_pieces_become_a_prelu_and_its_neighbours_take_scale_and_shift():
    function = two_pieces()
    model = behind_conv(function, "y = Conv(a, v, d)", out="N, 4, 8, 8", v=np.ones((4, 6, 1, 1)), d=np.zeros(4))
    result, reports = applied(model, fold_pwlu, fold_affine, fold_affine)
    assert count_ops(result)["PRelu"] == 1
    assert "PWLU" not in count_ops(result)
    assert count_ops(result).get("Mul", 0) == 0
    assert reports[0].notes[reports[0].changed[0]].startswith("PReLU with scale and shift in its neighbours")
    x = sample(2, 3, 8, 8)
    before, after = run(model, x), run(result, x)
    # Folded weights are rounded once: a few roundings of float32, relative to the largest output.
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("function", "tail", "reason"),
    [
        (two_pieces(scale=-1.0), "y = Identity(a)", "a right one does not rise"),
        (two_pieces(), "s = Add(c, a) y = Identity(s)", "no layer before it takes the scale and shift"),
    ],
)
def test_two_pieces_that_stay(function, tail, reason):
    report = fold_pwlu(import_graph(behind_conv(function, tail)))
    assert not report.changed
    assert reason in report.skipped[0].reason


def test_two_pieces_without_a_layer_before_them_stay():
    report = fold_pwlu(import_graph(alone(two_pieces())))
    assert "no layer before it" in report.skipped[0].reason


def test_parameters_that_are_computed_are_refused_with_the_reason():
    graph = import_graph(alone(unit(6)))
    graph.nodes[0].inputs[1] = gs.Variable("computed", np.float32)
    for report in (fold_pwlu(graph), spell_pwlu(graph, "ort")):
        assert "is computed at run time" in report.skipped[0].reason


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 999), st.floats(0, 0.5), st.floats(-6, 0), st.floats(0.1, 6))
def test_the_largest_error_is_never_below_what_a_search_finds(seed, eps, low, high):
    first, second = polylines(unit(1, 5, seed))[0], polylines(unit(1, 3, seed + 1))[0]
    x = np.linspace(low, high, 3001)
    assert np.abs(first(x) - second(x)).max() <= largest_error(first, second, low, high) + 1e-9


# ---------------------------------------------------------------------------------------------------------- spelling

LAYOUTS = {
    "N, 6, H, W": (1, (2, 6, 5, 4)),
    "N, T, 6": (-1, (2, 5, 6)),
    "N, 6": (1, (7, 6)),
    "N, 4, 6, W": (2, (2, 4, 6, 3)),
    "6, N": (0, (6, 9)),
    "N, 6, D, H, W": (1, (2, 6, 2, 3, 4)),
}


@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
@pytest.mark.parametrize("channels", [6, 1])
@pytest.mark.parametrize("shape", LAYOUTS)
def test_spelled_out_is_the_same_function(shape, channels, target):
    axis, sizes = LAYOUTS[shape]
    function = unit(channels)
    model = alone(function, shape, axis)
    result, (report,) = applied(model, lambda graph: spell_pwlu(graph, target))
    assert report.changed
    assert not result.functions
    assert {node.domain for node in result.graph.node} == {""}
    x = sample(*sizes)
    x.flat[:3] = np.nan, 1e30, -1e30
    got, want = run(result, x), function(x, axis)
    assert np.array_equal(np.isnan(got), np.isnan(want))
    # Seventeen hinges are seventeen roundings of sums that are as large as the largest term.
    scale = np.nanmax(np.abs(function(sample(*sizes), axis)))
    inner = np.abs(x) < 1e4
    np.testing.assert_allclose(got[inner], want[inner], rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(got[~inner], want[~inner], rtol=1e-4)
    assert not applied(result, lambda graph: spell_pwlu(graph, target))[1][0].changed


@pytest.mark.parametrize("kind", ["float16", "double"])
@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_other_floats(kind, target):
    dtype = {"float16": np.float16, "double": np.float64}[kind]
    function = unit(6)
    result, _ = applied(alone(function, kind=kind), lambda graph: spell_pwlu(graph, target))
    x = sample(2, 6, 3, 3).astype(dtype)
    got = run(result, x)
    assert got.dtype == dtype
    # The parameters are float32; the sums are computed in float32 and rounded once to float16.
    np.testing.assert_allclose(got, function(x), rtol=2e-3 if dtype is np.float16 else 1e-5, atol=1e-4)


def test_fewer_hinges_within_a_bound():
    function = like_relu(6, values=np.random.default_rng(1).uniform(-0.01, 0.01, (6, 17)))
    _, (exact,) = applied(alone(function), lambda graph: spell_pwlu(graph, "tensorrt-rtx"))
    result, (rough,) = applied(
        alone(function), lambda graph: spell_pwlu(graph, "tensorrt-rtx", {"y": Bound(0.02, -3, 3)})
    )
    assert exact.notes[exact.changed[0]].startswith("17 hinges")
    assert rough.notes[rough.changed[0]].startswith("1 hinges")
    x = np.clip(sample(2, 6, 9, 9), -3, 3)
    assert np.abs(run(result, x) - function(x)).max() <= 0.02 + 1e-6


def test_rank_unknown():
    model = alone(unit(6))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")
    report = spell_pwlu(import_graph(model), "ort")
    assert "the rank of its input is not known" in report.skipped[0].reason


# -------------------------------------------------------------------------------------------------------- recognising


def hinge_sum(function):
    """As a stranger's exporter writes it: slope and hinges, one after another."""
    slopes, offsets = function.tables()
    columns = {f"b{i}": function.points[:, i].reshape(6, 1, 1) for i in range(function.intervals + 1)}
    columns |= {f"k{i}": np.diff(slopes)[:, i].reshape(6, 1, 1) for i in range(function.intervals + 1)}
    columns |= {"k": slopes[:, 0].reshape(6, 1, 1), "z": offsets[:, 0].reshape(6, 1, 1)}
    text = "m = Mul(x, k) s0 = Add(m, z) "
    for i in range(function.intervals + 1):
        last = "y" if i == function.intervals else f"s{i + 1}"
        text += f"u{i} = Sub(x, b{i}) r{i} = Relu(u{i}) v{i} = Mul(r{i}, k{i}) {last} = Add(s{i}, v{i}) "
    return text, columns


def where_chain(function):
    """From left to right: the line of the first segment that ends behind x."""
    slopes, offsets = function.tables()
    columns = {f"b{i}": function.points[:, i].reshape(6, 1, 1) for i in range(function.intervals + 1)}
    columns |= {f"k{i}": slopes[:, i].reshape(6, 1, 1) for i in range(function.intervals + 2)}
    columns |= {f"z{i}": offsets[:, i].reshape(6, 1, 1) for i in range(function.intervals + 2)}
    last = function.intervals + 1
    text = f"m{last} = Mul(x, k{last}) w{last} = Add(m{last}, z{last}) "
    for i in reversed(range(last)):
        out = f"w{i}" if i else "y"
        text += f"m{i} = Mul(x, k{i}) l{i} = Add(m{i}, z{i}) c{i} = Less(x, b{i}) {out} = Where(c{i}, l{i}, w{i + 1}) "
    return text, columns


@pytest.mark.parametrize("spelling", [hinge_sum, where_chain])
@pytest.mark.parametrize("intervals", [4, 16])
def test_spellings_are_gathered(spelling, intervals):
    function = unit(6, intervals)
    text, columns = spelling(function)
    model = network(text, "N, 6, 5, 5", "N, 6, 5, 5", columns)
    result, (report,) = applied(model, recognise_pwlu)
    assert count_ops(result) == {"PWLU": 1}
    found = ops.read_pwlu(import_graph(result).nodes[0])
    assert found.intervals == intervals
    np.testing.assert_allclose(found.points, function.points, atol=1e-5)
    np.testing.assert_allclose(found.values, function.values, atol=1e-4)
    x = sample(2, 6, 5, 5)
    np.testing.assert_allclose(run(result, x), run(model, x), rtol=1e-5, atol=1e-4)
    assert not applied(result, recognise_pwlu)[1][0].changed
    assert "within" in report.notes[report.changed[0]]


def test_bends_off_any_grid_stay_spelled_out():
    columns = {"p": [0.0], "q": [1.0], "r": [np.sqrt(2) * 1.7]}
    text = "a = Sub(x, p) b = Relu(a) c = Sub(x, q) d = Relu(c) e = Sub(x, r) f = Relu(e) g = Sub(b, d) y = Add(g, f)"
    result, (report,) = applied(network(text, "N, 4", "N, 4", columns), recognise_pwlu)
    assert not report.changed
    assert "PWLU" not in count_ops(result)


def test_what_has_operators_of_its_own_is_left_to_them():
    for text in ("y = Relu(x)", "y = Clip(x)", "a = Relu(x) b = Neg(x) c = Relu(b) y = Sub(a, c)"):
        assert not applied(network(text, "N, 4", "N, 4", {}), recognise_pwlu)[1][0].changed


def test_an_old_opset_keeps_the_spelling_and_says_why():
    text, columns = hinge_sum(unit(6, 4))
    model = network(text, "N, 6, 5, 5", "N, 6, 5, 5", columns, opset=13)
    _, (report,) = applied(model, recognise_pwlu)
    assert "opset 13 cannot spell" in report.skipped[0].reason
    result, (spelled,) = spell(model, "tensorrt-rtx")
    assert spelled.changed
    x = sample(2, 6, 5, 5)
    np.testing.assert_allclose(run(result, x), run(model, x), rtol=1e-5, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- the whole path


def test_rewrite_for_a_target():
    text, columns = hinge_sum(unit(6))
    model = network(text, "N, 6, 5, 5", "N, 6, 5, 5", columns)
    one, _ = rewrite(model)
    assert count_ops(one) == {"PWLU": 1}
    for target, operator in (("ort", "GatherElements"), ("tensorrt-rtx", "Relu")):
        result, report = rewrite(model, target=target)
        assert operator in count_ops(result)
        assert report.verification is not None
        assert report.verification.outputs[0].error <= report.verification.outputs[0].allowed


def test_spelled_twice_it_is_the_same_graph():
    once, _ = rewrite(alone(unit(6)), target="tensorrt-rtx")
    twice, _ = rewrite(once, target="tensorrt-rtx")
    assert sorted(node.name for node in twice.graph.node) == sorted(node.name for node in once.graph.node)
    x = sample(2, 6, 5, 5)
    # Gathering rounds heights and boundaries to float32 again; slopes reach 30 here, and values 50.
    np.testing.assert_allclose(run(twice, x), run(once, x), rtol=1e-5, atol=1e-4)


@pytest.mark.torch
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_what_torch_exports_by_itself_is_gathered(exporter, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
    from relu_deploy.export.convert import quiet
    from relu_deploy.graph import load_model
    from relu_deploy.nn.pwlu import PWLU

    torch.manual_seed(0)
    layer = PWLU(8)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), layer, torch.nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8) * 3
    with quiet():
        torch.onnx.export(net, (x,), str(tmp_path / "net.onnx"), dynamo=exporter == "dynamo", opset_version=18)
    model = load_model(tmp_path / "net.onnx")
    result, report = rewrite(model)
    assert count_ops(result) == {"Conv": 2, "PWLU": 1}, [entry.skipped for entry in report.passes]
    found = next(ops.read_pwlu(node) for node in import_graph(result).nodes if ops.is_pwlu(node))
    assert found.intervals == 16
    name = result.graph.input[0].name
    got = ort.InferenceSession(result.SerializeToString()).run(None, {name: x.numpy()})[0]
    want = net(x).detach().numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


# ----------------------------------------------------------------------------------------------- what is not ours


def of_a_stranger(body, name="PWLU"):
    """A network whose file defines ``relu_deploy::<name>`` by itself, with our signature."""
    model = behind_conv(unit(6), out="N, 6, 8, 8")
    head = '<domain: "relu_deploy", opset_import: ["": 18]>'
    function = onnx.parser.parse_function(f"{head} {name} <channel_axis> (x, {', '.join(NAMES)}) => (y) {{ {body} }}")
    model.functions[0].CopyFrom(function)
    model.graph.node[1].op_type = name
    return model


@pytest.mark.parametrize("name", ["PWLU", "Other"])
def test_a_function_of_our_domain_with_another_body_is_what_its_body_says(name):
    model = of_a_stranger("y = Tanh(x)", name)
    assert [site.kind for site in survey(model).activations] == ["tanh"]
    x = sample(2, 3, 8, 8)
    for target in (None, "ort", "tensorrt-rtx"):
        result, report = rewrite(model, target=target)
        assert report.passes[0].changed == (f"relu_deploy.{name}",)
        assert count_ops(result)["Tanh"] == 1
        np.testing.assert_array_equal(run(result, x), run(model, x))


def test_quantising_takes_a_stranger_at_its_word():
    model = of_a_stranger("y = Tanh(x)")
    x = sample(4, 3, 8, 8)
    quantized, _ = quantize(model, calibrate(model, open_source({"x": x}, model_inputs(model))))
    assert "PWLU" not in " ".join(count_ops(quantized)), "nor a table of the function that its parameters would make"
    wanted, mistaken = run(model, x), run(behind_conv(unit(6), out="N, 6, 8, 8"), x)
    error = np.abs(run(quantized, x) - wanted).max()
    assert error < 0.05 * np.abs(mistaken - wanted).max(), "steps of INT8, not another function"


def test_our_definition_is_ours_whatever_opset_and_names():
    for opset in (15, 18, 23):
        function = ops.pwlu_definition(opset)
        assert ops.is_definition(function)
        for number, node in enumerate(function.node):
            node.name = f"node_{number}"
        function.doc_string = "remark"
        assert ops.is_definition(function)
        function.node[-1].op_type = "Identity"
        assert not ops.is_definition(function)


BRANCHES = (
    "y = If (flag) <then_branch = t () => (float[N, 6, 8, 8] p) {"
    f" p = relu_deploy.PWLU <channel_axis: int = 1> (d, {', '.join(NAMES)}) }},"
    " else_branch = e () => (float[N, 6, 8, 8] q) { q = Relu(d) }>"
)


def test_a_unit_inside_a_branch_stays_with_its_definition():
    function = unit(6)
    weights = {name: getattr(function, name) for name in NAMES}
    model = network(f"c = Abs(x) d = Identity(c) {BRANCHES}", "N, 6, 8, 8", "N, 6, 8, 8", weights)
    model.graph.input.append(onnx.helper.make_tensor_value_info("flag", onnx.TensorProto.BOOL, []))
    assert [f.name for f in model.functions] == ["PWLU"]
    assert survey(model).left_alone == {"pwlu": 1, "relu": 1}
    result, report = rewrite(model)
    assert report.changed
    assert [f.name for f in result.functions] == ["PWLU"]
    assert report.verification is not None
    assert report.verification.outputs[0].error == 0


def test_two_units_in_a_row_are_two():
    functions = [unit(6), unit(6, seed=1)]
    weights = {f"{name}{i}": getattr(f, name) for i, f in enumerate(functions) for name in NAMES}
    first, second = (", ".join(f"{name}{i}" for name in NAMES) for i in (0, 1))
    unit_of = "relu_deploy.PWLU <channel_axis: int = 1>"
    model = network(f"a = {unit_of} (x, {first}) y = {unit_of} (a, {second})", "N, 6, H, W", "N, 6, H, W", weights)
    assert [site.kind for site in survey(model).activations] == ["pwlu", "pwlu"]
    for target in ("ort", "tensorrt-rtx"):
        result, report = rewrite(model, target=target)
        assert len(report.passes[-1].notes or report.passes[-3].notes) == 2
        x = sample(2, 6, 5, 5)
        before = run(model, x)
        # Rounding of the first unit's hinges, larger than their sum, times slopes of the second of ten and more.
        np.testing.assert_allclose(run(result, x), before, rtol=0, atol=1e-4 * np.abs(before).max())


def test_a_float64_spelling_keeps_its_digits():
    function = unit(6)
    names = {name: getattr(function, name) + 1e-9 for name in NAMES}  # what float32 would round away
    model = alone(function, kind="double")
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(names[tensor.name], tensor.name))
    spelled, _ = spell(model, "tensorrt-rtx")
    gathered, report = rewrite(spelled)
    assert count_ops(gathered) == {"PWLU": 1}, report
    x = sample(2, 6, 5, 5).astype(np.float64)
    before = run(model, x)
    # Seventeen hinges each some hundred times the roundings of the type.
    np.testing.assert_allclose(run(gathered, x), before, rtol=0, atol=1e-13 * np.abs(before).max())


def test_a_rewritten_network_is_not_rewritten_again():
    z = np.zeros(())
    model = behind_conv(unit(6), "r = Max(a, z) y = Identity(r)", out="N, 6, 8, 8", z=z)
    once, report = rewrite(model)
    assert report.changed
    assert not rewrite(once)[1].changed


def test_a_unit_with_computed_parameters_is_left_alone_and_said_so():
    model = behind_conv(unit(6), "y = Identity(a)", out="N, 6, 8, 8")
    model.graph.initializer.remove(next(t for t in model.graph.initializer if t.name == "left"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("left", onnx.TensorProto.FLOAT, [6]))
    found = survey(model)
    assert (found.counts, found.left_alone) == ({}, {"pwlu": 1})
    assert found.activations[0].left_alone == "its parameters are computed at run time"
    assert not rewrite(model)[1].passes[-1].changed
