"""One block of the pre-norm residual stack.

B  batch, L  tokens, d  model width
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from timm.layers import DropPath, drop_path
from timm.models import checkpoint
from torch import Tensor, fx, nn

from fastvim.layers.hooks import is_bypassed
from fastvim.layers.mixer import Mixer
from fastvim.ops import Segments, add_norm
from fastvim.ops.reference import NormKind

fx.wrap("add_norm")
fx.wrap("drop_path")
fx.wrap("join")


class AddNorm(nn.Module):
    """The norm of the residual stream, which stays in float32, and the sum before it.

    Args:
        dim: model width d.
        kind: "rms" (classification, masked autoencoders) or "layer" (dense backbones).
        drop_path: probability of dropping a sample's `hidden` in training.
    """

    def __init__(self, dim: int, kind: NormKind = "rms", drop_path: float = 0.0) -> None:
        super().__init__()
        self.kind = kind
        self.eps = 1e-5
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if kind == "layer" else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, bias 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, stream: Tensor) -> Tensor:
        """(B, L, d) residual stream to its norm, in the same dtype."""
        return add_norm(stream, None, self.weight, self.bias, kind=self.kind, eps=self.eps)[0]

    def add(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of `residual + drop_path(hidden)`, in `hidden`'s dtype, and that sum."""
        hidden = self.drop_path(hidden)
        return add_norm(hidden, residual, self.weight, self.bias, kind=self.kind, eps=self.eps)


class Block(nn.Module):
    """Norm and mixer. The next block's norm adds the output to the residual stream."""

    def __init__(self, norm: AddNorm, mixer: Mixer) -> None:
        super().__init__()
        self.norm = norm
        self.mixer = mixer

    def forward(
        self,
        hidden: Tensor,
        residual: Tensor | None,
        segments: Segments,
        joined: torch.dtype | None = None,
    ) -> Any:
        """One step of the residual stream (docs/architecture.md, the stack).

        Args:
            hidden: (B, L, d), the previous mixer's output.
            residual: (B, L, d), the stream that it has not joined yet; None: `hidden` is it.
            segments: the walk over the tokens.
            joined: take `hidden` as the stream, and give the stream after the block; the mixer
                computes in this dtype. None: the fused form.

        Returns:
            This mixer's output and the stream that it has not joined yet; if `joined`, their sum.
        """
        if joined is not None:
            return join(self.mixer(self.norm(hidden).to(joined), segments), hidden)
        normed, residual = add_and_norm(self.norm, hidden, residual)
        return self.mixer(normed, segments), residual


def join(hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream with a mixer's output, in float32 (float64 for float64)."""
    hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    return hidden if residual is None else residual + hidden


def add_and_norm(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """`AddNorm.add`, or a call of the norm with the sum: of one with hooks, or of another class."""
    if is_bypassed(norm, AddNorm, hidden):
        return norm.add(hidden, residual)  # type: ignore[operator]
    stream = join(_dropped(norm, hidden), residual)
    return norm(stream).to(hidden.dtype), stream


def _dropped(norm: nn.Module, hidden: Tensor) -> Tensor:
    if not isinstance(norm, AddNorm):
        return hidden
    if isinstance(norm.drop_path, DropPath) and isinstance(hidden, fx.Proxy):
        # A node of its own. It scales in place, which feature extractors take for unused.
        return drop_path(hidden, norm.drop_path.drop_prob, norm.training)
    return norm.drop_path(hidden)


def run_block(
    block: nn.Module,
    hidden: Tensor,
    residual: Tensor | None,
    segments: Segments,
    *,
    following: Any,
    recompute: bool = False,
    pairs: bool = False,
) -> tuple[Tensor, Tensor]:
    """A block of a model: its fused form, or a call that takes and gives the residual stream alone.

    The second one is for hooks on the block and for graphs of `torch.fx`: both want one tensor.

    Args:
        block: the block.
        hidden: (B, L, d), the previous mixer's output.
        residual: (B, L, d), the stream that it has not joined yet; None: `hidden` is it.
        segments: the walk over the tokens.
        following: the norm after the block, which may drop the block's output; None: there is none.
        recompute: compute the block again in the backward pass and keep no activations.
        pairs: always the fused form, where a caller needs the mixer's output itself.

    Returns:
        The next `hidden` and `residual`.
    """
    fused = pairs or type(block) is not Block or is_bypassed(block, Block, hidden)
    call: Any = functools.partial(checkpoint, block) if recompute else block
    if fused:
        return call(hidden, residual, segments)
    assert isinstance(block, Block)
    stream = join(_dropped(block.norm, hidden), residual)
    after = call(stream, None, segments, hidden.dtype)
    drops = isinstance(following, AddNorm) and isinstance(following.drop_path, DropPath)
    if drops and following.training:
        return (after - stream).to(hidden.dtype), stream
    return torch.zeros_like(hidden), after
