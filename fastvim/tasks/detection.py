"""Detection and instance segmentation: Cascade Mask R-CNN as a LightningModule.

H, W: an image's height and width; n: objects in it; K: classes
"""

from __future__ import annotations

from typing import Any, get_args

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from fastvim.errors import NotFiniteError, OptionError
from fastvim.models import CascadeMaskRCNN, FastVim
from fastvim.models.heads.cascade import build_detector
from fastvim.models.heads.results import coco_results
from fastvim.models.intermediates import Source
from fastvim.options import (
    COUNT,
    COUNT_OR_0,
    FINITE,
    POSITIVE,
    SHARE,
    Range,
    check,
    check_choice,
    per_channel,
)
from fastvim.tasks.average_precision import AveragePrecision
from fastvim.tasks.dense_task import DenseTask
from fastvim.tasks.metrics import NotFinite
from fastvim.tasks.schedules import Curve, drops_by_steps

# Images (3, H, W) with values in 0 to 1, and what is in them.
Batch = tuple[list[Tensor], list[dict[str, Any]]]


# The published layer decay of 0.7 looked for the blocks under another name: it reached these alone,
# 13 layers below the heads.
EMBEDDINGS = {"*.patch_embed.*": 0.7**13, "*.pos_embed": 0.7**13}


