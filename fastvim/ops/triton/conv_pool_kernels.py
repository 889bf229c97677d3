"""Kernels of conv_pool, one for each way in which segments may lie on the path.

B  batch, L  tokens, E  inner width, S  segments
n0, n1, n2  sizes of the path's axes, slowest first; m0, m1, m2  their strides in memory
A program takes RUNS stretches of the path times BLOCK channels. Each token is loaded once: the
window of seven tokens, three on either side, stays in registers.
In every kernel f0..f3 are the taps of the forward direction, g0..g3 those of the backward one,
fb and gb their biases, and fd and gd their skips.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastvim.ops.triton.common import load_taps, near, row_of, silu_twice, token_at


@triton.jit
def runs_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, pieces, direction, stride_batch, n1, n2, m0, m1,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr,
    P: tl.constexpr, EVEN: tl.constexpr, SHORT: tl.constexpr, POOLED: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, AHEAD: tl.constexpr,
    RUNS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments are rows of the path, or single tokens.

    RUNS runs at once: `pieces` runs cover a row, and GROUP of them make up a pooled segment.
    """
    rows = L // n2
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, _, first, start, base, before, after = row_of(run, pieces, rows, P, n1, n2, m0, m1)
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_first = p_x + ((base + first * m2) * stride_token)[:, None]
    p_skip = skip + ((batch * L + base + first * m2) * E)[:, None] + columns[None, :]
    p_step = pooled + ((batch * S + start + first) * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)

    forward = tl.full((RUNS, BLOCK), float("-inf") if MAX else 0.0, tl.float32)
    backward = tl.full((RUNS, BLOCK), float("-inf") if MAX else 0.0, tl.float32)
    tokens = ()
    for i in tl.static_range(-3, P + 3 + AHEAD):
        if i < P + 3:  # load token i of the run, which is entry i + 3 of `tokens`
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
        if i >= AHEAD + 3:  # convolve around token i - AHEAD - 3
            x0 = tokens[i - AHEAD - 3].to(tl.float32)
            x1 = tokens[i - AHEAD - 2].to(tl.float32)
            x2 = tokens[i - AHEAD - 1].to(tl.float32)
            x3 = tokens[i - AHEAD].to(tl.float32)
            x4 = tokens[i - AHEAD + 1].to(tl.float32)
            x5 = tokens[i - AHEAD + 2].to(tl.float32)
            x6 = tokens[i - AHEAD + 3].to(tl.float32)
            fwd = silu_twice(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
            bwd = silu_twice(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
            present = mask if EVEN else mask & (first + i - AHEAD - 3 < n2)[:, None]
            tl.store(p_skip, fd * fwd + gd * bwd, mask=present)
            p_skip += m2 * E
            if not POOLED:
                tl.store(p_step, fwd * scale, mask=present)
                tl.store(p_step + direction, bwd * scale, mask=present)
                p_step += E
            elif MAX:
                forward = tl.maximum(forward, tl.where(present, fwd, float("-inf")))
                backward = tl.maximum(backward, tl.where(present, bwd, float("-inf")))
            elif EVEN:
                forward += fwd
                backward += bwd
            else:
                forward += tl.where(present, fwd, 0.0)
                backward += tl.where(present, bwd, 0.0)
    if POOLED:
        SEGMENTS: tl.constexpr = RUNS // GROUP
        if GROUP > 1:
            forward = tl.reshape(forward, (SEGMENTS, GROUP, BLOCK))
            backward = tl.reshape(backward, (SEGMENTS, GROUP, BLOCK))
            forward = tl.max(forward, axis=1) if MAX else tl.sum(forward, axis=1)
            backward = tl.max(backward, axis=1) if MAX else tl.sum(backward, axis=1)
        segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)  # counted over the batch
        mask = (segment < B * S)[:, None] & (columns < E)[None, :]
        p_segment = pooled + (segment.to(tl.int64) * E)[:, None] + columns[None, :]
        tl.store(p_segment, forward * scale, mask=mask)
        tl.store(p_segment + direction, backward * scale, mask=mask)


@triton.jit
def _gather(total, rest, value, MAX: tl.constexpr, FAST: tl.constexpr):
    """Add a value to a sum or maximum.

    Without FAST sums are compensated (Kahan), so that rounding errors do not grow with the length;
    `rest` is the compensation.
    """
    if MAX:
        return tl.maximum(total, value), rest
    if FAST:
        return total + value, rest
    value -= rest
    after = total + value
    return after, (after - total) - value


@triton.jit
def _load_cell(p, token, mask, step, CELL: tl.constexpr):
    """CELL tokens of each run, `step` elements apart."""
    values = ()
    for c in tl.static_range(CELL):
        values = values + (tl.load(p + token + c * step, mask=mask, other=0.0),)
    return values


@triton.jit
def channels_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, direction, stride_batch, n0, n1, m0, m1,
    E: tl.constexpr, m2: tl.constexpr, stride_token: tl.constexpr, CELL: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments have one token of each cell of a row: n1 cells of CELL tokens, an image's channels.

    RUNS rows at once, cell by cell, with the tokens of a cell and its neighbours in registers.
    """
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = (run // n0).to(tl.int64)
    row = run % n0
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_skip = skip + (batch * L * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)
    zero = tl.full((RUNS, BLOCK), float("-inf") if MAX else 0.0, tl.float32)
    forward = ()
    backward = ()
    for _c in tl.static_range(CELL):
        forward = forward + ((zero, zero),)
        backward = backward + ((zero, zero),)
    before = (row - 1) * m0 + (n1 - 1) * m1 + (CELL - 3) * m2
    exists = mask & (row > 0)[:, None]
    step: tl.constexpr = m2 * stride_token
    previous = _load_cell(p_x, (before * stride_token)[:, None], exists, step, 3)
    current = _load_cell(p_x, (row * m0 * stride_token)[:, None], mask, step, CELL)
    for j in range(n1):
        ends = j + 1 == n1
        token = tl.where(ends, (row + 1) * m0, row * m0 + (j + 1) * m1)
        exists = mask & ((not ends) | (row + 1 < n0))[:, None]
        following = _load_cell(p_x, (token * stride_token)[:, None], exists, step, CELL)
        window = previous + current + (following[0], following[1], following[2])
        p_token = p_skip + ((row * m0 + j * m1) * E)[:, None]
        forward_after = ()
        backward_after = ()
        for c in tl.static_range(CELL):
            x0 = window[c].to(tl.float32)
            x1 = window[c + 1].to(tl.float32)
            x2 = window[c + 2].to(tl.float32)
            x3 = window[c + 3].to(tl.float32)
            x4 = window[c + 4].to(tl.float32)
            x5 = window[c + 5].to(tl.float32)
            x6 = window[c + 6].to(tl.float32)
            fwd = silu_twice(fb + f0 * x0 + f1 * x1 + f2 * x2 + f3 * x3, FAST)
            bwd = silu_twice(gb + g3 * x3 + g2 * x4 + g1 * x5 + g0 * x6, FAST)
            tl.store(p_token + c * m2 * E, fd * fwd + gd * bwd, mask=mask)
            forward_after += (_gather(forward[c][0], forward[c][1], fwd, MAX, FAST),)
            backward_after += (_gather(backward[c][0], backward[c][1], bwd, MAX, FAST),)
        forward = forward_after
        backward = backward_after
        previous = (current[CELL - 3], current[CELL - 2], current[CELL - 1])
        current = following
    p_segment = pooled + ((batch * S + row * CELL) * E)[:, None] + columns[None, :]
    for c in tl.static_range(CELL):
        tl.store(p_segment + c * E, forward[c][0] * scale, mask=mask)
        tl.store(p_segment + c * E + direction, backward[c][0] * scale, mask=mask)


@triton.jit
def cells_kernel(
    x, weight, bias, D, pooled, skip,
    scale: tl.constexpr, B, L, S, direction, stride_batch,
    n1, n2, m0, m1, m2, k1, s0, s1, q1, t0, t1, P,
    E: tl.constexpr, stride_token: tl.constexpr,
    MAX: tl.constexpr, FAST: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Segments of any form, scattered over the path. Each of their tokens loads its own window.

    Segment s begins at path position (s // k1) * s0 + (s % k1) * s1, and its cell j lies
    (j // q1) * t0 + (j % q1) * t1 further on.
    """
    run = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch = (run // S).to(tl.int64)
    segment = run % S
    base = (segment // k1) * s0 + (segment % k1) * s1
    mask = (batch < B)[:, None] & (columns < E)[None, :]
    p_x = x + (batch * stride_batch)[:, None] + columns[None, :]
    p_skip = skip + (batch * L * E)[:, None] + columns[None, :]
    f0, f1, f2, f3, fb, fd = load_taps(weight, bias, D, columns, E)
    g0, g1, g2, g3, gb, gd = load_taps(weight + E * 4, bias + E, D + E, columns, E)
    forward = tl.full((RUNS, BLOCK), float("-inf") if MAX else 0.0, tl.float32)
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
        fwd = silu_twice(ahead, FAST)
        bwd = silu_twice(behind, FAST)
        token = token_at(position, n1, n2, m0, m1, m2)
        tl.store(p_skip + (token * E)[:, None], fd * fwd + gd * bwd, mask=mask)
        forward, forward_rest = _gather(forward, forward_rest, fwd, MAX, FAST)
        backward, backward_rest = _gather(backward, backward_rest, bwd, MAX, FAST)
    p_segment = pooled + ((batch * S + segment) * E)[:, None] + columns[None, :]
    tl.store(p_segment, forward * scale, mask=mask)
    tl.store(p_segment + direction, backward * scale, mask=mask)
