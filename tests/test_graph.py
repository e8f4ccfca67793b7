import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from relu_deploy import graph as files
from relu_deploy.errors import FileError, ModelError

RELU = '<ir_version: 8, opset_import: ["": 17]> g (float[1, 2] x) => (float[1, 2] y) { y = Relu(x) }'


@pytest.fixture
def model(residual_model):
    return residual_model()


@pytest.fixture
def external(tmp_path, residual_model):
    """A model whose weights lie in ``weights.bin`` beside it."""
    path = tmp_path / "model" / "net.onnx"
    path.parent.mkdir()
    onnx.save(residual_model(), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


def relocate(path, location):
    """Point every external tensor of a file at another location."""
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    path.write_bytes(model.SerializeToString())


def test_round_trip_keeps_everything(tmp_path, model):
    model.metadata_props.add(key="source", value="here")
    files.save_model(model, tmp_path / "a.onnx")
    loaded = files.load_model(tmp_path / "a.onnx")
    assert loaded == model
    through = files.export_graph(files.import_graph(loaded), loaded)
    assert through.metadata_props == model.metadata_props
    assert [n.name for n in through.graph.node] == [n.name for n in model.graph.node]
    assert through.ir_version == model.ir_version


def test_external_data_is_read_into_the_model(external, model):
    loaded = files.load_model(external)
    for left, right in zip(loaded.graph.initializer, model.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(left), numpy_helper.to_array(right))


def test_large_models_get_external_data(tmp_path, model, monkeypatch):
    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", (1 << 24) + 100)
    files.save_model(model, tmp_path / "big.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    monkeypatch.undo()
    loaded = files.load_model(tmp_path / "big.onnx")
    assert np.array_equal(
        numpy_helper.to_array(loaded.graph.initializer[0]), numpy_helper.to_array(model.graph.initializer[0])
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "holds no graph"), (b"\x00" * 64, "not an ONNX file"), (b"hello, world", "not an ONNX file")],
)
def test_not_an_onnx_file(tmp_path, content, message):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        files.load_model(path)


def test_truncated_at_every_length_is_refused_or_whole(tmp_path, model):
    whole, path = model.SerializeToString(), tmp_path / "cut.onnx"
    for length in range(0, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        with pytest.raises(ModelError, match=r"cut\.onnx"):
            files.load_model(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        files.load_model(tmp_path / "none.onnx")
    with pytest.raises(FileError, match="is a folder"):
        files.load_model(tmp_path)


def test_external_data_missing(external):
    (external.parent / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"external data of tensor 'stem.weight' is missing") as caught:
        files.load_model(external)
    assert "copy the data file" in caught.value.hint


def test_external_data_cut_short(external):
    data = external.parent / "weights.bin"
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"cut short: weights.bin has 100 bytes"):
        files.load_model(external)


@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "sub/../../secret.bin", ""])
def test_external_data_outside_the_folder_is_not_read(external, location):
    (external.parent.parent / "secret.bin").write_bytes(b"\x00" * 100_000)
    relocate(external, location)
    with pytest.raises(ModelError, match="outside the folder of the model"):
        files.load_model(external)


def test_external_data_through_a_link_is_not_read(external):
    secret = external.parent.parent / "secret.bin"
    (external.parent / "weights.bin").rename(secret)
    (external.parent / "weights.bin").symlink_to(secret)
    with pytest.raises(ModelError, match="outside the folder of the model"):
        files.load_model(external)


def test_forged_external_length(external):
    model = onnx.load(external, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "length":
            entry.value = str(1 << 50)
    external.write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="cut short"):
        files.load_model(external)


def test_versions_out_of_range_are_named(tmp_path):
    path = tmp_path / "m.onnx"
    for change, message in (
        ({"ir_version": 99}, "IR version 99"),
        ({"opset": 6}, "opset 6"),
        ({"opset": 999}, "opset 999"),
    ):
        model = onnx.parser.parse_model(RELU)
        model.ir_version = change.get("ir_version", 8)
        model.opset_import[0].version = change.get("opset", 17)
        path.write_bytes(model.SerializeToString())
        with pytest.raises(ModelError, match=message):
            files.load_model(path)


def test_checker_failure_names_the_file(tmp_path):
    model = onnx.parser.parse_model(RELU)
    model.graph.node[0].op_type = "Rleu"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx is not a valid ONNX model: .*Rleu"):
        files.load_model(tmp_path / "m.onnx")


def test_outputs_without_a_shape_get_what_follows_from_the_network(tmp_path):
    model = onnx.parser.parse_model(RELU)
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "m.onnx")
    assert files.load_model(tmp_path / "m.onnx").graph.output[0].type.tensor_type.shape.dim[1].dim_value == 2
    model.graph.node[0].domain = "nobody"
    model.opset_import.append(helper.make_opsetid("nobody", 1))
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="'shape' of 'type' is required"):
        files.load_model(tmp_path / "m.onnx")


