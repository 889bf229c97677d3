"""What checkpoints and the trained model's file hold: weights, and how to use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from fastvim.tasks.callbacks.run_log import describe
from fastvim.tasks.protocols import TrainedTask, as_trained_task
from fastvim.tasks.sharding import gather
from fastvim.weights import METADATA_KEY
from fastvim.weights.hub import save_folder


class ExportWeights(L.Callback):
    """Writes the trained weights at the end of training: the averaged ones if there are any.

    The metadata of `model.safetensors` and of every checkpoint says how to build the model and how
    to prepare its images: prediction needs one file. The files beside it are those of
    `fastvim.weights.hub`.

    Args:
        folder: gets the files.
        images: how images are prepared: `img_size`, `in_chans`, `mean`, `std`, `crop_pct`,
            `interpolation`.
        recipe: configuration of the run, for the model card.
    """

    def __init__(self, folder: Path, images: dict[str, Any], recipe: dict[str, Any]) -> None:
        self._folder, self._images, self._recipe = folder, images, recipe
        self._metrics: list[str] = []  # of the last validation

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            metrics = trainer.callback_metrics.items()
            self._metrics = [describe(n, float(m)) for n, m in metrics if n.startswith("val/")]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._metrics = checkpoint.get(METADATA_KEY, {}).get("metrics", [])

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        task = as_trained_task(pl_module)
        assert task is not None
        checkpoint[METADATA_KEY] = self._metadata(task)

    def teardown(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        # Not earlier: only now are the averages in the module.
        if stage != TrainerFn.FITTING or trainer.fast_dev_run or not trainer.global_step:
            return
        task = as_trained_task(pl_module)
        assert task is not None
        exported = gather(task.exported_weights(), trainer.is_global_zero)
        if trainer.is_global_zero:
            weights = "only" if task.ema_decay is None else "EMA"
            metadata = {**self._metadata(task), "weights": weights}
            save_folder(self._folder, exported, metadata, task.model, self._recipe)

    def _metadata(self, task: TrainedTask) -> dict[str, Any]:
        return {**task.exported_metadata(), **self._images, "metrics": self._metrics}
