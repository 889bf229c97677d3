"""Checks of the ops' arguments."""

from __future__ import annotations

from torch import Tensor


def check_shapes(*expected: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Raise ValueError for the first tensor whose shape is not the expected one."""
    for name, tensor, shape in expected:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} {tuple(tensor.shape)}: expected {shape}")
