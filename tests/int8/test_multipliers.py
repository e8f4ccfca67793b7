"""Integer multipliers: the arithmetic, and the emulator that lives on it, against ONNX Runtime's kernels."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import platform
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from relu_deploy.errors import FileError, QuantizationError
from relu_deploy.int8.formats import weight_bits_for_cpu
from relu_deploy.int8.multipliers import accumulator, multiplier
from relu_deploy.int8.multipliers_table import build_table, load_table, save_table
from relu_deploy.machine import describe_machine

_SPEC = importlib.util.spec_from_file_location("int8_emulator", Path(__file__).with_name("emulator.py"))
emulator = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = emulator  # dataclasses look their module up
_SPEC.loader.exec_module(emulator)

CONTRIB = "com.microsoft"
# What this CPU multiplies without saturating: the emulator is exact, and so are the kernels then.
WEIGHT_MAX = 127 if weight_bits_for_cpu(describe_machine().flags) == 8 else 63
KINDS = {"uint8": onnx.TensorProto.UINT8, "int8": onnx.TensorProto.INT8}
SCALES = st.floats(2.0**-12, 2.0**4, width=32)


@given(st.fractions(min_value=-(2**40), max_value=2**40, max_denominator=2**80))
def test_a_multiplier_is_the_nearest_of_its_shift(factor):
    found = multiplier(factor)
    if factor == 0:
        assert (found.mantissa, found.shift) == (0, 0)
        return
    assert found.shift >= 0
    if abs(factor) > 2**31 - 1:
        assert (abs(found.mantissa), found.shift) == (2**31 - 1, 0)
        return
    assert 2**30 <= abs(found.mantissa) < 2**31 or found.shift == 0
    assert (found.mantissa > 0) == (factor > 0)
    # Half a unit of a mantissa of 31 bits.
    assert abs(found.value - factor) <= Fraction(1, 2 << found.shift)
    assert found.relative_error == float(found.value / factor - 1)
    assert abs(found.relative_error) <= 2.0**-31 or found.shift == 0


@given(st.integers(-(2**31), 2**31 - 1), st.fractions(min_value=0, max_value=2, max_denominator=2**60))
def test_a_shift_rounds_as_a_fraction_does(total, factor):
    found = multiplier(factor)
    product = np.array([total], np.int64) * found.mantissa
    assert emulator.shift_right(product, found.shift)[0] == round(Fraction(int(product[0]), 1 << found.shift))


@given(st.integers(-(2**40), 0), st.integers(0, 2**40))
def test_bits_of_an_accumulator(low, high):
    found = accumulator(low, high)
    assert -(1 << found.bits - 1) <= low <= high < 1 << found.bits - 1
    assert found.bits == 1 or not (-(1 << found.bits - 2) <= low and high < 1 << found.bits - 2)
    assert found.int32 == (found.bits <= 32)


@dataclasses.dataclass
class Layer:
    """One integer operator as a network of its own."""

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]


class Builder:
    """Puts constants and codes around one node."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.feeds: dict[str, np.ndarray] = {}

    def constant(self, values: object, dtype: object) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), f"k{len(self.weights)}"))
        return self.weights[-1].name

    def codes(self, shape: tuple[int, ...], dtype: str, name: str) -> str:
        """Live codes with both ends of their range among them."""
        limits = np.iinfo(dtype)
        values = self.rng.integers(limits.min, limits.max + 1, shape)
        ends = self.rng.random(shape)
        values = np.where(ends < 0.15, limits.min, np.where(ends > 0.85, limits.max, values))
        self.feeds[name] = values.astype(dtype)
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def finish(self, op: str, domain: str, inputs: list[str], kind: int, **attributes: object) -> Layer:
        node = helper.make_node(op, inputs, ["y"], "node", domain=domain, **attributes)
        graph = helper.make_graph([node], "one", self.inputs, [onnx.ValueInfoProto(name="y")], self.weights)
        graph.output[0].type.tensor_type.elem_type = kind
        imports = [helper.make_opsetid("", 17), helper.make_opsetid(CONTRIB, 1)]
        return Layer(helper.make_model(graph, opset_imports=imports, ir_version=8), self.feeds)


def run(layer: Layer) -> np.ndarray:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = ort.InferenceSession(layer.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, layer.feeds)[0]


