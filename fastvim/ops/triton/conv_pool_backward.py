"""Gradients of conv_pool on GPUs: recomputes the convolutions, all gradients in one pass.

B  batch, L  tokens, E  inner width, S  segments, P  tokens of a run
Runs are those of the forward pass. The gradient of a token depends on the convolutions at the three
tokens before it to the three behind it, so each run also computes those of its neighbours.
Gradients of taps, bias and skip are summed over the runs of each program first, then over programs.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.reference import conv_pool_reference
from fastvim.ops.registered import gradients_of
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
    sigmoid,
)
from fastvim.ops.triton.launch import Launch, Launches, Op, multiprocessors
from fastvim.ops.triton.sums import sum_parts

CHANNELS = 32  # of a program
PER_THREAD = 1  # channels of a thread
WARPS = 4
MAX_RUN = 16  # most tokens of a run; the loop over them is unrolled
AHEAD = 8  # tokens that are loaded before they are used
PROGRAMS = 8  # most of a launch, for each multiprocessor
SUMS = tl.constexpr(12)  # per channel and direction: four taps, bias, skip

_launches: Launches[tuple[Launch, int]] = Launches()


@triton.jit
def _slope(half, FAST: tl.constexpr):
    """silu(2 · half) and its derivative."""
    gate = sigmoid(2.0 * half, FAST)
    value = 2.0 * half * gate
    return value, gate + value * (1.0 - gate)


@triton.jit
def _segment(
    position, row, s1, s2, k0, k1, k2, POOLED: tl.constexpr, SCATTERED: tl.constexpr
):  # fmt: skip
    """Number of the segment of a path position."""
    if POOLED:
        return position // row
    if SCATTERED:
        rest = position // s2
        return (rest // s1) * k0 + (rest % s1) * k1 + (position % s2) * k2
    return position


@triton.jit
def _runs_backward_kernel(
    x, weight, bias, D, dpooled, dskip, dx, sums,
    scale: tl.constexpr, B, L, S, pieces, direction, stride_batch, n1, n2, m0, m1, groups, programs,
    s1, s2, k0, k1, k2,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr,
    P: tl.constexpr, EVEN: tl.constexpr, SHORT: tl.constexpr,
    POOLED: tl.constexpr, SCATTERED: tl.constexpr,
    FAST: tl.constexpr, AHEAD: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a traversal with mean pooling, or none.

    POOLED: segments are the path's rows. SCATTERED: segments have any form; the path's faster axes
    have sizes s1 and s2, and k0, k1, k2 are the strides of its axes in segments. Neither: segments
    are the tokens.
    """
    rows = L // n2
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = (columns < E)[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)
    zero = tl.zeros((RUNS, BLOCK), tl.float32)
    df0, df1, df2, df3, dfb, dfd = zero, zero, zero, zero, zero, zero
    dg0, dg1, dg2, dg3, dgb, dgd = zero, zero, zero, zero, zero, zero
    for group in range(tl.program_id(0), groups, programs):
        run = group * RUNS + tl.arange(0, RUNS)
        batch, row, first, start, base, before, after = row_of(run, pieces, rows, P, n1, n2, m0, m1)
        mask = (batch < B)[:, None] & in_row
        p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
        p_dskip = dskip + (batch * L * E)[:, None] + columns[None, :]
        p_dpooled = dpooled + (batch * S * E)[:, None] + columns[None, :]
        p_dx = dx + ((batch * L + base + first * m2) * E)[:, None] + columns[None, :]
        own_forward = zero
        own_backward = zero
        if POOLED and EVEN:
            own = p_dpooled + (row * E)[:, None]
            own_forward = scale * tl.load(own, mask=mask, other=0.0).to(tl.float32)
            own_backward = scale * tl.load(own + direction, mask=mask, other=0.0).to(tl.float32)

        # Entry i + 3 belongs to token i of the run. upstream holds dskip; bwd and fwd hold the
        # gradients of the convolutions before SiLU. fwd starts at token 0, so its entry is i.
        tokens = ()
        upstream = ()
        bwd = ()
        fwd = ()
        for j in tl.static_range(-3, P + 3 + AHEAD):
            if j < P + 3:
                token, inside = near(
                    first + j, start, L, base, before, after, n1, n2, m0, m1, m2, SHORT
                )
                present = mask & inside[:, None]
                value = tl.load(p_x + (token * stride_token)[:, None], mask=present, other=0.0)
                tokens = tokens + (value,)
                value = tl.load(p_dskip + (token * E)[:, None], mask=present, other=0.0)
                upstream = upstream + (value,)
            if j >= AHEAD:  # convolve around token i = j - AHEAD
                i0 = tokens[j - AHEAD].to(tl.float32)  # i - 3
                i1 = tokens[j - AHEAD + 1].to(tl.float32)
                i2 = tokens[j - AHEAD + 2].to(tl.float32)
                i3 = tokens[j - AHEAD + 3].to(tl.float32)
                # Forward direction, around token i.
                position = start + first + (j - AHEAD)
                if POOLED and EVEN and j - AHEAD < P:
                    gradient = own_forward
                else:
                    exists = mask & (position < L)[:, None]
                    step = _segment(position, n2, s1, s2, k0, k1, k2, POOLED, SCATTERED)
                    p_step = p_dpooled + (step * E)[:, None]
                    gradient = scale * tl.load(p_step, mask=exists, other=0.0).to(tl.float32)
                b_dskip = upstream[j - AHEAD + 3].to(tl.float32)
                value, slope = _slope(fb + f0 * i0 + f1 * i1 + f2 * i2 + f3 * i3, FAST)
                gradient = (gradient + fd * b_dskip) * slope
                fwd = fwd + (gradient,)
                if j - AHEAD < P:
                    if not EVEN:
                        own = mask & (first + (j - AHEAD) < n2)[:, None]
                        gradient = tl.where(own, gradient, 0.0)
                        b_dskip = tl.where(own, b_dskip, 0.0)
                    df0 += gradient * i0
                    df1 += gradient * i1
                    df2 += gradient * i2
                    df3 += gradient * i3
                    dfb += gradient
                    dfd += b_dskip * value
                # Backward direction, around token i - 3.
                position = start + first + (j - AHEAD - 3)
                if POOLED and EVEN and j - AHEAD >= 3:
                    gradient = own_backward
                else:
                    exists = mask & ((position >= 0) & (position < L))[:, None]
                    step = _segment(position, n2, s1, s2, k0, k1, k2, POOLED, SCATTERED)
                    p_step = p_dpooled + direction + (step * E)[:, None]
                    gradient = scale * tl.load(p_step, mask=exists, other=0.0).to(tl.float32)
                b_dskip = upstream[j - AHEAD].to(tl.float32)
                value, slope = _slope(gb + g3 * i0 + g2 * i1 + g1 * i2 + g0 * i3, FAST)
                gradient = (gradient + gd * b_dskip) * slope
                bwd = bwd + (gradient,)
                if j - AHEAD >= 3:
                    own = mask
                    if not EVEN:
                        own = mask & (first + (j - AHEAD - 3) < n2)[:, None]
                        gradient = tl.where(own, gradient, 0.0)
                        b_dskip = tl.where(own, b_dskip, 0.0)
                    dg3 += gradient * i0
                    dg2 += gradient * i1
                    dg1 += gradient * i2
                    dg0 += gradient * i3
                    dgb += gradient
                    dgd += b_dskip * value
                    b_dx = f3 * fwd[j - AHEAD - 3] + f2 * fwd[j - AHEAD - 2]
                    b_dx += f1 * fwd[j - AHEAD - 1] + f0 * fwd[j - AHEAD]
                    b_dx += g3 * bwd[j - AHEAD] + g2 * bwd[j - AHEAD - 1]
                    b_dx += g1 * bwd[j - AHEAD - 2] + g0 * bwd[j - AHEAD - 3]
                    # Twice: `load_taps` halved the taps.
                    tl.store(p_dx + (j - AHEAD - 3) * m2 * E, 2.0 * b_dx, mask=own)
    p_sums = sums + tl.program_id(0) * SUMS * E + columns
    parts = (df0, df1, df2, df3, dg0, dg1, dg2, dg3, dfb, dgb, 0.5 * dfd, 0.5 * dgd)
    for k in tl.static_range(SUMS):
        tl.store(p_sums + k * E, tl.sum(parts[k], axis=0), mask=columns < E)


