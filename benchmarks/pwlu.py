"""A learned activation against ReLU, deployed: one residual network with PWLU and with ReLU, trained and built.

The network has ResNet-18's plan, with which the PWLU paper took its own times (19.9 against 17.1 ms, 1.16 x). It is
trained on scikit-learn's digits enlarged to 64 x 64; N = 16 intervals, a function for each channel, realigned as in the
paper. Printed are:

* how far the folded float network is from torch;
* accuracy as INT8 in ONNX Runtime, and latency on this CPU, PWLU over ReLU, one process an engine;
* kernels and bytes as INT8 in TensorRT-RTX, and for each PWLU the kernels that compute it, all read from the plan. What
  is counted there is what the compiler wrote for an RTX 4090 (SM 89); nothing runs on a GPU.

Needs the extras torch, demo and tensorrt-rtx, and g++ for training. About five minutes:

    python benchmarks/pwlu.py [--epochs 4] [--width 64] [--sizes 64 224] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F  # noqa: N812

from calib.inputs import model_inputs
from calib.session import open_session
from calib.sources import open_source
from common import latency_ratio, print_machine, working_folder
from relu_deploy.bench.compare import bench
from relu_deploy.engines.base import BuildConfig, ShapeRange, get_backend
from relu_deploy.export import DynamicAxis, ExampleInput, export_model
from relu_deploy.flow import EngineBuilt, Int8Plan, build_engine
from relu_deploy.graph import load_model
from relu_deploy.nn.pwlu import PWLU
from relu_deploy.nn.pwlu_model import collect_statistics, realign, use_kernel
from relu_deploy.passes.run import rewrite, spell

TRAIN_SIZE, BATCH = 64, 32
TRAIN, TEST = slice(0, 1437), slice(1437, 1797)


def activation(kind: str, channels: int) -> nn.Module:
    return PWLU(channels) if kind == "pwlu" else nn.ReLU()


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, kind: str, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, 1, bias=False), nn.BatchNorm2d(outside), activation(kind, outside),
            nn.Conv2d(outside, outside, 3, 1, 1, bias=False), nn.BatchNorm2d(outside),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))
        self.act = activation(kind, outside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.body(x) + self.shortcut(x))


def resnet18(kind: str, width: int) -> nn.Module:
    """The plan of ResNet-18 for ten classes; ``width`` 64 is the original's."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), activation(kind, width), nn.MaxPool2d(3, 2, 1),
    ]  # fmt: skip
    inside = width
    for stage in range(4):
        outside = width << stage
        layers += [Block(kind, inside, outside, 2 if stage else 1), Block(kind, outside, outside, 1)]
        inside = outside
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inside, 10))


def digits(size: int, count: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, size, size) with values in [-1, 1], and their classes."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))[count]
    images = torch.from_numpy(data.images[order].astype(np.float32) / 8 - 1)[:, None]
    images = F.interpolate(images, size=size, mode="bilinear").expand(-1, 3, -1, -1)
    return images.contiguous(), torch.from_numpy(data.target[order])


