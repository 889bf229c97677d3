"""conv_pool on GPUs: both convolutions, SiLU and pooling in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments, P  tokens of a run
A run is a stretch of the path: a segment where segments are contiguous on the path, or any P tokens
where nothing is pooled. A program walks R runs at once, token by token, and keeps the window of
seven tokens in registers, so that each token is loaded once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Pooling, Segments
from fastvim.ops.triton.common import (
    INTERPRETED,
    collapse,
    four_taps,
    near,
    pad_axes,
    silu,
    token_at,
)

CHANNELS = 64
TILE = 1024
WARPS = 4
STEP = 16  # tokens that the loop is unrolled for; of a run, where nothing is pooled


@triton.jit
def load_token(p_x, position, valid, columns, L, E, stride_token, n1, n2, m0, m1, m2):
    """(R, C) values at a path position of each run, 0 outside the path."""
    inside = valid & (position >= 0) & (position < L)
    token = token_at(position, n1, n2, m0, m1, m2)
    offsets = (token * stride_token)[:, None] + columns[None, :]
    mask = inside[:, None] & (columns < E)[None, :]
    return tl.load(p_x[:, None] + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _runs_kernel(
    x, weight, bias, out, scale,
    B, L, S, pieces, out_direction, stride_batch, n1, n2, m0, m1,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr,
    P: tl.constexpr, EVEN: tl.constexpr, SHORT: tl.constexpr, POOLED: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, STEP: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R runs at once: pieces of the path's rows, which are the segments where they are pooled."""
    rows = L // n2
    run = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    batch = (run // (pieces * rows)).to(tl.int64)
    row = (run // pieces) % rows
    first = (run % pieces) * P
    start = row * n2
    base = (row // n1) * m0 + (row % n1) * m1
    before = ((row - 1) // n1) * m0 + ((row - 1) % n1) * m1
    after = ((row + 1) // n1) * m0 + ((row + 1) % n1) * m1
    in_row = columns < E
    valid = batch < B
    mask = valid[:, None] & in_row[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]

    w = weight + columns * 4
    f0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
    f1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
    f2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
    f3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
    w += E * 4
    g0 = tl.load(w, mask=in_row, other=0.0).to(tl.float32)
    g1 = tl.load(w + 1, mask=in_row, other=0.0).to(tl.float32)
    g2 = tl.load(w + 2, mask=in_row, other=0.0).to(tl.float32)
    g3 = tl.load(w + 3, mask=in_row, other=0.0).to(tl.float32)
    fb = tl.load(bias + columns, mask=in_row, other=0.0).to(tl.float32)
    gb = tl.load(bias + E + columns, mask=in_row, other=0.0).to(tl.float32)

    window = ()
    for k in tl.static_range(6):
        token, inside = near(
            first + k - 3, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT
        )
        offsets = (token * stride_token)[:, None]
        value = tl.load(p_x + offsets, mask=mask & inside[:, None], other=0.0)
        window = window + (value.to(tl.float32),)
    x0, x1, x2, x3, x4, x5 = window
    p_ahead = p_x + ((base + (first + 3) * m2) * stride_token)[:, None]
    p_out = out + ((batch * S + start + first) * E)[:, None] + columns[None, :]
    forward = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    backward = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    for block in range(0, P, STEP):
        for k in tl.static_range(STEP):
            i = first + block + k
            if block + k < P - 3 and EVEN and not SHORT:
                x6 = tl.load(p_ahead, mask=mask, other=0.0).to(tl.float32)
            else:
                token, inside = near(
                    i + 3, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT
                )
                offsets = (token * stride_token)[:, None]
                x6 = tl.load(p_x + offsets, mask=mask & inside[:, None], other=0.0).to(tl.float32)
            ahead = silu(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
            behind = silu(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
            present = mask if EVEN else mask & (i < n2)[:, None]
            if not POOLED:
                tl.store(p_out, ahead * scale, mask=present)
                tl.store(p_out + out_direction, behind * scale, mask=present)
                p_out += E
            elif MAX:
                forward = tl.maximum(forward, tl.where(present, ahead, float("-inf")))
                backward = tl.maximum(backward, tl.where(present, behind, float("-inf")))
            elif EVEN:
                forward += ahead
                backward += behind
            else:
                forward += tl.where(present, ahead, 0.0)
                backward += tl.where(present, behind, 0.0)
            x0, x1, x2, x3, x4, x5 = x1, x2, x3, x4, x5, x6
            p_ahead += m2 * stride_token
    if POOLED:
        p_segment = out + ((batch * S + row) * E)[:, None] + columns[None, :]
        tl.store(p_segment, forward * scale, mask=mask)
        tl.store(p_segment + out_direction, backward * scale, mask=mask)


@triton.jit
def _cells_kernel(
    x, weight, bias, out, scale,
    B, L, E, S, stride_batch, stride_token, n1, n2, m0, m1, m2,
    k1, s0, s1, q1, t0, t1, P,
    MAX: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Segments scattered over the path: each cell loads its own window.

    Segment s begins at path position (s // k1) * s0 + (s % k1) * s1, and its cell j lies
    (j // q1) * t0 + (j % q1) * t1 further on.
    """
    run = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    direction = tl.program_id(2)
    batch = run // S
    segment = run % S
    valid = batch < B
    base = (segment // k1) * s0 + (segment % k1) * s1
    p_x = x + batch.to(tl.int64) * stride_batch
    in_row = columns < E
    p_w = weight + direction * E * 4 + columns * 4
    b_bias = tl.load(bias + direction * E + columns, mask=in_row, other=0.0).to(tl.float32)
    pooled = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    for j in range(P):
        position = base + (j // q1) * t0 + (j % q1) * t1
        value = tl.zeros((R, C), tl.float32) + b_bias[None, :]
        for k in tl.static_range(4):
            tap = tl.load(p_w + k, mask=in_row, other=0.0).to(tl.float32)
            source = position + (k - 3) * (1 - 2 * direction)
            value += tap[None, :] * load_token(
                p_x, source, valid, columns, L, E, stride_token, n1, n2, m0, m1, m2
            )
        value = silu(value, FAST)
        pooled = tl.maximum(pooled, value) if MAX else pooled + value
    mask = valid[:, None] & in_row[None, :]
    offsets = ((direction * B + batch).to(tl.int64) * S + segment)[:, None] * E + columns[None, :]
    tl.store(out + offsets, pooled * scale, mask=mask)


def conv_pool_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
) -> Tensor:
    """`fastvim.ops.conv_pool` for GPU tensors of at most 32 bits, forward, without a mask."""
    if x.stride(2) != 1:
        x = x.contiguous()
    weight, bias = four_taps(weight), bias.contiguous()
    B, L, E = x.shape
    S = segments.num_segments
    out = x.new_empty(2, B, S, E)
    if out.numel() == 0:
        return out
    sizes, strides, pooled = collapse(segments)
    n, m = pad_axes(sizes, 1), pad_axes(strides, 0)
    grid_arguments = (*n[1:], *m)
    P = segments.segment_size
    mean = pooling == "mean" and segments.pools
    scale = pool_scale / P if mean else pool_scale
    common = {"MAX": pooling == "max", "FAST": x.dtype != torch.float32 and not INTERPRETED}
    contiguous = not segments.pools or (pooled[-1] and not any(pooled[:-1]))
    if contiguous:
        row = n[2]
        step = min(STEP, row)
        P = triton.cdiv(row, step) * step if segments.pools else step
        pieces = triton.cdiv(row, P)
        C = min(CHANNELS, triton.next_power_of_2(E))
        R = max(1, TILE // C)
        _runs_kernel[(triton.cdiv(B * (L // row) * pieces, R), triton.cdiv(E, C))](
            x, weight, bias, out, scale,
            B, L, S, pieces, out.stride(0), x.stride(0), *n[1:], *m[:2],
            E=E, m2=m[2], stride_token=x.stride(1), P=P, EVEN=row % P == 0, SHORT=row < 4,
            POOLED=segments.pools, STEP=step, R=R, C=C, num_warps=WARPS, **common,
        )  # fmt: skip
    else:
        C = min(64, triton.next_power_of_2(E))
        R = 16
        _cells_kernel[(triton.cdiv(B * S, R), triton.cdiv(E, C), 2)](
            x, weight, bias, out, scale, B, L, E, S, x.stride(0), x.stride(1),
            *grid_arguments, *_scattered(sizes, pooled), P, R=R, C=C, num_warps=4, **common,
        )  # fmt: skip
    return out


def _scattered(sizes: list[int], pooled: list[bool]) -> tuple[int, ...]:
    """(k1, s0, s1, q1, t0, t1) of `_cells_kernel`: two kept and two pooled axes at most."""
    path_strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        path_strides[axis] = path_strides[axis + 1] * sizes[axis + 1]

    def two(chosen: bool) -> tuple[int, int, int]:
        axes = [axis for axis, pool in enumerate(pooled) if pool == chosen]
        if len(axes) < 2:
            stride = path_strides[axes[0]] if axes else 0
            return 1, stride, 0
        slow, fast = axes
        return sizes[fast], path_strides[slow], path_strides[fast]

    return (*two(False), *two(True))
