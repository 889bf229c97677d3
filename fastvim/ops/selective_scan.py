"""selective_scan: the state-space recurrence over the segments, both directions.

B  batch, S  segments, E  inner width, N  state size, R  rank of the step size
"""

from __future__ import annotations

from torch import Tensor

from fastvim.ops.checks import check_shapes
from fastvim.ops.dispatch import implementation
from fastvim.ops.reference import selective_scan_reference


def selective_scan(
    u: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
) -> Tensor:
    """`h_s = exp(Δ_s A) h_prev + Δ_s B_s u_s`, `y_s = C_s · h_s` (Mamba, arXiv 2312.00752, eq. 2).

    Steps 3 and 4 of the mixer (docs/architecture.md). Δ, B and C depend on the input:
    `[dt, B, C] = u @ x_projᵀ` and `Δ = softplus(dt @ dt_projᵀ + dt_bias)`. `A = -exp(A_log)`.
    Direction 0 scans s in ascending order, direction 1 in descending order. There is no skip term:
    FastVim's skip uses each token's own value (`conv_pool`).

    Args:
        u: (2, B, S, E) pooled input; any strides.
        x_proj: (2, R + 2N, E): rows of dt, then of B, then of C.
        dt_proj: (2, E, R).
        dt_bias: (2, E).
        A_log: (2, E, N).

    Returns:
        (2, B, S, E), in `u`'s dtype; projections, state and sums are float32 (float64 for float64).

    Raises:
        ValueError: shapes that do not agree.
    """
    if u.ndim != 4 or u.shape[0] != 2:
        raise ValueError(f"u {tuple(u.shape)}: expected (2, B, S, E)")
    E, N, R = u.shape[3], A_log.shape[-1], dt_proj.shape[-1]
    check_shapes(
        ("x_proj", x_proj, (2, R + 2 * N, E)),
        ("dt_proj", dt_proj, (2, E, R)),
        ("dt_bias", dt_bias, (2, E)),
        ("A_log", A_log, (2, E, N)),
    )
    run = implementation("selective_scan", u, selective_scan_reference)
    return run(u, x_proj, dt_proj, dt_bias, A_log)
