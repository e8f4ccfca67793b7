"""The two small image classifiers of the studies: a residual convolutional network and a vision transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fashion import CLASSES

Act = type[nn.Module]


class ConvUnit(nn.Sequential):
    """Convolution, BatchNorm, activation."""

    def __init__(self, c_in: int, c_out: int, act: Act, *, stride: int = 1) -> None:
        super().__init__(nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(c_out), act())


class Residual(nn.Module):
    """``x + unit(unit(x))``."""

    def __init__(self, channels: int, act: Act) -> None:
        super().__init__()
        self.first, self.second = ConvUnit(channels, channels, act), ConvUnit(channels, channels, act)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        return x + self.second(self.first(x))


class FashionCnn(nn.Sequential):
    """Images (N, 1, 28, 28) to logits (N, 10): a convolution to 14x14, one to 7x7, a residual pair after each."""

    def __init__(self, act: Act, width: int = 16) -> None:
        super().__init__(
            ConvUnit(1, width, act, stride=2),
            Residual(width, act),
            ConvUnit(width, 2 * width, act, stride=2),
            Residual(2 * width, act),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )


class Attention(nn.Module):
    """Multi-head self-attention over tokens (N, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(n, tokens, width))


class Block(nn.Module):
    """A transformer's layer, normalised before each part: attention, then Linear, activation, Linear."""

    def __init__(self, width: int, heads: int, act: Act) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), act(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FashionDeit(nn.Module):
    """Images (N, 1, 28, 28) to logits (N, 10): patches of 7x7, a class token, four layers, as DeiT has it."""

    def __init__(self, act: Act, width: int = 48, layers: int = 4, heads: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 17, width))
        self.blocks = nn.Sequential(*(Block(width, heads, act) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(x.shape[0], -1, -1), tokens], dim=1) + self.positions
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def make_network(name: str, act: Act) -> nn.Module:
    """``cnn`` or ``deit``, with random weights."""
    return {"cnn": FashionCnn, "deit": FashionDeit}[name](act)
