"""The three ops of a mixer in one call, where no gradient is wanted.

They run the kernels of the single ops, without what stands between those: checks, the choice of an
engine, conversions, copies. In a small model that takes as long as the kernels.

B  batch, L  tokens, E  inner width
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastvim.ops.cpu import conv_pool, expand_gate, selective_scan
from fastvim.ops.cpu.threads import ready, rows_of
from fastvim.ops.cpu.walks import arguments_of, walk_of
from fastvim.ops.reference import without_autocast
from fastvim.ops.traversal import Segments

EPS = 1e-5  # of the norm, the default of `expand_gate`


@without_autocast
def mix_cpu(
    x: Tensor,
    z: Tensor,
    convolution: tuple[Tensor, Tensor, Tensor],
    scan: tuple[Tensor, Tensor, Tensor, Tensor],
    norm: tuple[Tensor | None, Tensor | None],
    segments: Segments,
    pool_scale: float,
) -> Tensor:
    """`conv_pool` with means, `selective_scan` and `expand_gate`, of CPU tensors.

    Args:
        x: (B, L, E) in memory order, of at most 32 bits.
        z: (B, L, E) gate.
        convolution: the parameters of `conv_pool`: weight, bias and D.
        scan: those of `selective_scan`: x_proj, dt_proj, dt_bias and A_log.
        norm: those of `expand_gate`.
        segments: the layer's traversal over the grid of the L tokens.
        pool_scale: factor on the pooled values.

    Returns:
        (B, L, E) in memory order, in `x`'s dtype. What is between the ops is float32.
    """
    walk: Any
    walk, order, index = arguments_of(segments)
    taps, start, D = map(ready, convolution)
    pooled, skip = conv_pool.compute(rows_of(x), taps, start, D, walk, order, index, pool_scale)
    x_proj, dt_proj, dt_bias, A_log = map(ready, scan)
    y = selective_scan.compute(pooled, x_proj, dt_proj, dt_bias, A_log)
    weight, bias = (None if t is None else ready(t) for t in norm)
    expand_gate.fill(skip, skip, rows_of(z), y, walk_of(walk, order, index), weight, bias, EPS)
    return skip.to(x.dtype)
