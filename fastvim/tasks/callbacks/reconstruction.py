"""Pictures of reconstructions while a masked autoencoder trains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder
from fastvim.options import COUNT, check
from fastvim.pictures.reconstruction import draw_reconstruction
from fastvim.reconstruction import reconstruct
from fastvim.storage import save_picture
from fastvim.tasks.protocols import Normalised
from fastvim.tasks.strategies import ShardedStrategy

_logger = logging.getLogger(__name__)


class ReconstructionPictures(L.Callback):
    """Draws the same validation images under the same masks as training goes on.

    Every picture goes to the loggers that take pictures (`val/reconstruction`), the latest one to
    `reconstruction.png` in the run's folder. It is drawn at the end of a validation and at the end
    of the run. Where averaged weights are validated, they are drawn: `EMA` must then come later
    among the callbacks, as it does among a task's own.

    The images are chosen at random, once, from the first whole validation of the first process.
    The random state of the run is not touched.

    Args:
        every_n_epochs: how often.
        images: how many.
        mean: of the images' normalisation, one value per channel, or one for all; None for the
            data module's `mean`.
        std: likewise.

    Raises:
        UserError: a count below 1. When training starts: a task without a masked autoencoder, or
            data without `mean` and `std`.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        images: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        check(COUNT, every_n_epochs=every_n_epochs, images=images)
        self._every = every_n_epochs
        self._count = images
        self._mean, self._std = mean, std
        self._images: Tensor | None = None  # (B, C, H, W), once they are chosen
        self._drawn_at = -1  # optimiser steps done

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        _autoencoder(pl_module)
        if trainer.is_global_zero and isinstance(trainer.strategy, ShardedStrategy):
            _logger.warning("fsdp2: no pictures of reconstructions, which need whole weights")
        if self._mean is None or self._std is None:
            data = trainer.datamodule
            if not isinstance(data, Normalised):
                raise UserError(
                    "pictures of reconstructions need the mean and std of the images: the data "
                    "module does not tell them"
                )
            self._mean, self._std = data.mean, data.std

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Each image gets a random key. The images with the smallest keys are shown.
        self._keys = torch.empty(0)
        self._candidates: list[Tensor] = []
        self._random = torch.Generator().manual_seed(0)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._images is not None or not _draws(trainer):
            return
        images = batch if isinstance(batch, Tensor) else batch[0]
        before = len(self._keys)
        keys = torch.cat([self._keys, torch.rand(len(images), generator=self._random)])
        self._keys, chosen = keys.topk(min(self._count, len(keys)), largest=False)
        self._candidates = [
            self._candidates[i] if i < before else images[i - before].float().cpu()
            for i in chosen.tolist()
        ]

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not _draws(trainer):
            return
        if self._images is None and self._candidates:
            self._images = torch.stack(self._candidates)
        epochs = trainer.current_epoch + 1
        if epochs % self._every == 0 or epochs == trainer.max_epochs:
            self._draw(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        # Not earlier: only now are the averages in the module.
        if stage == TrainerFn.FITTING and self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._images is None:
            return
        assert self._mean is not None
        assert self._std is not None
        result = reconstruct(_autoencoder(pl_module), self._images, self._mean, self._std)
        picture = draw_reconstruction(result)
        save_picture(Path(trainer.default_root_dir) / "reconstruction.png", picture)
        pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        pixels = pixels.view(picture.height, picture.width, 3)
        self._drawn_at = trainer.global_step
        for logger in trainer.loggers:
            writer = getattr(logger, "experiment", None)
            if writer is not None and hasattr(writer, "add_image"):
                writer.add_image("val/reconstruction", pixels, self._drawn_at, dataformats="HWC")


def _draws(trainer: L.Trainer) -> bool:
    """Whether this validation is one of a real training run, and this process the first."""
    return (
        trainer.is_global_zero
        and trainer.state.fn == TrainerFn.FITTING
        and not trainer.sanity_checking
        and not trainer.fast_dev_run  # type: ignore[attr-defined]
        and not isinstance(trainer.strategy, ShardedStrategy)
    )


def _autoencoder(task: L.LightningModule) -> MaskedAutoencoder:
    for module in task.modules():
        if isinstance(module, MaskedAutoencoder):
            return module
    raise UserError(f"{type(task).__name__} has no masked autoencoder to draw pictures of")
