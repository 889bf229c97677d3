"""What a masked autoencoder makes of images.

B  batch, C  channels, H W  pixels of an image, L  patches
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastvim.models import MaskedAutoencoder

HIDDEN = 0.5  # mid-grey, of masked patches


class Reconstruction(NamedTuple):
    """The four panels of a batch, (B, C, H, W) in [0, 1], and the loss.

    Attributes:
        original: the images.
        masked: what the encoder saw, the hidden patches grey.
        predicted: the decoder's pixels of every patch. It was trained on hidden ones alone.
        completed: the visible patches of the original, the hidden ones as predicted.
        hidden: fraction of the patches that was masked.
        normalised: whether the predictions have the originals' means and deviations.
        loss: of the model on these images, scalar.
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

    A model with `norm_pix_loss` predicts patches without their mean and deviation. Those of the
    original are added here, as is usual for such pictures: the model did not predict the brightness
    and contrast of a hidden patch.

    Args:
        model: its mode stays as it is.
        images: (B, C, H, W), normalised, on any device.
        mean: of that normalisation, one value per channel, or one for all.
        std: likewise.
        mask_ratio: None for the model's.
        seed: of the masks. They have a generator of their own and depend only on the seed, the
            number of images and their size.

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
