"""The backward passes of the CPU engine, compiled by numba (`forward`: letters, how a kernel runs).

They start from the inputs of the forward passes and compute everything else again. Gradients of
parameters are partial sums, a row for each task or share. Long sums are taken in parts, `ROWS` or
`CHUNK` at a time, which keeps their rounding small.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32

from fastvim.ops.cpu.forward import (
    ROWS,
    convolve,
    inverse_deviation,
    load_rows,
    load_scan,
    load_taps,
    mix,
    standardise,
    step_size,
)
from fastvim.ops.cpu.threads import BLOCK
from fastvim.ops.cpu.vector import (
    LN_2,
    aligned,
    allocate,
    as_float,
    exp2,
    exp_below,
    floats,
    integers,
    next_task,
    reciprocal,
    release,
    sigmoid,
    softplus,
    summing,
    wide,
    words,
)

CHUNK = 16  # steps whose states the scan's backward pass holds


def conv_pool(data):
    """Fill dx (B, L, E) and sums (B x chunks, 2, K + 2, E), of taps, bias and D."""
    wide()
    p = words(data)
    B, L, E, K, S, chunks, stretch = p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    x_batch, x_token, order_batch, index_direction, index_batch = p[8], p[9], p[10], p[11], p[12]
    scale = as_float(int32(p[13]))
    weight, bias, D = floats(p[15], (2, E, K)), floats(p[16], (2, E)), floats(p[17], (2, E))
    dpooled, dskip = floats(p[20], (2, B, S, E)), floats(p[21], (B, L, E))
    dx, sums = floats(p[22], (B, L, E)), floats(p[23], (B * chunks, 2, K + 2, E))
    blocks, H = (E + BLOCK - 1) // BLOCK, K - 1
    memory = allocate((3 * ROWS + 10 * K + 11) * BLOCK)
    base = aligned(memory)
    rows = floats(base, (ROWS + 2 * H, BLOCK))
    at = base + 4 * rows.size
    grads = floats(at, (2, ROWS + H, BLOCK))  # of the convolutions, before SiLU
    at += 4 * grads.size
    taps = floats(at, (2, K, BLOCK))
    at += 4 * taps.size
    start, skips = floats(at, (2, BLOCK)), floats(at + 8 * BLOCK, (2, BLOCK))
    out, upstream = floats(at + 16 * BLOCK, (BLOCK,)), floats(at + 20 * BLOCK, (BLOCK,))
    below = floats(at + 24 * BLOCK, (BLOCK,))
    at += 28 * BLOCK
    total = floats(at, (2, K + 2, BLOCK))
    part = floats(at + 4 * total.size, (2, K + 2, BLOCK))
    task = next_task(data)
    while task < B * blocks * chunks:
        chunk, e0, b = task % chunks, task // chunks % blocks * BLOCK, task // chunks // blocks
        width = min(BLOCK, E - e0)
        x = p[14] + 4 * (b * x_batch + e0)
        order = integers(p[18] + 8 * b * order_batch, (L,))
        load_taps(weight, bias, D, e0, width, taps, start, skips)
        total[:] = float32(0.0)
        end = min(L, (chunk + 1) * stretch)
        for begin in range(chunk * stretch, end, ROWS):
            count = min(ROWS, end - begin)
            load_rows(x, x_token, width, begin - H, count + 2 * H, L, order, rows, base)
            part[:] = float32(0.0)
            for d in range(2):
                index = integers(p[19] + 8 * (d * index_direction + b * index_batch), (L,))
                before = H if d == 1 else 0  # positions before `begin` whose windows reach it
                for i in range(count + H):
                    position = begin - before + i
                    grad = grads[d, i]
                    if position < 0 or position >= L:
                        grad[:] = float32(0.0)
                        continue
                    convolve(rows, i, taps, start, d, out)
                    pools, skipped = (
                        dpooled[d, b, index[position], e0:],
                        dskip[b, order[position], e0:],
                    )
                    for e in range(width):
                        grad[e] = scale * pools[e]
                        upstream[e] = skipped[e]
                    for e in range(BLOCK):
                        below[e] = exp_below(out[e])
                    for e in range(BLOCK):
                        share = reciprocal(below[e])
                        value = out[e] * share
                        slope = share + value * (float32(1.0) - share)
                        grad[e] = (grad[e] + skips[d, e] * upstream[e]) * slope
                        out[e] = value
                    if i < before or i >= before + count:
                        continue
                    first, step = (i, 1) if d == 0 else (i + H, -1)
                    for e in range(BLOCK):
                        part[d, K, e] += grad[e]
                        part[d, K + 1, e] += float32(0.5) * upstream[e] * out[e]
                    for k in range(K):
                        for e in range(BLOCK):
                            part[d, k, e] += grad[e] * rows[first + k * step, e]
            for i in range(count):
                for e in range(BLOCK):
                    out[e] = float32(0.0)
                for k in range(K):
                    for e in range(BLOCK):
                        out[e] += taps[0, k, e] * grads[0, i + H - k, e]
                        out[e] += taps[1, k, e] * grads[1, i + k, e]
                target = dx[b, order[begin + i], e0 : e0 + width]
                for e in range(width):
                    target[e] = out[e]
            total += part
        sums[b * chunks + chunk, :, :, e0 : e0 + width] = total[:, :, :width]
        task = next_task(data)
    release(memory)


def scan(data):
    """Fill du (2, B, S, E), of a direct use of u alone, dselected (blocks, 2, B, S, R + 2N), sums.

    sums (shares, 2, R + N + 1, E) holds the gradients of dt_proj, A_log and dt_bias.
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
    dy, du = floats(p[12], (2, B, S, E)), floats(p[13], (2, B, S, E))
    blocks, chunks = (E + BLOCK - 1) // BLOCK, (S + CHUNK - 1) // CHUNK
    dselected = floats(p[14], (blocks, 2, B, S, R + 2 * N))
    sums = floats(p[15], (shares, 2, R + N + 1, E))
    rates, ranks = np.zeros((N, BLOCK), np.float32), np.zeros((R, BLOCK), np.float32)
    start, dh = np.zeros(BLOCK, np.float32), np.zeros((N, BLOCK), np.float32)
    starts = np.zeros((chunks, N, BLOCK), np.float32)  # the states at which chunks begin
    h = np.zeros((CHUNK + 1, N, BLOCK), np.float32)  # before and after each step of a chunk
    decay = np.zeros((CHUNK, N, BLOCK), np.float32)
    raws, steps = np.zeros((CHUNK, BLOCK), np.float32), np.zeros((CHUNK, BLOCK), np.float32)
    inputs, inflow = np.zeros((CHUNK, BLOCK), np.float32), np.zeros((CHUNK, BLOCK), np.float32)
    total = np.zeros((R + N + 1, BLOCK), np.float32)
    part = np.zeros((R + N + 1, BLOCK), np.float32)
    grad, dstep, dinflow = (
        np.zeros(BLOCK, np.float32),
        np.zeros(BLOCK, np.float32),
        np.zeros(BLOCK, np.float32),
    )
    task = next_task(data)
    while task < 2 * blocks * shares:
        share, block, d = task % shares, task // shares % blocks, task // shares // blocks
        e0 = block * BLOCK
        width = min(BLOCK, E - e0)
        load_scan(dt_proj, dt_bias, A_log, d, e0, width, ranks, start, rates)
        inputs[:] = float32(0.0)  # channels past `width` stay 0, and add nothing to sums
        grad[:] = float32(0.0)
        total[:] = float32(0.0)
        for b in range(share * B // shares, (share + 1) * B // shares):
            dh[:] = float32(0.0)
            for visit in range(2 * chunks - 1):
                # First the states at which chunks begin, then the chunks, the last one first.
                chunk = visit if visit < chunks else 2 * chunks - 2 - visit
                begin, count = chunk * CHUNK, min(CHUNK, S - chunk * CHUNK)
                h[0] = starts[chunk]  # of the first one: 0
                for k in range(count):
                    s = S - 1 - begin - k if d == 1 else begin + k
                    now, source = selected[d, b, s], u[d, b, s, e0:]
                    step_size(now, ranks, start, raws[k])
                    for e in range(width):
                        inputs[k, e] = source[e]
                    for e in range(BLOCK):
                        steps[k, e] = softplus(raws[k, e])
                        inflow[k, e] = steps[k, e] * inputs[k, e]
                    for n in range(N):
                        enters = now[R + n]
                        for e in range(BLOCK):
                            decay[k, n, e] = exp2(steps[k, e] * rates[n, e])
                            h[k + 1, n, e] = decay[k, n, e] * h[k, n, e] + inflow[k, e] * enters
                if visit < chunks - 1:
                    starts[chunk + 1] = h[count]
                    continue
                part[:] = float32(0.0)
                for k in range(count - 1, -1, -1):
                    s = S - 1 - begin - k if d == 1 else begin + k
                    now, dnow = selected[d, b, s], dselected[block, d, b, s]
                    upstream, target = dy[d, b, s, e0:], du[d, b, s, e0:]
                    for e in range(width):
                        grad[e] = upstream[e]
                    dstep[:] = float32(0.0)
                    dinflow[:] = float32(0.0)
                    for n in range(N):
                        enters, leaves = now[R + n], now[R + N + n]
                        denters, dleaves = float32(0.0), float32(0.0)
                        for e in range(BLOCK):
                            flow = dh[n, e] + leaves * grad[e]
                            dleaves += grad[e] * h[k + 1, n, e]
                            denters += flow * inflow[k, e]
                            dinflow[e] += flow * enters
                            dh[n, e] = flow * decay[k, n, e]
                            dexponent = dh[n, e] * h[k, n, e] * LN_2
                            dstep[e] += dexponent * rates[n, e]
                            part[R + n, e] += dexponent * steps[k, e] * rates[n, e]
                        dnow[R + n], dnow[R + N + n] = denters, dleaves
                    for e in range(BLOCK):
                        slope = sigmoid(raws[k, e])
                        dstep[e] = (dstep[e] + dinflow[e] * inputs[k, e]) * slope
                        dinflow[e] *= steps[k, e]
                        part[R + N, e] += dstep[e]
                    for r in range(R):
                        value, dvalue = now[r], float32(0.0)
                        for e in range(BLOCK):
                            dvalue += dstep[e] * ranks[r, e]
                            part[r, e] += value * dstep[e]
                        dnow[r] = dvalue
                    for e in range(width):
                        target[e] = dinflow[e]
                total += part
        sums[share, d, :, e0 : e0 + width] = total[:, :width]
        task = next_task(data)


@summing
def norm_gradient(grad, unit, scale, centred, target):
    """Gradient of a norm's input, from that of its unit values; `centred`: a mean was taken off."""
    wide()
    width = grad.shape[0]
    along, mean = float32(0.0), float32(0.0)
    for e in range(width):
        along += grad[e] * unit[e]
        mean += grad[e]
    along, mean = along / float32(width), mean / float32(width) if centred else float32(0.0)
    for e in range(width):
        target[e] = scale * (grad[e] - mean - unit[e] * along)


def expand_gate(data):
    """Fill dskip and dz (B, L, E), and sums (tasks, 2, E) of weight and bias."""
    wide()
    p = words(data)
    B, L, E, S, stretch, normed = p[1], p[2], p[3], p[4], p[5], p[6]
    z_batch, z_token, index_direction, index_batch = p[7], p[8], p[9], p[10]
    eps = as_float(int32(p[11]))
    skip, y, dout = (
        floats(p[12], (B * L, E)),
        floats(p[14], (2, B, S, E)),
        floats(p[18], (B * L, E)),
    )
    weight, bias = floats(p[16], (E,)), floats(p[17], (E,))
    dskip, dz = floats(p[19], (B * L, E)), floats(p[20], (B * L, E))
    sums = floats(p[21], ((B * L + stretch - 1) // stretch, 2, E))
    row, grad, part = np.zeros(E, np.float32), np.zeros(E, np.float32), np.zeros((2, E), np.float32)
    below, ones = np.zeros(E, np.float32), np.ones(E, np.float32)
    unit = np.zeros(E, np.float32) if normed else row
    task = next_task(data)
    while task * stretch < B * L:
        first, last = task * stretch, min(B * L, (task + 1) * stretch)
        for m in range(first, last):
            b, token = m // L, m % L
            index = integers(p[15] + 8 * (b * index_batch + token), (index_direction + 1,))
            gate = floats(p[13] + 4 * (b * z_batch + token * z_token), (E,))
            upstream, dgate, target = dout[m], dz[m], dskip[m]
            mean = mix(skip[m], y[0, b, index[0]], y[1, b, index[index_direction]], row)
            scale = float32(1.0)
            if normed:
                scale = inverse_deviation(row, mean, eps)
                standardise(row, mean, scale, ones, unit)
            for e in range(E):
                below[e] = exp_below(gate[e])
            for e in range(E):
                share = reciprocal(below[e])
                value = gate[e] * share
                dgate[e] = upstream[e] * (share + value * (float32(1.0) - share))
                grad[e] = upstream[e] * value
            if not normed:
                for e in range(E):
                    dgate[e] *= unit[e]
                    target[e] = grad[e]
                continue
            for e in range(E):
                part[0, e] += grad[e] * unit[e]
                part[1, e] += grad[e]
                dgate[e] *= unit[e] * weight[e]
                grad[e] *= weight[e]
            if p[17]:
                for e in range(E):
                    share = reciprocal(below[e])
                    dgate[e] += (
                        upstream[e]
                        * bias[e]
                        * share
                        * (float32(1.0) + gate[e] * (float32(1.0) - share))
                    )
            norm_gradient(grad, unit, scale, True, target)
            if (m + 1 - first) % ROWS == 0 or m + 1 == last:
                sums[task] += part
                part[:] = float32(0.0)
        task = next_task(data)


def sum_segments(data):
    """Add half of values (B, L, E) over each segment to out (2, B, S, E)."""
    wide()
    p = words(data)
    B, L, E, S, index_direction, index_batch = p[1], p[2], p[3], p[4], p[5], p[6]
    values, out = floats(p[7], (B, L, E)), floats(p[10], (2, B, S, E))
    blocks = (E + BLOCK - 1) // BLOCK
    sums = np.zeros((2, BLOCK), np.float32)
    task = next_task(data)
    while task < B * blocks:
        e0, b = task % blocks * BLOCK, task // blocks
        width = min(BLOCK, E - e0)
        order = integers(p[8] + 8 * b * index_batch, (L,))
        for position in range(L):
            source = values[b, order[position], e0:]
            for d in range(2):
                index = integers(p[9] + 8 * (d * index_direction + b * index_batch), (L,))
                here = index[position]
                for e in range(width):
                    sums[d, e] += float32(0.5) * source[e]
                if position + 1 == L or (position + 1) % ROWS == 0 or index[position + 1] != here:
                    total = out[d, b, here, e0:]
                    for e in range(width):
                        total[e] += sums[d, e]
                    sums[d, :] = float32(0.0)
        task = next_task(data)


def add_norm(data):
    """Fill dhidden (M, d), and sums (tasks, 2, d) of weight and bias."""
    wide()
    p = words(data)
    M, d, stretch, rms, eps = p[1], p[2], p[3], p[4], as_float(int32(p[5]))
    total, weight = floats(p[6], (M, d)), floats(p[7], (d,))
    dnormed, dtotal, dhidden = floats(p[8], (M, d)), floats(p[9], (M, d)), floats(p[10], (M, d))
    sums = floats(p[11], ((M + stretch - 1) // stretch, 2, d))
    row, grad, part = np.zeros(d, np.float32), np.zeros(d, np.float32), np.zeros((2, d), np.float32)
    ones = np.ones(d, np.float32)
    task = next_task(data)
    while task * stretch < M:
        first, last = task * stretch, min(M, (task + 1) * stretch)
        for m in range(first, last):
            source, upstream, target = total[m], dnormed[m], dhidden[m]
            mean = float32(0.0)
            if not rms:
                for e in range(d):
                    mean += source[e]
                mean /= float32(d)
            scale = inverse_deviation(source, mean, eps)
            standardise(source, mean, scale, ones, row)
            for e in range(d):
                part[0, e] += upstream[e] * row[e]
                part[1, e] += upstream[e]
                grad[e] = upstream[e] * weight[e]
            norm_gradient(grad, row, scale, not rms, target)
            if p[9]:
                stream = dtotal[m]
                for e in range(d):
                    target[e] += stream[e]
            if (m + 1 - first) % ROWS == 0 or m + 1 == last:
                sums[task] += part
                part[:] = float32(0.0)
        task = next_task(data)
