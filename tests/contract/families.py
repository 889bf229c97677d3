"""The registered models by family, and small ones of them.

The models of a family differ in their sizes alone: `test_registration.py` shows it of each of them.
The rest of the contract therefore runs once a family, on the model that is named here.
"""

from __future__ import annotations

import re

import timm
import torch
from torch import Tensor, nn

DEPTH, DIM, CLASSES, SIDE = 4, 32, 5, 3

IMAGE_FAMILIES = {
    "fastvim_tiny_patch16_224": timm.list_models("fastvim_*"),
    "vim_tiny_patch16_224": timm.list_models("vim_*"),
}
CHANNEL_FAMILIES = {
    "fastchannelvim_small_patch8_224": timm.list_models("fastchannelvim_*"),
    "channelvim_small_patch16_224": timm.list_models("channelvim_*"),
}
MASKED_FAMILIES = {
    "mae_fastvim_huge_patch14_224": timm.list_models("mae_fastvim_*"),
    "mae_vim_tiny_patch16_224": timm.list_models("mae_vim_*"),
}


def has_channels(name: str) -> bool:
    """Whether it is a model of many channels."""
    return "channelvim_" in name


def patch_of(name: str) -> int:
    return int(re.search(r"patch(\d+)", name)[1])


def create(name: str, side: int = SIDE, **options) -> nn.Module:
    """The registered constructor, in a small configuration: a grid of `side` x `side` patches."""
    torch.manual_seed(0)
    small = {"img_size": side * patch_of(name), "embed_dim": DIM, "depth": DEPTH, "in_chans": 3}
    if name.startswith("mae_"):
        small |= {"decoder_embed_dim": DIM // 2}
    else:
        small |= {"num_classes": CLASSES}
    return timm.create_model(name, **{**small, **options}).eval()


def image(name: str, rows: float = SIDE, columns: float | None = None, in_chans: int = 3) -> Tensor:
    """Two images, with a given number of patches, whole or not, down and across."""
    patch = patch_of(name)
    shape = [int(patch * count) for count in (rows, rows if columns is None else columns)]
    return torch.randn(2, in_chans, *shape, generator=torch.Generator().manual_seed(1))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
