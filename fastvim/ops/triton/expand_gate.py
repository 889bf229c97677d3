"""expand_gate on GPUs: broadcast of the scan, skip, norm and gate in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments
A program takes a few tokens that follow each other on the path, so that those of one segment find
its scan in the cache; all of E lies in registers as the norm asks, cut into pieces that leave no
thread idle where E is no power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.traversal import Segments
from fastvim.ops.triton.common import (
    INTERPRETED,
    pad_axes,
    pools_rows,
    row_pieces,
    sigmoid,
    silu_twice,
)
from fastvim.ops.triton.launch import Launch, Launches, Op
from fastvim.ops.triton.sums import sum_parts

PIECE = 256  # channels at most
PER_THREAD = 8  # channels of a piece
WARPS = 4
# Of the backward pass, which holds three times as much:
BACKWARD_PIECE = 512
BACKWARD_PER_THREAD = 8
BACKWARD_CHANNELS = 768  # of a row, for each warp
PROGRAMS = 2112  # at most, each with a row of partial sums

_launches: Launches[Launch] = Launches()
_backward_launches: Launches[tuple[Launch, int]] = Launches()


@triton.jit
def _place(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2):
    """Sequence, token in memory, and step in y, of places on the paths of all sequences."""
    batch = (place // L).to(tl.int64)
    position = place % L
    i2 = position % n2
    i1 = position // n2 % n1
    i0 = position // n2 // n1
    return batch, i0 * m0 + i1 * m1 + i2 * m2, batch * S + i0 * s0 + i1 * s1 + i2 * s2


@triton.jit
def _mix(
    p_skip, p_y, direction, present, columns,
    eps: tl.constexpr, E: tl.constexpr, NORM: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Skip and scan of a few tokens, in pieces of the row, and the row's mean and 1 / deviation."""
    mixed = ()
    total = tl.zeros((ROWS, C), tl.float32)
    for c in tl.static_range(PIECES):
        mask = present[:, None] & (columns < E - c * C)[None, :]
        value = tl.load(p_y + c * C, mask=mask, other=0.0).to(tl.float32)
        if DIRECTIONS == 2:
            value += tl.load(p_y + c * C + direction, mask=mask, other=0.0).to(tl.float32)
            value *= 0.5
        value += tl.load(p_skip + c * C, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed + (value,)
        total += value
    mean = tl.zeros((ROWS,), tl.float32)
    scale = mean + 1.0
    if NORM:
        mean = tl.sum(total, axis=1) / E
        total = tl.zeros((ROWS, C), tl.float32)
        for c in tl.static_range(PIECES):
            centred = mixed[c] - mean[:, None]
            if (c + 1) * C > E:
                centred = tl.where((columns < E - c * C)[None, :], centred, 0.0)
            total += centred * centred
        scale = tl.rsqrt(tl.sum(total, axis=1) / E + eps)
    return mixed, mean[:, None], scale[:, None]


@triton.jit
def _expand_gate_kernel(
    skip, z, y, norm_weight, norm_bias, out,
    eps: tl.constexpr, M, L, S, direction, skip_batch, z_batch, n1, n2, m0, m1, m2, s0, s1, s2,
    E: tl.constexpr, skip_token: tl.constexpr, z_token: tl.constexpr,
    NORM: tl.constexpr, FAST: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = place < M
    batch, token, step = _place(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2)
    columns = tl.arange(0, C)
    p_skip = skip + (batch * skip_batch + token * skip_token)[:, None] + columns[None, :]
    p_z = z + (batch * z_batch + token * z_token)[:, None] + columns[None, :]
    p_y = y + (step * E)[:, None] + columns[None, :]
    p_out = out + ((batch * L + token) * E)[:, None] + columns[None, :]
    gates = ()
    for c in tl.static_range(PIECES):
        mask = present[:, None] & (columns < E - c * C)[None, :]
        gates = gates + (tl.load(p_z + c * C, mask=mask, other=0.0),)
    mixed, mean, scale = _mix(
        p_skip, p_y, direction, present, columns, eps, E, NORM, DIRECTIONS, ROWS, C, PIECES
    )
    for c in tl.static_range(PIECES):
        in_row = (columns < E - c * C)[None, :]
        value = mixed[c]
        if NORM:
            # A row of them for each token: what the threads hold then needs no exchange.
            places = c * C + columns[None, :] + tl.zeros((ROWS, C), tl.int32)
            weight = tl.load(norm_weight + places, mask=in_row, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias + places, mask=in_row, other=0.0).to(tl.float32)
            value = (value - mean) * scale * weight + bias
        value *= silu_twice(0.5 * gates[c].to(tl.float32), FAST)
        tl.store(p_out + c * C, value, mask=present[:, None] & in_row)


@triton.jit
def _expand_gate_backward_kernel(
    skip, z, y, norm_weight, norm_bias, dout, dskip, dz, dy, sums,
    eps: tl.constexpr, M, L, S, direction, skip_batch, z_batch,
    n1, n2, m0, m1, m2, s0, s1, s2, programs,
    E: tl.constexpr, skip_token: tl.constexpr, z_token: tl.constexpr,
    NORM: tl.constexpr, FAST: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
    RUN: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Gradients of skip, gate and one direction of y, and in sums (programs, 2, E) those of the
    norm's parameters. Runs of RUN tokens of the path; POOLED: each is a segment, with a row of dy.
    """
    columns = tl.arange(0, C)
    sum_weight = ()
    sum_bias = ()
    for _ in tl.static_range(PIECES):
        sum_weight = sum_weight + (tl.zeros((ROWS, C), tl.float32),)
        sum_bias = sum_bias + (tl.zeros((ROWS, C), tl.float32),)
    for run in range(tl.program_id(0), (M + RUN - 1) // RUN, programs):
        sum_y = ()
        for _ in tl.static_range(PIECES if POOLED else 0):
            sum_y = sum_y + (tl.zeros((ROWS, C), tl.float32),)
        for first in range(0, RUN, ROWS):
            place = run * RUN + first + tl.arange(0, ROWS)
            present = (first + tl.arange(0, ROWS) < RUN) & (place < M)
            batch, token, step = _place(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2)
            p_skip = skip + (batch * skip_batch + token * skip_token)[:, None] + columns[None, :]
            p_z = z + (batch * z_batch + token * z_token)[:, None] + columns[None, :]
            p_y = y + (step * E)[:, None] + columns[None, :]
            o_out = ((batch * L + token) * E)[:, None] + columns[None, :]
            o_y = (place.to(tl.int64) * E)[:, None] + columns[None, :]
            mixed, mean, scale = _mix(
                p_skip, p_y, direction, present, columns, eps, E, NORM, DIRECTIONS, ROWS, C, PIECES
            )
            along = tl.zeros((ROWS, C), tl.float32)
            total = tl.zeros((ROWS, C), tl.float32)
            gradients = ()
            after_weight = ()
            after_bias = ()
            for c in tl.static_range(PIECES):
                in_row = (columns < E - c * C)[None, :]
                mask = present[:, None] & in_row
                b_z = tl.load(p_z + c * C, mask=mask, other=0.0).to(tl.float32)
                b_dout = tl.load(dout + o_out + c * C, mask=mask, other=0.0).to(tl.float32)
                gate = sigmoid(b_z, FAST)
                unit = mixed[c]
                value = unit
                gradient = b_dout * b_z * gate
                if NORM:
                    # A row of them for each token, as in the forward pass.
                    places = c * C + columns[None, :] + tl.zeros((ROWS, C), tl.int32)
                    weight = tl.load(norm_weight + places, mask=in_row, other=0.0).to(tl.float32)
                    bias = tl.load(norm_bias + places, mask=in_row, other=0.0).to(tl.float32)
                    unit = (unit - mean) * scale
                    value = unit * weight + bias
                    after_weight = after_weight + (sum_weight[c] + gradient * unit,)
                    after_bias = after_bias + (sum_bias[c] + gradient,)
                    gradient *= weight
                    along += gradient * unit
                    total += gradient
                else:
                    after_weight = after_weight + (sum_weight[c],)
                    after_bias = after_bias + (sum_bias[c],)
                b_dz = b_dout * value * gate * (1.0 + b_z * (1.0 - gate))
                tl.store(dz + o_out + c * C, b_dz, mask=mask)
                gradients = gradients + (gradient,)
            sum_weight = after_weight
            sum_bias = after_bias
            project = (tl.sum(along, axis=1) / E)[:, None]
            shift = (tl.sum(total, axis=1) / E)[:, None]
            after = ()
            for c in tl.static_range(PIECES):
                mask = present[:, None] & (columns < E - c * C)[None, :]
                gradient = gradients[c]
                if NORM:
                    unit = (mixed[c] - mean) * scale
                    gradient = (gradient - shift - unit * project) * scale
                tl.store(dskip + o_out + c * C, gradient, mask=mask)
                if POOLED:
                    after = after + (sum_y[c] + gradient,)
                else:
                    tl.store(dy + o_y + c * C, gradient * (1.0 / DIRECTIONS), mask=mask)
            if POOLED:
                sum_y = after
        for c in tl.static_range(PIECES if POOLED else 0):
            p_dy = dy + (run + tl.zeros((C,), tl.int64)) * E + c * C + columns
            tl.store(p_dy, tl.sum(sum_y[c], axis=0) * (1.0 / DIRECTIONS), mask=columns < E - c * C)
    if NORM:
        p_sums = sums + tl.program_id(0) * 2 * E + columns
        for c in tl.static_range(PIECES):
            mask = columns < E - c * C
            tl.store(p_sums + c * C, tl.sum(sum_weight[c], axis=0), mask=mask)
            tl.store(p_sums + E + c * C, tl.sum(sum_bias[c], axis=0), mask=mask)


def _run(
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
    skip, z, y, norm_weight, norm_bias = _prepared(skip, z, y, norm_weight, norm_bias)
    out = torch.empty(skip.shape, dtype=skip.dtype, device=skip.device)
    if out.numel() == 0:
        return out
    walk = (tuple(sizes), tuple(strides), tuple(pooled))
    launch = _launches.get(
        (skip, z, y, norm_weight, norm_bias),
        (walk, eps),
        lambda: _plan(skip, z, y, Segments(*walk), norm_weight is not None, eps),
    )
    launch(skip, z, y, norm_weight, norm_bias, out)
    return out


def _run_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of skip, z, one direction of y, and of the norm's weight and bias."""
    skip, z, y, norm_weight, norm_bias = _prepared(skip, z, y, norm_weight, norm_bias)
    dout = dout.contiguous()
    E = int(skip.shape[2])
    dskip = torch.empty(skip.shape, dtype=skip.dtype, device=skip.device)
    dz = torch.empty(skip.shape, dtype=z.dtype, device=skip.device)
    walk = (tuple(sizes), tuple(strides), tuple(pooled))
    segments = Segments(*walk)
    rows_pooled = pools_rows(segments.pooled)
    scattered = segments.pools and not rows_pooled
    # Segments that are no runs of the path: one value for each of their tokens, to be summed below.
    steps = skip.shape[1] if scattered else segments.num_segments
    dtype = torch.float32 if scattered else y.dtype
    dy = torch.empty((skip.shape[0], steps, E), dtype=dtype, device=skip.device)
    launch, programs = _backward_launches.get(
        (skip, z, y, norm_weight, norm_bias, dout),
        (walk, eps),
        lambda: _plan_backward(skip, z, y, segments, norm_weight is not None, eps),
    )
    sums = torch.empty((programs, 2, E), dtype=torch.float32, device=skip.device)
    if dskip.numel():
        launch(skip, z, y, norm_weight, norm_bias, dout, dskip, dz, dy, sums)
    if scattered:
        dy = segments.sum_of_path(dy).to(y.dtype)
    none = skip.new_empty(0)
    if norm_weight is None:
        return dskip, dz, dy, none, none
    dweight, dbias = sum_parts(sums[None])[0].to(norm_weight.dtype).unbind()
    return dskip, dz, dy, dweight.clone(), dbias.clone()


def _prepared(
    skip: Tensor, z: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The inputs with the strides that the kernels ask for, and a bias where there is a norm."""
    skip, z = (t if t.stride(2) == 1 else t.contiguous() for t in (skip, z))
    if weight is not None:
        weight = weight.contiguous()
        bias = torch.zeros_like(weight) if bias is None else bias.contiguous()
    # The directions may be one and the same.
    return skip, z, y if y[0].is_contiguous() else y.contiguous(), weight, bias


def _plan(skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float) -> Launch:
    """The launch of the forward pass."""
    C, pieces = row_pieces(int(skip.shape[2]), PIECE)
    rows = max(1, PER_THREAD * WARPS * 32 // C)
    grid = (triton.cdiv(skip.shape[0] * skip.shape[1], rows),)
    numbers = (*_sizes(skip, z, y, segments, eps), *_constants(skip, z, y, norm), rows, C, pieces)
    return Launch(_expand_gate_kernel, skip.device, grid, numbers, num_warps=WARPS)


def _plan_backward(
    skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float
) -> tuple[Launch, int]:
    """The launch of the backward pass, and the programs that sum apart."""
    E = int(skip.shape[2])
    C, pieces = row_pieces(E, BACKWARD_PIECE)
    warps = triton.next_power_of_2(triton.cdiv(E, BACKWARD_CHANNELS))
    rows = max(1, BACKWARD_PER_THREAD * warps * 32 // C)
    pooled = pools_rows(segments.pooled)
    run = int(segments.sizes[-1]) if pooled else rows
    programs = min(PROGRAMS, triton.cdiv(skip.shape[0] * skip.shape[1], run))
    numbers = (
        *_sizes(skip, z, y, segments, eps), programs, *_constants(skip, z, y, norm),
        rows, C, pieces, run, pooled,
    )  # fmt: skip
    kernel = _expand_gate_backward_kernel
    return Launch(kernel, skip.device, (programs,), numbers, num_warps=warps), programs


def _sizes(
    skip: Tensor, z: Tensor, y: Tensor, segments: Segments, eps: float
) -> tuple[int | float, ...]:
    """The kernels' numbers from eps to s2."""
    n, m = pad_axes(segments.sizes, 1), pad_axes(segments.strides, 0)
    return (
        eps, skip.shape[0] * skip.shape[1], skip.shape[1], segments.num_segments, y.stride(0),
        skip.stride(0), z.stride(0), *n[1:], *m, *pad_axes(segments.segment_strides, 0),
    )  # fmt: skip


def _constants(skip: Tensor, z: Tensor, y: Tensor, norm: bool) -> tuple[int | bool, ...]:
    """The kernels' numbers from E to DIRECTIONS."""
    fast = skip.dtype != torch.float32 and not INTERPRETED
    return int(skip.shape[2]), skip.stride(1), z.stride(1), norm, fast, int(y.shape[0])


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


def _fake_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    sizes: list[int],
    strides: list[int],
    pooled: list[bool],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    none = skip.new_empty(0)
    weight = none if norm_weight is None else torch.empty_like(norm_weight)
    dz = z.new_empty(skip.shape)
    return skip.new_empty(skip.shape), dz, y.new_empty(y.shape[1:]), weight, weight.clone()


_backward = Op("fastvim::expand_gate_triton_backward", _run_backward, _fake_backward)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    skip, z, y, *ctx.walk, norm_weight, norm_bias, ctx.eps = inputs
    ctx.save_for_backward(skip, z, y, norm_weight, norm_bias)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    skip, z, y, weight, bias = ctx.saved_tensors
    dskip, dz, dy, dweight, dbias = _backward(skip, z, y, *ctx.walk, weight, bias, ctx.eps, dout)
    return (
        dskip,
        dz,
        dy.expand(y.shape),  # the directions are averaged: both have the same gradient
        None,
        None,
        None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
    )


_op = Op("fastvim::expand_gate_triton", _run, _fake, _keep, _gradients)


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
    """`fastvim.ops.expand_gate` for GPU tensors of at most 32 bits, without a mask; y (1, B, S, E)
    is the mean of both directions."""
    walk = (segments.sizes, segments.strides, segments.pooled)
    out: Tensor = _op(skip, z, y, *walk, norm_weight, norm_bias, eps)
    return out
