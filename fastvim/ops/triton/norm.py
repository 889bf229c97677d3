"""add_norm on GPUs: residual sum and norm in one pass.

M  rows (batch x tokens), D  model width
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.norm import NormKind
from fastvim.ops.triton.launch import Launch, Launches, must_register, register

TILE = 1024  # values of a program
WARPS = 4

_launches: Launches[Launch] = Launches()


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


def _run(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden = hidden.contiguous()
    residual = None if residual is None else residual.contiguous()
    normed = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    total = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    if normed.numel() == 0:
        return normed, total
    launch = _launches.get(
        (hidden, residual, weight, bias),
        (rms, eps),
        lambda: _plan(hidden, residual is not None, bias is not None, rms, eps),
    )
    launch(hidden, residual, weight, bias, normed, total)
    return normed, total


def _plan(hidden: Tensor, has_residual: bool, has_bias: bool, rms: bool, eps: float) -> Launch:
    """The launch of the kernel."""
    D = int(hidden.shape[-1])
    M = hidden.numel() // D
    block = triton.next_power_of_2(D)
    rows = max(1, TILE // block)
    numbers = (M, D, eps, has_residual, has_bias, rms, rows, block)
    grid = (triton.cdiv(M, rows),)
    return Launch(_add_norm_kernel, hidden.device, grid, numbers, num_warps=WARPS)


def _fake(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=torch.float32)


register("fastvim::add_norm_triton", _run, _fake)
_registered = torch.ops.fastvim.add_norm_triton.default


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
    run = _registered if must_register(hidden) else _run
    out: tuple[Tensor, Tensor] = run(hidden, residual, weight, bias, kind == "rms", eps)
    return out
