"""selective_scan: the state-space recurrence over the segments, both directions.

B  batch, S  segments, E  inner width, N  state size, R  rank of the step size
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvim.ops.dispatch import check_shapes, compute_dtype, definition, implementation


def selective_scan(
    u: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
) -> Tensor:
    """`h_s = exp(Δ_s A) h_prev + Δ_s B_s u_s`, `y_s = C_s · h_s` (mixer, steps 3-4; Mamba, eq. 2).

    What is selected comes from the input: `[dt, B, C] = u @ x_projᵀ` and
    `Δ = softplus(dt @ dt_projᵀ + dt_bias)`; `A = -exp(A_log)`. Direction 0 scans s ascending,
    direction 1 descending. There is no skip term: FastVim's skip uses each token's own value.

    Args:
        u: (2, B, S, E) pooled input; any strides.
        x_proj: (2, R + 2N, E), the rows of dt, then of B, then of C.
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


@definition
def selective_scan_reference(
    u: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
) -> Tensor:
    dtype = compute_dtype(u)
    delta, B, C = select(u, x_proj, dt_proj, dt_bias, dtype)
    x = u.to(dtype)
    A = -A_log.to(dtype).exp()
    directions = [
        _scan(x[d], delta[d], A[d], B[d], C[d], reverse=d == 1) for d in range(u.shape[0])
    ]
    return torch.stack(directions).to(u.dtype)


def select(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Δ (2, B, S, E), B and C (2, B, S, N) of the steps, computed in `dtype`."""
    rank, steps = dt_proj.shape[2], u.shape[1:3]
    states = (x_proj.shape[1] - rank) // 2
    projected = torch.bmm(u.to(dtype).flatten(1, 2), x_proj.to(dtype).mT)
    dt, B, C = projected.split([rank, states, states], dim=-1)
    raw = torch.baddbmm(dt_bias.to(dtype)[:, None], dt, dt_proj.to(dtype).mT)
    return F.softplus(raw).unflatten(1, steps), B.unflatten(1, steps), C.unflatten(1, steps)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool) -> Tensor:
    """One direction: u, delta (B, S, E), A (E, N), B, C (B, S, N) to (B, S, E)."""
    steps = u.shape[1]
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y: list[Tensor] = []
    for s in reversed(range(steps)) if reverse else range(steps):
        decay = torch.exp(delta[:, s, :, None] * A)
        h = decay * h + (delta[:, s] * u[:, s])[:, :, None] * B[:, s, None, :]
        y.append((h * C[:, s, None, :]).sum(-1))
    if not y:
        return torch.zeros_like(u)
    return torch.stack(y[::-1] if reverse else y, dim=1)
