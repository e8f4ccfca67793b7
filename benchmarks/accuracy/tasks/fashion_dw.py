"""A ReLU network of depthwise and pointwise convolutions with residual additions, trained here on Fashion-MNIST."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.accuracy.task import Plan
from benchmarks.accuracy.tasks.classes import answers, score
from benchmarks.accuracy.tasks.studies import fit, trained, write_task
from relu_deploy.export import ExampleInput

CALIBRATION, TRAIN, EPOCHS, RATE = 128, 30_000, 3, 8e-3


def unit(c_in: int, c_out: int, size: int, *, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU."""
    conv = nn.Conv2d(c_in, c_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU()] if relu else []))


class Inverted(nn.Module):
    """Widen, filter each channel by itself, narrow without an activation; added to the input where shapes allow."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        wide = 4 * c_in
        self.body = nn.Sequential(
            unit(c_in, wide, 1), unit(wide, wide, 3, stride=stride, groups=wide), unit(wide, c_out, 1, relu=False)
        )
        self.same = stride == 1 and c_in == c_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(N, c_in, H, W) to (N, c_out, H/stride, W/stride)."""
        return x + self.body(x) if self.same else self.body(x)  # type: ignore[no-any-return]


def network() -> nn.Module:
    """Images (N, 1, 28, 28) to logits (N, 10)."""
    return nn.Sequential(
        unit(1, 16, 3, stride=2), unit(16, 16, 3, groups=16), unit(16, 16, 1), Inverted(16, 16, 1), Inverted(16, 32, 2),
        Inverted(32, 32, 1), Inverted(32, 64, 2), unit(64, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(128, 10),
    )  # fmt: skip


def prepare(folder: Path, shared: Path) -> None:
    """Train on 30,000 images, calibrate on some of them, test on the 10,000 of the test part."""
    import fashion

    images, labels = fashion.load("train")
    inputs = fashion.as_input(images)
    model = trained(
        network,
        shared / "fashion-dw.pt",
        lambda new: fit(new, inputs[:TRAIN], labels[:TRAIN], epochs=EPOCHS, rate=RATE),
    )
    tests, truth = fashion.load("test")
    write_task(
        folder, model, [ExampleInput("image", (2, 1, 28, 28))], {"image": inputs[:CALIBRATION]},
        {"image": fashion.as_input(tests)},
    )  # fmt: skip
    np.savez(folder / "truth.npz", label=truth)


PLAN = Plan("fashion-dw", "ReLU network with depthwise layers, trained here: Fashion-MNIST", prepare, answers, score)
