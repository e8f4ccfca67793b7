"""The operator relu_deploy::PWLU: its numpy reference against the formulas, its definition against the reference."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from relu_deploy.errors import ModelError
from relu_deploy.graph import convert_opset, export_graph, import_graph, load_model
from relu_deploy.ops import (
    DOMAIN,
    PwluFunction,
    channel_axis,
    define_operators,
    drop_definitions,
    is_definition,
    is_pwlu,
    read_pwlu,
)

NAMES = ("left", "right", "values", "slope_left", "slope_right")


def random_function(channels: int, intervals: int, seed: int = 0) -> PwluFunction:
    """Parameters that float32 holds exactly."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32).astype(np.float64)

    return PwluFunction(
        -2 + draw(channels) / 4, 2 + draw(channels) / 4, draw(channels, intervals + 1), draw(channels), draw(channels)
    )


def pwlu_model(
    function: PwluFunction, rank: int, axis: int, dtype: type = np.float32, opset: int = 18
) -> onnx.ModelProto:
    """One node and its definition; every size is dynamic."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    sizes = [f"size_{i}" for i in range(rank)]
    wide = np.float64 if dtype is np.float64 else np.float32
    weights = [numpy_helper.from_array(getattr(function, name).astype(wide), name) for name in NAMES]
    node = helper.make_node("PWLU", ["x", *NAMES], ["y"], "unit", domain=DOMAIN, channel_axis=axis)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", kind, sizes)],
        [helper.make_tensor_value_info("y", kind, sizes)], weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    define_operators(model, opset)
    return model


def formula(f: PwluFunction, c: int, x: float) -> float:
    """The paper's three cases, one element at a time."""
    width = (f.right[c] - f.left[c]) / f.intervals
    if x < f.left[c]:
        return (x - f.left[c]) * f.slope_left[c] + f.values[c, 0]
    if x >= f.right[c]:
        return (x - f.right[c]) * f.slope_right[c] + f.values[c, -1]
    i = min(int((x - f.left[c]) // width), f.intervals - 1)
    slope = (f.values[c, i + 1] - f.values[c, i]) / width
    return (x - (f.left[c] + i * width)) * slope + f.values[c, i]


@given(
    st.integers(1, 5), st.integers(1, 20), st.integers(0, 99),
    st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=20),
)  # fmt: skip
def test_reference_is_the_formula(channels: int, intervals: int, seed: int, xs: list[float]) -> None:
    f = random_function(channels, intervals, seed)
    got = f(np.broadcast_to(np.array(xs)[:, None], (len(xs), channels)))
    want = [[formula(f, c, x) for c in range(channels)] for x in xs]
    # Both are float64, and differ in the order of a handful of roundings of numbers below 100 (slopes up to 60).
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    ("shape", "axis", "channels", "intervals"),
    [((2, 5, 3, 4), 1, 5, 16), ((2, 3, 5), -1, 5, 4), ((7, 5), 1, 5, 1), ((3, 2, 2), 1, 1, 7), ((6,), 0, 1, 3)],
)
def test_definition_is_the_reference(
    shape: tuple[int, ...], axis: int, channels: int, intervals: int, dtype: type
) -> None:
    f = random_function(channels, intervals)
    model = pwlu_model(f, len(shape), axis, dtype)
    onnx.checker.check_model(model, full_check=True)
    x = (np.random.default_rng(1).normal(size=shape) * 3).astype(dtype)
    y = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    assert y.dtype == dtype
    # A few roundings of the type, relative to the largest slope times the largest input (below 100).
    tolerance = {np.float32: 1e-5, np.float64: 1e-13, np.float16: 2e-2}[dtype]
    np.testing.assert_allclose(y, f(x, axis), rtol=tolerance, atol=tolerance)


def test_nan_gives_nan_and_infinity_the_outer_slope() -> None:
    f = random_function(1, 16)
    model = pwlu_model(f, 1, 0)
    x = np.array([np.nan, np.inf, -np.inf, 1e30], dtype=np.float32)
    y = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    assert np.isnan(y[0])
    assert np.isnan(f(x)[0])
    assert y[1] == np.inf * f.slope_right[0] == f(x)[1]
    assert y[2] == -np.inf * f.slope_left[0] == f(x)[2]


@settings(max_examples=20)
@given(st.integers(0, 99))
def test_at_the_boundaries_both_sides_meet(seed: int) -> None:
    f = random_function(3, 8, seed)
    at = f(f.points.T)
    np.testing.assert_allclose(at, f.values.T, rtol=1e-12, atol=1e-12)


