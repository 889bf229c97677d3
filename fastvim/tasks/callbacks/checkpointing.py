"""What checkpoints and the trained model's file hold: finite weights, and how to use them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fastvim.errors import UserError
from fastvim.tasks.checkpoints import last_whole
from fastvim.tasks.protocols import TrainedTask
from fastvim.tasks.sharding import gather, local
from fastvim.weights import METADATA_KEY, save


class FiniteLoss(L.Callback):
    """Stops the run at the first loss that is not finite, before a checkpoint holds the damage.

    Reading a loss synchronises with the GPU, so there the losses are checked together every
    `log_every_n_steps` steps. Before a checkpoint is written, all losses and weights are checked.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[Tensor, int, int]] = []  # loss, optimiser steps, batch

    def on_train_batch_end(
        self, trainer: Any, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs["loss"].detach()
        self._unchecked.append((loss, trainer.global_step, batch_idx))
        patience = trainer.log_every_n_steps if loss.is_cuda else 1
        if len(self._unchecked) >= patience or trainer.is_last_batch:
            self._check_losses(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._check_losses(trainer, pl_module)
        # The loss was computed before the update. An update that overflows shows in the weights.
        finite = [local(weight).isfinite().all() for weight in pl_module.parameters()]
        if not torch.stack(finite).all():
            raise UserError(
                f"a weight is not finite after step {trainer.global_step} "
                f"(epoch {trainer.current_epoch}); {last_whole(trainer)}"
            )

    def _check_losses(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._unchecked:
            return
        unchecked, self._unchecked = self._unchecked, []
        losses = torch.stack([loss for loss, _, _ in unchecked])
        # Gathered from all processes, so that all stop at the same step.
        everywhere: Any = pl_module.all_gather(losses)
        finite = everywhere.view(-1, len(losses)).isfinite().all(dim=0)
        if finite.all():
            return
        _, step, batch_idx = unchecked[int(finite.int().argmin())]
        raise UserError(
            f"the loss is not finite at step {step} (epoch {trainer.current_epoch}, "
            f"batch {batch_idx}); {last_whole(trainer)}"
        )


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