def _plan(x: Tensor, segments: Segments, pool_scale: float) -> tuple[Launch, int]:
    """The launch for a traversal, and its programs along the runs, each with a row of sums."""
    B, L, E = x.shape[0], x.shape[1], int(x.shape[2])
    sizes, strides, pooled = collapse(segments)
    scattered = segments.pools and not pools_rows(pooled)
    (_, s1, s2), (k0, k1, k2) = (1, 1, 1), (0, 0, 0)
    if scattered:  # runs follow the rows of the path, whichever axes are pooled
        own = Segments(tuple(sizes), tuple(range(len(sizes))), tuple(pooled))
        (_, s1, s2), (k0, k1, k2) = pad_axes(sizes, 1), pad_axes(own.segment_strides, 0)
        sizes, strides, _ = collapse(replace(segments, pooled=(False,) * len(segments.sizes)))
    (_, n1, n2), (m0, m1, m2) = pad_axes(sizes, 1), pad_axes(strides, 0)
    pieces = triton.cdiv(n2, min(MAX_RUN, n2))
    P = triton.cdiv(n2, pieces)
    block = min(CHANNELS, triton.next_power_of_2(E))
    runs = max(1, PER_THREAD * WARPS * 32 // block)
    groups = triton.cdiv(B * (L // n2) * pieces, runs)
    blocks = triton.cdiv(E, block)
    programs = min(groups, triton.cdiv(PROGRAMS * multiprocessors(x.device), blocks))
    launch = Launch(
        _runs_backward_kernel, device=x.device, grid=(programs, blocks), num_warps=WARPS,
        scale=pool_scale / int(segments.segment_size) if segments.pools else pool_scale,
        B=B, L=L, S=segments.num_segments, E=E, direction=B * segments.num_segments * E,
        stride_batch=x.stride(0), stride_token=x.stride(1),
        n1=n1, n2=n2, m0=m0, m1=m1, m2=m2, s1=s1, s2=s2, k0=k0, k1=k1, k2=k2,
        groups=groups, programs=programs, pieces=pieces, P=P, EVEN=n2 == pieces * P, SHORT=n2 < 4,
        POOLED=segments.pools and not scattered, SCATTERED=scattered,
        FAST=x.dtype != torch.float32 and not INTERPRETED, AHEAD=AHEAD, RUNS=runs, BLOCK=block,
    )  # fmt: skip
    return launch, programs


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: str,
    pool_scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias and D."""
    if x.numel() == 0:
        return x.new_zeros(x.shape), weight * 0, bias * 0, D * 0
    if x.stride(2) != 1:
        x = x.contiguous()
    taps, bias, D = four_taps(weight), bias.contiguous(), D.contiguous()
    dpooled, dskip = dpooled.contiguous(), dskip.contiguous()
    segments = Segments.unflatten(walk)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch, programs = _launches.get(
        (x, taps, bias, D, dpooled, dskip),
        (segments, pool_scale),
        lambda: _plan(x, segments, pool_scale),
    )
    shape = (programs, SUMS.value, int(x.shape[2]))
    sums = torch.empty(shape, dtype=torch.float32, device=x.device)
    launch(x=x, weight=taps, bias=bias, D=D, dpooled=dpooled, dskip=dskip, dx=dx, sums=sums)
    total = sum_parts(sums[None])[0]
    dweight = total[:8].unflatten(0, (2, 4)).mT[..., 4 - weight.shape[2] :]
    return (
        dx,
        dweight.to(weight.dtype).contiguous(),
        total[8:10].to(bias.dtype).clone(),
        total[10:12].to(D.dtype).clone(),
    )


def _run_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: str,
    pool_scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same gradients by autograd through the reference: for maxima, which no kernel covers."""
    options: dict[str, Any] = {"pooling": pooling, "pool_scale": pool_scale}
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, D)]
    with torch.enable_grad():
        outputs = conv_pool_reference(
            leaves[0], leaves[1], leaves[2], leaves[3], Segments.unflatten(walk), **options
        )
    dx, dweight, dbias, dD = torch.autograd.grad(outputs, leaves, (dpooled, dskip))
    return dx, dweight, dbias, dD


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: str,
    pool_scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape)
    return dx, torch.empty_like(weight), torch.empty_like(bias), torch.empty_like(D)


def _definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: Pooling,
    pool_scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> list[Tensor]:
    forward = functools.partial(
        conv_pool_reference,
        segments=Segments.unflatten(walk),
        pooling=pooling,
        pool_scale=pool_scale,
    )
    return gradients_of(forward, (x, weight, bias, D), (dpooled.to(x.dtype), dskip))


_kernel_op = Op("fastvim::conv_pool_triton_backward", _run, _fake, definition=_definition)
_reference_op = Op(
    "fastvim::conv_pool_backward_reference", _run_reference, _fake, definition=_definition
)


def backward_op(segments: Segments, pooling: str) -> Op:
    """The op that gives the gradients of x, weight, bias and D for a traversal."""
    return _reference_op if pooling == "max" and segments.pools else _kernel_op
