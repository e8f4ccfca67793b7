"""What the graph passes do to published networks: nodes, RTX kernels and bytes, and latency in ONNX Runtime.

The first network is the stem of a YOLOX detector with random weights, a Focus and two convolutions; then those named.
Kernels and bytes are what the compiler wrote for an RTX 4090 (SM 89); nothing runs on a GPU. Latencies are the least of
interleaved runs on one thread of this machine, and still need a quiet one. The networks keep their activations: what
changes is the clean-up around them. INT8 ranges are those of random inputs, which is enough to count and to time.

Needs the extra tensorrt-rtx. Run, with open sizes given for every input that has any:

    python benchmarks/clean_up.py common_det.onnx ch_PP-OCRv4_rec_infer.onnx=1x3x48x320
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import tensorrt_rtx

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from relu_deploy import graph as files
from relu_deploy.engines.base import BuildConfig, get_backend
from relu_deploy.int8.run import quantize
from relu_deploy.passes.run import rewrite


def fixed(model: onnx.ModelProto, sizes: str) -> onnx.ModelProto:
    """The network with the first input's sizes set, and what onnx inferred from the open ones forgotten."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    if sizes:
        dims = copy.graph.input[0].type.tensor_type.shape.dim
        for dim, size in zip(dims, sizes.split("x"), strict=True):
            dim.dim_value = int(size)
        del copy.graph.value_info[:]
        for output in copy.graph.output:
            output.type.tensor_type.ClearField("shape")
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    return copy


def stem(size: int, width: int = 32) -> onnx.ModelProto:
    """Focus, Conv, ReLU and a strided Conv over a picture of 3 channels."""
    random = np.random.default_rng(0)
    end = np.iinfo(np.int64).max
    weights = {
        "w": random.normal(0, 0.1, (width, 12, 3, 3)).astype(np.float32),
        "u": random.normal(0, 0.1, (2 * width, width, 3, 3)).astype(np.float32),
        "ends": np.array([end, end]), "axes": np.array([2, 3]), "steps": np.array([2, 2]),
    } | {f"s{i}{j}": np.array([i, j]) for i in (0, 1) for j in (0, 1)}  # fmt: skip
    slices = " ".join(f"p{i}{j} = Slice(x, s{i}{j}, ends, axes, steps)" for i in (0, 1) for j in (0, 1))
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1, 3, {size}, {size}] x) => (float[A, B, C, D] y)'
        f" {{ {slices}"
        " f = Concat <axis = 1> (p00, p10, p01, p11) c = Conv <pads = [1, 1, 1, 1]> (f, w) r = Relu(c)"
        " y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r, u) }"
    )
    model.graph.initializer.extend(onnx.numpy_helper.from_array(values, name) for name, values in weights.items())
    return onnx.shape_inference.infer_shapes(model)


def feeds(model: onnx.ModelProto, count: int) -> np.ndarray:
    """Random samples of the one input, batch axis first."""
    (spec,) = model_inputs(model)
    random = np.random.default_rng(0)
    size = (count, *(spec.shape or ())[1:])
    return (random.integers(0, 2, size) if spec.dtype.kind in "iu" else random.normal(size=size)).astype(spec.dtype)


def int8(model: onnx.ModelProto, target: str) -> onnx.ModelProto:
    """Calibrated on two random samples and quantised."""
    ranges = calibrate(model, open_source(feeds(model, 2), model_inputs(model)))
    return quantize(model, ranges, target=target, float_part="fp32")[0]


def plan(model: onnx.ModelProto) -> str:
    """INT8 layers, kernels and bytes of the compiled plan."""
    with tempfile.TemporaryDirectory() as folder:
        config = BuildConfig(target="tensorrt-rtx")
        audit = get_backend("tensorrt-rtx").build(model, Path(folder) / "e.plan", config).audit
    assert audit.bytes_moved is not None
    return f"{audit.int8}/{len(audit.linear)} | {audit.kernels} | {audit.bytes_moved / 1e6:.2f}"


def latencies(models: list[onnx.ModelProto], rounds: int = 60) -> list[float]:
    """Least milliseconds of each network, one run of each a round: what else runs here only ever adds."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    sessions = [ort.InferenceSession(model.SerializeToString(), options) for model in models]
    name, sample = sessions[0].get_inputs()[0].name, feeds(models[0], 1)
    times: list[list[float]] = [[] for _ in sessions]
    for _ in range(rounds):
        for session, taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(None, {name: sample})
            taken.append(time.perf_counter() - start)
    return [min(taken) * 1e3 for taken in times]


def main() -> None:
    """Build everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="an ONNX file, with =1x3x48x320 where its input has open sizes")
    print(
        f"SM 89, tensorrt_rtx {tensorrt_rtx.__version__}, onnx {onnx.__version__}, onnxruntime {ort.__version__}, on "
        f"{platform.machine()} {platform.system()} without a GPU.\n\n"
        "| network | | nodes | int8 | kernels | MB moved | ONNX Runtime, ms |\n|---|---|---|---|---|---|---|"
    )
    subjects = {"Focus stem 416": stem(416)}
    for argument in parser.parse_args().model:
        path, _, sizes = argument.partition("=")
        subjects[Path(path).stem] = fixed(files.load_model(Path(path)), sizes)
    for name, before in subjects.items():
        both = [before, rewrite(before)[0]]
        for numbers in ("float32", "INT8"):
            times = latencies([int8(m, "ort") if numbers == "INT8" else m for m in both])
            for which, model, milliseconds in zip(("as published", "rewritten"), both, times, strict=True):
                built = plan(int8(model, "tensorrt-rtx") if numbers == "INT8" else model)
                row = f"{name} | {which}, {numbers} | {len(model.graph.node)} | {built} | {milliseconds:.2f}"
                print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
