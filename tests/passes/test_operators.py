"""What a region computes, against the expected outputs of the standard's own single-operator models."""

from __future__ import annotations

import functools

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from relu_deploy.graph import import_graph
from relu_deploy.passes.floats import sample
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.lower import LOWERINGS, UnsupportedError
from relu_deploy.passes.operands import one_axis
from relu_deploy.passes.program import Program
from relu_deploy.passes.region import program_between
from relu_deploy.passes.shapes import annotate

# Draws have no expected output; of a cast the test is that it gives what numpy gives, which here is refused.
_LEFT_OUT = ("Bernoulli", "RandomUniformLike")


@functools.cache
def cases() -> dict[str, object]:
    """Single-node models with one operator that regions know, by name; the operators' expansions into functions too."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its casts overflow on purpose
        from onnx.backend.test.case.node import collect_testcases

        collected = collect_testcases(None)
    found = {}
    for case in collected:
        ops = {node.op_type for node in case.model.graph.node}
        kinds = {value.type.WhichOneof("value") for value in (*case.model.graph.input, *case.model.graph.output)}
        if kinds == {"tensor_type"} and ops <= set(LOWERINGS) and not ops & set(_LEFT_OUT) and case.model.graph.input:
            found[case.name] = case
    return found


def with_one_live_input(model: onnx.ModelProto, inputs: list[np.ndarray], live: int) -> onnx.ModelProto:
    """The model with all inputs but one as initializers; of side inputs that vary along several axes one number."""
    fixed = onnx.ModelProto()
    fixed.CopyFrom(model)
    names = [value.name for value in model.graph.input]
    keep = model.graph.input[live]
    del fixed.graph.input[:]
    fixed.graph.input.append(keep)
    for place, (name, value) in enumerate(zip(names, inputs, strict=True)):
        if place != live:
            array = np.asarray(value)
            array = array if one_axis(array.shape) else array.reshape(-1)[0].reshape(())
            fixed.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return fixed


def program_of(model: onnx.ModelProto) -> Program | None:
    graph = import_graph(model)
    annotate(graph, model)
    functions = Functions(graph)
    cuts = [c for c in functions.forest.cuts.values() if c.tensor.name == model.graph.output[0].name and c.parent]
    if not cuts:
        return None
    top = cuts[0]
    while top.parent is not None:
        top = top.parent
    try:
        return program_between(top, cuts[0], same_shape=False)
    except UnsupportedError:
        return None


def expected(model: onnx.ModelProto, x: np.ndarray, given: np.ndarray | None) -> np.ndarray | None:
    """The output that the standard gives, or that its reference implementation computes."""
    if given is None:
        try:
            with np.errstate(all="ignore"):
                given = ReferenceEvaluator(model).run(None, {model.graph.input[0].name: x})[0]
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return None
    return np.asarray(given, dtype=np.float64)


def test_there_are_cases_enough():
    """Of every operator that regions know and that the standard has a model for."""
    covered = {node.op_type for case in cases().values() for node in case.model.graph.node}
    assert len(cases()) > 150
    assert set(LOWERINGS) - covered <= {*_LEFT_OUT, "Dropout"}


def test_every_operator_is_evaluated_as_the_standard_defines_it():
    checked: set[str] = set()
    for name, case in cases().items():
        inputs, outputs = (list(part) for part in case.data_sets[0])
        for live in range(len(case.model.graph.input)):
            x = np.asarray(inputs[live])
            if x.dtype.kind not in "fb" or x.size == 0:
                continue
            model = with_one_live_input(case.model, inputs, live)
            program = program_of(model)
            if program is None or program.constants.shape[1] > 1:
                continue
            want = expected(model, x, outputs[0] if len(inputs) == 1 else None)
            if want is None or want.shape != x.shape:
                continue  # a side input of higher rank
            got = sample(program, program.constants[:, 0], x.astype(np.float64).reshape(-1)).reshape(x.shape)
            seen = np.isfinite(want) & np.isfinite(got)
            tolerance = 2e-2 if x.dtype == np.float16 else 1e-5
            assert seen.any() or not np.isfinite(want).any(), name
            np.testing.assert_allclose(got[seen], want[seen], rtol=tolerance, atol=tolerance, err_msg=name)
            checked |= {node.op_type for node in case.model.graph.node}
    assert len(checked) > 50, set(LOWERINGS) - checked


def test_channels_are_evaluated_each_with_its_constants():
    """PRelu and Add with one entry a channel, along the last axis and along another one."""
    for shape, column in (((2, 3, 4), (4,)), ((2, 3, 4), (3, 1)), ((2, 3, 4, 5), (3, 1, 1))):
        random = np.random.default_rng(0)
        slope, x = random.normal(size=column).astype(np.float32), random.normal(size=shape).astype(np.float32)
        full, part = (",".join(map(str, size)) for size in (shape, column))
        model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[{full}] x, float[{part}] s) => (float[{full}] y) {{ y = PRelu(x, s) }}""")
        program = program_of(with_one_live_input(model, [x, slope], 0))
        assert program is not None
        axis = -1 if len(column) == 1 else -len(column)
        assert program.axis == axis
        want = np.where(x < 0, slope * x, x)
        for channel, (values, expected) in enumerate(
            zip(np.moveaxis(x, axis, 0), np.moveaxis(want, axis, 0), strict=True)
        ):
            got = sample(program, program.constants[:, channel], values.astype(np.float64).reshape(-1))
            np.testing.assert_allclose(got, expected.reshape(-1), rtol=1e-6)
