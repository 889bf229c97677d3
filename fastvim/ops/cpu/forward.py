"""The forward passes of the CPU engine, compiled by numba.

A kernel gets the address of `WORDS` integers: a counter of tasks, sizes and strides, and the
addresses of its arrays, float32 and contiguous unless strides are given. Threads run the same
kernel and take tasks from the counter.

    B  batch     L  tokens     E  inner width     K  taps     N  state size     R  rank of the step
    S  steps     M  B x L rows     d  model width
    order  (B or 1, L), memory index of each path position
    index  (2 or 1, B or 1, L), segment of each path position, or of each token in memory
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32

from fastvim.ops.cpu.threads import BLOCK
from fastvim.ops.cpu.vector import (
    LOG2_E,
    aligned,
    allocate,
    as_float,
    copy,
    exp2,
    exp_below,
    floats,
    inlined,
    integers,
    next_task,
    reciprocal,
    release,
    softplus,
    summing,
    wide,
    words,
)

ROWS = 32  # path positions that a task holds at a time


@inlined
def clear(rows):
    """Zeros; shorter to compile than an assignment to a slice."""
    wide()
    for i in range(rows.shape[0]):
        for e in range(rows.shape[1]):
            rows[i, e] = float32(0.0)


@inlined
def load_rows(x, stride, width, begin, count, L, order, rows, base):
    """Copy tokens at path positions from `begin` on to `rows`; zeros beyond the path's ends.

    At address `x` are the channels of a task, `stride` floats from token to token.
    """
    wide()
    for i in range(count):
        position = begin + i
        if position < 0 or position >= L:
            for e in range(BLOCK):
                rows[i, e] = float32(0.0)
        elif width == BLOCK:
            copy(base + 4 * BLOCK * i, x + 4 * stride * order[position], BLOCK)  # without a call
        else:
            copy(base + 4 * BLOCK * i, x + 4 * stride * order[position], width)


@inlined
def load_taps(weight, bias, D, e0, width, taps, start, skips):
    """The parameters of a block of channels, channels last; of the skip half, as a mean's terms."""
    wide()
    for d in range(2):
        for e in range(width):
            for k in range(weight.shape[2]):
                taps[d, k, e] = weight[d, e0 + e, k]
            start[d, e] = bias[d, e0 + e]
            skips[d, e] = float32(0.5) * D[d, e0 + e]


@inlined
def convolve(rows, i, taps, start, d, out):
    """The window at row i, which ends (d = 0) or begins (d = 1) there, into `out`."""
    wide()
    K = taps.shape[1]
    first, step = (i, 1) if d == 0 else (i + K - 1, -1)
    if K == 4:
        for e in range(BLOCK):
            out[e] = (
                start[d, e]
                + taps[d, 0, e] * rows[first, e]
                + taps[d, 1, e] * rows[first + step, e]
                + taps[d, 2, e] * rows[first + 2 * step, e]
                + taps[d, 3, e] * rows[first + 3 * step, e]
            )
        return
    for e in range(BLOCK):
        out[e] = start[d, e]
    for k in range(K):
        for e in range(BLOCK):
            out[e] += taps[d, k, e] * rows[first + k * step, e]


