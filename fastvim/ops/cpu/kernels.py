"""The loops of the CPU engine, compiled by numba.

A kernel takes a range of tasks, `kernel(first, last, *arrays)`, so that several threads can share
the range. A task is one block of `BLOCK` channels of one sequence. Its inner loops run over
channels and are vectorised.

    B  batch     L  tokens in path order     E  inner width     K  taps     N  state size
    G  2 x batch sequences, directions outer                    S  steps

All kernels are in one file: numba's cache notices changes only in a kernel's own file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import float32, int32
from numba.core import types
from numba.extending import intrinsic

BLOCK = 64  # channels of a task: four of the widest vectors, and rows that fit the L1 cache
CHUNK = 16  # steps whose states the backward pass holds; each chunk restarts from a saved state
LOG2_E = np.float32(1.4426950408889634)
LN_2 = np.float32(0.6931471805599453)

# Chebyshev fit of 2**f on [-1/2, 1/2], relative error 3e-9.
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in np.polynomial.Chebyshev.interpolate(np.exp2, 6, domain=[-0.5, 0.5])
    .convert(kind=np.polynomial.Polynomial)
    .coef
)

# Sums may be reordered, for vectorisation. Values are not assumed to be finite.
jit: Callable[..., Any] = functools.partial(
    numba.njit, nogil=True, cache=True, fastmath={"reassoc", "contract", "nsz"}, error_model="numpy"
)


@intrinsic
def _as_float(typing_context: Any, bits: Any) -> Any:
    """Reinterpret the bits of an int32 as a float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), build


@jit(inline="always")
def exp2(x):  # type: ignore[no-untyped-def]
    """2**x for x <= 0, floored at 2**-126. numba's own exp makes a call for each element."""
    x = float32(-126.0) if x < float32(-126.0) else x
    whole = np.floor(x + float32(0.5))
    f = x - whole
    p = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    bits = (int32(whole) + int32(127)) << int32(23)
    return p * _as_float(bits)  # type: ignore[call-arg]


