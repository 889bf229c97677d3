"""What checkpoints and the trained model's file hold: weights, and how to use them."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn

from fastvim.tasks.protocols import TrainedTask
from fastvim.tasks.sharding import gather
from fastvim.weights import METADATA_KEY, save


class ExportWeights(L.Callback):
    """Writes `model.safetensors` at the end of training: the averaged weights if there are any.

    The metadata of this file and of every checkpoint says how to build the model and how to prepare
    its images: prediction needs one file.

    Args:
        path: of the file.
        images: how images are prepared: `img_size`, `in_chans`, `mean`, `std`, `crop_pct`,
            `interpolation`.
    """

    def __init__(self, path: str, images: dict[str, Any]) -> None:
        self._path = path
        self._images = images

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        assert isinstance(pl_module, TrainedTask)
        checkpoint[METADATA_KEY] = {**pl_module.exported_metadata(), **self._images}

    def teardown(self, trainer: Any, pl_module: L.LightningModule, stage: str) -> None:
        # Not earlier: only now are the averages in the module.
        if stage != TrainerFn.FITTING or trainer.fast_dev_run or not trainer.global_step:
            return
        assert isinstance(pl_module, TrainedTask)
        exported = gather(pl_module.exported_weights(), trainer.is_global_zero)
        if trainer.is_global_zero:
            weights = "only" if pl_module.ema_decay is None else "EMA"
            metadata = {**pl_module.exported_metadata(), **self._images, "weights": weights}
            save(self._path, exported, metadata)