WRONG = """<ir_version: 8, opset_import: ["": 12]> g (float[N, T, 4] x) => (float[1, K] y)
{ s = Shape(x) [a] n = Gather(s, zero) [b] t = Gather(s, one) u = Unsqueeze<axes = [0]>(n) v = Unsqueeze<axes = [0]>(t)
  w = Concat<axis = 0>(u, v, four) y = Reshape(x, w) }"""


def test_outputs_declared_with_a_wrong_rank_are_mended_where_it_shows(tmp_path):
    """Runtimes pass over what a file says of its outputs; onnx's checker does not, once it can tell."""
    plain = onnx.parser.parse_model(RELU)
    plain.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 3
    onnx.save(plain, tmp_path / "a.onnx")
    (loaded,) = files.load_model(tmp_path / "a.onnx").graph.output
    assert [axis.dim_value for axis in loaded.type.tensor_type.shape.dim] == [1, 2]

    model = onnx.parser.parse_model(WRONG)
    for name, values in (("zero", 0), ("one", 1), ("four", [4])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    files.name_nodes(model.graph)
    before = model.SerializeToString(deterministic=True)
    lifted = files.convert_opset(model, lowest=19)
    assert model.SerializeToString(deterministic=True) == before
    assert len(lifted.graph.output[0].type.tensor_type.shape.dim) == 3
    onnx.checker.check_model(lifted, full_check=True)


def test_what_is_wrong_beside_a_declared_shape_is_still_refused(tmp_path):
    model = onnx.parser.parse_model(RELU)
    model.graph.output[0].type.tensor_type.shape.dim.add().dim_value = 3
    model.graph.node[0].op_type = "NoSuchOperator"
    declared = onnx.ValueInfoProto.FromString(model.graph.output[0].SerializeToString())
    with pytest.raises(ModelError):
        files.check_model(model, "it")
    assert model.graph.output[0] == declared


def test_failed_save_leaves_the_old_file(tmp_path, model, monkeypatch):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"precious")
    monkeypatch.setattr(onnx.ModelProto, "SerializeToString", lambda *a, **k: 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        files.save_model(model, path)
    assert path.read_bytes() == b"precious"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_weights_go_beside_what_a_link_points_to(tmp_path, model, monkeypatch):
    monkeypatch.setattr("calib.model.PROTOBUF_LIMIT", (1 << 24) + 100)
    (tmp_path / "real").mkdir()
    (tmp_path / "link.onnx").symlink_to("real/net.onnx")
    files.save_model(model, tmp_path / "link.onnx")
    assert sorted(p.name for p in (tmp_path / "real").iterdir()) == ["net.onnx", "net.onnx.data"]
    monkeypatch.undo()
    assert [t.name for t in files.load_model(tmp_path / "link.onnx").graph.initializer] == [
        t.name for t in model.graph.initializer
    ]


def test_save_where_it_cannot_be(tmp_path, model):
    with pytest.raises(FileError, match="is not a folder"):
        files.save_model(model, tmp_path / "none" / "m.onnx")
    with pytest.raises(FileError, match="it is a folder"):
        files.save_model(model, tmp_path)


def test_names_are_made_unique_also_inside_subgraphs():
    branch = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["t"], "same")], "b", [], [helper.make_empty_tensor_value_info("t")]
    )
    node = helper.make_node("If", ["c"], ["y"], "same", then_branch=branch, else_branch=branch)
    graph = helper.make_graph([node, helper.make_node("Relu", ["y"], ["z"])], "g", [], [])
    files.name_nodes(graph)
    names = [n.name for n in files.all_nodes(graph)]
    assert len(set(names)) == len(names)
    assert all(names)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 21])
def test_lifting_keeps_the_function(residual_model, opset, tmp_path):
    import onnxruntime

    model = residual_model(opset=opset)
    lifted = files.convert_opset(model, lowest=19)
    assert files.opset(lifted) == max(opset, 19)
    x = np.random.default_rng(0).normal(size=(1, 3, 16, 16)).astype(np.float32)
    first, second = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for m in (model, lifted)
    )
    assert np.array_equal(first, second)


def test_opset_that_cannot_be_lifted_says_so():
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 9]> '
        'g (float[1, 2] x) => (float[1, 2] y) { y = Upsample<mode="nearest">(x, s) }'
    )
    with pytest.raises(ModelError, match="uses opset 9 and cannot be lifted to 13"):
        files.convert_opset(model, lowest=13)


def test_lifting_the_opset_keeps_the_names_of_tensors():
    """The converter names the output of what it replaces anew; ranges measured before would no longer be found."""
    model = onnx.parser.parse_model(
        '<ir_version: 4, opset_import: ["": 9]> g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) '
        "<float[4] scales = {1, 1, 2, 2}> { [up] u = Upsample(x, scales) [act] y = Relu(u) }"
    )
    lifted = files.convert_opset(model, lowest=13)
    assert [node.op_type for node in lifted.graph.node if node.op_type != "Constant"] == ["Resize", "Relu"]
    (act,) = (node for node in lifted.graph.node if node.op_type == "Relu")
    assert list(act.input) == ["u"]
    onnx.checker.check_model(lifted, full_check=True)
