"""Why every plan is compiled in a process of its own, and what happens when that process dies."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy.engines import tensorrt_compile
from relu_deploy.engines.base import BuildConfig, ShapeRange, get_backend
from relu_deploy.engines.log import read_log
from relu_deploy.engines.plan import read_plan
from relu_deploy.engines.tensorrt_compile import Job, run_apart
from relu_deploy.engines.trt_audit import audit_engine
from relu_deploy.errors import EngineError
from relu_deploy.int8.run import quantize

GEMM = '<ir_version: 8, opset_import: ["": 17]> g (float[4, 64] x) => (float[4, 10] y) { h = MatMul(x, w) y = Relu(h) }'


@pytest.fixture
def quantized(residual_model):
    model = residual_model()
    data = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    ranges = calibrate(model, open_source(data, model_inputs(model)))
    return quantize(model, ranges, target="tensorrt-rtx", float_part="fp32")[0]


@pytest.fixture
def float_gemm():
    """SM 75 has no kernel for it, so that building it there fails."""
    model = onnx.parser.parse_model(GEMM)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 10), np.float32), "w"))
    return model


def job(folder: Path, name: str, model: onnx.ModelProto, sm: str) -> Job:
    onnx.save(model, folder / f"{name}.onnx")
    paths = [str(folder / f"{name}.{end}") for end in ("onnx", "plan", "json")]
    return Job("tensorrt-rtx", *paths, (sm,), {}, None, None)


@pytest.mark.engine
def test_a_failed_build_leaves_the_next_one_alone(tmp_path, quantized, float_gemm):
    backend = get_backend("tensorrt-rtx")
    with pytest.raises(EngineError, match="cannot build this network"):
        backend.build(float_gemm, tmp_path / "a.engine", BuildConfig("tensorrt-rtx", sm=("75",)))
    report = backend.build(quantized, tmp_path / "b.engine", BuildConfig("tensorrt-rtx", sm=("89",)))
    assert report.disagreements == ()
    assert report.audit.int8 == len(report.audit.linear) == 6


@pytest.mark.engine
@pytest.mark.parametrize("name", ["?", "N"])
def test_axes_of_one_name_may_have_ranges_of_their_own(tmp_path, name):
    """As Paddle's exporter writes them, whatever they are."""
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[A, 3, B, C] x, float[A, 4] u) => (float[A, 4] y) {'
    model = onnx.parser.parse_model(text + " c = Conv(x, w) p = GlobalAveragePool(c) f = Flatten(p) y = Add(f, u) }")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w"))
    for axis in (0, 2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = name
    image = ShapeRange((1, 3, 32, 32), (1, 3, 32, 64), (2, 3, 48, 128))
    config = BuildConfig("tensorrt-rtx", shapes={"x": image, "u": ShapeRange((1, 4), (1, 4), (2, 4))})
    get_backend("tensorrt-rtx").build(model, tmp_path / "a.engine", config)
    assert (tmp_path / "a.engine").is_file()


@pytest.mark.engine
def test_in_one_process_it_does_not(tmp_path, quantized, float_gemm):
    """The fault of the compiler that the isolation is for. When this fails, a newer compiler has mended it."""
    trt = pytest.importorskip("tensorrt_rtx")
    if not trt.__version__.startswith("1.7.1"):
        pytest.skip(f"TensorRT-RTX {trt.__version__} is not the version this was seen with")
    jobs = [job(tmp_path, "first", float_gemm, "75"), job(tmp_path, "second", quantized, "89")]
    script = (
        "import json, sys, tensorrt_rtx as trt\n"
        "from relu_deploy.engines.tensorrt_compile import Job, compile_here\n"
        "found = [compile_here(trt, Job(**request)) for request in json.load(sys.stdin)]\n"
        "print(json.dumps([outcome.failure and outcome.failure.stage for outcome in found]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps([dataclasses.asdict(j) for j in jobs]), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout.splitlines()[-1]) == ["build", None]
    audit = audit_engine(read_plan(Path(jobs[1].plan).read_bytes()), read_log(()), quantized)
    assert 0 <= audit.int8 < len(audit.linear) == 6


@pytest.mark.engine
def test_a_network_the_parser_refuses_names_the_node_it_is_about(tmp_path):
    broken = onnx.parser.parse_model(GEMM)
    broken.graph.initializer.append(numpy_helper.from_array(np.ones((64, 10), np.float32), "w"))
    broken.graph.node[0].op_type, broken.graph.node[0].name = "Nonsense", "here"
    failure = run_apart(job(tmp_path, "broken", broken, "89")).failure
    assert failure is not None
    assert (failure.stage, failure.node, failure.op) == ("parse", "here", "Nonsense")
    assert not (tmp_path / "broken.plan").exists()


@pytest.mark.parametrize(
    ("body", "how"),
    [("exit 3", "broke off"), ("kill -SEGV $$", "was ended by signal 11"), ("exit 0", "broke off")],
)
def test_a_compiler_that_dies_is_an_error_and_not_the_end(tmp_path, monkeypatch, float_gemm, body, how):
    script = tmp_path / "python"
    script.write_text(f"#!/bin/sh\ncat > /dev/null\necho 'out of luck' >&2\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setattr(tensorrt_compile.sys, "executable", str(script))
    with pytest.raises(EngineError, match=f"{how}; the last it said: out of luck"):
        run_apart(job(tmp_path, "any", float_gemm, "89"))
