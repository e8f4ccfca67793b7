"""This package as a user calls it: one command, the model, the calibration data, the target. No flag for a model."""

from __future__ import annotations

import shutil
import subprocess
import sys

import onnx
from samples import Request, feeds, parse


def main() -> None:
    """Build an engine and take the Q/DQ network that lies between."""
    request = parse()
    keep = request.output.with_suffix(".kept")
    target, grain = request.settings["target"], request.settings.get("weight_granularity")
    command = [
        sys.executable, "-m", "relu_deploy", "build-engine", str(request.model), "--int8", "--calib",
        str(request.calibration), "--target", target, "--keep", str(keep),
        "--output", str(request.output.with_suffix(".engine.onnx")),
    ]  # fmt: skip
    command += ["--weight-granularity", grain] if grain else []
    command += [] if target == "ort" else [part for shape in shapes(request) for part in ("--shape", shape)]
    subprocess.run(command, check=True)
    shutil.copy(keep / "int8.onnx", request.output)


def shapes(request: Request) -> list[str]:
    """What TensorRT has to be told of dynamic axes: the smallest and the largest shape among the samples."""
    seen: dict[str, list[tuple[int, ...]]] = {}
    for sample in feeds(request.calibration):
        for name, value in sample.items():
            seen.setdefault(name, []).append(value.shape)
    told = []
    for tensor in onnx.load(request.model).graph.input:
        if any(not axis.HasField("dim_value") for axis in tensor.type.tensor_type.shape.dim):
            columns = list(zip(*seen[tensor.name], strict=True))
            texts = ["x".join(str(pick(axis)) for axis in columns) for pick in (min, max, max)]
            told.append(f"{tensor.name}={'..'.join(texts)}")
    return told


if __name__ == "__main__":
    main()
