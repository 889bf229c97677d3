"""add_norm: the residual sum and the norm that precedes a mixer.

B  batch, L  tokens, d  model width
"""

from __future__ import annotations

from torch import Tensor

from fastvim.ops.checks import check_shapes
from fastvim.ops.dispatch import implementation
from fastvim.ops.reference import NormKind, add_norm_reference


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`residual + hidden`, and its norm over the last axis (docs/architecture.md, the stack).

    Args:
        hidden: (B, L, d), output of the previous mixer.
        residual: (B, L, d), the residual stream; None in the first block.
        weight: (d,).
        bias: (d,) or None.
        kind: RMSNorm ("rms") or LayerNorm ("layer").
        eps: added to the mean square or variance.

    Returns:
        The norm, in `hidden`'s dtype, and the new residual stream, in float32 (float64 for float64
        input).

    Raises:
        ValueError: shapes that do not agree, or an unknown kind.
    """
    if kind not in ("rms", "layer"):
        raise ValueError(f"kind={kind!r}: expected 'rms' or 'layer'")
    width = tuple(hidden.shape[-1:])
    check_shapes(
        ("residual", residual, tuple(hidden.shape)),
        ("weight", weight, width),
        ("bias", bias, width),
    )
    run = implementation("add_norm", hidden, add_norm_reference)
    return run(hidden, residual, weight, bias, kind=kind, eps=eps)