def conv_pool(data):
    """Add to pooled (2, B, S, E), and fill skip (B, L, E) in memory order.

    A task is a stretch of the path, of a block of channels of an image.
    """
    wide()
    p = words(data)
    B, L, E, K, S, chunks, stretch = p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    x_batch, x_token, order_batch, index_direction, index_batch = p[8], p[9], p[10], p[11], p[12]
    scale = as_float(int32(p[13]))
    weight, bias, D = floats(p[15], (2, E, K)), floats(p[16], (2, E)), floats(p[17], (2, E))
    pooled, skip = floats(p[20], (2, B, S, E)), floats(p[21], (B, L, E))
    blocks = (E + BLOCK - 1) // BLOCK
    memory = allocate((ROWS + 4 * K + 8) * BLOCK)
    base = aligned(memory)
    rows = floats(base, (ROWS + 2 * (K - 1), BLOCK))
    at = base + 4 * rows.size
    taps = floats(at, (2, K, BLOCK))
    at += 4 * taps.size
    start, skips = floats(at, (2, BLOCK)), floats(at + 8 * BLOCK, (2, BLOCK))
    sums, out = floats(at + 16 * BLOCK, (2, BLOCK)), floats(at + 24 * BLOCK, (2, BLOCK))
    # Both directions of `out` in a row: a chain of operations of its own overlaps with the next.
    both, below = floats(at + 24 * BLOCK, (2 * BLOCK,)), floats(at + 32 * BLOCK, (2 * BLOCK,))
    loaded = -1
    task = next_task(data)
    while task < B * blocks * chunks:
        chunk, e0, b = task % chunks, task // chunks % blocks * BLOCK, task // chunks // blocks
        width = min(BLOCK, E - e0)
        x = p[14] + 4 * (b * x_batch + e0)
        order = integers(p[18] + 8 * b * order_batch, (L,))
        if e0 != loaded:
            load_taps(weight, bias, D, e0, width, taps, start, skips)
            loaded = e0
        end = min(L, (chunk + 1) * stretch)
        clear(sums)
        for begin in range(chunk * stretch, end, ROWS):
            count = min(ROWS, end - begin)
            load_rows(x, x_token, width, begin - K + 1, count + 2 * (K - 1), L, order, rows, base)
            for i in range(count):
                for d in range(2):
                    convolve(rows, i + d * (K - 1), taps, start, d, out[d])
                for e in range(2 * BLOCK):
                    below[e] = exp_below(both[e])
                for e in range(BLOCK):
                    ahead = out[0, e] * reciprocal(below[e])
                    back = out[1, e] * reciprocal(below[BLOCK + e])
                    sums[0, e] += ahead
                    sums[1, e] += back
                    out[0, e] = skips[0, e] * ahead + skips[1, e] * back
                target = skip[b, order[begin + i], e0 : e0 + width]
                for e in range(width):
                    target[e] = out[0, e]
                for d in range(2):
                    index = integers(p[19] + 8 * (d * index_direction + b * index_batch), (L,))
                    here = index[begin + i]
                    if begin + i + 1 == end or index[begin + i + 1] != here:
                        total = pooled[d, b, here, e0 : e0 + width]
                        for e in range(width):
                            total[e] += scale * sums[d, e]
                            sums[d, e] = float32(0.0)
        task = next_task(data)
    release(memory)


@inlined
def load_scan(dt_proj, dt_bias, A_log, d, e0, width, ranks, start, rates):
    """The parameters of a block of channels, channels last; rates of decay to base 2."""
    wide()
    for e in range(width):
        for r in range(ranks.shape[0]):
            ranks[r, e] = dt_proj[d, e0 + e, r]
        start[e] = dt_bias[d, e0 + e]
        for n in range(rates.shape[0]):
            rates[n, e] = A_log[d, e0 + e, n]
    for n in range(rates.shape[0]):
        for e in range(BLOCK):
            rates[n, e] = -LOG2_E * exp2(LOG2_E * rates[n, e])


@inlined
def step_size(selected, ranks, start, raw):
    """Before softplus, from the first values that `x_proj` selected."""
    wide()
    for e in range(BLOCK):
        raw[e] = start[e]
    for r in range(ranks.shape[0]):
        value = selected[r]
        for e in range(BLOCK):
            raw[e] += value * ranks[r, e]


