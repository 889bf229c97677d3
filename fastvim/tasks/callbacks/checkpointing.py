"""Checkpoints that survive a kill, never hold broken weights, and export the trained model."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fastvim.errors import UserError
from fastvim.tasks.protocols import TrainedTask
from fastvim.tasks.sharding import gather, local
from fastvim.weights import METADATA_KEY, save


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are whole or absent, and a clear error for a damaged one.

    Lightning writes to the system's temporary folder and moves the file, which is a copy when
    that folder lies on another disk: a killed run could leave half a file under the final name.
    Here the partial file lies beside the final one, and a rename is atomic.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        if "://" in str(path):  # object stores publish a file when it is complete
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        partial = f"{path}.partial"
        torch.save(checkpoint, partial)
        os.replace(partial, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            checkpoint = super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError as error:
            raise UserError(f"checkpoint not found: {path}") from error
        except (RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            # torch.load raises these for a damaged file, and for one that is not a checkpoint.
            raise UserError(f"{path} is not a readable checkpoint: it is damaged") from error
        return checkpoint


class LastCheckpoint(ModelCheckpoint):
    """Keeps `last.ckpt`: the state after every epoch and, if asked, every n steps.

    A new run in the same folder writes `last-v1.ckpt` and so on; it overwrites nothing.

    Args:
        dirpath: folder of the checkpoints.
        every_n_train_steps: also save after each n-th optimiser step.
    """

    def __init__(self, dirpath: str, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=True,
        )
        # Lightning's constructor takes steps or epochs; a kill should lose neither.
        self._every_n_epochs = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # The state that a resumed run starts from is already saved. After the next batch, with
        # gradient accumulation, the step count may be the same: saving then would lose the
        # gradients of that batch.
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # After the last batch comes the validation. The end of the epoch saves.
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


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
                f"(epoch {trainer.current_epoch}); {_last_good(trainer)}"
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
            f"batch {batch_idx}); {_last_good(trainer)}"
        )


def _last_good(trainer: L.Trainer) -> str:
    """The checkpoint to resume from, for a message."""
    for callback in trainer.checkpoint_callbacks:
        path = callback.best_model_path if isinstance(callback, LastCheckpoint) else ""
        if os.path.exists(path):
            return f"the last good checkpoint is {os.path.relpath(path)}"
    return "no checkpoint was written yet"


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
