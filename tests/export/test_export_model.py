"""Real exports of small networks, and the ones that have to be refused."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: pip install 'relu-deploy[torch]'")
import onnxruntime as ort  # noqa: E402
from torch import nn  # noqa: E402

from relu_deploy.errors import CheckFailedError, ExportError, FileError  # noqa: E402
from relu_deploy.export import DynamicAxis, ExampleInput, export_model  # noqa: E402
from relu_deploy.graph import load_model, opset  # noqa: E402
from relu_deploy.nn.blend import Blend  # noqa: E402

pytestmark = pytest.mark.torch

IMAGE = ExampleInput("image", (1, 3, 8, 8))
BATCH = DynamicAxis("image", 0, 1, 16)
EXPORTERS = pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])


def convolutional():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.SiLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(216, 4)
    )
    model(torch.randn(32, 3, 8, 8) * 3 + 1)  # moves BatchNorm's statistics, so that training and evaluation differ
    return model


def run_file(path, **feeds):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)


def shapes(values):
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}


@EXPORTERS
def test_batchnorm_and_dropout_in_evaluation_mode_with_a_dynamic_batch(tmp_path, exporter):
    model = convolutional().train()
    report = export_model(model, [IMAGE], tmp_path / "m.onnx", dynamic=[BATCH], exporter=exporter, source="x/y.py:net")
    assert all(module.training for module in model.modules()), "the model is given back as it was"
    loaded = load_model(tmp_path / "m.onnx")
    assert (opset(loaded), report.opset) == (20, 20)
    assert loaded.ir_version <= 10
    assert shapes(loaded.graph.input) == {"image": ["batch", 3, 8, 8]}
    assert shapes(loaded.graph.output) == {"output": ["batch", 4]}
    assert {p.key: p.value for p in loaded.metadata_props} | {"producer": ""} == {
        "producer": "", "source": "y.py:net", "exporter": exporter,
    }  # fmt: skip
    assert "5.weight" in {tensor.name for tensor in loaded.graph.initializer}
    assert report.samples == 5  # three kinds of values at the example, the middle and the largest batch
    assert 0 <= report.outputs[0].worst <= report.outputs[0].limit
    images = np.random.default_rng(1).standard_normal((7, 3, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run_file(tmp_path / "m.onnx", image=images)[0], expected, atol=1e-5)  # float32 rounding


def test_the_file_tells_nothing_of_this_machine(tmp_path):
    export_model(convolutional(), [IMAGE], tmp_path / "m.onnx")
    text = (tmp_path / "m.onnx").read_bytes()
    assert b"site-packages" not in text
    assert b".py" not in text


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(100, 8)

    def forward(self, ids, mask, scale=2.0):
        hidden = self.table(ids) * mask[..., None]
        return {"hidden": hidden, "ids": ids + 1, "pair": (hidden.sum(1) * scale, [hidden.amax(1), None, 5])}


@EXPORTERS
def test_integers_two_inputs_and_nested_outputs_by_name(tmp_path, exporter):
    inputs = [ExampleInput("mask", (1, 6)), ExampleInput("ids", (1, 6), "int64", 0, 99)]  # by name, so in any order
    axes = [DynamicAxis(name, axis, 1, 9) for name in ("mask", "ids") for axis in (0, 1)]
    report = export_model(TwoInputs(), inputs, tmp_path / "m.onnx", dynamic=axes, exporter=exporter)
    loaded = load_model(tmp_path / "m.onnx")
    assert [check.name for check in report.outputs] == ["hidden", "ids_out", "pair_0", "pair_1_0"]
    assert shapes(loaded.graph.input) == {"mask": ["batch", "mask_1"], "ids": ["batch", "mask_1"]}
    assert report.outputs[1].limit == 0, "integers must be equal"
    assert any("pair_1_2 = 5" in note for note in report.notes)
    ids = np.arange(10).reshape(2, 5)
    assert np.array_equal(run_file(tmp_path / "m.onnx", mask=np.ones((2, 5), np.float32), ids=ids)[1], ids + 1)


def test_integers_without_a_range_fit_any_table_and_too_large_ones_are_told(tmp_path):
    class Lookup(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(3, 2)

        def forward(self, ids):
            return self.table(ids)

    export_model(Lookup(), [ExampleInput("ids", (4,), "int32")], tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"the torch model itself fails at ids=4.*IndexError"):
        export_model(Lookup(), [ExampleInput("ids", (4,), "int32", 3, 9)], tmp_path / "n.onnx")


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_a_blend_is_exported_as_it_stands(tmp_path, gamma):
    model = nn.Sequential(nn.Linear(4, 4), Blend(nn.SiLU(), gamma=gamma))
    export_model(model, [ExampleInput("x", (2, 4))], tmp_path / "m.onnx")
    ops = {node.op_type for node in load_model(tmp_path / "m.onnx").graph.node}
    assert {"Relu", "Sigmoid", "Add"} <= ops


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class FixedSize(nn.Module):
    def forward(self, image):
        return image.reshape(image.shape[0].__int__(), -1).reshape(-1, 3, 64).sum(-1) * float(image.shape[0])


def refused(tmp_path, error, match, model, inputs, **options):
    out = tmp_path / "m.onnx"
    out.write_bytes(b"an older file")
    with pytest.raises(error, match=match) as caught:
        export_model(model, inputs, out, **options)
    assert out.read_bytes() == b"an older file"
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]
    return caught.value


X = ExampleInput("x", (2, 4))


def test_a_branch_that_tracing_fixed_is_refused(tmp_path):
    error = refused(
        tmp_path, CheckFailedError, "output 'output'.*differs.*worst error", Branch(), [X], exporter="torchscript"
    )
    assert error.exit_code == 1
    assert "the exporter had warned" in (error.hint or "")


def test_a_branch_that_dynamo_cannot_take_is_told_with_the_fix(tmp_path):
    error = refused(tmp_path, ExportError, "dynamo exporter failed on Branch", Branch(), [X])
    assert "torch.where" in (error.hint or "")


@EXPORTERS
def test_random_numbers_are_refused(tmp_path, exporter):
    refused(
        tmp_path,
        CheckFailedError,
        "output 'output' of the model changes from run to run",
        Noise(),
        [X],
        exporter=exporter,
    )


def test_a_size_that_tracing_fixed_is_refused(tmp_path):
    refused(
        tmp_path,
        CheckFailedError,
        "output 'output'|does not run",
        FixedSize(),
        [IMAGE],
        dynamic=[BATCH],
        exporter="torchscript",
    )


def test_a_fixed_size_is_refused_by_dynamo_with_the_fix(tmp_path):
    class Fixed(nn.Module):
        def forward(self, image):
            return image.reshape(2, 192)

    spec = ExampleInput("image", (2, 3, 8, 8))
    error = refused(tmp_path, ExportError, "dynamo exporter failed|cannot be dynamic", Fixed(), [spec], dynamic=[BATCH])
    assert "--dynamic" in (error.hint or "")


def test_a_tolerance_of_zero_is_missed_by_rounding(tmp_path):
    refused(tmp_path, CheckFailedError, "worst error", convolutional(), [IMAGE], rtol=0.0, atol=0.0)


def test_outputs_that_are_never_finite_cannot_be_checked(tmp_path):
    class Nothing(nn.Module):
        def forward(self, x):
            return x / 0.0 * 0.0

    refused(tmp_path, CheckFailedError, "only NaN, Inf or nothing", Nothing(), [X], exporter="torchscript")


@pytest.mark.parametrize(
    ("inputs", "options", "match"),
    [
        ([ExampleInput("ids", (1, 6), "int64")], {}, "no input is given for mask"),
        ([ExampleInput("a", (1,)), ExampleInput("ids", (1, 6), "int64")], {}, "is number 2 of the inputs and number 1"),
        ([ExampleInput(n, (1, 6)) for n in "abcd"], {}, "takes 3 inputs"),
        ([ExampleInput("ids", (1, 6)), ExampleInput("mask", (1, 6))], {}, "the torch model itself fails"),
        ([X], {"opset": 9}, "cannot write opset 9"),
        ([X], {"opset": 21, "exporter": "torchscript"}, "cannot write opset 21"),
        ([X], {"exporter": "none"}, "no exporter 'none'"),
        ([X], {"rtol": float("nan")}, "rtol is nan"),
    ],
)
def test_bad_calls(tmp_path, inputs, options, match):
    refused(tmp_path, ExportError, match, TwoInputs(), inputs, **options)


def test_results_without_tensors_and_of_foreign_classes(tmp_path):
    class Returns(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            return self.value

    refused(tmp_path, ExportError, "returns no tensor", Returns(3), [X])
    refused(tmp_path, ExportError, "returns a object", Returns(object()), [X])


def test_a_folder_that_is_not_there_is_told_before_any_work(tmp_path):
    with pytest.raises(FileError, match="is not a folder"):
        export_model(convolutional(), [IMAGE], tmp_path / "none" / "m.onnx")


@EXPORTERS
def test_older_and_newer_opsets(tmp_path, exporter):
    wanted = 18 if exporter == "dynamo" else 13
    export_model(convolutional(), [IMAGE], tmp_path / "m.onnx", opset=wanted, exporter=exporter)
    assert opset(onnx.load(tmp_path / "m.onnx")) == wanted


def test_a_model_in_channels_last_is_exported_as_the_same_graph(tmp_path):
    """torch 2.13's dynamo exporter writes shape arithmetic and gathers for weights whose strides are not the usual."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    export_model(model, [IMAGE], tmp_path / "plain.onnx", dynamic=[BATCH])
    model.to(memory_format=torch.channels_last)
    export_model(model, [IMAGE], tmp_path / "last.onnx", dynamic=[BATCH])
    plain, last = (load_model(tmp_path / name).graph.node for name in ("plain.onnx", "last.onnx"))
    assert [node.op_type for node in last] == [node.op_type for node in plain]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last), "the caller's model is left as it was"
