"""selective_scan on the CPU: one pass over the steps, vectorised over channels.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size, W  channels of
a task. A task is one sequence and one block of channels; its state stays in the first cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import float32, int32
from torch import Tensor

from fastvim.ops.cpu.kernels import BLOCK, LN_2, LOG2_E, blocks_of, exp2, jit, parallel
from fastvim.ops.dispatch import definition
from fastvim.ops.selective_scan import step_size

CHUNK = 16  # steps whose states the backward pass holds; between chunks it restarts from saved ones


@jit
def _forward(first, last, u, delta, rate, B, C, y, starts):  # type: ignore[no-untyped-def]
    """Tasks first..last-1. Fills y (G, S, E) and starts (G, S // CHUNK, N, E), if it has room."""
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
def _backward(first, last, u, delta, rate, B, C, starts, dy, du, ddelta, drate, dB, dC):  # type: ignore[no-untyped-def]
    """Tasks first..last-1. drate (G, N, E), dB and dC (blocks, G, S, N) are partial sums."""
    G, S, E = u.shape
    N = rate.shape[1]
    blocks = (E + BLOCK - 1) // BLOCK
    h = np.zeros((CHUNK + 1, N, BLOCK), np.float32)  # the state before and after each step
    decay = np.zeros((CHUNK, N, BLOCK), np.float32)
    dh = np.zeros((N, BLOCK), np.float32)
    rates = np.zeros((N, BLOCK), np.float32)
    drates = np.zeros((N, BLOCK), np.float32)
    step, inflow, grad = np.zeros((3, BLOCK), np.float32)
    dstep, dinflow = np.zeros((2, BLOCK), np.float32)
    for task in range(first, last):
        g, block = task // blocks, task % blocks
        e0 = block * BLOCK
        width = min(BLOCK, E - e0)
        backward = g >= G // 2
        # Lanes past `width` stay 0, so that they add nothing to the sums over channels.
        dh[:], drates[:] = float32(0.0), float32(0.0)
        step[:], inflow[:], grad[:] = float32(0.0), float32(0.0), float32(0.0)
        rates[:, :width] = rate[int32(backward), :, e0 : e0 + width]
        for chunk in range((S - 1) // CHUNK, -1, -1):
            begin, end = chunk * CHUNK, min(S, (chunk + 1) * CHUNK)
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
                        drates[n, e] += dexponent * step[e]
                    dB[block, g, s, n] = sum_b
                    dC[block, g, s, n] = sum_c
                for e in range(width):
                    du[g, s, e0 + e] = dinflow[e] * step[e]
                    ddelta[g, s, e0 + e] = dstep[e] + dinflow[e] * u[g, s, e0 + e]
        drate[g, :, e0 : e0 + width] = drates[:, :width]


@torch.library.custom_op("fastvim::scan_cpu", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, rate: Tensor, B: Tensor, C: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """u, delta (G, S, E), rate (2, N, E), B, C (G, S, N): y, and the states where chunks end."""
    G, S, E = u.shape
    y = torch.empty_like(u)
    starts = u.new_empty(G, S // CHUNK if save else 0, rate.shape[1], E)
    parallel(_forward, G * blocks_of(E), u, delta, rate, B, C, y, starts)
    return y, starts


@_scan.register_fake
def _(
    u: Tensor, delta: Tensor, rate: Tensor, B: Tensor, C: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    chunks = u.shape[1] // CHUNK if save else 0
    return torch.empty_like(u), u.new_empty(u.shape[0], chunks, rate.shape[1], u.shape[2])


@torch.library.custom_op("fastvim::scan_cpu_backward", mutates_args=())
def _scan_backward(
    u: Tensor, delta: Tensor, rate: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    G, S, E = u.shape
    N, blocks = rate.shape[1], blocks_of(u.shape[2])
    du, ddelta = torch.empty_like(u), torch.empty_like(u)
    drate, dB, dC = (u.new_empty(G, N, E), *u.new_empty(2, blocks, G, S, N))
    sums = (du, ddelta, drate, dB, dC)
    parallel(_backward, G * blocks, u, delta, rate, B, C, starts, dy.contiguous(), *sums)
    return du, ddelta, drate.unflatten(0, (2, -1)).sum(1), dB.sum(0), dC.sum(0)


@_scan_backward.register_fake
def _(
    u: Tensor, delta: Tensor, rate: Tensor, B: Tensor, C: Tensor, starts: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(u),
        torch.empty_like(u),
        torch.empty_like(rate),
        torch.empty_like(B),
        torch.empty_like(C),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])


def _gradients(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(*ctx.saved_tensors, dy), None)


_scan.register_autograd(_gradients, setup_context=_keep)


@definition
def selective_scan_numba(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` for CPU tensors of at most 32 bits."""
    dtype = torch.float32
    # Rates to base 2, channels last: the kernel's inner loop is 2**(Δ · rate) over channels.
    rate = (-float(LOG2_E) * A_log.to(dtype).exp()).mT.contiguous()
    delta = step_size(dt, dt_proj, dt_bias, dtype)
    sequences = [t.to(dtype).flatten(0, 1).contiguous() for t in (u, delta, B, C)]
    save = torch.is_grad_enabled()
    y: Tensor = _scan(sequences[0], sequences[1], rate, *sequences[2:], save)[0]
    return y.view(u.shape).to(u.dtype)
