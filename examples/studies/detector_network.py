"""A small detector of YOLOX's kind: split stages, a neck over two levels, a decoupled head without anchors.

Its outputs are three maps over 8x8 cells of 8 pixels. The sigmoids of the head are part of the network, as in YOLOX;
the boxes are decoded and thinned out here in NumPy, the same for torch's outputs and for an engine's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from relu_deploy.demo.network import ConvUnit, SplitStage

CLASSES = 10
STRIDE = 8  # pixels of a cell
BASE = 20.0  # pixels of a box whose size is given as 0
LEAST, MOST = 0.01, 30  # score of a detection that counts, and detections of an image
SAME = 0.55  # boxes of one class that overlap more are one detection

Array = npt.NDArray[Any]


class Head(nn.Module):
    """Features (N, C, H, W) to ``boxes`` (N, 4, H, W), ``objectness`` (N, 1, H, W) and ``classes`` (N, 10, H, W).

    While it trains, the last two are logits, which the loss takes; after that they are probabilities.
    """

    def __init__(self, channels: int, width: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.stem = ConvUnit(channels, width, act, size=1)
        self.what, self.where = ConvUnit(width, width, act), ConvUnit(width, width, act)
        self.classes = nn.Conv2d(width, CLASSES, 1)
        self.objectness = nn.Conv2d(width, 1, 1)
        self.boxes = nn.Conv2d(width, 4, 1)
        self.sigmoid = nn.Sigmoid()
        for layer in (self.classes, self.objectness):  # nearly every cell is background
            nn.init.constant_(layer.bias, -math.log(99))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The three maps."""
        x = self.stem(x)
        where = self.where(x)
        classes, objectness = self.classes(self.what(x)), self.objectness(where)
        if not self.training:
            classes, objectness = self.sigmoid(classes), self.sigmoid(objectness)
        return {"boxes": self.boxes(where), "objectness": objectness, "classes": classes}


class Detector(nn.Module):
    """Images (N, 1, 64, 64) to the head's maps of 8x8 cells."""

    def __init__(self, act: type[nn.Module] = nn.SiLU, width: int = 16) -> None:
        super().__init__()
        w = width
        self.stem = ConvUnit(1, w, act, stride=2)
        self.stage4 = nn.Sequential(ConvUnit(w, 2 * w, act, stride=2), SplitStage(2 * w, 2 * w, act))
        self.stage8 = nn.Sequential(ConvUnit(2 * w, 4 * w, act, stride=2), SplitStage(4 * w, 4 * w, act))
        self.stage16 = nn.Sequential(ConvUnit(4 * w, 6 * w, act, stride=2), SplitStage(6 * w, 6 * w, act))
        self.lateral = ConvUnit(6 * w, 2 * w, act, size=1)
        self.up = nn.Upsample(scale_factor=2)
        self.neck = SplitStage(6 * w, 4 * w, act)
        self.head = Head(4 * w, 2 * w, act)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """The head's maps."""
        fine = self.stage8(self.stage4(self.stem(image)))
        coarse = self.up(self.lateral(self.stage16(fine)))
        return self.head(self.neck(torch.cat([fine, coarse], dim=1)))  # type: ignore[no-any-return]


def decode(outputs: Mapping[str, Array]) -> list[dict[str, Tensor]]:
    """Detections of each image from the maps of an evaluated network, best first, as torchmetrics takes them."""
    boxes = corners(np.asarray(outputs["boxes"], np.float32))
    classes = np.asarray(outputs["classes"], np.float32)
    classes = classes.reshape(*classes.shape[:2], -1).transpose(0, 2, 1)
    scores = classes.max(2) * np.asarray(outputs["objectness"], np.float32).reshape(len(boxes), -1)
    order = np.argsort(-scores, axis=1, kind="stable")
    boxes = np.take_along_axis(boxes, order[..., None], axis=1)
    labels, scores = np.take_along_axis(classes.argmax(2), order, 1), np.take_along_axis(scores, order, 1)
    kept = suppress(boxes, labels) & (scores > LEAST)
    return [
        {
            "boxes": torch.from_numpy(b[k][:MOST]),
            "scores": torch.from_numpy(s[k][:MOST]),
            "labels": torch.from_numpy(c[k][:MOST]),
        }
        for b, s, c, k in zip(boxes, scores, labels, kept, strict=True)
    ]


def corners(raw: Array) -> Array:
    """Maps (N, 4, H, W) of centre (in cells, from the cell's own) and size (as a logarithm) to boxes (N, H*W, 4)."""
    n, _, height, width = raw.shape
    y, x = np.mgrid[:height, :width]
    middle = (raw[:, :2] + np.stack([x, y]) + 0.5) * STRIDE
    half = BASE / 2 * np.exp(raw[:, 2:].clip(-4, 4))
    return np.concatenate([middle - half, middle + half], axis=1).reshape(n, 4, -1).transpose(0, 2, 1)


def suppress(boxes: Array, labels: Array) -> Array:
    """Which boxes stand: those that no better one of their class, which itself stands, overlaps much.

    Args:
        boxes: (N, A, 4), each image's best first.
        labels: (N, A).

    Returns:
        Bool (N, A).
    """
    rivals = (overlaps(boxes) > SAME) & (labels[:, :, None] == labels[:, None, :])
    stands = np.ones(labels.shape, bool)
    for i in range(labels.shape[1] - 1):
        stands[:, i + 1 :] &= ~(rivals[:, i, i + 1 :] & stands[:, i, None])
    return stands


def overlaps(boxes: Array) -> Array:
    """Intersection over union of all pairs, (N, A, 4) to (N, A, A)."""
    first, second = boxes[:, :, None], boxes[:, None]
    shared = (np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])).clip(0)
    both = shared.prod(-1)
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return both / (area[:, :, None] + area[:, None] - both).clip(1e-9)
