"""Image classification: the published recipe as a LightningModule."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn, optim
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from fastvim.checkpoint import load_weights
from fastvim.errors import UserError
from fastvim.models import create_model
from fastvim.tasks.ema import EMA
from fastvim.tasks.optim import count_steps, parameter_groups, warmup_cosine

_logger = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]


class Classification(L.LightningModule):
    """Trains and evaluates a timm model on (image, class index) batches.

    The defaults are the ImageNet-1k recipe of the published models. The data module must have
    `batch_size` (images per process) and, where `num_classes` is None, `num_classes`.

    Args:
        model: name of a timm model, e.g. `fastvim_tiny_patch16_224`.
        model_args: options of that model, e.g. `{drop_path_rate: 0.05, img_size: 224}`.
        num_classes: width of the head; None takes the data's.
        checkpoint: file of weights to start from; None starts from random ones. Training makes
            a new head if the file's has another number of classes.
        lr: peak learning rate for `lr_batch` images a step. The rate used is
            `lr * global batch / lr_batch`, the global batch being images per process times
            processes times `accumulate_grad_batches`.
        lr_batch: see `lr`.
        min_lr: where the cosine ends.
        warmup_lr: where the linear warm-up starts.
        warmup_epochs: length of the warm-up; the cosine starts after it.
        weight_decay: of every parameter of two or more dimensions.
        no_decay: shell patterns of further parameter names without weight decay.
        betas: of AdamW.
        layer_decay: factor of the rate from one layer to the one below it; None for one rate.
        blocks_per_decay: how many consecutive blocks share one factor of `layer_decay`.
        mixup: alpha of Mixup; 0 turns it off.
        cutmix: alpha of CutMix; 0 turns it off.
        switch_prob: probability of CutMix instead of Mixup in a batch, when both are on.
        label_smoothing: share of the target spread evenly over all classes.
        ema_decay: decay of the averaged weights, which are validated and exported; None trains
            without them.

    Raises:
        UserError: unknown model or model option; checkpoint that does not fit the model; batch
            of odd size with Mixup or CutMix; warm-up as long as the run.
    """

    monitor = "val/acc1"  # what the best checkpoint is chosen by; higher is better

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        num_classes: int | None = None,
        checkpoint: str | None = None,
        lr: float = 1e-3,
        lr_batch: int = 512,
        min_lr: float = 1e-5,
        warmup_lr: float = 1e-6,
        warmup_epochs: float = 5,
        weight_decay: float = 0.05,
        no_decay: list[str] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        layer_decay: float | None = None,
        blocks_per_decay: int = 1,
        mixup: float = 0.8,
        cutmix: float = 1.0,
        switch_prob: float = 0.5,
        label_smoothing: float = 0.1,
        ema_decay: float | None = 0.9999,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()  # a checkpoint says what it is a checkpoint of
        self.model_name = model
        self.model_args = model_args or {}
        self.num_classes = num_classes
        self.checkpoint = checkpoint
        self.lr, self.lr_batch, self.min_lr = lr, lr_batch, min_lr
        self.warmup_lr, self.warmup_epochs = warmup_lr, warmup_epochs
        self.weight_decay, self.no_decay = weight_decay, no_decay or []
        self.betas = betas
        self.layer_decay, self.blocks_per_decay = layer_decay, blocks_per_decay
        self.mixup_alpha, self.cutmix_alpha, self.switch_prob = mixup, cutmix, switch_prob
        self.label_smoothing = label_smoothing
        self.ema_decay = ema_decay
        self.model: nn.Module | None = None
        self.mixup: Mixup | None = None

    def configure_model(self) -> None:
        """Build the network and what depends on the number of classes; Lightning calls it."""
        if self.model is not None:
            return
        num_classes = self.num_classes or self._data.num_classes
        self.model = create_model(self.model_name, num_classes=num_classes, **self.model_args)
        if self.checkpoint is not None:
            training = self.trainer.state.fn == TrainerFn.FITTING
            load_weights(self.model, self.checkpoint, new_head=training)

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

    def configure_callbacks(self) -> list[L.Callback]:
        return [] if self.ema_decay is None else [EMA(self.ema_decay)]

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, num_classes) of normalised images (B, C, H, W)."""
        assert self.model is not None
        return self.model(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, target = batch
        if self.mixup is not None:
            if len(images) % 2:
                raise UserError(
                    f"Mixup and CutMix pair images: batch_size {len(images)} must be even"
                )
            images, target = self.mixup(images, target)
        loss = self.train_loss(self(images).float(), target)

        rate = max(group["lr"] for group in self.trainer.optimizers[0].param_groups)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/lr", rate, on_step=True, on_epoch=False)
        self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, "val/loss", self.val_metrics)

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the logits, for callbacks that show predictions."""
        return self._evaluate(batch, "test/loss", self.test_metrics)

    def _evaluate(self, batch: Batch, loss_name: str, metrics: MetricCollection) -> Tensor:
        images, target = batch
        logits = self(images).float()
        metrics.update(logits, target)
        self.log(loss_name, F.cross_entropy(logits, target), batch_size=len(images), sync_dist=True)
        self.log_dict(metrics, batch_size=len(images))
        return logits

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        assert self.model is not None
        steps_per_epoch, total_steps = count_steps(self.trainer)
        warmup_steps = round(self.warmup_epochs * steps_per_epoch)
        if self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            warmup_steps = 0
        else:
            self._check_averaging(total_steps)
        if warmup_steps >= total_steps:
            raise UserError(
                f"warmup_epochs is {self.warmup_epochs:g} ({warmup_steps} steps) but the whole "
                f"run is {total_steps} steps: shorten the warm-up or train longer"
            )
        groups = parameter_groups(
            self.model, self.weight_decay, self.layer_decay, self.blocks_per_decay, self.no_decay
        )
        optimizer = optim.AdamW(groups, lr=self.peak_lr, betas=self.betas)
        scheduler = warmup_cosine(optimizer, total_steps, warmup_steps, self.warmup_lr, self.min_lr)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _check_averaging(self, total_steps: int) -> None:
        """Warn of an average that has not forgotten the initial weights when the run ends."""
        initial = 0.0 if self.ema_decay is None else self.ema_decay**total_steps
        if initial > 0.05 and self.trainer.is_global_zero:
            _logger.warning(
                "%.0f %% of the averaged weights will still be the initial ones after %d steps: "
                "lower ema_decay from %g, say to %.3g",
                100 * initial,
                total_steps,
                self.ema_decay,
                max(0.0, 1 - 30 / total_steps),
            )

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        # Optimiser steps done so far: a resumed run continues the curve from the loop's counter.
        scheduler.step_update(num_updates=self.trainer.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own, theirs = self.state_dict(), checkpoint["state_dict"]
        wrong = [
            f"{name} {_shape(theirs.get(name))} for {_shape(own.get(name))}"
            for name in sorted(own.keys() | theirs.keys())
            if _shape(theirs.get(name)) != _shape(own.get(name))
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"the checkpoint does not fit {self.model_name} as configured: "
                f"{', '.join(wrong[:3])}{more}"
            )

    @property
    def global_batch(self) -> int:
        """Images of one optimiser step over all processes."""
        trainer = self.trainer
        return self._data.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    @property
    def peak_lr(self) -> float:
        """The learning rate at the end of the warm-up, scaled to the global batch."""
        return self.lr * self.global_batch / self.lr_batch

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]


def _shape(weight: Tensor | None) -> str:
    return "absent" if weight is None else str(tuple(weight.shape))
