"""How wide a network has to be for learned activations to cost little as INT8 in ONNX Runtime.

Each line is a stack of 3 x 3 convolutions of one width with a PWLU for each channel behind each of them, against the
same stack with ReLU; weights are random, and each PWLU is bent everywhere, so that it becomes a table of codes. One
process an engine, on all processors of this machine.

    python benchmarks/pwlu_width.py [--widths 32 64 128 256 512] [--depth 6] [--seconds 5]

Needs nothing but the package itself.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from calib.inputs import model_inputs
from calib.sources import open_source
from common import latency_ratio, print_machine
from relu_deploy import ops
from relu_deploy.bench.compare import bench
from relu_deploy.engines.base import BuildConfig
from relu_deploy.flow import Int8Plan, build_engine

NAMES = ("left", "right", "values", "slope_left", "slope_right")
# Elements of each tensor: as many as a stage of ResNet-18 has at 224 x 224.
ELEMENTS = 200_704


def stack(kind: str, width: int, depth: int) -> onnx.ModelProto:
    """The network: ``depth`` convolutions and activations."""
    rng = np.random.default_rng(0)
    size = round((ELEMENTS / width) ** 0.5)
    nodes, weights, data = [], [], "x"
    points = np.tile(np.linspace(-3, 3, 17), (width, 1))
    unit = {
        "left": points[:, 0], "right": points[:, -1], "slope_left": rng.normal(0, 0.1, width),
        "slope_right": 1 + rng.normal(0, 0.1, width),
        "values": np.maximum(points, 0) + rng.normal(0, 0.2, points.shape),
    }  # fmt: skip
    for i in range(depth):
        weight = rng.normal(0, (2 / (9 * width)) ** 0.5, (width, width, 3, 3))
        weights += [numpy_helper.from_array(weight.astype(np.float32), f"w{i}")]
        nodes.append(helper.make_node("Conv", [data, f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1] * 4))
        data = "y" if i == depth - 1 else f"a{i}"
        if kind == "relu" or data == "y":
            nodes.append(helper.make_node("Relu", [f"c{i}"], [data], f"act{i}"))
            continue
        names = [f"{name}{i}" for name in NAMES]
        weights += [numpy_helper.from_array(unit[name].astype(np.float32), f"{name}{i}") for name in NAMES]
        node = helper.make_node("PWLU", [f"c{i}", *names], [data], f"act{i}", domain=ops.DOMAIN, channel_axis=1)
        nodes.append(node)
    shape = [1, width, size, size]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, shape)], [helper.make_tensor_value_info("y", 1, shape)],
        weights,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    ops.define_operators(model, 18)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each engine")
    args = parser.parse_args()
    print_machine()
    for width in args.widths:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for kind in ("relu", "pwlu"):
                model = stack(kind, width, args.depth)
                shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
                x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
                plan = Int8Plan(open_source({"x": x}, model_inputs(model)))
                build_engine(model, folder / f"{kind}.ort.onnx", BuildConfig("ort"), int8=plan)
            report = bench([folder / "pwlu.ort.onnx"], against=folder / "relu.ort.onnx", seconds=args.seconds)
        ratio = report.engines[0].ratio
        assert ratio is not None
        print(
            f"{width:4d} channels, {shape[2]} x {shape[3]}: ReLU {report.original.median_ms:.2f} ms, "
            f"PWLU {report.engines[0].median_ms:.2f} ms, {latency_ratio(ratio)}"
        )


if __name__ == "__main__":
    main()
