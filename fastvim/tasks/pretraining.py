"""Masked pre-training: the published recipe as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder, MaskedOutput
from fastvim.options import COUNT, check_given
from fastvim.tasks.callbacks.reconstruction import ReconstructionPictures
from fastvim.tasks.task import Task

Batch = tuple[Tensor, Any]  # images, and labels that are not used


class Pretraining(Task):
    """Trains a masked autoencoder on images; the batches' labels are ignored.

    The defaults are the published recipe: crops of (0.2, 1) and flips are the data's. A training
    step draws its mask from torch's generator of the images' device, which `SeedSteps` seeds. The
    masks of validation are the same in every epoch, so that its losses can be compared.

    What is exported is the whole autoencoder. `Classification` and `LinearProbe` take its encoder
    when that file is their `checkpoint`.

    Args:
        model: name of a masked autoencoder, e.g. `mae_fastvim_base_patch16_224`.
        model_args: options of that model, e.g. `{mask_ratio: 0.75, img_size: 224}`.
        checkpoint: file of weights to start from; None starts from random ones. Ignored when
            resuming.
        pictures_every_n_epochs: how often to draw reconstructions of some validation images. The
            data need the `mean` and `std` of their normalisation for it. None draws none.
        **options: of `Task`.

    Raises:
        UserError: as `Task`; a model that is not a masked autoencoder.
    """

    monitor, monitor_mode = "val/loss", "min"
    uses_labels = False
    fixed_options = (
        *("num_classes", "weight_decay_end"),
        *("no_decay", "layer_decay", "blocks_per_decay", "lr_scales"),
    )

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        *,
        lr: float = 1.5e-4,
        lr_batch: int = 256,
        warmup_epochs: float = 40,
        decay_vectors: bool = True,
        lr_by_epoch: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        pictures_every_n_epochs: int | None = 10,
        **options: Any,
    ) -> None:
        super().__init__(
            model,
            model_args,
            num_classes=None,
            checkpoint=checkpoint,
            lr=lr,
            lr_batch=lr_batch,
            warmup_epochs=warmup_epochs,
            weight_decay_end=None,
            no_decay=None,
            layer_decay=None,
            blocks_per_decay=1,
            lr_scales=None,
            decay_vectors=decay_vectors,
            lr_by_epoch=lr_by_epoch,
            betas=betas,
            **options,
        )
        check_given(COUNT, pictures_every_n_epochs=pictures_every_n_epochs)
        self.pictures_every_n_epochs = pictures_every_n_epochs

    def configure_model(self) -> None:
        """Build the network; Lightning calls it."""
        if self.model is not None:
            return
        model = self.build_model()
        if not isinstance(model, MaskedAutoencoder):
            raise UserError(
                f"{self.model_name} is not a masked autoencoder: expected a model whose name "
                "begins with mae_"
            )
        self.model = model

    def configure_callbacks(self) -> list[L.Callback]:
        averaging = super().configure_callbacks()
        if self.pictures_every_n_epochs is None:
            return averaging
        # The averages come last: pictures are drawn while the module still holds them.
        return [ReconstructionPictures(self.pictures_every_n_epochs), *averaging]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> MaskedOutput:
        """Mask, encode and decode normalised images (B, C, H, W).

        Args:
            images: at least one patch high and wide.
            generator: draws the masks; None for torch's own.
        """
        if generator is None:
            return self.call_model(images)
        return self.call_model(images, generator=generator)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self(batch[0]).loss
        self.log_training(loss)
        return loss

    def on_validation_epoch_start(self) -> None:
        # On the CPU, so that every device masks the same.
        self._validation_masks = torch.Generator().manual_seed(self.global_rank)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images = batch[0]
        loss = self(images, self._validation_masks).loss
        self.log("val/loss", loss, batch_size=len(images), sync_dist=True)
