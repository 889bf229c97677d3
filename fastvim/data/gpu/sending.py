"""What the host knows of a batch, sent to the device without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device; those for a GPU through memory that it reads by itself."""
    if device.type == "cuda":
        return values.pin_memory().to(device, non_blocking=True)
    return values
