"""A learned activation is exported as one node that every runtime can run."""

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest

from relu_deploy.ops import is_pwlu, read_pwlu

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")

from torch import nn  # noqa: E402

from relu_deploy.export import export_model  # noqa: E402
from relu_deploy.export.specs import DynamicAxis, ExampleInput  # noqa: E402
from relu_deploy.nn.pwlu import PWLU  # noqa: E402

pytestmark = pytest.mark.torch


def trained(unit: PWLU) -> PWLU:
    """Parameters as if trained; one channel's boundaries have crossed."""
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        unit.right[0] = unit.left[0] - 1
    return unit


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), trained(PWLU(8)), nn.Conv2d(8, 8, 3), trained(PWLU(None, intervals=5)), nn.Flatten(2),
        nn.LayerNorm(64), trained(PWLU(64, channel_axis=-1)).to_static(),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 18), ("dynamo", 20), ("torchscript", 15)])
def test_each_unit_is_one_node(tmp_path: Path, exporter: Literal["dynamo", "torchscript"], opset: int) -> None:
    model, out = network(), tmp_path / "model.onnx"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    dynamic = [DynamicAxis("x", 0, 1, 8)]
    report = export_model(
        model, [ExampleInput("x", (2, 3, 12, 12))], out, dynamic=dynamic, exporter=exporter, opset=opset
    )
    assert not [note for note in report.notes if "warned" in note]
    graph = gs.import_onnx(onnx.load(out))
    units = [node for node in graph.nodes if is_pwlu(node)]
    assert [read_pwlu(node).channels for node in units] == [8, 1, 64]
    assert [read_pwlu(node).intervals for node in units] == [16, 5, 16]
    x = torch.randn(3, 3, 12, 12) * 3
    y = ort.InferenceSession(str(out)).run(None, {"x": x.numpy()})[0]
    # Tables in float32 on both sides, relative to the largest output.
    np.testing.assert_allclose(y, model(x).detach().numpy(), rtol=0, atol=1e-5 * float(np.abs(y).max()))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_half_precision_keeps_parameters_in_float32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Flatten(), trained(PWLU(12))).half().eval()
    report = export_model(model, [ExampleInput("x", (2, 12), "float16")], tmp_path / "model.onnx")
    assert report.outputs[0].dtype == "float16"
    (node,) = [n for n in gs.import_onnx(onnx.load(report.path)).nodes if is_pwlu(n)]
    assert {tensor.dtype for tensor in node.inputs[1:]} == {np.dtype(np.float32)}
    assert model[1].left.dtype == torch.float16


def test_an_opset_too_old_for_a_definition_gets_plain_operators(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), trained(PWLU(8))).eval()
    out = tmp_path / "model.onnx"
    export_model(model, [ExampleInput("x", (2, 3, 12, 12))], out, exporter="torchscript", opset=13)
    exported = onnx.load(out)
    assert not exported.functions
    assert {node.domain for node in exported.graph.node} == {""}


def test_phase_one_is_a_relu(tmp_path: Path) -> None:
    unit = PWLU(8)
    unit.collect()
    out = tmp_path / "model.onnx"
    export_model(nn.Sequential(nn.Conv2d(3, 8, 3), unit).eval(), [ExampleInput("x", (2, 3, 12, 12))], out)
    assert [node.op_type for node in onnx.load(out).graph.node] == ["Conv", "Relu"]
