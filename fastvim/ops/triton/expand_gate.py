"""expand_gate on GPUs: broadcast of the scan, skip, norm and gate in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments
A program takes a few tokens that follow each other on the path, so that those of one segment find
its scan in the cache; all of E lies in registers as the norm asks, cut into pieces that leave no
thread idle where E is no power of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Segments
from fastvim.ops.triton.common import INTERPRETED, pad_axes, row_pieces, silu_twice
from fastvim.ops.triton.launch import Launch, Launches, must_register, register

PER_THREAD = 8  # channels of a piece
WARPS = 4

_launches: Launches[Launch] = Launches()


@triton.jit
def _expand_gate_kernel(
    skip, z, y, norm_weight, norm_bias, out,
    eps, M, L, S, direction, skip_batch, z_batch, n1, n2, m0, m1, m2, s0, s1, s2,
    E: tl.constexpr, skip_token: tl.constexpr, z_token: tl.constexpr,
    NORM: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = place < M
    batch = (place // L).to(tl.int64)
    position = place % L
    i2 = position % n2
    i1 = position // n2 % n1
    i0 = position // n2 // n1
    token = i0 * m0 + i1 * m1 + i2 * m2
    columns = tl.arange(0, C)
    p_skip = skip + (batch * skip_batch + token * skip_token)[:, None] + columns[None, :]
    p_z = z + (batch * z_batch + token * z_token)[:, None] + columns[None, :]
    p_y = y + ((batch * S + i0 * s0 + i1 * s1 + i2 * s2) * E)[:, None] + columns[None, :]
    p_out = out + ((batch * L + token) * E)[:, None] + columns[None, :]

    mixed = ()
    gates = ()
    for c in tl.static_range(PIECES):
        mask = present[:, None] & (columns < E - c * C)[None, :]
        value = tl.load(p_y + c * C, mask=mask, other=0.0).to(tl.float32)
        value += tl.load(p_y + c * C + direction, mask=mask, other=0.0).to(tl.float32)
        value = 0.5 * value + tl.load(p_skip + c * C, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed + (value,)
        gates = gates + (tl.load(p_z + c * C, mask=mask, other=0.0),)
    mean = tl.zeros((ROWS,), tl.float32)
    scale = mean
    if NORM:
        total = tl.zeros((ROWS, C), tl.float32)
        for c in tl.static_range(PIECES):
            total += mixed[c]
        mean = tl.sum(total, axis=1) / E
        total = tl.zeros((ROWS, C), tl.float32)
        for c in tl.static_range(PIECES):
            centred = mixed[c] - mean[:, None]
            if (c + 1) * C > E:
                centred = tl.where((columns < E - c * C)[None, :], centred, 0.0)
            total += centred * centred
        scale = tl.rsqrt(tl.sum(total, axis=1) / E + eps)
    for c in tl.static_range(PIECES):
        in_row = (columns < E - c * C)[None, :]
        value = mixed[c]
        if NORM:
            # A row of them for each token: what the threads hold then needs no exchange.
            places = c * C + columns[None, :] + tl.zeros((ROWS, C), tl.int32)
            weight = tl.load(norm_weight + places, mask=in_row, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias + places, mask=in_row, other=0.0).to(tl.float32)
            value = (value - mean[:, None]) * scale[:, None] * weight + bias
        value *= silu_twice(0.5 * gates[c].to(tl.float32), FAST)
        tl.store(p_out + c * C, value, mask=present[:, None] & in_row)


def _run(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    skip, z = (t if t.stride(2) == 1 else t.contiguous() for t in (skip, z))
    y = y.contiguous()
    out = torch.empty(skip.shape, dtype=skip.dtype, device=skip.device)
    if out.numel() == 0:
        return out
    if norm_weight is not None and norm_bias is None:
        norm_bias = torch.zeros_like(norm_weight)
    launch = _launches.get(
        (skip, z, y, norm_weight, norm_bias),
        (segments, eps),
        lambda: _plan(skip, z, y, segments, norm_weight is not None, eps),
    )
    launch(skip, z, y, norm_weight, norm_bias, out)
    return out


def _plan(skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float) -> Launch:
    """The launch of the kernel."""
    B, L, E = skip.shape[0], skip.shape[1], int(skip.shape[2])
    n, m, s = (
        pad_axes(values, fill)
        for values, fill in (
            (segments.sizes, 1), (segments.strides, 0), (segments.segment_strides, 0),
        )
    )  # fmt: skip
    C, pieces = row_pieces(E)
    rows = max(1, PER_THREAD * WARPS * 32 // C)
    numbers = (
        eps, B * L, L, segments.num_segments, y.stride(0), skip.stride(0), z.stride(0),
        *n[1:], *m, *s, E, skip.stride(1), z.stride(1),
        norm, skip.dtype != torch.float32 and not INTERPRETED, rows, C, pieces,
    )  # fmt: skip
    grid = (triton.cdiv(B * L, rows),)
    return Launch(_expand_gate_kernel, skip.device, grid, numbers, num_warps=WARPS)


def _flat(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    segments = Segments(tuple(sizes), tuple(strides), tuple(pooled))
    return _run(skip, z, y, segments, norm_weight, norm_bias, eps)


def _fake(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return skip.new_empty(skip.shape)


register("fastvim::expand_gate_triton", _flat, _fake)
_registered = torch.ops.fastvim.expand_gate_triton.default


def expand_gate_triton(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate` for GPU tensors of at most 32 bits, forward, without a mask."""
    if not must_register(skip):
        return _run(skip, z, y, segments, norm_weight, norm_bias, eps)
    walk = [list(values) for values in (segments.sizes, segments.strides, segments.pooled)]
    out: Tensor = _registered(skip, z, y, *walk, norm_weight, norm_bias, eps)
    return out
