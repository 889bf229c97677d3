"""A detector that is small enough for tests, and what it learns from."""

from __future__ import annotations

import torch

from fastvim import FastVim
from fastvim.models.heads.cascade import CascadeMaskRCNN
from fastvim.models.heads.cascade_heads import HeadOptions

SMALL = HeadOptions(hidden_dim=16, samples=16)
STAGES = range(3)


def tiny(patch_size: int = 8, channels: int = 16, **options) -> CascadeMaskRCNN:
    backbone = FastVim(img_size=64, patch_size=patch_size, embed_dim=32, depth=2, norm="layer")
    options = {"proposals": 50, "heads": SMALL, **options}
    return CascadeMaskRCNN(backbone, 2, channels=channels, **options)


def target_of(boxes, labels, size) -> dict[str, torch.Tensor]:
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes, strict=True):
        mask[y1:y2, x1:x2] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "masks": masks,
    }
