"""Masked pre-training: the published recipe as a LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, optim

from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder, MaskedOutput
from fastvim.tasks.optim import parameter_groups
from fastvim.tasks.callbacks.reconstruction import ReconstructionPictures
from fastvim.tasks.task import Task

Batch = tuple[Tensor, Any]  # images and what nobody looks at here


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
        checkpoint: file of weights to start from; None starts from random ones. A run that goes
            on from its own checkpoint leaves it be.
        lr: peak learning rate for `lr_batch` images a step. The rate used is
            `lr * global batch / lr_batch`, the global batch being images per process times
            processes times `accumulate_grad_batches`.
        lr_batch: see `lr`.
        min_lr: where the cosine ends.
        warmup_lr: where the linear warm-up starts.
        warmup_epochs: length of the warm-up; the cosine starts after it.
        weight_decay: of every parameter of two or more dimensions.
        betas: of AdamW.
        ema_decay: decay of the averaged weights, which are validated and exported; None trains
            without them.
        grad_checkpointing: recompute each block in the backward pass, for memory.
        capture: on a GPU, record the model's forward and backward pass as CUDA graphs and replay
            them: the same steps, several times faster where the model is small. Not with
            `grad_checkpointing`.
        pictures_every_n_epochs: draw what the model makes of some validation images so often;
            the data must then tell the `mean` and `std` of their normalisation. None draws none.

    Raises:
        UserError: unknown model or model option, or a model that is no masked autoencoder;
            checkpoint that does not fit the model; warm-up as long as the run.
    """

    monitor, monitor_mode = "val/loss", "min"

    def __init__(
        self,
        model: str,
        model_args: dict[str, Any] | None = None,
        checkpoint: str | None = None,
        lr: float = 1.5e-4,
        lr_batch: int = 256,
        min_lr: float = 0.0,
        warmup_lr: float = 0.0,
        warmup_epochs: float = 40,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        ema_decay: float | None = None,
        grad_checkpointing: bool = False,
        capture: bool = True,
        pictures_every_n_epochs: int | None = 10,
    ) -> None:
        super().__init__(
            model,
            model_args,
            checkpoint,
            lr=lr,
            lr_batch=lr_batch,
            min_lr=min_lr,
            warmup_lr=warmup_lr,
            warmup_epochs=warmup_epochs,
            ema_decay=ema_decay,
            grad_checkpointing=grad_checkpointing,
            capture=capture,
        )
        self.save_hyperparameters()  # a checkpoint says what it is a checkpoint of
        self.weight_decay = weight_decay
        self.betas = betas
        self.pictures_every_n_epochs = pictures_every_n_epochs

    def configure_model(self) -> None:
        """Build the network; Lightning calls it."""
        if self.model is not None:
            return
        model = self.build_model()
        if not isinstance(model, MaskedAutoencoder):
            raise UserError(
                f"{self.model_name} is no masked autoencoder: expected a model whose name begins "
                "with mae_"
            )
        self.model = model

    def configure_callbacks(self) -> list[L.Callback]:
        averaging = super().configure_callbacks()
        if self.pictures_every_n_epochs is None:
            return averaging
        # The averages stand last: pictures are then drawn before they leave the module again.
        return [ReconstructionPictures(self.pictures_every_n_epochs), *averaging]

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> MaskedOutput:
        """Mask, encode and decode normalised images (B, C, H, W).

        Args:
            images: in both sides at least a patch.
            generator: what draws the masks; None for torch's own.
        """
        assert self.model is not None
        if generator is None:
            return self.call_model(images)
        return self.model(images, generator=generator)

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

    def make_optimizer(self) -> optim.Optimizer:
        groups = parameter_groups(self.model, self.weight_decay)
        return optim.AdamW(groups, lr=self.peak_lr, betas=self.betas)
