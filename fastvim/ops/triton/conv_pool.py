"""conv_pool on GPUs: both convolutions, SiLU, pooling and the skip in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments, P  tokens of a run
A run is a stretch of one of the path's rows. A program takes R runs times C channels, and walks all
of its runs at once, token by token, with the window of seven tokens in registers, so that each
token is loaded once. Rows longer than a run are several runs of the same program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Pooling, Segments
from fastvim.ops.triton.common import (
    INTERPRETED,
    collapse,
    four_taps,
    load_taps,
    near,
    pad_axes,
    pools_rows,
    row_of,
    silu_twice,
    token_at,
)
from fastvim.ops.triton.conv_pool_backward import backward_op
from fastvim.ops.triton.launch import Launch, Launches, Op

CHANNELS = 64  # of a program
PER_THREAD = 2  # channels
WARPS = 4
LONGEST = 16  # tokens of a run, all unrolled
AHEAD = 16  # tokens loaded ahead of use
MOST_RUNS = 64  # of a program
MOST_VALUES = 1024  # runs times channels
MOST_CHANNELS = 16  # of an image, whose cells are then walked whole
LONGEST_WALK = 256  # cells of such a walk


_launches: Launches[Launch] = Launches()


@triton.jit
def _runs_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, pieces, direction, stride_batch, n1, n2, m0, m1,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr,
    P: tl.constexpr, EVEN: tl.constexpr, SHORT: tl.constexpr, POOLED: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
    R: tl.constexpr, GROUP: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """R runs at once: `pieces` of each row, GROUP of which make up a segment where it is pooled."""
    rows = L // n2
    run = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    batch, _, first, start, base, before, after = row_of(run, pieces, rows, P, n1, n2, m0, m1)
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_first = p_x + ((base + first * m2) * stride_token)[:, None]
    p_skip = skip + ((batch * L + base + first * m2) * E)[:, None] + columns[None, :]
    p_step = pooled + ((batch * S + start + first) * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)

    forward = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    backward = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    tokens = ()
    for i in tl.static_range(-3, P + 3 + AHEAD):
        if i < P + 3:  # load token i of the run: entry i + 3
            if EVEN and not SHORT and i >= 0 and i < P:
                value = tl.load(p_first + i * m2 * stride_token, mask=mask, other=0.0)
            else:
                token, inside = near(
                    first + i, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT
                )
                value = tl.load(
                    p_x + (token * stride_token)[:, None], mask=mask & inside[:, None], other=0.0
                )
            tokens = tokens + (value,)
        if i >= AHEAD + 3:  # convolve around the token loaded AHEAD + 3 turns ago
            x0 = tokens[i - AHEAD - 3].to(tl.float32)
            x1 = tokens[i - AHEAD - 2].to(tl.float32)
            x2 = tokens[i - AHEAD - 1].to(tl.float32)
            x3 = tokens[i - AHEAD].to(tl.float32)
            x4 = tokens[i - AHEAD + 1].to(tl.float32)
            x5 = tokens[i - AHEAD + 2].to(tl.float32)
            x6 = tokens[i - AHEAD + 3].to(tl.float32)
            there = silu_twice(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
            back = silu_twice(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
            present = mask if EVEN else mask & (first + i - AHEAD - 3 < n2)[:, None]
            tl.store(p_skip, fd * there + gd * back, mask=present)
            p_skip += m2 * E
            if not POOLED:
                tl.store(p_step, there * scale, mask=present)
                tl.store(p_step + direction, back * scale, mask=present)
                p_step += E
            elif MAX:
                forward = tl.maximum(forward, tl.where(present, there, float("-inf")))
                backward = tl.maximum(backward, tl.where(present, back, float("-inf")))
            elif EVEN:
                forward += there
                backward += back
            else:
                forward += tl.where(present, there, 0.0)
                backward += tl.where(present, back, 0.0)
    if POOLED:
        if GROUP > 1:
            forward = tl.reshape(forward, (R // GROUP, GROUP, C))
            backward = tl.reshape(backward, (R // GROUP, GROUP, C))
            forward = tl.max(forward, axis=1) if MAX else tl.sum(forward, axis=1)
            backward = tl.max(backward, axis=1) if MAX else tl.sum(backward, axis=1)
        segment = tl.program_id(0) * (R // GROUP) + tl.arange(0, R // GROUP)  # of the whole batch
        mask = (segment < B * S)[:, None] & (columns < E)[None, :]
        p_segment = pooled + (segment.to(tl.int64) * E)[:, None] + columns[None, :]
        tl.store(p_segment, forward * scale, mask=mask)
        tl.store(p_segment + direction, backward * scale, mask=mask)


@triton.jit
def _gather(total, rest, value, MAX: tl.constexpr, FAST: tl.constexpr):
    """A sum or maximum with one value more, and the sum's `rest`, what rounding added to it:
    without FAST the sum of any length keeps to the last place (Kahan)."""
    if MAX:
        return tl.maximum(total, value), rest
    if FAST:
        return total + value, rest
    value -= rest
    after = total + value
    return after, (after - total) - value


@triton.jit
def _load_cell(p, token, mask, step, K: tl.constexpr):
    """K tokens that lie `step` elements apart, of R runs."""
    values = ()
    for c in tl.static_range(K):
        values = values + (tl.load(p + token + c * step, mask=mask, other=0.0),)
    return values


@triton.jit
def _channels_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, direction, stride_batch, n0, n1, m0, m1,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr, K: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Rows of n1 cells of K tokens (the channels of an image): a segment has one of each cell.

    R rows at once, cell by cell, with the tokens of a cell and its neighbours in registers.
    """
    run = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    batch = (run // n0).to(tl.int64)
    row = run % n0
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_skip = skip + (batch * L * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)
    zero = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    forward = ()
    backward = ()
    for _c in tl.static_range(K):
        forward = forward + ((zero, zero),)
        backward = backward + ((zero, zero),)
    before = (row - 1) * m0 + (n1 - 1) * m1 + (K - 3) * m2
    exists = mask & (row > 0)[:, None]
    step: tl.constexpr = m2 * stride_token
    previous = _load_cell(p_x, (before * stride_token)[:, None], exists, step, 3)
    current = _load_cell(p_x, (row * m0 * stride_token)[:, None], mask, step, K)
    for j in range(n1):
        ends = j + 1 == n1
        token = tl.where(ends, (row + 1) * m0, row * m0 + (j + 1) * m1)
        exists = mask & ((not ends) | (row + 1 < n0))[:, None]
        following = _load_cell(p_x, (token * stride_token)[:, None], exists, step, K)
        window = previous + current + (following[0], following[1], following[2])
        p_token = p_skip + ((row * m0 + j * m1) * E)[:, None]
        forward_after = ()
        backward_after = ()
        for c in tl.static_range(K):
            x0 = window[c].to(tl.float32)
            x1 = window[c + 1].to(tl.float32)
            x2 = window[c + 2].to(tl.float32)
            x3 = window[c + 3].to(tl.float32)
            x4 = window[c + 4].to(tl.float32)
            x5 = window[c + 5].to(tl.float32)
            x6 = window[c + 6].to(tl.float32)
            there = silu_twice(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
            back = silu_twice(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
            tl.store(p_token + c * m2 * E, fd * there + gd * back, mask=mask)
            forward_after += (_gather(forward[c][0], forward[c][1], there, MAX, FAST),)
            backward_after += (_gather(backward[c][0], backward[c][1], back, MAX, FAST),)
        forward = forward_after
        backward = backward_after
        previous = (current[K - 3], current[K - 2], current[K - 1])
        current = following
    p_segment = pooled + ((batch * S + row * K) * E)[:, None] + columns[None, :]
    for c in tl.static_range(K):
        tl.store(p_segment + c * E, forward[c][0] * scale, mask=mask)
        tl.store(p_segment + c * E + direction, backward[c][0] * scale, mask=mask)


@triton.jit
def _cells_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, direction, stride_batch,
    n1, n2, m0, m1, m2, k1, s0, s1, q1, t0, t1, P,
    E: tl.constexpr, stride_token: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Segments scattered over the path: each cell loads its own window.

    Segment s begins at path position (s // k1) * s0 + (s % k1) * s1, and its cell j lies
    (j // q1) * t0 + (j % q1) * t1 further on.
    """
    run = tl.program_id(0) * R + tl.arange(0, R)
    columns = tl.program_id(1) * C + tl.arange(0, C)
    batch = (run // S).to(tl.int64)
    segment = run % S
    base = (segment // k1) * s0 + (segment % k1) * s1
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_skip = skip + (batch * L * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)
    forward = tl.full((R, C), float("-inf") if MAX else 0.0, tl.float32)
    backward = forward
    forward_rest = forward
    backward_rest = forward
    for j in range(P):
        position = base + (j // q1) * t0 + (j % q1) * t1
        window = ()
        for k in tl.static_range(-3, 4):
            inside = (position + k >= 0) & (position + k < L)
            token = token_at(position + k, n1, n2, m0, m1, m2)
            value = tl.load(
                p_x + (token * stride_token)[:, None], mask=mask & inside[:, None], other=0.0
            )
            window = window + (value.to(tl.float32),)
        ahead = fb + f0 * window[0] + f1 * window[1] + f2 * window[2] + f3 * window[3]
        behind = gb + g3 * window[3] + g2 * window[4] + g1 * window[5] + g0 * window[6]
        there = silu_twice(ahead, FAST)
        back = silu_twice(behind, FAST)
        token = token_at(position, n1, n2, m0, m1, m2)
        tl.store(p_skip + (token * E)[:, None], fd * there + gd * back, mask=mask)
        forward, forward_rest = _gather(forward, forward_rest, there, MAX, FAST)
        backward, backward_rest = _gather(backward, backward_rest, back, MAX, FAST)
    p_segment = pooled + ((batch * S + segment) * E)[:, None] + columns[None, :]
    tl.store(p_segment, forward * scale, mask=mask)
    tl.store(p_segment + direction, backward * scale, mask=mask)


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    pooling: str,
    pool_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if x.stride(2) != 1:
        x = x.contiguous()
    weight, bias, D = four_taps(weight), bias.contiguous(), D.contiguous()
    B, L, E = x.shape
    segments = Segments(tuple(sizes), tuple(strides), tuple(pooled))
    steps = torch.empty(2, B, segments.num_segments, E, dtype=dtype, device=x.device)
    skip = torch.empty(B, L, E, dtype=x.dtype, device=x.device)
    if skip.numel() == 0:
        return steps, skip
    launch = _launches.get(
        (x, weight, bias, D),
        (segments, pooling, pool_scale, dtype),
        lambda: _plan(x, segments, pooling, pool_scale),
    )
    launch(x, weight, bias, D, steps, skip)
    return steps, skip


def _plan(x: Tensor, segments: Segments, pooling: str, pool_scale: float) -> Launch:
    """The launch of the kernel that suits the traversal."""
    B, L, E = x.shape[0], x.shape[1], int(x.shape[2])
    S, segment_size = segments.num_segments, int(segments.segment_size)
    direction, pools = B * S * E, segments.pools
    sizes, strides, flags = collapse(segments)
    n, m = pad_axes(sizes, 1), pad_axes(strides, 0)
    scale = pool_scale / segment_size if pools and pooling == "mean" else pool_scale
    fast = x.dtype != torch.float32 and not INTERPRETED
    row = n[2]
    longest = min(LONGEST, row)
    pieces = triton.cdiv(row, longest)
    if pools:
        pieces = triton.next_power_of_2(pieces)
    P = triton.cdiv(row, pieces)
    along_path = not pools or (pools_rows(flags) and pieces <= MOST_RUNS)
    C = min(CHANNELS, triton.next_power_of_2(E))
    if along_path:
        group = pieces if pools else 1
        R = max(group, PER_THREAD * WARPS * 32 // C)
        C = min(C, MOST_VALUES // R)
        numbers = (
            scale, B, L, S, pieces, direction, x.stride(0), *n[1:], *m[:2],
            E, m[2], x.stride(1), P, row == pieces * P, row < 4, pools, pooling == "max", fast,
            AHEAD, R, group, C,
        )  # fmt: skip
        grid = (triton.cdiv(B * (L // row) * pieces, R), triton.cdiv(E, C))
        warps = max(1, R * C // (PER_THREAD * 32))
        return Launch(_runs_kernel, x.device, grid, numbers, num_warps=warps)
    if flags[-2:] == [True, False] and 3 <= row <= MOST_CHANNELS and n[1] <= LONGEST_WALK:
        R = max(1, PER_THREAD * WARPS * 32 // C)
        numbers = (
            scale, B, L, S, direction, x.stride(0), *n[:2], *m[:2], E, m[2], x.stride(1), row,
            pooling == "max", fast, R, C,
        )  # fmt: skip
        grid = (triton.cdiv(B * n[0], R), triton.cdiv(E, C))
        return Launch(_channels_kernel, x.device, grid, numbers, num_warps=WARPS)
    R = 16
    numbers = (
        scale, B, L, S, direction, x.stride(0), *n[1:], *m, *_scattered(sizes, flags),
        segment_size, E, x.stride(1), pooling == "max", fast, R, C,
    )  # fmt: skip
    grid = (triton.cdiv(B * S, R), triton.cdiv(E, C))
    return Launch(_cells_kernel, x.device, grid, numbers, num_warps=4)


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


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    pooling: str,
    pool_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, L, E = x.shape
    steps = Segments(tuple(sizes), tuple(strides), tuple(pooled)).num_segments
    return x.new_empty(2, B, steps, E, dtype=dtype), x.new_empty(B, L, E)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:-1]


def _gradients(ctx: Any, dpooled: Tensor, dskip: Tensor) -> tuple[Tensor | None, ...]:
    sizes, strides, pooled, pooling, _ = ctx.options
    backward = backward_op(Segments(tuple(sizes), tuple(strides), tuple(pooled)), pooling)
    gradients = backward(*ctx.saved_tensors, *ctx.options, dpooled, dskip)
    return (*gradients, None, None, None, None, None, None)


_op = Op("fastvim::conv_pool_triton", _run, _fake, _keep, _gradients)


def conv_pool_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.conv_pool` for GPU tensors of at most 32 bits, without a mask; pooled input of
    another dtype, if one is given."""
    walk = (segments.sizes, segments.strides, segments.pooled)
    dtype = dtype or x.dtype
    out: tuple[Tensor, Tensor] = _op(x, weight, bias, D, *walk, pooling, pool_scale, dtype)
    return out
