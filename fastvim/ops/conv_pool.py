"""conv_pool: the convolution of both directions, SiLU, the pooling to segments, and the skip.

B  batch, L  tokens, E  inner width, K  taps of the convolution, S  segments
Direction 0 walks the path, direction 1 walks it backwards: its window looks ahead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvim.ops.dispatch import check_shapes, compute_dtype, definition, implementation
from fastvim.ops.traversal import Pooling, Segments


def conv_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Depthwise convolution along the path, SiLU, one value per segment, and each token's skip.

    Steps 1 and 2 of the mixer, and the part `D ⊙ x'` of step 5: the convolved token `x'` is needed
    for both, and nowhere else.

    Args:
        x: (B, L, E) tokens in memory order; any strides.
        weight: (2, E, K), per direction; tap K-1 is the token itself.
        bias: (2, E).
        D: (2, E) skip.
        segments: the layer's traversal over the grid of the L tokens.
        pooling: "mean" (over the full size of a segment) or "max".
        pool_scale: factor on the pooled value; 0.25 when fine-tuning from 75 % masked weights.

    Returns:
        The pooled values (2, B, S, E), and the skip (B, L, E) in memory order: the mean over
        directions of `D · x'`. Both in `x`'s dtype.

    Raises:
        ValueError: shapes that do not agree, or an unknown pooling.
    """
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling={pooling!r}: expected 'mean' or 'max'")
    if x.ndim != 3 or x.shape[1] != segments.num_tokens:
        raise ValueError(f"x {tuple(x.shape)}: expected (B, {segments.num_tokens}, E)")
    width = x.shape[2]
    if weight.ndim != 3 or weight.shape[:2] != (2, width):
        raise ValueError(f"weight {tuple(weight.shape)}: expected (2, {width}, K)")
    check_shapes(("bias", bias, (2, width)), ("D", D, (2, width)))
    run = implementation("conv_pool", x, conv_pool_reference, segments.kept is not None)
    return run(x, weight, bias, D, segments, pooling=pooling, pool_scale=pool_scale)


def conv_silu(x_path: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, L, E) in path order to SiLU of the convolution in each direction, (2, B, L, E)."""
    taps, channels = weight.shape[-1], x_path.shape[-1]
    weight, bias = weight.to(x_path.dtype), bias.to(x_path.dtype)
    x = x_path.mT
    causal, anticausal = weight[0].unsqueeze(1), weight[1].flip(-1).unsqueeze(1)
    forward = F.conv1d(F.pad(x, (taps - 1, 0)), causal, bias[0], groups=channels)
    backward = F.conv1d(F.pad(x, (0, taps - 1)), anticausal, bias[1], groups=channels)
    return F.silu(torch.stack([forward, backward]).mT)


@definition
def conv_pool_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = conv_silu,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x)
    convolved = convolve(segments.to_path(x.to(dtype)), weight, bias)
    pooled = segments.reduce(convolved, pooling) * pool_scale
    skip = segments.from_path((D.to(dtype)[:, None, None] * convolved).mean(0))
    return pooled.to(x.dtype), skip.to(x.dtype)
