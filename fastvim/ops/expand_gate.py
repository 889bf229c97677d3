"""expand_gate: broadcast of the scan to the tokens of its segment, skip, norm and gate.

B  batch, L  tokens, E  inner width, S  segments
"""

from __future__ import annotations

from torch import Tensor

from fastvim.ops.checks import check_shapes
from fastvim.ops.dispatch import implementation
from fastvim.ops.reference import expand_gate_reference
from fastvim.ops.traversal import Segments


def expand_gate(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`LayerNorm(skip + mean over directions of y_segment) · silu(z)`.

    The mixer from step 5 on (docs/architecture.md).

    Args:
        skip: (B, L, E) in memory order, from `conv_pool`. All tensors may have any strides.
        z: (B, L, E) gate.
        y: (2, B, S, E), from `selective_scan`.
        segments: the layer's traversal over the grid of the L tokens.
        norm_weight: (E,) of the norm after the scan. None: no norm, only the gate.
        norm_bias: (E,) of the norm, or None.
        eps: of the norm.

    Returns:
        (B, L, E) in memory order, in `skip`'s dtype.

    Raises:
        ValueError: shapes that do not agree.
    """
    if skip.ndim != 3 or skip.shape[1] != segments.num_tokens:
        raise ValueError(f"skip {tuple(skip.shape)}: expected (B, {segments.num_tokens}, E)")
    batch, tokens, width = skip.shape
    check_shapes(
        ("z", z, (batch, tokens, width)),
        ("y", y, (2, batch, segments.num_segments, width)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
    )
    run = implementation("expand_gate", skip, expand_gate_reference, segments.masked is not None)
    return run(skip, z, y, segments, norm_weight, norm_bias, eps=eps)
