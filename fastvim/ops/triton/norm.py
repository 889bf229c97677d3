"""add_norm on GPUs: residual sum and norm in one pass.

M  rows (batch x tokens), D  model width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.norm import NormKind


@triton.jit
def _add_norm_kernel(
    hidden, residual, weight, bias, normed, total, M, D, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < M)[:, None] & (columns < D)[None, :]
    offsets = rows[:, None].to(tl.int64) * D + columns[None, :]
    b_total = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + offsets, b_total, mask=mask)
    b_centred = b_total
    if not RMS:
        mean = tl.sum(b_total, axis=1) / D
        b_centred = tl.where(mask, b_total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(b_centred * b_centred, axis=1) / D + eps)
    b_weight = tl.load(weight + columns, mask=columns < D, other=0.0).to(tl.float32)
    b_normed = b_centred * scale[:, None] * b_weight[None, :]
    if HAS_BIAS:
        b_bias = tl.load(bias + columns, mask=columns < D, other=0.0).to(tl.float32)
        b_normed += b_bias[None, :]
    tl.store(normed + offsets, b_normed, mask=mask)


def add_norm_triton(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.add_norm` for GPU tensors of at most 32 bits, forward."""
    hidden = hidden.contiguous()
    residual = None if residual is None else residual.contiguous()
    normed = torch.empty_like(hidden)
    total = torch.empty_like(hidden, dtype=torch.float32)
    D = hidden.shape[-1]
    M = hidden.numel() // D
    block = triton.next_power_of_2(D)
    rows = max(1, 1024 // block)
    if M:
        _add_norm_kernel[(triton.cdiv(M, rows),)](
            hidden, residual, weight, bias, normed, total, M, D, eps,
            HAS_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, RMS=kind == "rms",
            ROWS=rows, BLOCK_D=block, num_warps=4,
        )  # fmt: skip
    return normed, total
