"""Kernels of expand_gate: forward and backward.

B  batch, L  tokens, M  B · L, E  inner width, S  segments
n1, n2  sizes of the path's faster axes; m0, m1, m2  strides of the axes in memory
s0, s1, s2  strides of the axes in segments
A row of E channels is held as PIECES pieces of BLOCK channels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvim.ops.triton.common import sigmoid, silu_twice


@triton.jit
def _locate(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2):
    """Sequence, memory index and row of y of each token; `place` counts along all paths."""
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
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Skip plus scan of a few rows, in pieces, and each row's mean and 1 / standard deviation."""
    mixed = ()
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for c in tl.static_range(PIECES):
        mask = present[:, None] & (columns < E - c * BLOCK)[None, :]
        value = tl.load(p_y + c * BLOCK, mask=mask, other=0.0).to(tl.float32)
        if DIRECTIONS == 2:
            value += tl.load(p_y + c * BLOCK + direction, mask=mask, other=0.0).to(tl.float32)
            value *= 0.5
        value += tl.load(p_skip + c * BLOCK, mask=mask, other=0.0).to(tl.float32)
        mixed = mixed + (value,)
        total += value
    mean = tl.zeros((ROWS,), tl.float32)
    scale = mean + 1.0
    if NORM:
        mean = tl.sum(total, axis=1) / E
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for c in tl.static_range(PIECES):
            centred = mixed[c] - mean[:, None]
            if (c + 1) * BLOCK > E:
                centred = tl.where((columns < E - c * BLOCK)[None, :], centred, 0.0)
            total += centred * centred
        scale = tl.rsqrt(tl.sum(total, axis=1) / E + eps)
    return mixed, mean[:, None], scale[:, None]