def check(layer: Layer, tmp: Path | None = None) -> tuple[int, int]:
    """The emulator's codes are the kernel's, or it is explained why not. Returns how many differ, of how many."""
    table, integer = build_table(layer.model)
    path = (tmp or Path("/nowhere")) / "table.json"
    if tmp is not None:
        save_table(table, path)
        value = load_table(path, layer.model)
    else:
        value = as_json(table)
    emulated = emulator.Emulator(integer, value)
    result = emulated.compute(integer.graph.node[0], layer.feeds)
    theirs = run(layer)
    entry = value["entries"][0]
    if entry.get("output") is None:
        # A float of the exact sum: int32 to float, one product of scales, one of both.
        assert np.all(np.abs(result.codes - theirs) <= 4 * 2.0**-24 * np.abs(theirs))
        return 0, theirs.size
    different, _ = emulator.explain(result, theirs, entry["output"]["zero_point"][0])
    return different, theirs.size


def as_json(table: object) -> dict:
    """What :func:`save_table` writes, without a file."""
    from relu_deploy.int8 import multipliers_table as module

    entries = [json.loads(json.dumps(module._entry_json(entry))) for entry in table.entries]
    return {"rounding": "half_even", "entries": entries, "moves": table.moves, "other": table.other}


@st.composite
def grids(draw, dtype):
    """Scale and zero point, the ends of the range included."""
    limits = np.iinfo(dtype)
    zero = draw(st.sampled_from([limits.min, limits.max, 0]) | st.integers(limits.min, limits.max))
    return draw(SCALES), zero


ACTIVATIONS = st.sampled_from(["uint8", "int8"])


@st.composite
def convolutions(draw):
    make = Builder(draw(st.integers(0, 2**32)))
    spatial, group = draw(st.sampled_from([1, 2, 2])), draw(st.sampled_from([1, 1, 2, 4]))
    depthwise = draw(st.booleans())
    per_group, made = (1, 1) if depthwise else (draw(st.integers(1, 5)), draw(st.integers(1, 3)))
    group = 8 if depthwise else group
    kernel = draw(st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial))
    strides = draw(st.lists(st.integers(1, 2), min_size=spatial, max_size=spatial))
    dilations = draw(st.lists(st.integers(1, 2), min_size=spatial, max_size=spatial))
    pads = draw(st.lists(st.integers(0, 2), min_size=2 * spatial, max_size=2 * spatial))
    size = draw(st.lists(st.integers(5, 9), min_size=spatial, max_size=spatial))
    dtype = draw(ACTIVATIONS)
    (x_scale, x_zero), (y_scale, y_zero) = draw(grids(dtype)), draw(grids(dtype))
    channels = group * made
    weight = make.rng.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, (channels, per_group, *kernel))
    many = draw(st.booleans())
    scales = np.float32(make.rng.uniform(2.0**-12, 2.0**-4, channels if many else ()))
    inputs = [
        make.codes((2, group * per_group, *size), dtype, "x"), make.constant(x_scale, np.float32),
        make.constant(x_zero, dtype), make.constant(weight, np.int8), make.constant(scales, np.float32),
        make.constant(np.zeros_like(scales), np.int8), make.constant(y_scale, np.float32), make.constant(y_zero, dtype),
    ]  # fmt: skip
    if draw(st.booleans()):
        inputs.append(make.constant(make.rng.integers(-(2**20), 2**20, channels), np.int32))
    attributes = {"kernel_shape": kernel, "strides": strides, "dilations": dilations, "group": group}
    automatic = draw(st.sampled_from(["NOTSET", "NOTSET", "VALID"]))
    attributes |= {"pads": pads} if automatic == "NOTSET" else {"auto_pad": automatic}
    return make.finish("QLinearConv", "", inputs, KINDS[dtype], **attributes)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_convolutions(layer):
    check(layer)


