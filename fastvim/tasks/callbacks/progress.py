"""The bar of a run on a terminal."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from fastvim.tasks.callbacks.pace import Pace

EVERY = 1.0  # seconds between two looks at the loss


class ProgressBar(RichProgressBar):
    """Lightning's, without the number of the log folder, and counting epochs from one.

    It shows the loss of a training step once a second, and of the last one of an epoch: to read a
    number off a GPU is to wait until that has done all that it was given.

    Args:
        pace: of the training, to show.
    """

    def __init__(self, pace: Pace | None = None) -> None:
        super().__init__(refresh_rate=10)  # drawings a second, for which the loop stands still
        self._pace = pace
        self._loss: float | None = None
        self._looked = -EVERY

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        text = f"epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return text.ljust(len(self.validation_description))  # equally long, or the bars flicker

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        due = trainer.is_last_batch or time.monotonic() >= self._looked + EVERY
        loss = trainer.callback_metrics.get("train/loss") if trainer.training and due else None
        if loss is not None:
            self._loss, self._looked = float(loss), time.monotonic()
        if self._loss is not None:
            metrics["train/loss"] = self._loss
        if self._pace is not None and self._pace.rate is not None:
            metrics["images/s"] = f"{self._pace.rate:,.0f}"
            if self._pace.waiting is not None:
                metrics["waiting"] = f"{self._pace.waiting:.0%}"
        return metrics