@triton.jit
def expand_gate_kernel(
    skip, z, y, norm_weight, norm_bias, out,
    eps: tl.constexpr, M, L, S, direction, skip_batch, z_batch, n1, n2, m0, m1, m2, s0, s1, s2,
    E: tl.constexpr, skip_token: tl.constexpr, z_token: tl.constexpr,
    NORM: tl.constexpr, FAST: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = place < M
    batch, token, step = _locate(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2)
    columns = tl.arange(0, BLOCK)
    p_skip = skip + (batch * skip_batch + token * skip_token)[:, None] + columns[None, :]
    p_z = z + (batch * z_batch + token * z_token)[:, None] + columns[None, :]
    p_y = y + (step * E)[:, None] + columns[None, :]
    p_out = out + ((batch * L + token) * E)[:, None] + columns[None, :]
    gates = ()
    for c in tl.static_range(PIECES):
        mask = present[:, None] & (columns < E - c * BLOCK)[None, :]
        gates = gates + (tl.load(p_z + c * BLOCK, mask=mask, other=0.0),)
    mixed, mean, scale = _mix(
        p_skip, p_y, direction, present, columns, eps, E, NORM, DIRECTIONS, ROWS, BLOCK, PIECES
    )
    for c in tl.static_range(PIECES):
        in_row = (columns < E - c * BLOCK)[None, :]
        value = mixed[c]
        if NORM:
            # Loaded once for each token, so that threads need not exchange them.
            places = c * BLOCK + columns[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
            weight = tl.load(norm_weight + places, mask=in_row, other=0.0).to(tl.float32)
            bias = tl.load(norm_bias + places, mask=in_row, other=0.0).to(tl.float32)
            value = (value - mean) * scale * weight + bias
        value *= silu_twice(0.5 * gates[c].to(tl.float32), FAST)
        tl.store(p_out + c * BLOCK, value, mask=present[:, None] & in_row)


@triton.jit
def expand_gate_backward_kernel(
    skip, z, y, norm_weight, norm_bias, dout, dskip, dz, dy, sums,
    eps: tl.constexpr, M, L, S, direction, skip_batch, z_batch,
    n1, n2, m0, m1, m2, s0, s1, s2, programs,
    E: tl.constexpr, skip_token: tl.constexpr, z_token: tl.constexpr,
    NORM: tl.constexpr, FAST: tl.constexpr, DIRECTIONS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
    RUN: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Gradients of skip, of the gate and of one direction of y.

    sums (programs, 2, E): those of the norm's weight and bias, for each program.
    A program takes runs of RUN tokens of the path. POOLED: a run is a segment, and has a row of dy.
    """
    columns = tl.arange(0, BLOCK)
    sum_weight = ()
    sum_bias = ()
    for _ in tl.static_range(PIECES):
        sum_weight = sum_weight + (tl.zeros((ROWS, BLOCK), tl.float32),)
        sum_bias = sum_bias + (tl.zeros((ROWS, BLOCK), tl.float32),)
    for run in range(tl.program_id(0), (M + RUN - 1) // RUN, programs):
        sum_y = ()
        for _ in tl.static_range(PIECES if POOLED else 0):
            sum_y = sum_y + (tl.zeros((ROWS, BLOCK), tl.float32),)
        for first in range(0, RUN, ROWS):
            place = run * RUN + first + tl.arange(0, ROWS)
            present = (first + tl.arange(0, ROWS) < RUN) & (place < M)
            batch, token, step = _locate(place, L, S, n1, n2, m0, m1, m2, s0, s1, s2)
            p_skip = skip + (batch * skip_batch + token * skip_token)[:, None] + columns[None, :]
            p_z = z + (batch * z_batch + token * z_token)[:, None] + columns[None, :]
            p_y = y + (step * E)[:, None] + columns[None, :]
            o_out = ((batch * L + token) * E)[:, None] + columns[None, :]
            o_y = (place.to(tl.int64) * E)[:, None] + columns[None, :]
            mixed, mean, scale = _mix(
                p_skip,
                p_y,
                direction,
                present,
                columns,
                eps,
                E,
                NORM,
                DIRECTIONS,
                ROWS,
                BLOCK,
                PIECES,
            )
            along = tl.zeros((ROWS, BLOCK), tl.float32)
            total = tl.zeros((ROWS, BLOCK), tl.float32)
            gradients = ()
            after_weight = ()
            after_bias = ()
            for c in tl.static_range(PIECES):
                in_row = (columns < E - c * BLOCK)[None, :]
                mask = present[:, None] & in_row
                b_z = tl.load(p_z + c * BLOCK, mask=mask, other=0.0).to(tl.float32)
                b_dout = tl.load(dout + o_out + c * BLOCK, mask=mask, other=0.0).to(tl.float32)
                gate = sigmoid(b_z, FAST)
                unit = mixed[c]
                value = unit
                gradient = b_dout * b_z * gate
                if NORM:
                    # Loaded once for each token, as in the forward pass.
                    places = c * BLOCK + columns[None, :] + tl.zeros((ROWS, BLOCK), tl.int32)
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
                tl.store(dz + o_out + c * BLOCK, b_dz, mask=mask)
                gradients = gradients + (gradient,)
            sum_weight = after_weight
            sum_bias = after_bias
            project = (tl.sum(along, axis=1) / E)[:, None]
            shift = (tl.sum(total, axis=1) / E)[:, None]
            after = ()
            for c in tl.static_range(PIECES):
                mask = present[:, None] & (columns < E - c * BLOCK)[None, :]
                gradient = gradients[c]
                if NORM:
                    unit = (mixed[c] - mean) * scale
                    gradient = (gradient - shift - unit * project) * scale
                tl.store(dskip + o_out + c * BLOCK, gradient, mask=mask)
                if POOLED:
                    after = after + (sum_y[c] + gradient,)
                else:
                    tl.store(dy + o_y + c * BLOCK, gradient * (1.0 / DIRECTIONS), mask=mask)
            if POOLED:
                sum_y = after
        for c in tl.static_range(PIECES if POOLED else 0):
            p_dy = dy + (run + tl.zeros((BLOCK,), tl.int64)) * E + c * BLOCK + columns
            tl.store(
                p_dy, tl.sum(sum_y[c], axis=0) * (1.0 / DIRECTIONS), mask=columns < E - c * BLOCK
            )
    if NORM:
        p_sums = sums + tl.program_id(0) * 2 * E + columns
        for c in tl.static_range(PIECES):
            mask = columns < E - c * BLOCK
            tl.store(p_sums + c * BLOCK, tl.sum(sum_weight[c], axis=0), mask=mask)
            tl.store(p_sums + E + c * BLOCK, tl.sum(sum_bias[c], axis=0), mask=mask)
