"""Masks and patches of a masked autoencoder (`fastvim.models.masked`).

B  batch, C  channels of the image, L  cells of the grid, n  cells kept, p  side of a patch
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvim.errors import UserError
from fastvim.options import SHARE_BELOW_1, check


class MaskedOutput(NamedTuple):
    """What a masked autoencoder gives.

    Attributes:
        loss: scalar, the mean squared error of the masked patches.
        prediction: (B, L, p·p·C) pixels of every patch, normalised if `norm_pix_loss` is set.
        mask: (B, L) float, 1 where a patch was masked.
        latent: (B, n, d) tokens of the encoder after its last norm; with the class token, n + 1.
        ids_keep: (B, n) indices of the cells that the encoder saw.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor
    latent: Tensor
    ids_keep: Tensor

    @property
    def shape(self) -> torch.Size:
        """Of the prediction, which loops that know one output of a model look at."""
        return self.prediction.shape


def patches_of(images: Tensor, p: int) -> Tensor:
    """`MaskedAutoencoder.patchify`."""
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % p, 0, -height % p))
    cells = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, H, p, W, p)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def draw_kept(
    batch: int,
    tokens: int,
    usual_ratio: float,
    mask_ratio: float | None,
    noise: Tensor | None,
    generator: torch.Generator | None,
    device: torch.device | None,
) -> Tensor:
    """`MaskedAutoencoder.random_mask`."""
    ratio = usual_ratio if mask_ratio is None else mask_ratio
    check(SHARE_BELOW_1, mask_ratio=ratio)
    count = int(tokens * (1 - ratio))
    if count == 0:
        raise UserError(f"mask_ratio={ratio} keeps none of {tokens} patches")
    if noise is None:
        source = device if generator is None else generator.device
        noise = torch.rand(batch, tokens, generator=generator, device=source)
    if noise.shape != (batch, tokens):
        raise UserError(f"noise {tuple(noise.shape)}: expected ({batch}, {tokens})")
    ids_keep = noise.argsort(dim=1, stable=True)[:, :count]
    return ids_keep.sort(dim=1).values.to(device)


def mask_of(ids_keep: Tensor, cells: int) -> Tensor:
    """(B, n) kept cells to (B, L) float, 1 where a cell is masked."""
    ones = torch.ones(ids_keep.shape[0], cells, device=ids_keep.device)
    return ones.scatter(1, ids_keep, 0.0)
