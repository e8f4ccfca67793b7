"""COCO's mean average precision by pycocotools, where torchmetrics' own class cannot be imported.

torchmetrics runs the same ``COCOeval``, but asks for torchvision to convert box formats, and torchvision's wheels do
not load beside every build of torch.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from relu_deploy.errors import DataError

_NAMES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large",
          "mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")  # fmt: skip


class CocoMeanAveragePrecision(Metric):
    """Takes and gives what ``torchmetrics.detection.MeanAveragePrecision(box_format="xyxy")`` does, boxes only.

    States are one row a box, so that processes with different numbers of images and boxes can be put together.
    """

    full_state_update = False
    images: Tensor
    detections: list[Tensor]
    truths: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("detections", default=[], dist_reduce_fx="cat")  # image, x, y, w, h, label, score
        self.add_state("truths", default=[], dist_reduce_fx="cat")  # image, x, y, w, h, label
        self._seen = 0

    def update(self, predictions: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> None:
        """Add images.

        Args:
            predictions: A dict for each image: ``boxes`` ``(n, 4)`` as x1, y1, x2, y2 in pixels, ``scores`` ``(n,)``,
                ``labels`` ``(n,)``.
            targets: The same without scores.

        Raises:
            DataError: there is not one prediction for each image.
        """
        if len(predictions) != len(targets):
            raise DataError(f"{len(predictions)} predictions for {len(targets)} images: each image needs one")
        parts = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        rank = torch.distributed.get_rank() if parts > 1 else 0
        for found, truth in zip(predictions, targets, strict=True):
            image = self._seen * parts + rank
            self._seen += 1
            self.detections.append(torch.cat([_rows(image, found), found["scores"].double()[:, None]], 1))
            # An image without objects still counts for false alarms: a row of its own says that it is there.
            marker = torch.tensor([[float(image), 0, 0, 0, 0, -1.0]], dtype=torch.float64, device=self.device)
            self.truths.append(torch.cat([marker, _rows(image, truth)]))

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self._seen = 0

    def compute(self) -> dict[str, Tensor]:
        """COCO's twelve numbers; -1 where there is nothing to measure."""
        truths, found = _together(self.truths, 6), _together(self.detections, 7)
        if len(truths) == 0:
            raise DataError("there are no images to evaluate on")
        from pycocotools.coco import COCO  # type: ignore[import-untyped]
        from pycocotools.cocoeval import COCOeval  # type: ignore[import-untyped]

        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
            reference, detected = COCO(), COCO()
            boxes = truths[truths[:, 5] >= 0]
            ids = sorted({int(i) for i in truths[:, 0].tolist()})
            labels = sorted({int(label) for label in [*boxes[:, 5].tolist(), *found[:, 5].tolist()]})
            shared = {"images": [{"id": i} for i in ids], "categories": [{"id": label} for label in labels]}
            reference.dataset = {**shared, "annotations": _annotations(boxes)}
            detected.dataset = {**shared, "annotations": _annotations(found)}
            reference.createIndex()
            detected.createIndex()
            evaluation = COCOeval(reference, detected, iouType="bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return {name: torch.tensor(float(value)) for name, value in zip(_NAMES, evaluation.stats, strict=True)}


def _rows(image: int, boxes: dict[str, Tensor]) -> Tensor:
    corners = boxes["boxes"].double().reshape(-1, 4)
    sizes = corners[:, 2:] - corners[:, :2]
    label = boxes["labels"].double().reshape(-1, 1)
    return torch.cat([torch.full_like(label, image), corners[:, :2], sizes, label], 1)


def _together(parts: list[Tensor] | Tensor, columns: int) -> Tensor:
    """A state is a list before the processes are put together and one tensor after."""
    if isinstance(parts, Tensor):
        return parts.cpu()
    return torch.cat(parts).cpu() if parts else torch.zeros(0, columns, dtype=torch.float64)


def _annotations(rows: Tensor) -> list[dict[str, Any]]:
    """Numbers from 1: pycocotools takes 0 for "not matched"."""
    return [
        {
            "id": i, "image_id": int(row[0]), "bbox": row[1:5], "area": row[3] * row[4], "category_id": int(row[5]),
            "iscrowd": 0, **({"score": row[6]} if len(row) > 6 else {}),
        }
        for i, row in enumerate(rows.tolist(), 1)
    ]  # fmt: skip
