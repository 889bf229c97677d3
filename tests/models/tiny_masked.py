"""Masked autoencoders and classifiers of the size of a test, and what they are given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastvim.models import FastVim, MaskedAutoencoder

PATCH, DIM, DEPTH = 4, 16, 3
KINDS = {
    "fastvim": {},
    "max": {"pooling": "max"},
    "fixed": {"alternate": False},
    "vim": {"pooling": "none", "class_token": True},
    "plain vim": {"pooling": "none"},
}
PUBLISHED = ("fastvim", "vim")

every_kind = pytest.mark.parametrize("kind", KINDS)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """No two weights alike, in float64; fixed positions too, so that none can be mixed up."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def create(kind: str = "fastvim", grid: tuple[int, int] = (4, 4), **options) -> MaskedAutoencoder:
    return MaskedAutoencoder(
        **{
            "img_size": (grid[0] * PATCH, grid[1] * PATCH),
            "patch_size": PATCH,
            "embed_dim": DIM,
            "depth": DEPTH,
            "decoder_embed_dim": 12,
            "decoder_depth": 2,
            **KINDS[kind],
            **options,
        },
    )


def classifier(kind: str = "fastvim", grid: tuple[int, int] = (4, 4), **options) -> FastVim:
    return FastVim(
        img_size=(grid[0] * PATCH, grid[1] * PATCH),
        **{"patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH, **KINDS[kind], **options},
    )


def image(grid: tuple[int, int] = (4, 4), seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, grid[0] * PATCH, grid[1] * PATCH)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def some_kept(grid: tuple[int, int], count: int, seed: int) -> Tensor:
    noise = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    return noise.argsort(dim=1)[:, :count].sort(dim=1).values


def all_kept(grid: tuple[int, int]) -> Tensor:
    return torch.arange(grid[0] * grid[1]).expand(2, -1)