@st.composite
def products(draw):
    make = Builder(draw(st.integers(0, 2**32)))
    op = draw(st.sampled_from(["QLinearMatMul", "QGemm", "QGemm float", "MatMulIntegerToFloat"]))
    dtype = draw(ACTIVATIONS)
    rows, inner, columns = draw(st.integers(1, 5)), draw(st.integers(1, 70)), draw(st.integers(1, 9))
    across = op.startswith("QGemm") and draw(st.booleans())
    (x_scale, x_zero), (y_scale, y_zero) = draw(grids(dtype)), draw(grids(dtype))
    weight = make.rng.integers(-WEIGHT_MAX, WEIGHT_MAX + 1, (columns, inner) if across else (inner, columns))
    scales = np.float32(make.rng.uniform(2.0**-12, 2.0**-4, columns if draw(st.booleans()) else ()))
    lead = (2,) if op in ("QLinearMatMul", "MatMulIntegerToFloat") and draw(st.booleans()) else ()
    data = [make.codes((*lead, rows, inner), dtype, "x")]
    data += [make.constant(x_scale, np.float32), make.constant(x_zero, dtype)]
    right = [make.constant(weight, np.int8), make.constant(scales, np.float32)]
    right.append(make.constant(np.zeros_like(scales), np.int8))
    out = [make.constant(y_scale, np.float32), make.constant(y_zero, dtype)]
    kind = KINDS[dtype]
    if op == "QLinearMatMul":
        return make.finish(op, "", [*data, *right, *out], kind)
    if op == "MatMulIntegerToFloat":
        return make.finish(op, CONTRIB, [n for pair in zip(data, right, strict=True) for n in pair], 1)
    bias = make.constant(make.rng.integers(-(2**20), 2**20, columns), np.int32) if draw(st.booleans()) else ""
    if op == "QGemm":
        return make.finish("QGemm", CONTRIB, [*data, *right, bias, *out], kind, transB=int(across))
    return make.finish("QGemm", CONTRIB, [*data, *right, *([bias] if bias else [])], 1, transB=int(across))


@settings(max_examples=150, deadline=None)
@given(products())
def test_matrix_products(layer):
    check(layer)


@st.composite
def pairs(draw):
    make = Builder(draw(st.integers(0, 2**32)))
    dtype = draw(ACTIVATIONS)
    shape = (2, 3, draw(st.integers(1, 40)))
    other = draw(st.sampled_from([shape, (2, 3, 1), (1,), shape[2:]]))
    inputs = []
    for name, form in (("x", shape), ("z", other)):
        scale, zero = draw(grids(dtype))
        inputs += [make.codes(form, dtype, name), make.constant(scale, np.float32), make.constant(zero, dtype)]
    scale, zero = draw(grids(dtype))
    # Past 2^31 codes the conversion to int32 in ONNX Runtime's product of tensors wraps around.
    inputs += [make.constant(max(scale, 2.0**-6), np.float32), make.constant(zero, dtype)]
    return make.finish(draw(st.sampled_from(["QLinearAdd", "QLinearMul"])), CONTRIB, inputs, KINDS[dtype])


@settings(max_examples=200, deadline=None)
@given(pairs())
@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="on ARM, ONNX Runtime's kernel of QLinearAdd has mantissas of 22 bits, which this bound is not for",
)
def test_sums_and_products_of_tensors(layer):
    check(layer)