def test_graph_round_trip_keeps_node_and_definition() -> None:
    model = pwlu_model(random_function(4, 16), 4, 1)
    graph = import_graph(model)
    (node,) = graph.nodes
    assert is_pwlu(node)
    assert channel_axis(node) == 1
    assert read_pwlu(node).intervals == 16
    again = export_graph(graph, model)
    onnx.checker.check_model(again, full_check=True)
    assert [function.name for function in again.functions] == ["PWLU"]
    assert is_definition(again.functions[0]), "graphsurgeon sorts its nodes anew"
    graph.nodes.clear()
    again.graph.node.clear()
    drop_definitions(again)
    assert not again.functions
    assert [entry.domain for entry in again.opset_import] == [""]


def test_lifting_the_opset_keeps_the_definition() -> None:
    model = pwlu_model(random_function(4, 16), 4, 1)
    lifted = convert_opset(model, lowest=21)
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    runs = [ort.InferenceSession(m.SerializeToString()).run(None, {"x": x})[0] for m in (model, lifted)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": np.zeros((4, 1))}, "shapes"),
        ({"left": np.zeros(3)}, "shapes"),
        ({"right": np.full(4, -9.0)}, "right boundary"),
        ({"slope_left": np.full(4, np.nan)}, "not finite"),
    ],
)
def test_parameters_that_make_no_function(change: dict[str, np.ndarray], message: str) -> None:
    f = random_function(4, 16)
    with pytest.raises(ModelError, match=message):
        PwluFunction(**{**{name: getattr(f, name) for name in NAMES}, **change})


def test_parameters_must_be_constants() -> None:
    graph = import_graph(pwlu_model(random_function(4, 16), 4, 1))
    graph.nodes[0].inputs[3] = gs.Variable("computed", np.float32)
    with pytest.raises(ModelError, match="values of the PWLU 'unit' is computed at run time"):
        read_pwlu(graph.nodes[0])
    graph.nodes[0].inputs.pop()
    with pytest.raises(ModelError, match="has 5 inputs"):
        read_pwlu(graph.nodes[0])


def test_nothing_is_defined_where_nothing_is_used() -> None:
    body = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip
    model = helper.make_model(body)
    define_operators(model, 18)
    assert not model.functions


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda node, _: node.input.pop(), "has 5 inputs"),
        (lambda node, _: node.input.append("left"), "has 7 inputs"),
        (lambda node, _: node.input.__setitem__(3, ""), "has 5 inputs"),
        (lambda node, _: node.output.append("more"), "has 2 outputs"),
        (lambda node, _: node.attribute.pop(), "has no integer attribute channel_axis"),
        (lambda _, weights: weights["values"].dims.__setitem__(slice(None), [1, 68]), "4 channels and values for 1"),
        (lambda _, weights: weights["values"].dims.__setitem__(slice(None), [68]), "of the shapes"),
        (lambda _, weights: weights["right"].dims.__setitem__(slice(None), [2, 2]), "of the shapes"),
    ],
)
def test_a_damaged_node_is_named_when_the_file_is_read(damage, message, tmp_path) -> None:
    model = pwlu_model(random_function(4, 16), 4, 1)
    damage(model.graph.node[0], {tensor.name: tensor for tensor in model.graph.initializer})
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=f"net.onnx: the PWLU 'unit' .*{message}"):
        load_model(tmp_path / "net.onnx")


def test_a_file_without_the_definition_gets_it_when_it_is_read(tmp_path) -> None:
    function = random_function(4, 16)
    model = pwlu_model(function, 4, 1)
    del model.functions[:]
    (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
    loaded = load_model(tmp_path / "net.onnx")
    x = np.random.default_rng(1).normal(size=(2, 4, 3, 3)).astype(np.float32)
    y = ort.InferenceSession(loaded.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, function(x), rtol=1e-5, atol=1e-5)  # as the definition against the reference


@pytest.mark.parametrize(
    ("axis", "channels", "message"),
    [(1, 5, "functions for 5 channels, and its input has 4 on axis 1"), (4, 4, "on axis 4 of"), (-5, 4, "on axis -5")],
)
def test_channels_that_the_input_does_not_have(axis: int, channels: int, message: str) -> None:
    graph = import_graph(pwlu_model(random_function(channels, 16), 4, axis))
    graph.inputs[0].shape = ["N", 4, 8, 8]
    with pytest.raises(ModelError, match=f"node 'unit' has .*{message}"):
        read_pwlu(graph.nodes[0])
