"""Every kind of ONNX file through ``relu-deploy rewrite``: it still passes the checker and computes the same.

The newest opset is the one that ONNX Runtime reads (tests/test_limits.py asks it).
"""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from calib.session import open_session
from relu_deploy.cli import main
from relu_deploy.graph import MAX_IR_VERSION, MAX_OPSET, opset

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None,
    reason="needs the extra: pip install 'relu-deploy[torch]'",
)


def through(source: Path) -> tuple[onnx.ModelProto, dict]:
    """Run the command on a file; the network it wrote, checked, and its report."""
    out, report = source.with_suffix(".out.onnx"), source.with_suffix(".json")
    result = CliRunner().invoke(main, ["rewrite", str(source), "-o", str(out), "--json", str(report)])
    assert result.exit_code == 0, result.output
    onnx.checker.check_model(out, full_check=True)
    return onnx.load(out), json.loads(report.read_text())


def same(before: onnx.ModelProto, after: onnx.ModelProto, feeds: dict[str, np.ndarray], *, rtol: float = 0) -> None:
    """Equal outputs, by name and shape; ``rtol`` is relative to the largest magnitude of each output."""
    old, new = open_session(before), open_session(after)
    assert [o.name for o in old.get_outputs()] == [o.name for o in new.get_outputs()]
    assert [i.name for i in old.get_inputs()] == [i.name for i in new.get_inputs()]
    for a, b in zip(old.run(None, feeds), new.run(None, feeds), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert np.abs(a.astype(np.float64) - b).max(initial=0) <= rtol * np.abs(a).max(initial=0)


def readable(after: onnx.ModelProto, before: onnx.ModelProto) -> None:
    """Nothing newer than what came in: a target that read the original reads the result."""
    assert after.ir_version == before.ir_version <= MAX_IR_VERSION
    assert opset(after) == opset(before) <= MAX_OPSET


def image(batch: int = 1, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).normal(size=(batch, 3, 16, 16)).astype(dtype)}


@pytest.mark.parametrize("batch", [1, "N"])
@pytest.mark.parametrize("version", range(11, MAX_OPSET + 1))
def test_every_opset(tmp_path, residual_model, version, batch):
    model = residual_model(opset=version, batch=batch)
    # A residue of blending, so that there is something to rewrite in every one of them.
    relu = next(node for node in model.graph.node if node.name == "stem.act")
    relu.op_type = "PRelu"
    relu.input.append("slope")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((16, 1, 1), np.float32), "slope"))
    onnx.save(model, tmp_path / "m.onnx")
    after, report = through(tmp_path / "m.onnx")
    assert "stem.act" in next(p for p in report["passes"] if p["name"] == "collapse_relu")["changed"]
    assert not [node for node in after.graph.node if node.op_type == "PRelu"]
    readable(after, model)
    for size in (1,) if batch == 1 else (1, 3):
        same(model, after, image(size))
    assert [d.dim_param or d.dim_value for d in after.graph.input[0].type.tensor_type.shape.dim] == [batch, 3, 16, 16]


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data(tmp_path, residual_model, one_file):
    model = residual_model(activation="Silu")
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=one_file, size_threshold=0,
        convert_attribute=True, location="weights.bin" if one_file else None,
    )  # fmt: skip
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    after, _ = through(tmp_path / "m.onnx")
    same(residual_model(activation="Silu"), after, image())
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_float16(tmp_path, residual_model):
    model = residual_model()
    for tensor in model.graph.initializer:
        if tensor.name not in ("roi", "scales"):  # Resize takes these two in float32
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, tmp_path / "m.onnx")
    after, _ = through(tmp_path / "m.onnx")
    same(model, after, image(dtype=np.float16))


def test_weights_that_are_also_inputs(tmp_path, residual_model):
    """As files of IR version 3 have to have them: they are defaults, which a caller may replace."""
    model = residual_model(opset=11)
    model.ir_version = 3
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "m.onnx")
    after, _ = through(tmp_path / "m.onnx")
    readable(after, model)
    old, new = (onnxruntime.InferenceSession(m.SerializeToString()) for m in (model, after))
    assert np.array_equal(old.run(None, image())[0], new.run(None, image())[0])
    onnx.checker.check_model(after)
    assert {tensor.name for tensor in after.graph.initializer} <= {value.name for value in after.graph.input}


HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1, "f": 1]>'
KINDS = {
    "subgraphs": """g (float[N, 4] x, bool c) => (float[N, 4] y) <float z = {0}> { a = Max(x, z)
        y = If(c)<then_branch = t () => (float[N, 4] e1) { e1 = Relu(a) },
                  else_branch = e () => (float[N, 4] e2) { e2 = Max(x, z) }> }""",
    "a loop": """g (float[4] x) => (float[4] y) <int64 n = {3}, bool t = {1}, float z = {0}> { a = Max(x, z)
        y = Loop(n, t, a)<body = b (int64 i, bool c, float[4] v) => (bool d, float[4] w)
            { d = Identity(c) w = Add(v, a) }> }""",
    "model-local functions": """g (float[N, 4] x) => (float[N, 4] y) { a = f.blend(x) y = f.blend(a) }
        <domain: "f", opset_import: ["": 17]> blend (i) => (o)
        { z = Constant<value = float {0}>() s = Sigmoid(i) m = Mul(i, s) p = Mul(m, z) r = Relu(i) o = Add(p, r) }""",
    "scalars": """g (float x) => (float y, float[1] w) <float z = {0}> { y = Max(x, z) k = Constant<value_ints = [1]>()
        w = Reshape(y, k) }""",
    "an unused input": "g (float[4] x, float[7] unused) => (float[4] y) <float z = {0}> { y = Max(x, z) }",
    "an unused node": "g (float[4] x) => (float[4] y) <float z = {0}> { dead = Exp(x) y = Max(x, z) }",
    "an output twice": "g (float[4] x) => (float[4] y, float[4] y) <float z = {0}> { a = Identity(x) y = Max(a, z) }",
    "an output that is an input": "g (float[4] x) => (float[4] x, float[4] y) <float z = {0}> { y = Max(x, z) }",
    "an output that is a weight": "g (float[4] x) => (float[4] y, float z) <float z = {0}> { y = Max(x, z) }",
    "an output read inside": "g (float[4] x) => (float[4] a, float[4] y) <float z = {0}> { a = Max(x, z) y = Exp(a) }",
    "an output behind identities": "g (float[4] x) => (float[4] y) <float z = {0}> { a = Max(x, z) y = Identity(a) }",
    "only identities": "g (float[4] x) => (float[4] y) { a = Identity(x) y = Identity(a) }",
    "no inputs": "g () => (float[4] y) <float[4] k = {-1, 0, 1, 2}, float z = {0}> { a = Max(k, z) y = Exp(a) }",
    "a domain of the runtime": """g (float[N, 4] x) => (float[N, 4] y) <float z = {0}>
        { a = Max(x, z) y = com.microsoft.Gelu(a) }""",
    "optional inputs left out": """g (float[N, 4] x) => (float[N, 4] y) <float z = {0}> { a = Clip(x, z)
        y = Clip(a, , z) }""",
    "names with spaces and slashes": """g (float[4] "a b") => (float[4] "../y") <float z = {0}>
        { "../y" = Max("a b", z) }""",
}  # fmt: skip


@pytest.mark.parametrize("graph", KINDS.values(), ids=KINDS)
def test_kinds_of_graphs(tmp_path, graph):
    model = onnx.parser.parse_model(f"{HEAD} {graph}")
    onnx.save(model, tmp_path / "m.onnx")
    after, report = through(tmp_path / "m.onnx")
    readable(after, model)
    assert report["verification"] is not None
    assert report["verification"]["samples"] > 0
    session = open_session(model)
    rng = np.random.default_rng(0)
    kinds = {"tensor(float)": np.float32, "tensor(bool)": np.bool_}
    for sign in (1, -1):
        feeds = {
            value.name: np.asarray(sign * rng.normal(size=[s if isinstance(s, int) else 3 for s in value.shape]))
            .astype(kinds[value.type]) for value in session.get_inputs()
        }  # fmt: skip
        same(model, after, feeds)


