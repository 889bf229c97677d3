"""Images of many channels for the tests of their augmentation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

STILL = {"orientation": 0.0, "defocus": 0.0, "dropout": 0.0}


def noise(*shape: int) -> Tensor:
    """Stored values from 1 to 255: no pixel is 0."""
    values = np.random.default_rng(0).integers(1, 256, shape)
    return torch.from_numpy(values.astype(np.float32))


def plain(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that leave the stored values alone."""
    return (0.0,) * channels, (1.0,) * channels


def orientations(image: Tensor) -> dict[str, Tensor]:
    """An image, its flips and its exact rotations."""
    turns = {f"by {90 * k}": torch.rot90(image, k, (1, 2)) for k in (1, 2, 3)}
    return {"same": image, "horizontal": image.flip(2), "vertical": image.flip(1), **turns}
