from __future__ import annotations

import copy

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from calib.fingerprint import combine, model_fingerprint, sample_hash

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[N, 3] x) => (float[N, 3] y) <float[3] w = {1.5, 2.5, 3.5}, int64[1] k = {7}>
{ [first] t = Add(x, w) [second] u = LeakyRelu<alpha = 0.1>(t) y = Relu(u) }"""


@pytest.fixture
def model():
    return onnx.parser.parse_model(TEXT)


def test_it_ignores_storage_names_of_nodes_docs_and_metadata(model):
    before = model_fingerprint(model)
    changed = copy.deepcopy(model)
    for tensor in changed.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        assert tensor.raw_data
    assert not model.graph.initializer[0].raw_data
    changed.graph.initializer.reverse()
    changed.graph.node[0].name = "other"
    changed.graph.node[0].doc_string = changed.doc_string = changed.graph.doc_string = "words"
    changed.graph.name = "another"
    changed.producer_name, changed.ir_version = "someone", 9
    changed.metadata_props.add(key="a", value="b")
    changed.opset_import[0].domain = "ai.onnx"
    assert model_fingerprint(changed) == before
    onnx.checker.check_model(changed)
    assert model_fingerprint(onnx.shape_inference.infer_shapes(model)) == before


def test_external_weights_hash_like_internal_ones(model, tmp_path):
    expected = model_fingerprint(model)
    for tensor in model.graph.initializer:  # only raw data is moved out
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert any(t.data_location == onnx.TensorProto.EXTERNAL for t in stored.graph.initializer)
    assert model_fingerprint(stored, base_dir=tmp_path) == expected
    assert model_fingerprint(onnx.load(tmp_path / "m.onnx")) == expected


def _set(path, value):
    def change(model):
        target = model
        for step in path[:-1]:
            target = target[step] if isinstance(step, int) else getattr(target, step)
        if isinstance(path[-1], int):
            target[path[-1]] = value
        else:
            setattr(target, path[-1], value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _set(("graph", "initializer", 0, "float_data", 1), 2.25),
        _set(("graph", "initializer", 0, "name"), "v"),
        _set(("graph", "node", 1, "attribute", 0, "f"), 0.2),
        _set(("graph", "node", 1, "op_type"), "Elu"),
        _set(("graph", "node", 1, "domain"), "my.domain"),
        _set(("graph", "node", 0, "output", 0), "t2"),
        _set(("opset_import", 0, "version"), 18),
        lambda model: model.graph.node[0].input.reverse(),
        lambda model: model.graph.output.add(name="t"),
        _set(("graph", "input", 0, "type", "tensor_type", "shape", "dim", 1, "dim_value"), 4),
        lambda model: model.graph.node.pop(),
    ],
)
def test_it_changes_with_what_is_computed(model, change):
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_subgraphs_and_tensor_attributes_count():
    def build(value):
        branch = [
            helper.make_graph(
                [helper.make_node("Constant", [], ["o"], value=numpy_helper.from_array(np.float32([v])))], "b", [],
                [helper.make_tensor_value_info("o", 1, [1])],
            )
            for v in (1.0, value)
        ]  # fmt: skip
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch[0], else_branch=branch[1])
        ends = [helper.make_tensor_value_info("c", 9, [])], [helper.make_tensor_value_info("y", 1, [1])]
        return helper.make_model(helper.make_graph([node], "g", *ends))

    assert model_fingerprint(build(2.0)) == model_fingerprint(build(2.0)) != model_fingerprint(build(3.0))


@pytest.mark.parametrize(
    "kind", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT4, onnx.TensorProto.BOOL]
)
def test_small_types_hash_alike_raw_and_typed(kind):
    raw, typed = (helper.make_tensor("w", kind, [3], [0, 1, 1]) for _ in range(2))
    raw.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(raw), "w"))
    assert raw.raw_data
    assert not typed.raw_data
    graphs = [helper.make_graph([], "g", [], [], [tensor]) for tensor in (raw, typed)]
    assert len({model_fingerprint(helper.make_model(graph)) for graph in graphs}) == 1


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.randoms())
def test_data_fingerprint_ignores_order_and_grouping(values, random):
    hashes = [sample_hash({"x": np.array([value])}) for value in values]
    shuffled = random.sample(hashes, len(hashes))
    cut = random.randint(0, len(hashes))
    assert combine(*hashes) == combine(combine(*shuffled[:cut]), combine(*shuffled[cut:]))


def test_sample_hash_tells_shape_type_name_and_value():
    one = np.zeros((2, 3), np.float32)
    feeds = [{"x": one}, {"y": one}, {"x": one.T}, {"x": one.astype("f8")}, {"x": one + 1}, {"x": one, "y": one}]
    assert len({sample_hash(f) for f in feeds}) == len(feeds)
    assert sample_hash({"x": np.asfortranarray(one)}) == sample_hash({"x": one})
