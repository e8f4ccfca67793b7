"""What channel fusion does for one weight scale a layer: accuracy on Fashion-MNIST, with and without it.

Trains a ReLU network of depthwise and pointwise convolutions (BatchNorm behind each) and a residual one, quantises each
with a weight scale for every output channel and with one for the layer, and prints the test images that they get right
and the signal-to-noise ratio of their logits against the float network's.
Needs the torch extra and Debian's dataset-fashion-mnist.

    python benchmarks/fusion.py [--epochs 3] [--images 60000] [--calibration 256] [--target ort]
        [--networks depthwise residual] [--keep DIR]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples" / "studies"))
import fashion
from calib.inputs import model_inputs
from calib.run import calibrate
from calib.session import open_session
from calib.sources import open_source
from common import print_machine, working_folder
from relu_deploy.graph import load_model
from relu_deploy.int8.drift import sqnr_db
from relu_deploy.int8.run import quantize
from relu_deploy.passes.run import rewrite

MODES = ("off", "pow2", "free")


class Separable(nn.Sequential):
    """A depthwise convolution and a pointwise one."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_in, 3, stride=stride, padding=1, groups=c_in, bias=False), nn.BatchNorm2d(c_in),
            nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(),
        )  # fmt: skip


class Residual(nn.Module):
    """Two convolutions and a shortcut, as ResNet has them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def stem(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(1, channels, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, fashion.CLASSES)]


def network(name: str) -> nn.Module:
    """``depthwise`` or ``residual``, with random weights."""
    torch.manual_seed(0)
    if name == "residual":
        down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        return nn.Sequential(*stem(16), Residual(16), down, Residual(32), Residual(32), *head(32))
    blocks = [Separable(16, 32, 1), Separable(32, 64, 2), Separable(64, 64, 1), Separable(64, 64, 1)]
    return nn.Sequential(*stem(16), *blocks, *head(64))


def train(net: nn.Module, epochs: int, images: int) -> None:
    """Adam, one cycle, batches of 128."""
    torch.manual_seed(1)
    loader = torch.utils.data.DataLoader(fashion.dataset("train", images), batch_size=128, shuffle=True)
    optimiser = torch.optim.Adam(net.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=epochs * len(loader))
    net.train()
    for _ in range(epochs):
        for x, labels in loader:
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(x), labels).backward()
            optimiser.step()
            schedule.step()
    net.eval()


def trained(name: str, folder: Path, epochs: int, images: int) -> onnx.ModelProto:
    """The trained network as ONNX, BatchNorm folded; trained once a folder."""
    path = folder / f"{name}.onnx"
    if not path.exists():
        net = network(name)
        train(net, epochs, images)
        batch = torch.export.Dim("batch")
        torch.onnx.export(
            net, (torch.zeros(2, 1, 28, 28),), str(path), input_names=["x"], output_names=["y"], dynamo=True,
            dynamic_shapes=({0: batch},), external_data=False, verbose=False, opset_version=18,
        )  # fmt: skip
    return rewrite(load_model(path))[0]


def scores(model: onnx.ModelProto, *, integer_kernels: bool) -> np.ndarray:
    """Logits of all test images, float64 (10000, 10)."""
    images, _ = fashion.load("test")
    session = open_session(model, optimise=integer_kernels)
    parts = [session.run(None, {"x": fashion.as_input(images[at : at + 500])})[0] for at in range(0, len(images), 500)]
    return np.concatenate(parts).astype(np.float64)


def right(logits: np.ndarray) -> float:
    """Test images that are told right, of 100."""
    return 100 * float((logits.argmax(axis=1) == fashion.load("test")[1]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=60_000, help="of the training images")
    parser.add_argument("--calibration", type=int, default=256, help="training images to measure ranges on")
    parser.add_argument("--networks", nargs="+", default=["depthwise", "residual"])
    parser.add_argument("--target", default="ort", help="others than ort are computed in float from their Q/DQ")
    parser.add_argument("--keep", type=Path, help="folder of the trained networks; reused where they are there")
    args = parser.parse_args()
    print_machine()
    with working_folder(args.keep) as folder:
        for name in args.networks:
            model = trained(name, folder, args.epochs, args.images)
            data = fashion.as_input(fashion.load("train")[0][: args.calibration])
            ranges = calibrate(model, open_source(data, model_inputs(model)), batch_size=64)
            reference = scores(model, integer_kernels=True)
            print(f"{name}: float {right(reference):.2f}")
            for granularity, mode in itertools.product(("channel", "tensor"), MODES):
                options = {"target": args.target, "weight_granularity": granularity, "channel_fusion": mode}
                int8, report = quantize(model, ranges, **options)
                found = scores(int8, integer_kernels=args.target == "ort")
                sqnr = sqnr_db(float((reference**2).sum()), float(((reference - found) ** 2).sum()))
                print(
                    f"  a weight scale for each {granularity:7s} channel fusion {mode:4s} {right(found):6.2f} "
                    f"{sqnr:6.1f} dB {report.fusion.channels:4d} channels scaled"
                )


if __name__ == "__main__":
    main()
