"""expand_gate: each token's own convolution, the scan broadcast to it, skip, norm and gate.

B  batch, L  tokens, E  inner width, K  taps of the convolution, S  segments
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from fastvim.ops.conv_pool import check_tokens, conv_silu
from fastvim.ops.dispatch import check_shapes, compute_dtype, definition, implementation
from fastvim.ops.traversal import Segments


def expand_gate(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    D: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`LayerNorm(mean over directions of (y_segment + D · x')) · silu(z)` (mixer, from step 5 on).

    The convolution `x'` is computed again from `x`: cheaper than storing it from `conv_pool`.

    Args:
        x: (B, L, E) tokens in memory order, the input of `conv_pool`; any strides, like `z`.
        z: (B, L, E) gate.
        y: (2, B, S, E), what `selective_scan` gave.
        conv_weight: (2, E, K).
        conv_bias: (2, E).
        D: (2, E) skip.
        segments: the layer's traversal over the grid of the L tokens.
        norm_weight: (E,) of the norm after the scan, or None for no norm; the gate stays.
        norm_bias: (E,), given with `norm_weight`.
        eps: of the norm.

    Returns:
        (B, L, E) in memory order, in `x`'s dtype.

    Raises:
        ValueError: shapes that do not agree.
    """
    check_tokens(x, conv_weight, conv_bias, segments)
    batch, tokens, width = x.shape
    check_shapes(
        ("z", z, (batch, tokens, width)),
        ("y", y, (2, batch, segments.num_segments, width)),
        ("D", D, (2, width)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
    )
    run = implementation("expand_gate", x, expand_gate_reference, segments.order is not None)
    return run(x, z, y, conv_weight, conv_bias, D, segments, norm_weight, norm_bias, eps=eps)


@definition
def expand_gate_reference(
    x: Tensor,
    z: Tensor,
    y: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    D: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = conv_silu,
) -> Tensor:
    dtype = compute_dtype(x)
    convolved = convolve(segments.to_path(x.to(dtype)), conv_weight, conv_bias)
    scanned = segments.broadcast(y.to(dtype)) + D.to(dtype)[:, None, None] * convolved
    mixed = segments.from_path(scanned.mean(0))
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(dtype)
        mixed = F.layer_norm(mixed, mixed.shape[-1:], norm_weight.to(dtype), bias, eps)
    return (mixed * F.silu(z.to(dtype))).to(x.dtype)
