"""conv_pool and expand_gate on the CPU: their convolution and SiLU in one pass each way.

B  batch, L  tokens in path order, E  inner width, K  taps
The convolution of both directions, its SiLU and their gradients are what costs in these two ops;
the rest of each stays as it is defined.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from numba import float32
from torch import Tensor

from fastvim.ops.conv_pool import conv_pool_reference
from fastvim.ops.cpu.kernels import BLOCK, LOG2_E, blocks_of, exp2, jit, parallel
from fastvim.ops.expand_gate import expand_gate_reference


@jit(inline="always")
def _sigmoid(x):  # type: ignore[no-untyped-def]
    decay = exp2(-abs(x) * LOG2_E)
    return (float32(1.0) if x >= float32(0.0) else decay) / (float32(1.0) + decay)


# Blocks are copied to scratch first: its rows are padded with K-1 zero tokens at both ends, and an
# index that starts at 0 is one that the compiler knows not to be negative, so that it vectorises.


@jit
def _forward(first, last, x, taps, bias, out):  # type: ignore[no-untyped-def]
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
    """row = the window that ends (d = 0) or begins (d = 1) at a position of the padded tokens."""
    K = window.shape[0]
    for e in range(BLOCK):
        row[e] = start[e]
    for k in range(K):
        source = position + (k if d == 0 else 2 * (K - 1) - k)
        for e in range(BLOCK):
            row[e] += window[k, e] * tokens[source, e]


@jit
def _backward(first, last, x, taps, bias, dout, dx, dtaps, dbias):  # type: ignore[no-untyped-def]
    """Gradients; dtaps (B, 2, K, E) and dbias (B, 2, E) are partial sums."""
    _, L, E = x.shape
    K = taps.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    tokens = np.zeros((L + 2 * (K - 1), BLOCK), np.float32)
    dtokens = np.zeros((L, BLOCK), np.float32)
    grad = np.zeros((L + 2 * (K - 1), BLOCK), np.float32)  # of the convolution, before SiLU
    window, dwindow = np.zeros((K, BLOCK), np.float32), np.zeros((K, BLOCK), np.float32)
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
                _convolve(tokens, position, window, start, d, row)
                upstream[:width] = dout[d, b, position, e0 : e0 + width]
                for e in range(BLOCK):
                    sigmoid = _sigmoid(row[e])
                    slope = sigmoid * (float32(1.0) + row[e] * (float32(1.0) - sigmoid))
                    row[e] = upstream[e] * slope
                    grad[position + K - 1, e] = row[e]
                    dstart[e] += row[e]
                for k in range(K):
                    source = position + (k if d == 0 else 2 * (K - 1) - k)
                    for e in range(BLOCK):
                        dwindow[k, e] += row[e] * tokens[source, e]
            for position in range(L):
                for k in range(K):
                    target = position + (2 * (K - 1) - k if d == 0 else k)
                    for e in range(BLOCK):
                        dtokens[position, e] += window[k, e] * grad[target, e]
            dtaps[b, d, :, e0 : e0 + width] = dwindow[:, :width]
            dbias[b, d, e0 : e0 + width] = dstart[:width]
        dx[b, :, e0 : e0 + width] = dtokens[:, :width]


@torch.library.custom_op("fastvim::conv_silu_cpu", mutates_args=())
def _conv_silu(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """x (B, L, E), taps (2, K, E), bias (2, E), contiguous float32, to (2, B, L, E)."""
    out = x.new_empty(2, *x.shape)
    parallel(_forward, x.shape[0] * blocks_of(x.shape[2]), x, taps, bias, out)
    return out


@_conv_silu.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(2, *x.shape)


@torch.library.custom_op("fastvim::conv_silu_cpu_backward", mutates_args=())
def _conv_silu_backward(
    x: Tensor, taps: Tensor, bias: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    dx, dtaps, dbias = (
        torch.empty_like(x),
        x.new_empty(batch, *taps.shape),
        x.new_empty(batch, *bias.shape),
    )
    tasks = batch * blocks_of(x.shape[2])
    parallel(_backward, tasks, x, taps, bias, dout.contiguous(), dx, dtaps, dbias)
    return dx, dtaps.sum(0), dbias.sum(0)


@_conv_silu_backward.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(taps), torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _conv_silu_backward(*ctx.saved_tensors, dout)
    return gradients


_conv_silu.register_autograd(_gradients, setup_context=_keep)


def conv_silu_numba(x_path: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`fastvim.ops.conv_pool.conv_silu` for float32 tensors on the CPU."""
    taps = weight.to(x_path.dtype).mT.contiguous()
    out: Tensor = _conv_silu(x_path.contiguous(), taps, bias.to(x_path.dtype).contiguous())
    return out


conv_pool_numba = functools.partial(conv_pool_reference, convolve=conv_silu_numba)
expand_gate_numba = functools.partial(expand_gate_reference, convolve=conv_silu_numba)
