"""Metrics of segmentation, from a confusion matrix; the count of results that are not finite.

K  classes
"""

from __future__ import annotations

import logging
from typing import TypedDict

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics import Metric

from fastvim.labels import IGNORE_INDEX

_logger = logging.getLogger(__name__)


class SegmentationScores(TypedDict):
    """What `SegmentationMetrics` computes.

    Attributes:
        miou: mean of `iou` over the classes that occur in the targets or the predictions; NaN
            where fewer than two do, since then it says nothing.
        acc: share of the labelled pixels that are right; NaN likewise.
        iou: (K,), intersection over union of each class; NaN for one that never occurs.
    """

    miou: Tensor
    acc: Tensor
    iou: Tensor


class SegmentationMetrics(Metric):
    """Intersection over union and pixel accuracy of everything seen, over all processes.

    torchmetrics' confusion matrix is not used: in deterministic mode it compares every pixel with
    each of the K² cells, which takes terabytes for 150 classes.

    Args:
        num_classes: K.
        ignore_index: target of the pixels that do not count.
    """

    full_state_update = False
    matrix: Tensor  # (K, K): pixels by target and prediction

    def __init__(self, num_classes: int, ignore_index: int = IGNORE_INDEX) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        zeros = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self.add_state("matrix", zeros, dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count pixels: class indices of one shape, predicted and right."""
        counted = target != self.ignore_index
        pairs = target[counted] * self.num_classes + predicted[counted]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.matrix += counts.view_as(self.matrix)

    def compute(self) -> SegmentationScores:
        right = self.matrix.diag()
        union = self.matrix.sum(0) + self.matrix.sum(1) - right
        iou = right / union  # 0 / 0 is NaN
        told = torch.tensor(1.0 if (union > 0).sum() > 1 else torch.nan, device=iou.device)
        acc = right.sum() / self.matrix.sum()
        return {"miou": told * iou.nanmean(), "acc": told * acc, "iou": iou}


class NotFinite:
    """Counts the images of a validation whose results are not finite."""

    def __init__(self) -> None:
        self._images: Tensor | int = 0

    def add(self, images: Tensor | int) -> None:
        """So many more; a count on a GPU stays there."""
        self._images = self._images + images

    def tell(self, task: LightningModule) -> None:
        """Say how many there were in all processes, and begin anew."""
        count = torch.as_tensor(self._images, dtype=torch.float32, device=task.device)
        self._images = 0
        total = int(task.trainer.strategy.reduce(count, reduce_op="sum"))
        if total and task.trainer.is_global_zero:
            _logger.warning(
                "validation after step %d: images whose results are not finite, none right: %d",
                *(task.trainer.global_step, total),
            )
