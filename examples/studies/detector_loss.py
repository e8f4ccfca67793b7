"""What the detector learns from: cells near an item's middle answer for it, as in FCOS and YOLOX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses

from detector_network import BASE, STRIDE

RADIUS = 1.25 * STRIDE  # pixels from an item's middle, along each axis
BOX_WEIGHT = 5.0  # YOLOX's


def detection_loss(outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Overlap loss of the boxes, and binary cross entropy of objectness and classes, a positive cell.

    Objectness is taught the overlap that the predicted box reaches, so that well-placed boxes come first.

    Args:
        outputs: Of a network in training mode: logits.
        targets: ``boxes`` and ``labels`` of each image.
    """
    raw = outputs["boxes"].flatten(2).transpose(1, 2)
    image, cell, boxes, labels = assign(targets, outputs["boxes"].shape[2:], raw.device)
    objectness = outputs["objectness"].flatten(1)
    wanted = torch.zeros_like(objectness)
    if len(image) == 0:
        return F.binary_cross_entropy_with_logits(objectness, wanted, reduction="sum") / len(wanted)
    overlap = box_overlap(decoded(raw[image, cell], cell, outputs["boxes"].shape[3]), boxes)
    wanted[image, cell] = overlap.detach().clamp(min=0)
    classes = outputs["classes"].flatten(2).transpose(1, 2)[image, cell]
    one_hot = F.one_hot(labels, classes.shape[1]).to(classes.dtype)
    terms = (
        BOX_WEIGHT * (1 - overlap).sum()
        + F.binary_cross_entropy_with_logits(objectness, wanted, reduction="sum")
        + F.binary_cross_entropy_with_logits(classes, one_hot, reduction="sum")
    )
    return terms / len(image)


def assign(
    targets: Sequence[Mapping[str, Tensor]], grid: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positive cells: those whose middle is near an item's, which is then the nearest one.

    Returns:
        Of each positive cell: image, cell (row by row), box ``(P, 4)`` and label.
    """
    rows = torch.cat([torch.full((len(t["labels"]),), i) for i, t in enumerate(targets)]).to(device)
    boxes = torch.cat([t["boxes"] for t in targets]).to(device)
    labels = torch.cat([t["labels"] for t in targets]).to(device)
    y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    middles = (torch.stack([x, y], -1).reshape(-1, 2) + 0.5) * STRIDE
    distance = ((boxes[:, None, :2] + boxes[:, None, 2:]) / 2 - middles).abs().amax(-1)  # (items, cells)
    distance = distance + 1e-4 * torch.arange(len(boxes), device=device)[:, None]  # of two just as near, the first
    nearest = torch.full((len(targets), len(middles)), float("inf"), device=device)
    nearest = nearest.scatter_reduce(0, rows[:, None].expand_as(distance), distance, "amin")
    item, cell = ((distance <= RADIUS) & (distance == nearest[rows])).nonzero(as_tuple=True)
    return rows[item], cell, boxes[item], labels[item]


def decoded(raw: Tensor, cell: Tensor, width: int) -> Tensor:
    """Boxes of single cells, as ``detector_network.corners`` makes them of whole maps."""
    middle = (raw[:, :2] + torch.stack([cell % width, cell // width], 1) + 0.5) * STRIDE
    half = BASE / 2 * raw[:, 2:].clamp(-4, 4).exp()
    return torch.cat([middle - half, middle + half], 1)


def box_overlap(first: Tensor, second: Tensor) -> Tensor:
    """Generalised intersection over union, row by row: below 0 for boxes far apart (Rezatofighi et al. 2019)."""
    shared = (torch.minimum(first[:, 2:], second[:, 2:]) - torch.maximum(first[:, :2], second[:, :2])).clamp(min=0)
    hull = torch.maximum(first[:, 2:], second[:, 2:]) - torch.minimum(first[:, :2], second[:, :2])
    both = shared.prod(1)
    union = (first[:, 2:] - first[:, :2]).prod(1) + (second[:, 2:] - second[:, :2]).prod(1) - both
    return both / union - (1 - union / hull.prod(1))
