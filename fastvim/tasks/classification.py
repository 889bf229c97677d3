"""Image classification: the published recipe as a LightningModule."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fastvim.errors import OptionError, UserError
from fastvim.models import FastChannelVim, sample_channels
from fastvim.options import NOT_NEGATIVE, SHARE, SHARE_BELOW_1, check
from fastvim.tasks.metrics import NotFinite
from fastvim.tasks.task import Task

Batch = tuple[Tensor, Tensor]


class Classification(Task):
    """Trains and evaluates a timm model on (image, class index) batches.

    The defaults are the ImageNet-1k recipe of the published models.

    Args:
        mixup: alpha of Mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off.
        switch_prob: probability of CutMix instead of Mixup in a batch, when both are on.
        label_smoothing: share of the target spread evenly over all classes.
        sample_channels: train each batch on a random choice of its images' channels (hierarchical
            channel sampling, `fastvim.models.sample_channels`), for channel models. The choice
            follows from the data's seed, epoch and batch, the same in every process. Not with
            `capture`, which has no effect then.
        **options: of `Task`.

    Raises:
        UserError: as `Task`; fewer than two classes; batch of odd size with Mixup or CutMix.
    """

    monitor, monitor_mode = "val/acc1", "max"

    def __init__(
        self,
        *args: Any,
        lr: float = 1e-3,
        lr_batch: int = 512,
        min_lr: float = 1e-5,
        warmup_lr: float = 1e-6,
        warmup_epochs: float = 5,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        ema_decay: float | None = 0.9999,
        sample_channels: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            *args,
            lr=lr,
            lr_batch=lr_batch,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            ema_decay=ema_decay,
            **options,
        )
        self._not_finite = NotFinite()
        check(NOT_NEGATIVE, mixup=mixup, cutmix=cutmix)
        check(SHARE, switch_prob=switch_prob)
        check(SHARE_BELOW_1, label_smoothing=label_smoothing)
        self.mixup_alpha, self.cutmix_alpha, self.switch_prob = mixup, cutmix, switch_prob
        self.label_smoothing = label_smoothing
        self.sample_channels = sample_channels
        self.mixup: Mixup | None = None

    def setup(self, stage: str) -> None:
        self._require_two(self.num_classes)
        if self.fitting:
            self._require_two(None)
        super().setup(stage)

    def configure_model(self) -> None:
        """Build the network and what depends on the number of classes; Lightning calls it."""
        if self.model is not None:
            return
        if self.model_name.startswith("mae_"):
            raise UserError(
                f"{self.model_name} is a masked autoencoder and has no classes: pre-train it with "
                f"fastvim.tasks.Pretraining, then train {self.model_name.removeprefix('mae_')} "
                "with its weights as the checkpoint"
            )
        self._require_two(self.num_classes)
        num_classes = self.head_classes
        self.model = self.build_model(num_classes=num_classes)
        if self.sample_channels and not isinstance(self.model, FastChannelVim):
            expected = f"False, as {self.model_name} is no fastchannelvim or channelvim model"
            raise OptionError("sample_channels", True, expected)

        self.train_loss: nn.Module = LabelSmoothingCrossEntropy(self.label_smoothing)
        if self.mixup_alpha > 0 or self.cutmix_alpha > 0:
            self.mixup = Mixup(
                mixup_alpha=self.mixup_alpha,
                cutmix_alpha=self.cutmix_alpha,
                switch_prob=self.switch_prob,
                label_smoothing=self.label_smoothing,
                num_classes=num_classes,
            )
            self.train_loss = SoftTargetCrossEntropy()  # the targets are smoothed by Mixup

        accuracy: dict[str, Metric | MetricCollection] = {
            "acc1": MulticlassAccuracy(num_classes, average="micro")
        }
        if num_classes > 5:
            accuracy["acc5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro")
        self.val_metrics = MetricCollection(accuracy, prefix="val/")
        self.test_metrics = self.val_metrics.clone(prefix="test/")

    def _require_two(self, num_classes: int | None) -> None:
        """Refuse a single class: the option's, or with None the data's."""
        found = self.data.num_classes if num_classes is None else num_classes
        if found < 2:
            where = f"num_classes {num_classes}"
            if num_classes is None:
                where = f"{self.data.classes_from}: one class, {self.data.class_names[0]}"
            raise UserError(f"{where}: a classifier needs two classes or more")

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, C, H, W)."""
        return self.call_model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, target = batch
        if self.mixup is not None:
            if len(images) % 2:
                raise OptionError("batch_size", len(images), "an even one: mixup pairs images")
            images, target = self.mixup(images, target)
        if self.sample_channels:
            channels = self._draw_channels(images.shape[1], batch_idx).to(images.device)
            assert self.model is not None
            logits = self.model(images[:, channels], channels)
        else:
            logits = self(images)
        loss = self.train_loss(logits.float(), target)
        self.log_training(loss)
        return loss

    def _draw_channels(self, count: int, batch_idx: int) -> Tensor:
        key = (self.data.seed, self.trainer.current_epoch, batch_idx)
        seed = int(np.random.SeedSequence(key).generate_state(1)[0])
        return sample_channels(count, torch.Generator().manual_seed(seed))

    def on_validation_epoch_end(self) -> None:
        if self.fitting:
            self._not_finite.tell(self)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits, for callbacks that show predictions."""
        return self._evaluate(batch, "test/loss", self.test_metrics)

    def _evaluate(self, batch: Batch, loss_name: str, metrics: MetricCollection) -> Tensor:
        images, target = batch
        logits = self(images).float()
        lost = ~logits.isfinite().all(dim=1)
        if self.fitting:
            self._not_finite.add(lost.sum())
        # Where a result is not finite, the right class is the last of all.
        no_answer = -F.one_hot(target, logits.shape[1]).to(logits.dtype)
        metrics.update(torch.where(lost[:, None], no_answer, logits), target)
        self.log(loss_name, F.cross_entropy(logits, target), batch_size=len(images), sync_dist=True)
        self.log_dict(metrics, batch_size=len(images))
        return logits

    def exported_metadata(self) -> dict[str, Any]:
        metadata = super().exported_metadata()
        assert self.model is not None
        options = {**metadata["model_args"], "num_classes": self.model.num_classes}
        return {**metadata, "model_args": options, "class_names": self.output_names()}
