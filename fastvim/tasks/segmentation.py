"""Semantic segmentation: the published UPerNet recipe as a LightningModule.

B  batch, K  classes
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvim.errors import OptionError
from fastvim.labels import IGNORE_INDEX
from fastvim.models import FastVim, FeatureMaps
from fastvim.models.heads.sliding import multi_scale_flip, sliding_window
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.intermediates import Source
from fastvim.options import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE_BELOW_1,
    WHOLE,
    check,
    check_choice,
    check_given,
)
from fastvim.tasks.dense_task import DenseTask
from fastvim.tasks.metrics import NotFinite, SegmentationMetrics
from fastvim.tasks.schedules import Curve, line_by_steps

# Images (3, H, W) and classes (H, W) each: tensors in training, lists in evaluation.
Batch = tuple[Iterable[Tensor], Iterable[Tensor]]


class Segmentation(DenseTask):
    """Trains and evaluates UPerNet over a FastVim or Vim on (image, class of each pixel) batches.

    The defaults are the published ADE20K recipe: AdamW, a linear warm-up, then a line to 0. A loss
    is the mean over all pixels of a batch, ignored ones included, which count as 0. A
    prediction is resized to the size of the classes that it is compared with.

    Args:
        out_indices: blocks whose maps the head reads.
        source: "mixer" as published, or the "residual" stream (`fastvim.models.FeatureMaps`).
        channels: width of the head.
        aux_channels: width of the auxiliary head, which reads the last map but one.
        aux_weight: of the auxiliary loss.
        drop_rate: of both heads.
        window: side of the sliding windows in evaluation; None predicts the whole image at once.
        stride: pixels from one window to the next.
        scales: of the multi-scale evaluation, factors on the sides of an image.
        flip: average with the predictions of the mirrored images.
        **options: of `DenseTask`.

    Raises:
        UserError: as `Task`; one image a step; scales below or at 0.
    """

    monitor, monitor_mode = "val/miou", "max"
    head = "segmentation"
    head_options = ("out_indices", "source", "channels", "aux_channels")
    default_no_decay = ("*pos_embed", "*cls_token", "*norm*", "*A_log", "*.D")
    fixed_options = (*DenseTask.fixed_options, "layer_decay", "blocks_per_decay")

    def __init__(
        self,
        *args: Any,
        out_indices: tuple[int, ...] = (5, 11, 17, 23),
        source: Source = "mixer",
        channels: int = 512,
        aux_channels: int = 256,
        aux_weight: float = 0.4,
        drop_rate: float = 0.1,
        window: int | None = 512,
        stride: int = 341,
        scales: tuple[float, ...] = (1.0,),
        flip: bool = False,
        lr: float = 6e-5,
        lr_batch: int = 16,
        warmup_lr: float = 6e-11,
        warmup_steps: int = 1500,
        weight_decay: float = 0.01,
        **options: Any,
    ) -> None:
        super().__init__(
            *args,
            lr=lr,
            lr_batch=lr_batch,
            warmup_lr=warmup_lr,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            layer_decay=None,
            blocks_per_decay=1,
            **options,
        )
        self._not_finite = NotFinite()
        check(COUNT, channels=channels, aux_channels=aux_channels, stride=stride)
        check_given(COUNT, window=window)
        check(WHOLE, out_indices=out_indices)
        check_choice(get_args(Source), source=source)
        check(NOT_NEGATIVE, aux_weight=aux_weight)
        check(SHARE_BELOW_1, drop_rate=drop_rate)
        check(POSITIVE, scales=scales)
        if not scales:
            raise OptionError("scales", scales, "one factor or more")
        self.out_indices, self.source = tuple(out_indices), source
        self.channels, self.aux_channels = channels, aux_channels
        self.aux_weight, self.drop_rate = aux_weight, drop_rate
        self.window, self.stride = window, stride
        self.scales, self.flip = tuple(scales), flip
        self._test_iou: dict[str, float] = {}

    # The network and its weights.

    def configure_model(self) -> None:
        """Build the network and the metrics; Lightning calls it."""
        if self.model is None:
            super().configure_model()
            self.val_metrics = SegmentationMetrics(self.head_classes)
            self.test_metrics = SegmentationMetrics(self.head_classes)

    def add_head(self, backbone: FastVim, **options: Any) -> nn.Module:
        depth = len(backbone.blocks)
        if len(self.out_indices) < 2 or not all(-depth <= i < depth for i in self.out_indices):
            expected = f"two or more of the {depth} blocks of {self.model_name}"
            raise OptionError("out_indices", self.out_indices, expected)
        maps = FeatureMaps(backbone, self.out_indices, self.source)
        sizes: dict[str, Any] = {"channels": self.channels, "aux_channels": self.aux_channels}
        return UPerNet(maps, drop_rate=self.drop_rate, **sizes, **options)

    def exported_metadata(self) -> dict[str, Any]:
        assert isinstance(self.model, UPerNet)
        head = {
            "num_classes": self.model.num_classes,
            "out_indices": list(self.out_indices),
            "source": self.source,
            "channels": self.channels,
            "aux_channels": self.aux_channels,
            "window": self.window,
            "stride": self.stride,
        }
        names = {"class_names": self.output_names()}
        return {**super().exported_metadata(), "segmentation": head, **names}

    # Training.

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, classes = batch
        logits, auxiliary = self.call_model(images)
        loss = _cross_entropy(logits, classes)
        loss = loss + self.aux_weight * _cross_entropy(auxiliary, classes)
        self.log_training(loss)
        return loss

    def make_rate(self, total: float, warmup: float) -> Curve:
        return line_by_steps(self.peak_lr, total, warmup, self.warmup_lr, self.min_lr)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        if self.data.batch_size * self.trainer.world_size == 1:
            raise OptionError("batch_size", 1, "2 or more, the head has batch norms")
        return super().configure_optimizers()

    # Evaluation.

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K, H, W) of normalised images (B, C, H, W), in evaluation mode."""
        assert self.model is not None
        if self.window is None:
            return self.model(images).float()
        return sliding_window(self.model, images, self.window, self.stride)

    def class_scores(self) -> dict[str, dict[str, float]]:
        return {"iou": self._test_iou} if self._test_iou else {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, list[Tensor]]:
        """The predicted classes of each image, for `fastvim.tasks.callbacks.report.Report`."""
        return {"labelled": self._evaluate(batch, "test/loss", self.test_metrics)}

    def on_validation_epoch_end(self) -> None:
        if self.fitting:
            self._not_finite.tell(self)
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        iou = self._log_metrics("test", self.test_metrics)
        self._test_iou = dict(zip(self.output_names(), iou.tolist(), strict=True))

    def _evaluate(self, batch: Batch, loss_name: str, metrics: SegmentationMetrics) -> list[Tensor]:
        predicted = []
        for image, classes in zip(*batch, strict=True):
            size = (classes.shape[0], classes.shape[1])
            logits = multi_scale_flip(self, image[None], size, self.scales, self.flip)
            lost = logits[0].isnan().any(dim=0)
            if self.fitting:
                self._not_finite.add(lost.any())
            # Where a result is not finite, another class than the right one.
            wrong = (classes + 1) % logits.shape[1]
            predicted.append(torch.where(lost, wrong, logits[0].argmax(dim=0)))
            metrics.update(predicted[-1], classes)
            loss = _cross_entropy(logits, classes[None])
            # An image of which no pixel counts has no loss, not one of 0.
            weight = int((classes != IGNORE_INDEX).any())
            self.log(loss_name, loss, on_epoch=True, batch_size=weight, sync_dist=True)
        return predicted

    def _log_metrics(self, stage: str, metrics: SegmentationMetrics) -> Tensor:
        """Log the mean scores and return the IoU of each class, (K,)."""
        scores = metrics.compute()
        self.log(f"{stage}/miou", scores["miou"], prog_bar=True, sync_dist=True)
        self.log(f"{stage}/acc", scores["acc"], sync_dist=True)
        metrics.reset()
        return scores["iou"]


def _cross_entropy(logits: Tensor, classes: Tensor) -> Tensor:
    """Mean over all pixels, (B, K, H, W) and (B, H, W), where an ignored one counts as 0."""
    total = F.cross_entropy(logits.float(), classes, ignore_index=IGNORE_INDEX, reduction="sum")
    return total / classes.numel()
