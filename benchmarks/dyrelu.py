"""DY-ReLU against ReLU, deployed: one small network with each variant, trained, quantised and built.

Six convolutions (16, 16, 32, 32, 64, 64 channels) on scikit-learn's digits enlarged to 32 x 32, from random weights.
Printed are, for each variant:

* digits right, in float and as INT8 in ONNX Runtime;
* throughput as INT8 in ONNX Runtime over that of ReLU, one process an engine, in one run: as exported, and as
  ``relu_deploy.passes.dyrelu_spell`` spells it; and the same with four times the channels;
* kernels and bytes as INT8 in TensorRT-RTX, and how many kernels compute the lines of each unit and their maximum, read
  from the plan for an RTX 4090 (SM 89); nothing runs on a GPU;
* what ``rewrite --fold-dynamic`` would do: the bound of each unit, largest and smallest.

Needs the extras torch, demo and tensorrt-rtx. About six minutes:

    python benchmarks/dyrelu.py [--epochs 4] [--seconds 5] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812

from calib.inputs import model_inputs
from calib.run import calibrate
from calib.sources import open_source
from common import print_machine, working_folder
from relu_deploy.bench.compare import bench
from relu_deploy.engines.base import BuildConfig, ShapeRange, get_backend
from relu_deploy.engines.plan import read_plan
from relu_deploy.export import DynamicAxis, ExampleInput, export_model
from relu_deploy.flow import Int8Plan, build_engine
from relu_deploy.graph import import_graph, load_model
from relu_deploy.nn.dynamic import DyReLU
from relu_deploy.passes.dyrelu import find_dyrelu
from relu_deploy.passes.fold_dynamic import fold_dynamic, measure_folding
from relu_deploy.report import PassReport

SIZE, BATCH, TRAIN = 32, 32, 1437
KINDS = {"A": ("A", 2), "B": ("B", 2), "B, K = 3": ("B", 3), "C": ("C", 2)}


def network(kind: str, width: int) -> nn.Module:
    """Convolutions with a unit behind each; halved in size before the third and the fifth."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    inside = 1
    for number in range(6):
        outside = width << (number // 2)
        layers += [nn.Conv2d(inside, outside, 3, 2 if number in (2, 4) else 1, 1), nn.BatchNorm2d(outside)]
        layers.append(nn.ReLU() if kind == "ReLU" else DyReLU(outside, KINDS[kind][0], pieces=KINDS[kind][1]))
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All images (N, 1, 32, 32) in [-1, 1] in a fixed random order, and their classes; the first are for training."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    images = torch.from_numpy(data.images[order].astype(np.float32) / 8 - 1)[:, None]
    return F.interpolate(images, size=SIZE, mode="bilinear"), torch.from_numpy(data.target[order])


def train(model: nn.Module, epochs: int) -> nn.Module:
    images, labels = (part[:TRAIN] for part in digits())
    model.train()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimiser.step()
    return model.eval()


def build(model: nn.Module, path: Path, *, spelled: bool = True) -> Path:
    """The INT8 engine for ONNX Runtime; without ``spelled``, of the unit as it was exported."""
    example = ExampleInput("x", (2, 1, SIZE, SIZE), low=-1, high=1)
    export_model(model, [example], path, dynamic=[DynamicAxis("x", 0, 1, 64)])
    network = load_model(path)
    plan = Int8Plan(open_source({"x": digits()[0][:128].numpy()}, model_inputs(network)), batch_size=16)
    engine = path.with_suffix(".spelled.ort.onnx" if spelled else ".ort.onnx")
    leave = contextlib.nullcontext() if spelled else mock.patch("relu_deploy.int8.run.spell_dyrelu", _leave_it)
    with leave:
        build_engine(network, engine, BuildConfig("ort"), int8=plan)
    return engine


def _leave_it(_graph: object) -> PassReport:
    return PassReport("spell_dyrelu")


def accuracy(model: nn.Module, engine: Path) -> tuple[float, float]:
    """Share of the held-out digits that are right: torch, engine."""
    images, labels = (part[TRAIN:] for part in digits())
    with torch.no_grad():
        exact = model(images).argmax(1)
    with get_backend("ort").open(engine, threads=2) as opened:
        parts = [next(iter(opened.run({"x": part.numpy()}).values())) for part in images.split(64)]
    answers = torch.from_numpy(np.concatenate(parts)).argmax(1)
    return float((exact == labels).float().mean()), float((answers == labels).float().mean())


def compiled(path: Path, folder: Path) -> str:
    """What TensorRT-RTX makes of the network, from its plan."""
    network, engine = load_model(path), path.with_suffix(".engine")
    plan = Int8Plan(open_source({"x": digits()[0][:128].numpy()}, model_inputs(network)), float_part="fp32")
    one = {"x": ShapeRange(*[(1, 1, SIZE, SIZE)] * 3)}
    built = build_engine(network, engine, BuildConfig("tensorrt-rtx", shapes=one), int8=plan, keep=folder / path.stem)
    audit = built.engine.audit
    kernels = [kernel for program in read_plan(engine.read_bytes()) for kernel in program.kernels]
    counts = [
        sum(bool({node.name for node in site.body} & set(kernel.layers)) for kernel in kernels)
        for site in find_dyrelu(import_graph(load_model(folder / path.stem / "rewritten.onnx")))
    ]
    moved = "unknown" if audit.bytes_moved is None else f"{audit.bytes_moved / 1e6:.2f} MB"
    units = f"; lines and maximum of each unit in {min(counts)} to {max(counts)} kernels" if counts else ""
    return f"{audit.kernels} kernels, {moved} moved, {audit.int8} of {len(audit.linear)} layers in int8{units}"


def foldable(path: Path) -> str:
    """The bounds of making every unit static, and what that would really change, on the calibration samples."""
    network, images = load_model(path), digits()[0][:128].numpy()
    ranges = calibrate(network, open_source({"x": images}, model_inputs(network)), batch_size=16)
    static, _, units = fold_dynamic(network, ranges, np.inf)
    folding = measure_folding(network, static, units, np.inf, samples=[{"x": image[None]} for image in images])
    shares = [(unit.bound / (unit.largest or 1), (unit.measured or 0) / (unit.largest or 1)) for unit in folding.units]
    parts = ", ".join(f"{bound:.2g} ({seen:.2g})" for bound, seen in shares)
    return f"bound (measured error) of each unit, over its largest output: {parts}"


def speed(engines: dict[str, Path], seconds: float) -> None:
    """Throughput over that of ReLU, all in one run."""
    report = bench([path for name, path in engines.items() if name != "ReLU"], against=engines["ReLU"], seconds=seconds)
    print(f"  ReLU: {report.original.throughput:.0f} {report.unit}")
    for name, result in zip([name for name in engines if name != "ReLU"], report.engines, strict=True):
        assert result.ratio is not None
        print(f"  DY-ReLU-{name}: {result.ratio.value:.2f} [{result.ratio.low:.2f}, {result.ratio.high:.2f}]")
    print(*(f"  {warning}" for warning in report.warnings), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time of each engine")
    parser.add_argument("--keep", type=Path, help="folder for the networks and engines")
    args = parser.parse_args()
    print_machine()
    with working_folder(args.keep) as folder:
        small: dict[str, Path] = {}
        wide: dict[str, Path] = {}
        for kind in ("ReLU", *KINDS):
            title = kind.replace(", K = ", "")
            model = train(network(kind, 16), args.epochs)
            engine = build(model, folder / f"{title}.onnx")
            exact, int8 = accuracy(model, engine)
            print(f"{kind}: float {exact:.2%}, INT8 {int8:.2%} of {len(digits()[1]) - TRAIN} digits right")
            print(f"  TensorRT-RTX INT8: {compiled(folder / f'{title}.onnx', folder)}")
            large = network(kind, 64).eval()
            if kind == "ReLU":
                small[kind], wide[kind] = engine, build(large, folder / "wide-ReLU.onnx")
                continue
            print(f"  {foldable(folder / f'{title}.onnx')}")
            for engines, net, stem in ((small, model, title), (wide, large, f"wide-{title}")):
                engines[f"{kind} as exported"] = build(net, folder / f"{stem}.onnx", spelled=False)
                engines[f"{kind} spelled"] = build(net, folder / f"{stem}.onnx")
        for name, engines in (("16 to 64 channels", small), ("64 to 256 channels", wide)):
            print(f"ONNX Runtime INT8, batch 1, {name}, throughput over ReLU's:")
            speed(engines, args.seconds)


if __name__ == "__main__":
    main()
