# ruff: noqa: E501 - graphs in ONNX text stay on one line
"""Floors, tables, learned piecewise-linear units in every form, and draws at random whose outcome is certain."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relu_deploy.graph import import_graph
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.program import Builder
from relu_deploy.passes.pwl import NotPiecewiseLinearError, PiecewiseLinear
from relu_deploy.passes.run import rewrite
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.symbolic import evaluate

HALVES = st.integers(-8, 8).map(lambda n: n / 2)
INTEGERS = st.integers(-4, 4)
ROUNDINGS = {"floor": math.floor, "ceil": math.ceil, "round": round, "integer": math.trunc}


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(sorted(ROUNDINGS)), HALVES.filter(bool), HALVES, INTEGERS, INTEGERS, INTEGERS, st.booleans(),
    st.booleans(), st.lists(st.fractions(-9, 9, max_denominator=8), min_size=5, max_size=9),
)  # fmt: skip
def test_a_floor_that_is_clipped_somewhere_is_a_step_function(name, scale, shift, add, low, high, negate, swap, places):
    """``clip(+-g(scale x + shift) + add, low, high)`` and the index that a table makes of it."""
    low, high = min(low, high), max(low, high)
    build = Builder()
    x = build.step("add", build.step("mul", build.step("x"), build.const(scale)), build.const(shift))
    whole = build.fn(name, x)
    index = build.step("add", build.neg(whole) if negate else whole, build.const(float(add)))
    order = [("max", low), ("min", high)]
    for op, edge in reversed(order) if swap else order:
        index = build.step(op, index, build.const(float(edge)))
    table = np.arange(9, dtype=np.float64) ** 2
    result = build.lookup(table, build.step("add", build.fn("integer", index), build.const(4.0)))
    function = evaluate(build.finish(result), [row[0] for row in build.finish(result).constants])
    assert function is not None
    for place in {*places, *(Fraction(n, 4) for n in range(-40, 41))}:
        value = ROUNDINGS[name](Fraction(scale) * place + Fraction(shift))
        expected = min(max((-value if negate else value) + add, low), high)
        assert function(place) == Fraction(table[expected + 4])


@pytest.mark.parametrize("op", ["gt", "ge", "eq"])
@pytest.mark.parametrize("name", sorted(ROUNDINGS))
@pytest.mark.parametrize("bound", [-1.5, 0.0, 2.0])
def test_a_floor_compared_with_a_constant_is_decided(op, name, bound):
    build = Builder()
    result = build.step(op, build.fn(name, build.step("x")), build.const(bound))
    function = evaluate(build.finish(result), [bound])
    assert function is not None
    tests = {"gt": lambda v: v > bound, "ge": lambda v: v >= bound, "eq": lambda v: v == bound}
    for place in (Fraction(n, 8) for n in range(-40, 41)):
        assert function(place) == tests[op](ROUNDINGS[name](place))


def test_a_floor_without_an_end_is_no_piecewise_linear_function():
    build = Builder()
    floor = build.fn("floor", build.step("x"))
    assert evaluate(build.finish(floor), []) is None
    with pytest.raises(NotPiecewiseLinearError, match="not bounded"):
        PiecewiseLinear.identity().rounded(math.floor)
    build = Builder()
    floor = build.fn("floor", build.step("x"))
    result = build.step("add", build.step("x"), build.step("mul", floor, build.const(0.0)))
    assert evaluate(build.finish(result), [0.0]) == PiecewiseLinear.identity()


def test_a_table_that_is_read_past_its_end_is_not_evaluated():
    for table, fits in ((np.arange(5.0), True), (np.arange(4.0), False), (np.array([np.inf] * 5), False)):
        build = Builder()
        index = build.step(
            "min", build.step("max", build.fn("floor", build.step("x")), build.const(-5.0)), build.const(4.0)
        )
        assert (evaluate(build.finish(build.lookup(table, index)), [-5.0, 4.0]) is not None) == fits


def pwlu(channels: int, intervals: int, seed: int) -> dict[str, np.ndarray]:
    """Parameters of a PWLU, float32."""
    random = np.random.default_rng(seed)
    left, width = random.uniform(-4, -1, channels), random.uniform(2, 8, channels)
    values = np.maximum(left[:, None] + width[:, None] * np.arange(intervals + 1) / intervals, 0)
    return {
        "left": left, "right": left + width, "values": values + random.normal(0, 0.3, values.shape),
        "slope_left": random.normal(0, 0.1, channels), "slope_right": random.normal(1, 0.1, channels),
    }  # fmt: skip


def lines(p: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Slopes K' and offsets Z', (C, N + 2), in float64."""
    n = p["values"].shape[1] - 1
    step = ((p["right"] - p["left"]) / n)[:, None]
    slopes = np.concatenate([p["slope_left"][:, None], np.diff(p["values"]) / step, p["slope_right"][:, None]], axis=1)
    anchors = np.concatenate(
        [p["left"][:, None], p["left"][:, None] + step * np.arange(n), p["right"][:, None]], axis=1
    )
    return slopes, np.concatenate([p["values"][:, :1], p["values"]], axis=1) - slopes * anchors


