"""conv_pool: convolution of both directions, SiLU, pooling to segments, and the skip.

B  batch, L  tokens, E  inner width, K  taps of the convolution, S  segments
Direction 0 walks the path. Direction 1 walks it backwards, so its window looks ahead.
"""

from __future__ import annotations

from torch import Tensor

from fastvim.ops.checks import check_shapes
from fastvim.ops.dispatch import implementation
from fastvim.ops.reference import conv_pool_reference
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

    Steps 1 and 2 of the mixer (docs/architecture.md) and the skip `D ⊙ x'` of step 5. No other step
    needs the convolved token `x'`.

    Args:
        x: (B, L, E) tokens in memory order; any strides.
        weight: (2, E, K), per direction; tap K-1 is the token itself.
        bias: (2, E).
        D: (2, E) skip.
        segments: the layer's traversal over the grid of the L tokens.
        pooling: "mean", over the full size of a segment, or "max".
        pool_scale: factor on the pooled value; 0.25 to fine-tune from pretraining with 75 % masked.

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
    run = implementation("conv_pool", x, conv_pool_reference, segments.masked is not None)
    return run(x, weight, bias, D, segments, pooling=pooling, pool_scale=pool_scale)
