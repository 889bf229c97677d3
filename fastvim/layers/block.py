"""One block of the pre-norm residual stack.

B  batch, L  tokens, d  model width
"""

from __future__ import annotations

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from fastvim.layers.mixer import Mixer
from fastvim.ops import Segments, add_norm
from fastvim.ops.reference import NormKind


class AddNorm(nn.Module):
    """`residual + drop_path(hidden)` and its norm. The residual stream stays in float32.

    Args:
        dim: model width d.
        kind: "rms" (classification, masked autoencoders) or "layer" (dense backbones).
        drop_path: probability of dropping a sample's `hidden` in training.
    """

    def __init__(self, dim: int, kind: NormKind = "rms", drop_path: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if kind == "layer" else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(B, L, d) each to the norm, in `hidden`'s dtype, and the new residual stream."""
        hidden = self.drop_path(hidden)
        return add_norm(hidden, residual, self.weight, self.bias, kind=self.kind, eps=self.eps)


class Block(nn.Module):
    """Norm and mixer. The next block's norm adds the output to the residual stream."""

    def __init__(self, norm: AddNorm, mixer: Mixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(
        self, hidden: Tensor, residual: Tensor | None, segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """Take the previous mixer's output and the residual stream; give this block's."""
        normed, residual = self.norm(hidden, residual)
        return self.mixer(normed, segments), residual