class Detection(DenseTask):
    """Trains and evaluates Cascade Mask R-CNN over a FastVim or Vim.

    The defaults are the published COCO recipe: AdamW, a short linear warm-up, then a constant rate
    that drops to a tenth twice. The data module gives batches as
    `fastvim.data.detection.DetectionData` does. Evaluation reports the average precision of boxes
    and masks in the images as stored.

    Args:
        source: "mixer" as published, or the "residual" stream (`fastvim.models.FeatureMaps`).
        channels: width of the pyramid and of the heads' convolutions.
        pad_to: images are padded to squares of at least this side; 0 pads as little as possible.
        image_mean: per channel, for values in 0 to 1.
        image_std: as `image_mean`.
        proposals: regions per image that the proposal network gives to the first stage.
        hidden_dim: width of a box head's last layer.
        samples: regions per image that each stage trains on.
        score_thresh: minimum score of a detection.
        nms_thresh: IoU threshold of per-class NMS.
        detections: maximum per image; COCO's scores count 100.
        drops: fractions of the run after which the rate falls to a tenth.
        lr_scales: see `Task`; None for the published ones, of the patch and position embeddings.
        **options: of `DenseTask`.

    Raises:
        UserError: as `Task`; drops outside of the run or out of order.
    """

    monitor, monitor_mode = "val/box_ap", "max"
    head = "detection"
    head_options = ("source", "channels", "hidden_dim")
    classes_by_name = False  # four offsets a class, and the background
    default_no_decay = ("*pos_embed",)
    fixed_options = (*DenseTask.fixed_options, "min_lr", "capture")

    def __init__(
        self,
        *args: Any,
        source: Source = "mixer",
        channels: int = 256,
        pad_to: int = 1024,
        image_mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        image_std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        proposals: int = 1000,
        hidden_dim: int = 1024,
        samples: int = 512,
        score_thresh: float = 0.05,
        nms_thresh: float = 0.5,
        detections: int = 100,
        lr: float = 1e-4,
        lr_batch: int = 64,
        warmup_lr: float = 1e-7,
        warmup_steps: int = 250,
        drops: tuple[float, ...] = (8 / 9, 26 / 27),
        lr_scales: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            *args,
            lr=lr,
            lr_batch=lr_batch,
            min_lr=0.0,  # the rate ends where the drops leave it
            warmup_lr=warmup_lr,
            warmup_steps=warmup_steps,
            lr_scales=dict(EMBEDDINGS) if lr_scales is None else lr_scales,
            capture=False,  # the number of regions changes from image to image
            **options,
        )
        self._not_finite = NotFinite()
        check(COUNT, channels=channels, proposals=proposals, hidden_dim=hidden_dim)
        check(COUNT, samples=samples, detections=detections)
        check(COUNT_OR_0, pad_to=pad_to)
        check_choice(get_args(Source), source=source)
        check(SHARE, score_thresh=score_thresh, nms_thresh=nms_thresh)
        check(Range(0, 1, above=True, below=True), drops=drops)
        if list(drops) != sorted(drops):
            raise OptionError("drops", drops, "shares of the run, the earliest first")
        self.source: Source = source
        self._sizes: dict[str, Any] = {
            "channels": channels,
            "pad_to": pad_to,
            "image_mean": list(per_channel("image_mean", image_mean, 3, FINITE)),
            "image_std": list(per_channel("image_std", image_std, 3, POSITIVE)),
            "proposals": proposals,
            "heads": {
                "hidden_dim": hidden_dim,
                "samples": samples,
                "score_thresh": score_thresh,
                "nms_thresh": nms_thresh,
                "detections": detections,
            },
        }
        self.drops = tuple(drops)
        self._metrics: AveragePrecision | None = None
        self._test_scores: dict[str, dict[str, float]] = {}

    def setup(self, stage: str) -> None:
        if self.num_classes not in (None, known := self.data.num_classes):
            expected = f"{known}; data.categories gives all categories that a model knows"
            raise OptionError("num_classes", self.num_classes, expected)

    # The network and its weights.

    def add_head(self, backbone: FastVim, **options: Any) -> nn.Module:
        return build_detector(backbone, source=self.source, **self._sizes, **options)

    def exported_metadata(self) -> dict[str, Any]:
        assert isinstance(self.model, CascadeMaskRCNN)
        head = {"num_classes": self.model.num_classes, "source": self.source, **self._sizes}
        return {
            **super().exported_metadata(),
            "detection": head,
            "class_names": list(self.data.class_names),
            "category_ids": list(self.data.category_ids),
            **({"orientation": "stored"} if self.data.frame == "stored" else {}),
        }

    # Training.

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, targets = batch
        assert self.model is not None
        losses = self.model(images, targets)
        loss: Tensor = sum(losses.values())
        self.log_training(loss, len(images))
        parts = {f"train/{name}": part for name, part in losses.items()}
        self.log_dict(parts, on_step=True, on_epoch=False, batch_size=len(images))
        return loss

    def make_rate(self, total: float, warmup: float) -> Curve:
        return drops_by_steps(self.peak_lr, total, warmup, self.warmup_lr, self.drops)

    # Evaluation.

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of `CascadeMaskRCNN` in images (3, H, W), in evaluation mode."""
        assert self.model is not None
        return self.model(images)

    def class_scores(self) -> dict[str, dict[str, float]]:
        return self._test_scores

    def on_validation_epoch_start(self) -> None:
        self._metrics = AveragePrecision(self.data.category_ids)

    def on_test_epoch_start(self) -> None:
        self._metrics = AveragePrecision(self.data.category_ids)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        if self.fitting:
            self._not_finite.tell(self)
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        class_scores = self._log_scores("test")
        names = self.data.class_names
        self._test_scores = {
            score: dict(zip(names, values, strict=True)) for score, values in class_scores.items()
        }

    def _evaluate(self, batch: Batch) -> None:
        images, targets = batch
        assert self._metrics is not None
        for image, target, found in zip(images, targets, self._detect(images), strict=True):
            if found is None:
                self._metrics.update(target, [])
                continue
            seen = (image.shape[1], image.shape[2])
            size, image_id = target["size"], target["image_id"]
            results = coco_results(found, seen, size, image_id, self._metrics.category_ids)
            self._metrics.update(target, results)

    def _detect(self, images: list[Tensor]) -> list[dict[str, Tensor] | None]:
        """Detections of each image; in training None where a result of the batch is not finite.

        Raises:
            NotFiniteError: for such results, but in training.
        """
        assert isinstance(self.model, CascadeMaskRCNN)
        try:
            return [*self.model.detect(images)]
        except NotFiniteError:
            if not self.fitting:
                raise
        self._not_finite.add(len(images))
        return [None] * len(images)

    def _log_scores(self, stage: str) -> dict[str, list[float]]:
        """Log the scores over all classes and return those of each class."""
        assert self._metrics is not None
        scores = self._metrics.compute()  # the same in every process
        for name, value in scores.overall.items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("box_ap", "mask_ap"))
        self._metrics = None
        return scores.of_classes
