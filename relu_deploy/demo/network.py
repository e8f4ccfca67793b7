"""The demo's network: a small residual CNN of the kind a detector's backbone is made of."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relu_deploy.demo.data import CLASSES
from relu_deploy.errors import TrainingError

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU, "gelu": nn.GELU, "hardswish": nn.Hardswish, "mish": nn.Mish, "relu": nn.ReLU,
}  # fmt: skip


class ConvUnit(nn.Sequential):
    """Convolution, BatchNorm, activation: ``(N, c_in, H, W)`` to ``(N, c_out, H/stride, W/stride)``."""

    def __init__(self, c_in: int, c_out: int, act: type[nn.Module], *, size: int = 3, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(c_in, c_out, size, stride=stride, padding=size // 2, bias=False), nn.BatchNorm2d(c_out), act()
        )


class Residual(nn.Module):
    """``x + unit(unit(x))``: one shape in, the same out."""

    def __init__(self, channels: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.first = ConvUnit(channels, channels, act)
        self.second = ConvUnit(channels, channels, act)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch to its input."""
        branch: Tensor = self.second(self.first(x))
        return x + branch


class SplitStage(nn.Module):
    """Two 1x1 branches, one of them residual, concatenated and mixed: the stage of YOLO-like backbones."""

    def __init__(self, c_in: int, c_out: int, act: type[nn.Module]) -> None:
        super().__init__()
        half = c_out // 2
        self.left = ConvUnit(c_in, half, act, size=1)
        self.right = nn.Sequential(ConvUnit(c_in, half, act, size=1), Residual(half, act))
        self.mix = ConvUnit(c_out, c_out, act, size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Concatenate the branches and mix them."""
        return self.mix(torch.cat([self.left(x), self.right(x)], dim=1))  # type: ignore[no-any-return]


class DigitNet(nn.Module):
    """Images ``(N, 1, 32, 32)`` to logits ``(N, 10)``."""

    def __init__(self, act: type[nn.Module], width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            ConvUnit(1, width, act),
            ConvUnit(width, 2 * width, act, stride=2),
            Residual(2 * width, act),
            SplitStage(2 * width, 4 * width, act),
            nn.MaxPool2d(2),
            SplitStage(4 * width, 8 * width, act),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(8 * width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(image))  # type: ignore[no-any-return]


def build_network(activation: str = "silu", *, width: int = 24) -> nn.Module:
    """The demo's network with random weights.

    Args:
        activation: One of ``ACTIVATIONS``.
        width: Channels of the first layer; the others have 2, 4 and 8 times as many.

    Raises:
        TrainingError: ``activation`` is not one of them.
    """
    if activation not in ACTIVATIONS:
        raise TrainingError(f"the demo's network has no activation {activation!r}", hint=", ".join(ACTIVATIONS))
    return DigitNet(ACTIVATIONS[activation], width)


def build_relu_network() -> nn.Module:
    """The student's shape: the demo's network with ReLU. Its weights have the names of the teacher's."""
    return build_network("relu")
