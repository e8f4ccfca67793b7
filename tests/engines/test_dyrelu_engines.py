"""DY-ReLU in INT8 as TensorRT-RTX compiles it: what its plan says of every unit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from calib.inputs import model_inputs
from calib.sources import open_source
from relu_deploy.engines.base import BuildConfig
from relu_deploy.engines.plan import read_plan
from relu_deploy.export import ExampleInput, export_model
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.graph import import_graph, load_model
from relu_deploy.passes.dyrelu import find_dyrelu

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'relu-deploy[torch]'")
from torch import nn  # noqa: E402

from relu_deploy.nn.dynamic import DyReLU  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.torch]

SHAPE = (1, 16, 16, 16)


def network(variant: str, pieces: int) -> nn.Module:
    """Three convolutions, a unit behind each of the first two; slopes have left their start."""
    torch.manual_seed(0)
    units = [DyReLU(16, variant, pieces=pieces) for _ in range(2)]
    with torch.no_grad():
        for unit in units:
            unit.excite.weight.add_(0.3 * torch.randn_like(unit.excite.weight))
    layers = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)]
    return nn.Sequential(layers[0], units[0], layers[1], units[1], layers[2])


@pytest.mark.parametrize(("variant", "pieces"), [("A", 2), ("B", 3), ("C", 2)])
def test_the_lines_their_maximum_and_the_quantiser_are_one_kernel(variant, pieces, tmp_path: Path):
    export_model(network(variant, pieces), (ExampleInput("x", SHAPE),), tmp_path / "net.onnx", exporter="torchscript")
    model = load_model(tmp_path / "net.onnx")
    samples = np.random.default_rng(0).standard_normal((8, *SHAPE[1:])).astype(np.float32)
    plan = Int8Plan(open_source(samples, model_inputs(model)))
    engine = tmp_path / "net.engine"
    built = build_engine(model, engine, BuildConfig("tensorrt-rtx"), int8=plan, keep=tmp_path / "keep")
    audit = built.engine.audit
    # Two layers of the hyper function a unit, and the map of the attention.
    assert len(audit.linear) == 3 + 2 * (3 if variant == "C" else 2)
    assert [layer.name for layer in audit.linear if layer.precision != "int8"] == []
    kernels = [kernel for program in read_plan(engine.read_bytes()) for kernel in program.kernels]
    sites = find_dyrelu(import_graph(load_model(tmp_path / "keep" / "rewritten.onnx")))
    assert [site.variant for site in sites] == [variant] * 2
    for site in sites:
        body = {node.name for node in site.body}
        (kernel,) = [kernel for kernel in kernels if body & set(kernel.layers)]
        assert body <= set(kernel.layers)
        assert {"max", "roun", "cast"} <= kernel.ops or "etc" in kernel.ops  # long names are cut