def scan(data):
    """Fill y (2, B, S, E) from u (2, B, S, E) and what was selected, (2, B, S, R + 2N).

    A task is a block of channels in one direction, of a share of the images.
    """
    wide()
    p = words(data)
    B, S, E, N, R, shares = p[1], p[2], p[3], p[4], p[5], p[6]
    u, selected = floats(p[7], (2, B, S, E)), floats(p[8], (2, B, S, R + 2 * N))
    dt_proj, dt_bias, A_log = (
        floats(p[9], (2, E, R)),
        floats(p[10], (2, E)),
        floats(p[11], (2, E, N)),
    )
    y = floats(p[12], (2, B, S, E))
    blocks = (E + BLOCK - 1) // BLOCK
    memory = allocate((2 * N + R + 4) * BLOCK)
    at = aligned(memory)
    start, step = floats(at, (BLOCK,)), floats(at + 4 * BLOCK, (BLOCK,))
    inflow, out = floats(at + 8 * BLOCK, (BLOCK,)), floats(at + 12 * BLOCK, (BLOCK,))
    at += 16 * BLOCK
    rates, h = floats(at, (N, BLOCK)), floats(at + 4 * N * BLOCK, (N, BLOCK))
    ranks = floats(at + 8 * N * BLOCK, (R, BLOCK))
    task = next_task(data)
    while task < 2 * blocks * shares:
        share, e0, d = task % shares, task // shares % blocks * BLOCK, task // shares // blocks
        width = min(BLOCK, E - e0)
        load_scan(dt_proj, dt_bias, A_log, d, e0, width, ranks, start, rates)
        for b in range(share * B // shares, (share + 1) * B // shares):
            clear(h)
            for i in range(S):
                s = S - 1 - i if d == 1 else i
                now, source, target = selected[d, b, s], u[d, b, s, e0:], y[d, b, s, e0:]
                step_size(now, ranks, start, step)
                for e in range(width):
                    inflow[e] = source[e]
                for e in range(BLOCK):
                    step[e] = softplus(step[e])
                    inflow[e] *= step[e]
                    out[e] = float32(0.0)
                for n in range(N):
                    enters, leaves = now[R + n], now[R + N + n]
                    for e in range(BLOCK):
                        state = exp2(step[e] * rates[n, e]) * h[n, e] + inflow[e] * enters
                        h[n, e] = state
                        out[e] += leaves * state
                for e in range(width):
                    target[e] = out[e]
        task = next_task(data)
    release(memory)


@summing
def mix(skip, first, second, row):
    """The scan's mean over the directions, with the skip, into `row`; gives the mean of that."""
    wide()
    total = float32(0.0)
    for e in range(row.shape[0]):
        value = skip[e] + float32(0.5) * (first[e] + second[e])
        row[e] = value
        total += value
    return total / float32(row.shape[0])


@summing
def inverse_deviation(row, mean, eps):
    """1 / sqrt(variance + eps)."""
    wide()
    total = float32(0.0)
    for e in range(row.shape[0]):
        total += (row[e] - mean) * (row[e] - mean)
    return float32(1.0) / np.sqrt(total / float32(row.shape[0]) + eps)


@inlined
def standardise(source, mean, scale, weight, target):
    """Without the mean, and scaled. Where sums are reordered, LLVM would divide by 1 / scale."""
    wide()
    for e in range(source.shape[0]):
        target[e] = (source[e] - mean) * scale * weight[e]


def expand_gate(data):
    """Fill out (B, L, E). A task is a stretch of tokens in memory."""
    wide()
    p = words(data)
    B, L, E, S, stretch, normed = p[1], p[2], p[3], p[4], p[5], p[6]
    z_batch, z_token, index_direction, index_batch = p[7], p[8], p[9], p[10]
    eps = as_float(int32(p[11]))
    skip, y, out = floats(p[12], (B * L, E)), floats(p[14], (2, B, S, E)), floats(p[18], (B * L, E))
    weight, bias = floats(p[16], (E,)), floats(p[17], (E,))
    memory = allocate(3 * E)
    at = aligned(memory)
    row, below = floats(at, (E,)), floats(at + 4 * E, (E,))
    unit = floats(at + 8 * E if normed else at, (E,))
    task = next_task(data)
    while task * stretch < B * L:
        for m in range(task * stretch, min(B * L, (task + 1) * stretch)):
            b, token = m // L, m % L
            index = integers(p[15] + 8 * (b * index_batch + token), (index_direction + 1,))
            gate = floats(p[13] + 4 * (b * z_batch + token * z_token), (E,))
            mean = mix(skip[m], y[0, b, index[0]], y[1, b, index[index_direction]], row)
            target = out[m]
            if normed:
                standardise(row, mean, inverse_deviation(row, mean, eps), weight, unit)
                if p[17]:
                    for e in range(E):
                        unit[e] += bias[e]
            for e in range(E):
                below[e] = exp_below(gate[e])
            for e in range(E):
                target[e] = unit[e] * gate[e] * reciprocal(below[e])
        task = next_task(data)
    release(memory)


def add_norm(data):
    """Fill total and normed (M, d). A task is a stretch of rows."""
    wide()
    p = words(data)
    M, d, stretch, rms, eps = p[1], p[2], p[3], p[4], as_float(int32(p[5]))
    hidden, residual = floats(p[6], (M, d)), floats(p[7], (M, d))
    weight, bias = floats(p[8], (d,)), floats(p[9], (d,))
    total, normed = floats(p[10], (M, d)), floats(p[11], (M, d))
    task = next_task(data)
    while task * stretch < M:
        for m in range(task * stretch, min(M, (task + 1) * stretch)):
            source, row, target = hidden[m], total[m], normed[m]
            mean = float32(0.0)
            if p[7]:
                stream = residual[m]
                for e in range(d):
                    row[e] = source[e] + stream[e]
            else:
                for e in range(d):
                    row[e] = source[e]
            if not rms:
                for e in range(d):
                    mean += row[e]
                mean /= float32(d)
            standardise(row, mean, inverse_deviation(row, mean, eps), weight, target)
            if p[9]:
                for e in range(d):
                    target[e] += bias[e]
        task = next_task(data)
