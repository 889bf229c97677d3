"""What a masked autoencoder makes of images, as a picture.

B  batch, C  channels, H W  pixels of an image, L  patches
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image, ImageDraw
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models import MaskedAutoencoder
from fastvim.tasks.pictures.drawing import GREY, LINE, SLATE, WHITE, font

HIDDEN = 0.5  # mid-grey, of masked patches
PANEL = 224  # pixels that the longer side of a panel comes closest to by whole enlargement
MARGIN, GAP, GROUP_GAP = 14, 8, 28
STACKED = 3  # up to so many images stand below one another, more in two groups of columns
TEXT_SIZE, NOTE_SIZE = 14, 12
NOTE = "brightness and contrast of each patch are the original's (norm_pix_loss)"


class Reconstruction(NamedTuple):
    """The four panels of a batch, (B, C, H, W) in [0, 1], and how good the prediction is.

    Attributes:
        original: the images.
        masked: what the encoder saw, the hidden patches grey.
        predicted: the decoder's pixels of every patch. It was trained on hidden ones alone.
        completed: the visible patches of the original, the hidden ones as predicted.
        hidden: part of the patches that was masked.
        normalised: whether predictions were given the originals' means and deviations.
        loss: scalar, the model's over these images.
    """

    original: Tensor
    masked: Tensor
    predicted: Tensor
    completed: Tensor
    hidden: float
    normalised: bool
    loss: Tensor


@torch.no_grad()
def reconstruct(
    model: MaskedAutoencoder,
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    mask_ratio: float | None = None,
    seed: int = 0,
) -> Reconstruction:
    """Mask images, predict them in evaluation mode, and undo the normalisation.

    A model with `norm_pix_loss` predicts patches without their mean and deviation. They are given
    back here from the original, as is the custom for such pictures: brightness and contrast of a
    hidden patch are its own, not the model's work.

    Args:
        model: its mode stays as it is.
        images: (B, C, H, W), normalised, on any device.
        mean: of that normalisation, one value per channel, or one for all.
        std: likewise.
        mask_ratio: None for the model's.
        seed: of the masks. They are drawn apart from torch's own generators, and depend on the
            seed, the number of images and their size alone.

    Returns:
        Panels in float32 on the CPU.

    Raises:
        UserError: see `MaskedAutoencoder.forward`.
    """
    weight = model.mask_token
    images = images.to(weight.device, weight.dtype)
    training = model.training
    model.eval()
    try:
        generator = torch.Generator().manual_seed(seed)
        output = model(images, mask_ratio=mask_ratio, generator=generator)
    finally:
        model.train(training)

    prediction = output.prediction.float()
    target = model.patchify(images).float()
    if model.norm_pix_loss:
        variance, centre = torch.var_mean(target, dim=-1, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + centre
    height, width = images.shape[-2:]
    grid = model.encoder.patch_embed.grid_size(height, width)

    def pixels(patches: Tensor) -> Tensor:
        return model.unpatchify(patches, grid)[..., :height, :width].cpu()

    shift, scale = (torch.tensor(value).view(-1, 1, 1) for value in (mean, std))
    original = (images.float().cpu() * scale + shift).clamp(0, 1)
    predicted = (pixels(prediction) * scale + shift).clamp(0, 1)
    hidden = pixels(output.mask[:, :, None].expand_as(target)) > 0
    return Reconstruction(
        original,
        original.masked_fill(hidden, HIDDEN),
        predicted,
        torch.where(hidden, predicted, original),
        output.mask.mean().item(),
        model.norm_pix_loss,
        output.loss.float().cpu(),
    )


def draw_reconstruction(result: Reconstruction) -> Image.Image:
    """Four panels an image: original, masked, reconstruction, visible patches pasted in.

    A line below tells where predictions were given the originals' means and deviations. Small
    images are enlarged by a whole number, pixel for pixel. Other channel counts than 1 and 3 have
    no colours: their first channel is shown.

    Returns:
        RGB. Up to three images stand below one another, more in two groups of columns.
    """
    captions = (
        "original",
        f"{result.hidden:.0%} masked",
        "reconstruction",
        "visible pasted in",
    )
    text = font(TEXT_SIZE)
    count, _, height, width = result.original.shape
    factor = max(1, round(PANEL / max(height, width)))
    height, width = height * factor, width * factor
    # A column is at least as wide as its caption.
    column = max(width, *(math.ceil(text.getlength(caption)) for caption in captions))
    groups = 1 if count <= STACKED else 2
    rows = math.ceil(count / groups)
    top = MARGIN + TEXT_SIZE + GAP
    group = 4 * column + 3 * GAP
    bottom = top + rows * height + (rows - 1) * GAP + MARGIN
    note = NOTE_SIZE + GAP if result.normalised else 0
    size = (2 * MARGIN + groups * group + (groups - 1) * GROUP_GAP, bottom + note)
    picture = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(picture)
    if note:
        place = (MARGIN, bottom + note - MARGIN)
        draw.text(place, NOTE, fill=GREY, font=font(NOTE_SIZE), anchor="ls")
    for half in range(groups):
        for panel, (caption, batch) in enumerate(zip(captions, result[:4], strict=True)):
            left = MARGIN + half * (group + GROUP_GAP) + panel * (column + GAP)
            centre = left + column / 2
            draw.text((centre, top - GAP), caption, fill=SLATE, font=text, anchor="ms")
            left += (column - width) // 2
            for row, image in enumerate(batch[half * rows : (half + 1) * rows]):
                y = top + row * (height + GAP)
                draw.rectangle((left - 1, y - 1, left + width, y + height), outline=LINE)
                picture.paste(_to_pil(image, factor), (left, y))
    return picture


def _to_pil(pixels: Tensor, factor: int) -> Image.Image:
    """(C, H, W) in [0, 1], enlarged."""
    if len(pixels) != 3:
        pixels = pixels[:1].expand(3, -1, -1)
    values = (pixels * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
    image = Image.fromarray(values.numpy())
    size = (image.width * factor, image.height * factor)
    return image.resize(size, Image.Resampling.NEAREST)


@runtime_checkable
class Normalised(Protocol):
    """Data that say how their images are normalised."""

    @property
    def mean(self) -> Sequence[float]: ...

    @property
    def std(self) -> Sequence[float]: ...


class ReconstructionPictures(L.Callback):
    """Draws the same validation images under the same masks as training goes on.

    The picture goes to every logger that takes pictures (`val/reconstruction`) and, the latest
    one, to `reconstruction.png` in the run's folder. It is drawn at the end of a validation, from
    the averaged weights if they are what is validated (an `EMA` must stand later among the
    callbacks, as a task's own do), and in any case from the weights that the run ends with.

    The images are drawn at random, once, from those of the first whole validation; with several
    processes, from the first one's. Nothing here touches the random state of the run.

    Args:
        every_n_epochs: how often.
        images: how many.
        mean: of the images' normalisation, one value per channel, or one for all; None for the
            data module's `mean`.
        std: likewise.

    Raises:
        UserError: a count below 1; when training starts, a task without a masked autoencoder, or
            data that do not tell their normalisation.
    """

    def __init__(
        self,
        every_n_epochs: int = 10,
        images: int = 8,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if min(every_n_epochs, images) < 1:
            raise UserError(
                f"every_n_epochs={every_n_epochs}, images={images}: expected 1 or more of each"
            )
        self._every = every_n_epochs
        self._count = images
        self._mean, self._std = mean, std
        self._images: Tensor | None = None  # (B, C, H, W), once they are chosen
        self._drawn_at = -1  # optimiser steps done

    def on_fit_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        _autoencoder(pl_module)
        if self._mean is None or self._std is None:
            data = trainer.datamodule
            if not isinstance(data, Normalised):
                raise UserError(
                    "pictures of reconstructions need the mean and std of the images: the data "
                    "module does not tell them"
                )
            self._mean, self._std = data.mean, data.std

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Each image gets a random key; those of the smallest keys are shown.
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
        # Here and not at an earlier hook: averages are in the module only now.
        if stage == TrainerFn.FITTING and self._drawn_at != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._images is None:
            return
        assert self._mean is not None
        assert self._std is not None
        result = reconstruct(_autoencoder(pl_module), self._images, self._mean, self._std)
        picture = draw_reconstruction(result)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / "reconstruction.png")
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
    )


def _autoencoder(task: L.LightningModule) -> MaskedAutoencoder:
    for module in task.modules():
        if isinstance(module, MaskedAutoencoder):
            return module
    raise UserError(f"{type(task).__name__} has no masked autoencoder to draw pictures of")