INT64 = np.int64


def graph_of(body: str, constants: dict[str, np.ndarray], shape: str, *, opset: int = 18) -> onnx.ModelProto:
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": {opset}]>
    g (float[{shape}] x) => (float[{shape}] y) {{ {body} }}""")
    for name, values in constants.items():
        array = np.asarray(values if np.asarray(values).dtype == INT64 else np.asarray(values, np.float32))
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        )
    return model


def spelled(  # noqa: C901 - one spelling an if
    form: str, p: dict[str, np.ndarray], column: tuple[int, ...]
) -> tuple[str, dict[str, np.ndarray]]:
    """Body and constants of a PWLU as different exporters would write it; channels are along ``column``."""
    slopes, offsets = lines(p)
    channels, segments = slopes.shape
    n = segments - 2
    step = (p["right"] - p["left"]) / n
    per = {"l": p["left"].reshape(column), "d": step.reshape(column)}
    ends = {"lo": np.array(0.0), "hi": np.array(n + 1.0), "one": np.array(1.0)}
    rows = {"k": slopes.reshape(-1), "z": offsets.reshape(-1)}
    offset = (np.arange(channels) * segments).reshape(column)
    place = "a = Sub(x, l) b = Div(a, d)"
    read = "s = Gather(k, i) t = Gather(z, i) m = Mul(s, x) y = Add(m, t)"
    if form == "gather, clipped as float":
        body = f"{place} f = Floor(b) g = Add(f, one) h = Clip(g, lo, hi) j = Cast <to = 7> (h) i = Add(j, c) {read}"
        return body, {**per, **ends, **rows, "c": offset}
    if form == "gather, clipped under the floor, int32":
        body = f"{place} g = Add(b, one) h = Clip(g, lo, hi) f = Floor(h) j = Cast <to = 6> (f) o = Cast <to = 6> (c) i = Add(j, o) {read}"
        return body, {**per, **ends, **rows, "c": offset}
    if form == "gather, clipped as integer by Min and Max":
        bounds = {"lo": np.array(0), "hi": np.array(n + 1), "one": np.array(1)}
        body = f"{place} f = Floor(b) j = Cast <to = 7> (f) g = Add(j, one) h = Min(g, hi) q = Max(h, lo) i = Add(q, c) {read}"
        return body, {**per, **bounds, **rows, "c": offset}
    if form == "gather at a channel and an index":
        body = (f"{place} f = Floor(b) g = Add(f, one) h = Clip(g, lo, hi) j = Cast <to = 7> (h) v = Shape(j) e = Expand(r, v) "
                "e1 = Unsqueeze(e, last) j1 = Unsqueeze(j, last) i = Concat <axis = -1> (e1, j1) s = GatherND(k, i) "
                "t = GatherND(z, i) m = Mul(s, x) y = Add(m, t)")  # fmt: skip
        both = {"k": slopes, "z": offsets, "r": np.arange(channels).reshape(column), "last": np.array([-1])}
        return body, {**per, **ends, **both}
    if form == "where on the index":
        body = (f"{place} f = Floor(b) g = Add(f, one) u = Less(x, l) v = Where(u, lo, g) w = GreaterOrEqual(x, r) h = Where(w, hi, v) "
                f"j = Cast <to = 7> (h) i = Add(j, c) {read}")  # fmt: skip
        return body, {**per, **ends, **rows, "c": offset, "r": p["right"].reshape(column)}
    if form == "counted thresholds":
        points = [(p["left"] + i * step).reshape(column) for i in range(n + 1)]
        tests = " ".join(f"q{i} = GreaterOrEqual(x, p{i}) e{i} = Cast <to = 7> (q{i})" for i in range(n + 1))
        total = " ".join(f"s{i + 1} = Add({f's{i}' if i else 'e0'}, e{i + 1})" for i in range(n))
        return f"{tests} {total} i = Add({f's{n}'}, c) {read}", {
            **rows,
            "c": offset,
            **{f"p{i}": v for i, v in enumerate(points)},
        }
    if form == "hinge sum":
        bends = np.diff(slopes)
        parts = " ".join(
            f"a{i} = Sub(x, p{i}) r{i} = Relu(a{i}) m{i} = Mul(r{i}, k{i}) t{i + 1} = Add(t{i}, m{i})"
            for i in range(n + 1)
        )
        constants = {"k": slopes[:, 0].reshape(column), "z": offsets[:, 0].reshape(column)}
        for i in range(n + 1):
            constants |= {f"p{i}": (p["left"] + i * step).reshape(column), f"k{i}": bends[:, i].reshape(column)}
        return f"t = Mul(x, k) t0 = Add(t, z) {parts} y = Identity(t{n + 1})", constants
    if form in ("hinge sum over an axis", "hinge sum by a product"):
        bends, points = np.diff(slopes), p["left"][:, None] + step[:, None] * np.arange(n + 1)
        wide = (*column, n + 1)
        constants = {"k": slopes[:, 0].reshape(column), "z": offsets[:, 0].reshape(column), "p": points.reshape(wide)}
        constants |= {"last": np.array([-1]), "b": bends.reshape(wide)}
        head = "t = Mul(x, k) t0 = Add(t, z) u = Unsqueeze(x, last) a = Sub(u, p) r = Relu(a)"
        if form == "hinge sum over an axis":
            return f"{head} m = Mul(r, b) s = ReduceSum <keepdims = 0> (m, last) y = Add(t0, s)", constants
        # A vector is the same for all channels, so each hinge is scaled before it bends: k relu(v) = sign(k) relu(|k| v).
        constants |= {"b": np.abs(bends).reshape(wide), "w": np.sign(bends[0])}
        return f"{head.replace('r = Relu(a)', 'f = Mul(a, b) r = Relu(f)')} s = MatMul(r, w) y = Add(t0, s)", constants
    if form == "where chain":
        constants = {}
        parts = [f"m{n + 1} = Mul(x, k{n + 1}) w{n + 1} = Add(m{n + 1}, z{n + 1})"]
        for i in range(segments):
            constants |= {f"k{i}": slopes[:, i].reshape(column), f"z{i}": offsets[:, i].reshape(column)}
        for i in reversed(range(n + 1)):
            constants[f"p{i}"] = (p["left"] + i * step).reshape(column)
            parts.append(
                f"m{i} = Mul(x, k{i}) v{i} = Add(m{i}, z{i}) q{i} = Less(x, p{i}) w{i} = Where(q{i}, v{i}, w{i + 1})"
            )
        return f"{' '.join(parts)} y = Identity(w0)", constants
    raise KeyError(form)


FORMS = (
    "gather, clipped as float", "gather, clipped under the floor, int32", "gather, clipped as integer by Min and Max",
    "where on the index", "counted thresholds", "hinge sum", "where chain", "hinge sum over an axis",
    "gather at a channel and an index",
)  # fmt: skip


def exact(model: onnx.ModelProto) -> tuple[list[PiecewiseLinear], int | None]:
    """Functions of all channels of the one region that makes the output, and their axis; checked to be there."""
    model, _ = rewrite(model, verify=False)  # constants are folded
    graph = import_graph(model)
    annotate(graph, model)
    functions = Functions(graph)
    (cut,) = (c for c in functions.forest.exits if c.tensor.name == model.graph.output[0].name)
    program = functions.segment(cut).program
    assert program is not None, functions.segment(cut).refusal
    found = [functions.exact(program, channel) for channel in range(program.constants.shape[1])]
    assert None not in found
    return [f for f in found if f is not None], program.axis


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "ntc"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_function_that_it_spells(form, last, channels):
    p = {name: np.asarray(value, np.float32).astype(np.float64) for name, value in pwlu(channels, 4, seed=1).items()}
    column = (channels,) if last else (channels, 1, 1)
    shape = "N,5,3" if last else "N,3,5,5"
    model = graph_of(*spelled(form, p, column), shape)
    found, axis = exact(model)
    assert (len(found), axis) == (channels, None if channels == 1 else (-1 if last else -3))
    slopes, offsets = lines(p)
    for channel, function in enumerate(found):
        assert len(function.breaks) == 5
        for x in np.linspace(-9, 9, 73):
            segment = int(np.clip(np.floor((x - p["left"][channel]) / (p["right"] - p["left"])[channel] * 4) + 1, 0, 5))
            # The graph holds float32 constants: tables are off by 1e-7, and so is the place of a point.
            expected = slopes[channel, segment] * x + offsets[channel, segment]
            assert float(function(Fraction(x))) == pytest.approx(expected, abs=1e-5)
    x = np.random.default_rng(0).normal(0, 4, (2, 5, 3) if last else (2, 3, 5, 5)).astype(np.float32)
    y, place = run(model, x), np.moveaxis(x, axis or -1, 0)
    for channel, values in enumerate(np.moveaxis(y, axis or -1, 0)[:channels]):
        mine = [float(found[channel](Fraction(float(v)))) for v in place[channel].reshape(-1)]
        np.testing.assert_allclose(values.reshape(-1), mine, rtol=1e-5, atol=1e-5)


def relu_unit(left: np.ndarray, width: np.ndarray, intervals: int) -> dict[str, np.ndarray]:
    """A PWLU that is ReLU: as it starts, or as realignment leaves it."""
    points = left[:, None] + width[:, None] * np.arange(intervals + 1) / intervals
    zero = np.zeros_like(left)
    return {
        "left": left,
        "right": left + width,
        "values": np.maximum(points, 0),
        "slope_left": zero,
        "slope_right": zero + 1,
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_unit_that_is_relu_collapses_and_rounding_near_its_points_is_bounded(form):
    """Near a point rounding may name the wrong segment; both lines meet there, and interval arithmetic has to see it."""
    p = relu_unit(np.array([-3.0, -1.5, -2.25]), np.array([6.0, 3.0, 4.5]), 4)
    model = graph_of(*spelled(form, p, (3, 1, 1)), "N,3,5,5")
    domain = (-1e6, 1e6) if "Min and Max" in form else None  # a float past 2**31 has no integer
    after, report = rewrite(model, collapse_tolerance=None if domain is None else 0.0, domain=domain)
    assert [node.op_type for node in after.graph.node] == ["Relu"], report
    (note,) = next(e for e in report.passes if e.name == "collapse_relu").notes.values()
    rounding = float(note.split("at most ")[1].split()[0]) if "at most" in note else 0.0
    points = (p["left"][:, None] + (p["right"] - p["left"])[:, None] * np.arange(5) / 4).astype(np.float32)
    near = np.concatenate([points * (1 + np.float32(k * 2.0**-23)) for k in range(-12, 13)], axis=1)
    x = np.moveaxis(near.reshape(3, -1, 5, 5), 0, 1).astype(np.float32)
    gap = np.abs(run(model, x) - np.maximum(x, 0)) / np.maximum(np.abs(x), 1)
    assert gap.max() <= rounding


def test_a_unit_whose_lines_do_not_meet_is_not_called_accurate():
    """As above, with a table that jumps by a hundredth: ReLU but for a step that no bound of rounding may hide."""
    p = relu_unit(np.array([-3.0]), np.array([6.0]), 4)
    body, constants = spelled("gather, clipped as float", p, (1, 1, 1))
    constants["z"] = constants["z"] + np.array([0, 0, 0, 0, 0, 0.01])
    model = graph_of(body, constants, "N,3,5,5")
    assert "Gather" in [node.op_type for node in rewrite(model)[0].graph.node]
    after, report = rewrite(model, collapse_tolerance=0.02)
    assert "Gather" in [node.op_type for node in after.graph.node]
    assert any("not accurate" in skip.reason for entry in report.passes for skip in entry.skipped)


def test_a_sum_by_a_product_is_a_sum_too():
    p = pwlu(1, 4, seed=2)
    found, axis = exact(graph_of(*spelled("hinge sum by a product", p, (1,)), "N,5,3"))
    plain, _ = exact(graph_of(*spelled("hinge sum", p, (1,)), "N,5,3"))
    assert axis is None
    for x in (Fraction(n, 4) for n in range(-40, 41)):
        assert float(found[0](x)) == pytest.approx(float(plain[0](x)), abs=1e-5)


@pytest.mark.parametrize("body", [
    "u = Unsqueeze(x, last) a = Sub(u, p) r = Relu(a) y = ReduceSum <keepdims = 0> (r, first)",
    "u = Unsqueeze(x, last) a = Sub(u, p) r = Softmax(a) y = ReduceSum <keepdims = 0> (r, last)",
    "u = Unsqueeze(x, last) a = Sub(u, p) r = Relu(a) y = ReduceMax <keepdims = 0> (r, last)",
    "u = Unsqueeze(x, first) a = Sub(u, p) r = Relu(a) y = ReduceSum <keepdims = 0> (r, last)",
])  # fmt: skip
def test_other_reductions_end_a_region(body):
    model = graph_of(body, {"p": np.arange(4.0), "last": np.array([-1]), "first": np.array([0])}, "4,4")
    graph = import_graph(model)
    annotate(graph, model)
    assert not any(cut.parent and cut.tensor.name == "y" for cut in Functions(graph).forest.cuts.values())


def test_gather_elements_reads_one_row_a_channel_and_counts_negative_indices_from_its_end():
    table = np.arange(12, dtype=np.float32).reshape(3, 4) ** 2
    body = "f = Floor(x) h = Clip(f, lo, hi) i = Cast <to = 7> (h) t = GatherElements <axis = 1> (k, i) y = Add(t, x)"
    model = graph_of(body, {"k": table, "lo": np.array(-4.0), "hi": np.array(3.0)}, "3,8")
    found, axis = exact(model)
    assert axis == -2
    x = np.random.default_rng(0).uniform(-6, 6, (3, 8)).astype(np.float32)
    mine = [[float(found[c](Fraction(float(v)))) for v in row] for c, row in enumerate(x)]
    np.testing.assert_allclose(run(model, x), mine, rtol=1e-6)


@pytest.mark.parametrize("body", [
    "i = Cast <to = 7> (x) y = Gather(k, i)",
    "f = Clip(x, lo, hi) i = Cast <to = 7> (f) k2 = Relu(k) t = Gather(k2, i) y = Add(t, x)",
])  # fmt: skip
def test_what_has_no_table_or_no_end_is_left_alone(body):
    model = graph_of(body, {"k": np.arange(4.0), "lo": np.array(0.0), "hi": np.array(3.0)}, "N,4")
    assert rewrite(model, verify=False)[0] is model or "Relu" not in [
        n.op_type for n in rewrite(model, verify=False)[0].graph.node
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("axis", "shape"), [(1, "N,3,5,5"), (-1, "N,5,3"), (2, "N,5,3")])
def test_the_operator_of_this_package_is_its_definition(channels, axis, shape):
    from relu_deploy.ops import define_operators

    p = {name: np.asarray(value, np.float32) for name, value in pwlu(channels, 5, seed=3).items()}
    node = onnx.helper.make_node("PWLU", ["x", *p], ["y"], domain="relu_deploy", channel_axis=axis)
    info = [
        onnx.helper.make_tensor_value_info(name, 1, [int(d) if d.isdigit() else d for d in shape.split(",")])
        for name in "xy"
    ]
    graph = onnx.helper.make_graph(
        [node], "g", info[:1], info[1:], [onnx.numpy_helper.from_array(v, k) for k, v in p.items()]
    )
    model = onnx.helper.make_model(
        graph,
        opset_imports=[onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("relu_deploy", 1)],
        ir_version=8,
    )
    found, place = exact(model)
    assert place == (None if channels == 1 else {"N,3,5,5": -3, "N,5,3": -1}[shape])
    for channel, function in enumerate(found):
        assert function.is_continuous  # parameters, not rounded tables: exactly so
        assert len(function.breaks) == 6
        left, right = (Fraction(float(p[side][channel])) for side in ("left", "right"))
        for i, height in enumerate(p["values"][channel]):
            assert function(left + (right - left) * i / 5) == Fraction(float(height))
        assert function.lines[0][0] == Fraction(float(p["slope_left"][channel]))
        assert function.lines[-1][0] == Fraction(float(p["slope_right"][channel]))
    define_operators(model, 18)
    same, report = rewrite(model)
    assert same is model  # neither unfolded nor changed
    assert any("PWLU" in skip.name or "piecewise" in skip.reason for entry in report.passes for skip in entry.skipped)


SILU = "s = Sigmoid(x) a = Mul(x, s) r = Relu(x)"
STOCHASTIC = {
    "uniform like, p = 1": f"{SILU} u = RandomUniformLike(x) c = Less(u, one) y = Where(c, r, a)",
    "uniform like, p = 0": f"{SILU} u = RandomUniformLike(x) c = Less(u, zero) y = Where(c, a, r)",
    "uniform like, the other way round": f"{SILU} u = RandomUniformLike(x) c = GreaterOrEqual(u, one) y = Where(c, a, r)",
    "one draw for all": f"{SILU} u = RandomUniform <shape = [1]> () c = Less(u, one) y = Where(c, r, a)",
    "bernoulli of a fill": f"{SILU} n = Shape(x) p = Expand(one, n) b = Bernoulli(p) c = Cast <to = 9> (b) y = Where(c, r, a)",
    "bernoulli as a factor": f"{SILU} n = Shape(x) p = ConstantOfShape <value = float[1] {{0}}> (n) b = Bernoulli(p) d = Sub(a, r) m = Mul(b, d) y = Add(r, m)",
    "dropout in training that drops nothing": "t = Dropout(x, zero, yes) y = Max(t, zero)",
    "bernoulli of the tensor": f"{SILU} p = Mul(x, zero) b = Bernoulli(p) m = Mul(b, a) y = Add(r, m)",
}  # fmt: skip


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_draw_whose_outcome_is_certain_is_no_draw(name):
    model = graph_of(STOCHASTIC[name], {"one": np.array(1.0), "zero": np.array(0.0)}, "N,4")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "yes"))
    after, report = rewrite(model)
    assert [node.op_type for node in after.graph.node] == ["Relu"], [e.skipped for e in report.passes]


@pytest.mark.parametrize(
    "name", [name for name in STOCHASTIC if not name.startswith(("bernoulli of the tensor", "dropout"))]
)
def test_a_draw_that_is_open_stays(name):
    model = graph_of(STOCHASTIC[name].replace("{0}", "{0.5}"), {"one": np.array(0.5), "zero": np.array(0.5)}, "N,4")
    after, _ = rewrite(model, verify=False)
    assert any(node.op_type in ("RandomUniformLike", "RandomUniform", "Bernoulli") for node in after.graph.node)


def test_two_draws_are_not_one():
    body = "u = RandomUniformLike(x) v = RandomUniformLike(x) d = Sub(u, v) r = Relu(x) y = Add(r, d)"
    after, _ = rewrite(graph_of(body, {}, "N,4"), verify=False)
    assert len(after.graph.node) == 5


@pytest.mark.torch
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "ntc"])
@pytest.mark.parametrize("channels", [5, None])
def test_what_torch_writes_of_a_unit_in_plain_operators(tmp_path: Path, exporter, last, channels):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
    from relu_deploy.nn.pwlu import PWLU
    from relu_deploy.nn.pwlu_function import Parameters, evaluate, tables_of

    unit = PWLU(channels, intervals=6)
    torch.manual_seed(0)
    for parameter in unit.parameters():
        parameter.data += torch.randn_like(parameter) * 0.3

    tables = tables_of(Parameters(*(p.detach() for p in unit.parameters_in_order())))

    class Plain(torch.nn.Module):
        def forward(self, x):
            return evaluate(x, tables, 2 if last else 1)

    import warnings

    x = torch.randn(2, 7, 5) if last else torch.randn(2, 5, 4, 4)
    path = tmp_path / "unit.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        options = {"external_data": False} if exporter == "dynamo" else {"input_names": ["x"]}
        torch.onnx.export(
            Plain().eval(), (x,), str(path), dynamo=exporter == "dynamo", opset_version=18, verbose=False, **options
        )
    model, _ = rewrite(onnx.load(path), verify=False)
    found, axis = exact(model)
    assert (len(found), axis) == ((1, None) if channels is None else (5, -1 if last else -3))
    left, right, values, low, high = (p.detach().double().numpy() for p in unit.parameters_in_order())
    for channel, function in enumerate(found):
        assert len(function.breaks) == 7
        assert float(function.largest_jump) < 1e-5  # the tables are float32
        points = left[channel] + (right - left)[channel] * np.arange(7) / 6
        np.testing.assert_allclose([float(b) for b in function.breaks], points, atol=1e-6)
        np.testing.assert_allclose([float(function(b)) for b in function.breaks], values[channel], atol=1e-5)
        assert (float(function.lines[0][0]), float(function.lines[-1][0])) == pytest.approx(
            (low[channel], high[channel])
        )