@st.composite
def pools(draw):
    make = Builder(draw(st.integers(0, 2**32)))
    dtype = draw(ACTIVATIONS)
    (x_scale, x_zero), (y_scale, y_zero) = draw(grids(dtype)), draw(grids(dtype))
    shape = (2, 3, draw(st.integers(4, 9)), draw(st.integers(4, 9)))
    inputs = [
        make.codes(shape, dtype, "x"), make.constant(x_scale, np.float32), make.constant(x_zero, dtype),
        make.constant(y_scale, np.float32), make.constant(y_zero, dtype),
    ]  # fmt: skip
    kind = KINDS[dtype]
    if draw(st.booleans()):
        # The kernel refuses factors outside of 2^-32 to 2^8.
        inputs[3] = make.constant(max(y_scale, x_scale / 200), np.float32)
        return make.finish("QLinearGlobalAveragePool", CONTRIB, inputs, kind)
    kernel = draw(st.lists(st.integers(2, 3), min_size=2, max_size=2))
    return make.finish(
        "QLinearAveragePool", CONTRIB, inputs, kind, kernel_shape=kernel,
        strides=draw(st.lists(st.integers(1, 2), min_size=2, max_size=2)),
        pads=draw(st.lists(st.integers(0, 1), min_size=4, max_size=4)), ceil_mode=draw(st.integers(0, 1)),
        count_include_pad=draw(st.integers(0, 1)),
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(pools())
def test_means(layer):
    check(layer)


@st.composite
def others(draw):
    make = Builder(draw(st.integers(0, 2**32)))
    dtype = draw(ACTIVATIONS)
    op = draw(st.sampled_from(["QLinearLeakyRelu", "QLinearSigmoid", "QLinearConcat"]))
    (x_scale, x_zero), (y_scale, y_zero) = draw(grids(dtype)), draw(grids(dtype))
    if op == "QLinearSigmoid":
        y_scale = max(y_scale, 2.0**-9)  # 1 / 512 and more: the whole output fits the codes at least twice
    data = [make.codes((3, 120), dtype, "x"), make.constant(x_scale, np.float32), make.constant(x_zero, dtype)]
    out = [make.constant(y_scale, np.float32), make.constant(y_zero, dtype)]
    kind = KINDS[dtype]
    if op == "QLinearConcat":
        scale, zero = draw(grids(dtype))
        more = [make.codes((3, 40), dtype, "z"), make.constant(scale, np.float32), make.constant(zero, dtype)]
        return make.finish(op, CONTRIB, [*out, *data, *more], kind, axis=draw(st.sampled_from([1, -1])))
    alpha = draw(st.sampled_from([0.0, 0.01, 1.0, -0.5]) | st.floats(-2, 2, width=32))
    return make.finish(op, CONTRIB, [*data, *out], kind, **({"alpha": alpha} if op == "QLinearLeakyRelu" else {}))


@settings(max_examples=150, deadline=None)
@given(others())
def test_functions_and_joins(layer):
    check(layer)


def one_layer(*, scale: float = 0.25, weight: float = 0.5, out: float = 1.0, zero: int = 0) -> Layer:
    """x (1, 8) by a diagonal of weights 2: factor 1/8 with the defaults, sums 2 x."""
    make = Builder(0)
    make.codes((1, 8), "uint8", "x")
    make.feeds["x"][:] = [[0, 2, 4, 6, 10, 14, 100, 255]]
    inputs = [
        "x", make.constant(scale, np.float32), make.constant(0, np.uint8), make.constant(2 * np.eye(8), np.int8),
        make.constant(weight, np.float32), make.constant(0, np.int8), make.constant(out, np.float32),
        make.constant(zero, np.uint8),
    ]  # fmt: skip
    return make.finish("QLinearMatMul", "", inputs, 2)


def test_ties_go_to_even_as_in_onnx_runtime(tmp_path):
    """Factor 1/8 on sums 0, 4, 8, 12, 20, 28: 0, 0.5, 1, 1.5, 2.5, 3.5."""
    layer = one_layer()
    assert run(layer).tolist() == [[0, 0, 1, 2, 2, 4, 25, 64]]
    assert check(layer, tmp_path) == (0, 8)


def test_a_nearly_dead_output_saturates():
    """Factor 2^47: any sum is beyond every code. The multiplier says so with what it has."""
    layer = one_layer(out=2.0**-50, zero=3)
    row = build_table(layer.model)[0].entries[0].multipliers[0][0]
    assert (row.mantissa, row.shift) == (2**31 - 1, 0)
    assert check(layer) == (0, 8)


def test_a_factor_too_small_for_64_bits_gives_zero():
    layer = one_layer(scale=2.0**-40, weight=2.0**-20, zero=3)
    row = build_table(layer.model)[0].entries[0].multipliers[0][0]
    assert row.shift > 62
    assert check(layer) == (0, 8)
    assert (run(layer) == 3).all()


def test_the_proof_refuses_codes_that_are_wrong():
    """Negative case: one code off by one where no tie is near, and one off by two."""
    layer = one_layer(scale=0.3)
    table, integer = build_table(layer.model)
    result = emulator.Emulator(integer, as_json(table)).compute(integer.graph.node[0], layer.feeds)
    for off in (1, 2):
        wrong = result.codes.copy()
        wrong[0, 6] += off
        with pytest.raises(AssertionError):
            emulator.explain(result, wrong, 0)


@pytest.mark.parametrize("change", ["mantissa", "shift", "zero_point", "bias"])
def test_the_emulator_sees_a_wrong_table(change):
    """Negative case: a table that is off in any of its numbers is found out."""
    make = Builder(1)
    inputs = [
        make.codes((1, 4, 6, 6), "uint8", "x"), make.constant(0.02, np.float32), make.constant(7, np.uint8),
        make.constant(make.rng.integers(-63, 64, (3, 4, 3, 3)), np.int8), make.constant(0.01, np.float32),
        make.constant(0, np.int8), make.constant(0.05, np.float32), make.constant(128, np.uint8),
        make.constant([100, -3000, 20], np.int32),
    ]  # fmt: skip
    layer = make.finish("QLinearConv", "", inputs, 2, kernel_shape=[3, 3])
    assert check(layer)[0] == 0
    table, integer = build_table(layer.model)
    value = as_json(table)
    entry = value["entries"][0]
    if change == "bias":
        entry["bias"][1] += 500
        del entry["accumulator"]
    elif change == "zero_point":
        entry["inputs"][0]["zero_point"] = [8]
        del entry["accumulator"]
    else:
        entry["multipliers"][0][change][0] += 1 if change == "shift" else 1 << 25
    result = emulator.Emulator(integer, value).compute(integer.graph.node[0], layer.feeds)
    with pytest.raises(AssertionError):
        emulator.explain(result, run(layer), 128)


def test_accumulators_are_the_worst_that_inputs_can_do():
    """The bound is reached by the input that is made for it, and the bias counts."""
    make = Builder(2)
    weight = make.rng.integers(-127, 128, (40, 3))
    inputs = [
        make.codes((1, 40), "uint8", "x"), make.constant(1, np.float32), make.constant(100, np.uint8),
        make.constant(weight, np.int8), make.constant(1, np.float32), make.constant(0, np.int8),
        make.constant([1 << 20, -5, 0], np.int32), make.constant(1, np.float32), make.constant(0, np.uint8),
    ]  # fmt: skip
    found = build_table(make.finish("QGemm", CONTRIB, inputs, 2).model)[0].entries[0].accumulator
    most = np.where(weight > 0, 155 * weight, -100 * weight).sum(axis=0)
    least = np.where(weight > 0, -100 * weight, 155 * weight).sum(axis=0)
    assert found.high == max(most[0] + (1 << 20), *most[1:])
    assert found.low == min(*least, least[1] - 5)
    assert found.bits == 1 + max(int(found.high).bit_length(), int(-found.low - 1).bit_length())


def test_a_sum_too_long_for_int32_is_said_so():
    """70,000 products of 255 and 127 do not fit 32 bits."""
    make = Builder(3)
    inputs = [
        make.codes((1, 70000), "uint8", "x"), make.constant(1, np.float32), make.constant(0, np.uint8),
        make.constant(np.full((70000, 1), 127), np.int8), make.constant(1, np.float32), make.constant(0, np.int8),
        make.constant(1, np.float32), make.constant(0, np.uint8),
    ]  # fmt: skip
    found = build_table(make.finish("QLinearMatMul", "", inputs, 2).model)[0].entries[0].accumulator
    assert (found.high, found.bits, found.int32) == (70000 * 255 * 127, 33, False)


def test_an_open_mean_is_divided_by_the_number_of_elements():
    """Height and width that the file does not say: one factor, and a division."""
    make = Builder(4)
    inputs = [
        make.codes((1, 3, 5, 7), "uint8", "x"), make.constant(0.1, np.float32), make.constant(9, np.uint8),
        make.constant(0.07, np.float32), make.constant(3, np.uint8),
    ]  # fmt: skip
    layer = make.finish("QLinearGlobalAveragePool", CONTRIB, inputs, 2)
    for axis, name in ((2, "H"), (3, "W")):
        layer.model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    entry = build_table(layer.model)[0].entries[0]
    assert entry.counts is None
    assert entry.accumulator is None
    assert entry.multipliers[0][0] == multiplier(Fraction(float(np.float32(0.1))) / Fraction(float(np.float32(0.07))))
    check(layer)


def test_a_table_belongs_to_its_network(tmp_path):
    layer, other = one_layer(), one_layer(scale=0.5)
    table, _ = build_table(layer.model)
    path = tmp_path / "table.json"
    save_table(table, path)
    assert load_table(path, layer.model)["version"] == 1
    with pytest.raises(QuantizationError, match="belongs to another network"):
        load_table(path, other.model)
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(QuantizationError, match="version 99"):
        load_table(path, layer.model)
    path.write_text("[]")
    with pytest.raises(QuantizationError, match="no table"):
        load_table(path, layer.model)
    path.write_text('{"format":')
    with pytest.raises(FileError, match="not valid JSON"):
        load_table(path, layer.model)


def test_numbers_survive_the_file(tmp_path):
    """Scales are float32 numbers and come back as such."""
    layer = one_layer(scale=math.pi, weight=math.e / 100)
    save_table(build_table(layer.model)[0], tmp_path / "t.json")
    entry = load_table(tmp_path / "t.json", layer.model)["entries"][0]
    assert np.float32(entry["inputs"][0]["scale"][0]) == np.float32(math.pi)
    assert float(np.float32(entry["weight"]["scale"][0])) == entry["weight"]["scale"][0]