@jit
def scan_forward(first, last, u, delta, rate, B, C, y, starts):  # type: ignore[no-untyped-def]
    """Fill y (G, S, E), and starts (G, S // CHUNK, N, E) with the states after chunks.

    starts may be empty: (G, 0, N, E).
    """
    G, S, E = u.shape
    N = rate.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    h = np.zeros((N, BLOCK), np.float32)
    rates = np.zeros((N, BLOCK), np.float32)
    step = np.zeros(BLOCK, np.float32)
    inflow = np.zeros(BLOCK, np.float32)
    out = np.zeros(BLOCK, np.float32)
    for task in range(first, last):
        g, e0 = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, E - e0)
        backward = g >= G // 2
        h[:], step[:], inflow[:] = float32(0.0), float32(0.0), float32(0.0)
        rates[:, :width] = rate[int32(backward), :, e0 : e0 + width]
        for i in range(S):
            s = S - 1 - i if backward else i
            for e in range(width):
                step[e] = delta[g, s, e0 + e]
                inflow[e] = step[e] * u[g, s, e0 + e]
            out[:] = float32(0.0)
            for n in range(N):
                b, c = B[g, s, n], C[g, s, n]
                for e in range(BLOCK):
                    h[n, e] = exp2(step[e] * rates[n, e]) * h[n, e] + inflow[e] * b
                    out[e] += c * h[n, e]
            for e in range(width):
                y[g, s, e0 + e] = out[e]
            if (i + 1) % CHUNK == 0 and starts.shape[1] > 0:
                starts[g, i // CHUNK, :, e0 : e0 + width] = h[:, :width]


@jit
def scan_backward(first, last, u, delta, rate, B, C, starts, dy, du, ddelta, drate, dB, dC):  # type: ignore[no-untyped-def]
    """Fill the gradients. drate (G, N, E), dB and dC (blocks, G, S, N) are partial sums."""
    G, S, E = u.shape
    N = rate.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    h = np.zeros((CHUNK + 1, N, BLOCK), np.float32)  # the state before and after each step
    decay = np.zeros((CHUNK, N, BLOCK), np.float32)
    dh = np.zeros((N, BLOCK), np.float32)
    rates = np.zeros((N, BLOCK), np.float32)
    drates, part_rates = np.zeros((N, BLOCK), np.float32), np.zeros((N, BLOCK), np.float32)
    step, inflow, grad = np.zeros((3, BLOCK), np.float32)
    dstep, dinflow = np.zeros((2, BLOCK), np.float32)
    for task in range(first, last):
        g, block = task // blocks, task % blocks
        e0 = block * BLOCK
        width = min(BLOCK, E - e0)
        backward = g >= G // 2
        # Channels past `width` stay 0, so they add nothing to the sums over channels.
        dh[:], drates[:] = float32(0.0), float32(0.0)
        step[:], inflow[:], grad[:] = float32(0.0), float32(0.0), float32(0.0)
        rates[:, :width] = rate[int32(backward), :, e0 : e0 + width]
        for chunk in range((S - 1) // CHUNK, -1, -1):
            begin, end = chunk * CHUNK, min(S, (chunk + 1) * CHUNK)
            part_rates[:] = float32(0.0)  # summed chunk by chunk: long sums would lose accuracy
            if chunk == 0:
                h[0] = float32(0.0)
            else:
                h[0, :, :width] = starts[g, chunk - 1, :, e0 : e0 + width]
            for i in range(begin, end):
                s = S - 1 - i if backward else i
                k = i - begin
                for e in range(width):
                    step[e] = delta[g, s, e0 + e]
                    inflow[e] = step[e] * u[g, s, e0 + e]
                for n in range(N):
                    b = B[g, s, n]
                    for e in range(BLOCK):
                        decay[k, n, e] = exp2(step[e] * rates[n, e])
                        h[k + 1, n, e] = decay[k, n, e] * h[k, n, e] + inflow[e] * b
            for i in range(end - 1, begin - 1, -1):
                s = S - 1 - i if backward else i
                k = i - begin
                for e in range(width):
                    step[e] = delta[g, s, e0 + e]
                    inflow[e] = step[e] * u[g, s, e0 + e]
                    grad[e] = dy[g, s, e0 + e]
                dstep[:] = float32(0.0)
                dinflow[:] = float32(0.0)
                for n in range(N):
                    b, c = B[g, s, n], C[g, s, n]
                    sum_b, sum_c = float32(0.0), float32(0.0)
                    for e in range(BLOCK):
                        flow = dh[n, e] + c * grad[e]
                        sum_c += grad[e] * h[k + 1, n, e]
                        sum_b += flow * inflow[e]
                        dinflow[e] += flow * b
                        dh[n, e] = flow * decay[k, n, e]
                        dexponent = dh[n, e] * h[k, n, e] * LN_2
                        dstep[e] += dexponent * rates[n, e]
                        part_rates[n, e] += dexponent * step[e]
                    dB[block, g, s, n] = sum_b
                    dC[block, g, s, n] = sum_c
                for e in range(width):
                    du[g, s, e0 + e] = dinflow[e] * step[e]
                    ddelta[g, s, e0 + e] = dstep[e] + dinflow[e] * u[g, s, e0 + e]
            drates += part_rates
        drate[g, :, e0 : e0 + width] = drates[:, :width]


@jit(inline="always")
def _sigmoid(x):  # type: ignore[no-untyped-def]
    decay = exp2(-abs(x) * LOG2_E)
    return (float32(1.0) if x >= float32(0.0) else decay) / (float32(1.0) + decay)


# Each block is copied to a buffer first, padded with K-1 zero tokens at both ends. Indices into the
# buffer start at 0: the compiler then knows that they are not negative, and vectorises.


@jit
def conv_forward(first, last, x, taps, bias, out):  # type: ignore[no-untyped-def]
    """x (B, L, E), taps (2, K, E), bias (2, E) to out (2, B, L, E)."""
    _, L, E = x.shape
    K = taps.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    tokens = np.zeros((L + 2 * (K - 1), BLOCK), np.float32)
    window = np.zeros((K, BLOCK), np.float32)
    start = np.zeros(BLOCK, np.float32)
    row = np.zeros(BLOCK, np.float32)
    for task in range(first, last):
        b, e0 = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, E - e0)
        tokens[K - 1 : K - 1 + L, :width] = x[b, :, e0 : e0 + width]
        for d in range(2):
            window[:, :width] = taps[d, :, e0 : e0 + width]
            start[:width] = bias[d, e0 : e0 + width]
            for position in range(L):
                _convolve(tokens, position, window, start, d, row)
                for e in range(BLOCK):
                    row[e] *= _sigmoid(row[e])
                out[d, b, position, e0 : e0 + width] = row[:width]


@jit(inline="always")
def _convolve(tokens, position, window, start, d, row):  # type: ignore[no-untyped-def]
    """Convolve into `row`; the window ends (d = 0) or begins (d = 1) at a position."""
    K = window.shape[0]
    for e in range(BLOCK):
        row[e] = start[e]
    for k in range(K):
        source = position + (k if d == 0 else 2 * (K - 1) - k)
        for e in range(BLOCK):
            row[e] += window[k, e] * tokens[source, e]


@jit
def conv_backward(first, last, x, taps, bias, dout, dx, dtaps, dbias):  # type: ignore[no-untyped-def]
    """Fill the gradients. dtaps (B, 2, K, E) and dbias (B, 2, E) are partial sums."""
    _, L, E = x.shape
    K = taps.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    tokens = np.zeros((L + 2 * (K - 1), BLOCK), np.float32)
    dtokens = np.zeros((L, BLOCK), np.float32)
    grad = np.zeros((L + 2 * (K - 1), BLOCK), np.float32)  # of the convolution, before SiLU
    window, dwindow = np.zeros((K, BLOCK), np.float32), np.zeros((K, BLOCK), np.float32)
    part_window, part_start = np.zeros((K, BLOCK), np.float32), np.zeros(BLOCK, np.float32)
    start, dstart = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    row, upstream = np.zeros(BLOCK, np.float32), np.zeros(BLOCK, np.float32)
    for task in range(first, last):
        b, e0 = task // blocks, task % blocks * BLOCK
        width = min(BLOCK, E - e0)
        tokens[K - 1 : K - 1 + L, :width] = x[b, :, e0 : e0 + width]
        dtokens[:] = float32(0.0)
        for d in range(2):
            window[:, :width] = taps[d, :, e0 : e0 + width]
            start[:width] = bias[d, e0 : e0 + width]
            dwindow[:], dstart[:] = float32(0.0), float32(0.0)
            for position in range(L):
                if position % CHUNK == 0:  # chunk by chunk, as above
                    dwindow += part_window
                    dstart += part_start
                    part_window[:], part_start[:] = float32(0.0), float32(0.0)
                _convolve(tokens, position, window, start, d, row)
                upstream[:width] = dout[d, b, position, e0 : e0 + width]
                for e in range(BLOCK):
                    sigmoid = _sigmoid(row[e])
                    slope = sigmoid * (float32(1.0) + row[e] * (float32(1.0) - sigmoid))
                    row[e] = upstream[e] * slope
                    grad[position + K - 1, e] = row[e]
                    part_start[e] += row[e]
                for k in range(K):
                    source = position + (k if d == 0 else 2 * (K - 1) - k)
                    for e in range(BLOCK):
                        part_window[k, e] += row[e] * tokens[source, e]
            for position in range(L):
                for k in range(K):
                    target = position + (2 * (K - 1) - k if d == 0 else k)
                    for e in range(BLOCK):
                        dtokens[position, e] += window[k, e] * grad[target, e]
            dwindow += part_window
            dstart += part_start
            part_window[:], part_start[:] = float32(0.0), float32(0.0)
            dtaps[b, d, :, e0 : e0 + width] = dwindow[:, :width]
            dbias[b, d, e0 : e0 + width] = dstart[:width]
        dx[b, :, e0 : e0 + width] = dtokens[:, :width]