def train(kind: str, width: int, epochs: int) -> nn.Module:
    """SGD; of the PWLU network the first epoch is phase I, in which its units are ReLU and statistics are taken."""
    model = resnet18(kind, width)
    use_kernel(model, "compiled")
    images, labels = digits(TRAIN_SIZE, TRAIN)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.05, total_steps=epochs * (len(images) // BATCH))
    if kind == "pwlu":
        collect_statistics(model)
    for epoch in range(epochs):
        if kind == "pwlu" and epoch == 1:
            realign(model)
        model.train()
        for chosen in torch.randperm(len(images)).split(BATCH):
            if len(chosen) == BATCH:
                optimiser.zero_grad()
                F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimiser.step()
                steps.step()
    return model.eval()


def deploy(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, EngineBuilt]:
    """Train, export, build both INT8 engines, and say how well they classify."""
    weights = folder / f"{kind}.pt"
    if weights.exists():
        model = resnet18(kind, args.width).eval()
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        model = train(kind, args.width, args.epochs)
        torch.save(model.state_dict(), weights)
    path, sizes = folder / f"{kind}.onnx", (min(TRAIN_SIZE, *args.sizes), max(TRAIN_SIZE, *args.sizes))
    dynamic = [DynamicAxis("x", 0, 1, 8), DynamicAxis("x", 2, *sizes), DynamicAxis("x", 3, *sizes)]
    example = ExampleInput("x", (2, 3, TRAIN_SIZE, TRAIN_SIZE), low=-1, high=1)
    export_model(model, [example], path, dynamic=dynamic)
    network = load_model(path)
    if kind == "pwlu":
        float_error(model, network)
    calibration, _ = digits(TRAIN_SIZE, slice(64))
    plan = Int8Plan(open_source({"x": calibration.numpy()}, model_inputs(network)), batch_size=8, float_part="fp32")
    one = {"x": ShapeRange(*[(1, 3, args.sizes[-1], args.sizes[-1])] * 3)}
    built = {
        "ort": build_engine(network, folder / f"{kind}.ort.onnx", BuildConfig("ort"), int8=plan),
        "rtx": build_engine(network, folder / f"{kind}.engine", BuildConfig("tensorrt-rtx", shapes=one), int8=plan),
    }
    images, labels = digits(TRAIN_SIZE, TEST)
    with torch.no_grad():
        exact = torch.cat([model(part) for part in images.split(8)])
    with get_backend("ort").open(folder / f"{kind}.ort.onnx", threads=2) as engine:
        answers = [next(iter(engine.run({"x": part.numpy()}).values())) for part in images.split(8)]
    right = [
        float((got.argmax(1) == labels).float().mean()) for got in (exact, torch.from_numpy(np.concatenate(answers)))
    ]
    print(f"  right on {len(labels)} digits: float {right[0]:.2%}, INT8 in ONNX Runtime {right[1]:.2%}")
    quantized = built["rtx"].quantize
    forms = Counter(note.split(",")[0] for note in quantized.folded.values()) if quantized else {}
    print("".join(f"  {count} x {form}\n" for form, count in forms.items()), end="")
    return built


def float_error(model: nn.Module, network: onnx.ModelProto) -> None:
    """Print how far the folded float network is from torch, relative to the largest output."""
    images, _ = digits(TRAIN_SIZE, slice(TEST.start, TEST.start + 8))
    with torch.no_grad():
        wanted = model(images).numpy()
    rewritten, _ = rewrite(network, verify=False)
    for target in ("ort", "tensorrt-rtx"):
        spelled, (report, *_) = spell(rewritten, target)
        got = open_session(spelled).run(None, {"x": images.numpy()})[0]
        error = np.abs(got - wanted).max() / np.abs(wanted).max()
        form = next(iter(report.notes.values()), "no PWLU is left")
        print(f"  float form for {target}: {form}; {error:.2g} from torch, relative")


def kernels_of_units(built: EngineBuilt) -> str:
    """For each learned activation of an RTX engine, by how many kernels it is computed."""
    folded = built.quantize.folded if built.quantize else {}
    found = {one.name: one for one in built.engine.audit.activations if one.name in folded}
    counts = Counter(len(one.kernel.split(", ")) for one in found.values())
    kernels = ", ".join(f"{number} computed by {count} each" for count, number in sorted(counts.items()))
    lost = len(folded) - len(found)
    return (
        f"kernels of the {len(folded)} PWLU: {kernels}" + (f", {lost} not found" if lost else "")
        if folded
        else "no PWLU"
    )


def latency(folder: Path, size: int, seconds: float) -> None:
    """Print both medians and their ratio at one size of image."""
    shape = {"x": (1, 3, size, size)}
    report = bench([folder / "pwlu.ort.onnx"], against=folder / "relu.ort.onnx", shapes=shape, seconds=seconds)
    relu, (learned,) = report.original, report.engines
    ratio = learned.ratio
    assert ratio is not None
    print(
        f"ONNX Runtime INT8, batch 1, {size} x {size}: ReLU {relu.median_ms:.2f} ms, PWLU {learned.median_ms:.2f} ms, "
        f"{latency_ratio(ratio)}"
    )
    print(*(f"  {warning}" for warning in report.warnings), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage; 64 is ResNet-18")
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 224], help="of the images whose latency is taken")
    parser.add_argument("--seconds", type=float, default=10.0, help="measured time of each engine")
    parser.add_argument("--keep", type=Path, help="folder for networks and engines; what is trained there is not again")
    args = parser.parse_args()
    print_machine()
    with working_folder(args.keep) as folder:
        built = {}
        for kind in ("relu", "pwlu"):
            print(kind)
            built[kind] = deploy(kind, args, folder)
        for size in args.sizes:
            latency(folder, size, args.seconds)
        for kind, both in built.items():
            audit = both["rtx"].engine.audit
            print(
                f"TensorRT-RTX INT8, {kind}: {audit.kernels} kernels, {(audit.bytes_moved or 0) / 1e6:.2f} MB moved, "
                f"{audit.int8} of {len(audit.linear)} layers in int8; {kernels_of_units(both['rtx'])}"
            )


if __name__ == "__main__":
    main()
