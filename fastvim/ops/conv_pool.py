"""conv_pool: the convolution of both directions, SiLU, and the pooling to segments.

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
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
) -> Tensor:
    """Depthwise convolution along the path, SiLU, and one value per segment (mixer, steps 1-2).

    Args:
        x: (B, L, E) tokens in memory order; any strides.
        weight: (2, E, K), per direction; tap K-1 is the token itself.
        bias: (2, E).
        segments: the layer's traversal over the grid of the L tokens.
        pooling: "mean" (over the full size of a segment) or "max".
        pool_scale: factor on the pooled value; 0.25 when fine-tuning from 75 % masked weights.

    Returns:
        (2, B, S, E), in `x`'s dtype.

    Raises:
        ValueError: shapes that do not agree, or an unknown pooling.
    """
    if pooling not in ("mean", "max"):
        raise ValueError(f"pooling={pooling!r}: expected 'mean' or 'max'")
    check_tokens(x, weight, bias, segments)
    run = implementation("conv_pool", x, conv_pool_reference, segments.order is not None)
    return run(x, weight, bias, segments, pooling=pooling, pool_scale=pool_scale)


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
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = conv_silu,
) -> Tensor:
    convolved = convolve(segments.to_path(x.to(compute_dtype(x))), weight, bias)
    return (segments.reduce(convolved, pooling) * pool_scale).to(x.dtype)


def check_tokens(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> None:
    """Raise ValueError unless the tokens fit the traversal and the convolution."""
    if x.ndim != 3 or x.shape[1] != segments.num_tokens:
        raise ValueError(f"x {tuple(x.shape)}: expected (B, {segments.num_tokens}, E)")
    if weight.ndim != 3 or weight.shape[:2] != (2, x.shape[2]):
        raise ValueError(f"weight {tuple(weight.shape)}: expected (2, {x.shape[2]}, K)")
    check_shapes(("bias", bias, (2, x.shape[2])))