def test_tensors_without_elements(tmp_path):
    """An extent of 0 may also be an exporter's word for any extent, so no input is made at random."""
    text = "g (float[4, 0] x) => (float[4, 0] y) <float z = {0}> { a = Identity(x) y = Max(a, z) }"
    model = onnx.parser.parse_model(f"{HEAD} {text}")
    onnx.save(model, tmp_path / "m.onnx")
    after, _ = through(tmp_path / "m.onnx")
    assert [node.op_type for node in after.graph.node] == ["Relu"]
    same(model, after, {"x": np.zeros((4, 0), np.float32)})


def test_a_domain_that_nobody_knows_is_kept_as_it_is(tmp_path):
    """No runtime here can run it, so nothing can be compared, and the report says so."""
    text = "g (float[N, 4] x) => (float[N, 4] y) <float z = {0}> { a = Max(x, z) b = my.Op<k = 3>(a) y = Max(b, z) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "my": 2]> {text}')
    onnx.save(model, tmp_path / "m.onnx")
    after, report = through(tmp_path / "m.onnx")
    node = next(node for node in after.graph.node if node.domain == "my")
    assert (node.op_type, node.attribute[0].i) == ("Op", 3)
    assert {entry.domain: entry.version for entry in after.opset_import}["my"] == 2
    assert report["verification"]["samples"] == 0
    assert "cannot load the original" in report["verification"]["note"]


def network():
    """Conv, BatchNorm, a blend that has become ReLU, and a head."""
    import torch
    from torch import nn

    class Blend(nn.Module):
        def forward(self, x):
            return torch.lerp(torch.nn.functional.silu(x), torch.relu(x), 1.0)

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), Blend(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 10)).eval()


def exported(path: Path, *, dynamo: bool, version: int, dynamic: bool) -> onnx.ModelProto:
    import torch

    x = torch.zeros(2, 3, 16, 16)
    options: dict = {"input_names": ["x"], "output_names": ["y"], "opset_version": version, "dynamo": dynamo}
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch", min=1, max=64)},)
    elif dynamic:
        options["dynamic_axes"] = {"x": {0: "batch"}, "y": {0: "batch"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the older exporter, which is deprecated, and of what dynamo itself calls
        torch.onnx.export(network(), (x,), str(path), external_data=False, verbose=False, **options)
    return onnx.load(path)


EXPORTS = [
    *((False, version, True) for version in (11, 13, 17, 20)), (True, 18, True), (True, 23, False),
]  # fmt: skip


@needs_torch
@pytest.mark.torch
@pytest.mark.parametrize(("dynamo", "version", "dynamic"), EXPORTS)
def test_exports_of_torch(tmp_path, dynamo, version, dynamic):
    model = exported(tmp_path / "m.onnx", dynamo=dynamo, version=version, dynamic=dynamic)
    assert opset(model) == version
    after, _ = through(tmp_path / "m.onnx")
    readable(after, model)
    left = {node.op_type for node in after.graph.node}
    assert "Relu" in left
    assert left.isdisjoint({"Sigmoid", "Swish", "BatchNormalization", "Sub", "Mul"})
    for batch in (1, 5) if dynamic else (2,):
        # BatchNormalization is folded into Conv: each product is rounded once instead of twice, 8 of 2**-24 at most.
        same(model, after, image(batch), rtol=1e-5)


@pytest.mark.parametrize("version", [11, 17, MAX_OPSET])
@pytest.mark.parametrize("target", ["ort", "tensorrt-rtx"])
def test_what_quantize_writes_is_no_newer_than_the_targets_read(tmp_path, residual_model, target, version):
    onnx.save(residual_model(opset=version), tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", image()["x"])
    for call in (
        f"calibrate {tmp_path}/m.onnx --calib {tmp_path}/x.npy -o {tmp_path}/r.json",
        f"quantize {tmp_path}/m.onnx --ranges {tmp_path}/r.json --target {target} -o {tmp_path}/q.onnx",
    ):
        result = CliRunner().invoke(main, call.split())
        assert result.exit_code == 0, result.output
    written = onnx.load(tmp_path / "q.onnx")
    onnx.checker.check_model(written, full_check=True)
    assert written.ir_version <= MAX_IR_VERSION
    assert opset(written) <= MAX_OPSET
    open_session(written, optimise=True)
