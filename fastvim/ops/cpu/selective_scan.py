"""selective_scan on the CPU: one pass over the steps (the loops: `fastvim.ops.cpu.kernels`).

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.kernels import CHUNK, scan_backward, scan_forward
from fastvim.ops.cpu.threads import blocks_of, parallel
from fastvim.ops.reference import select, without_autocast

LOG2_E = 1 / log(2)


@torch.library.custom_op("fastvim::scan_cpu", mutates_args=())
def _scan(
    u: Tensor, delta: Tensor, rate: Tensor, B: Tensor, C: Tensor, save: bool
) -> tuple[Tensor, Tensor]:
    """u, delta (G, S, E), rate (2, N, E), B, C (G, S, N) to y and the states after each chunk."""
    G, S, E = u.shape
    y = torch.empty_like(u)
    starts = u.new_empty(G, S // CHUNK if save else 0, rate.shape[1], E)
    parallel(scan_forward, G * blocks_of(E), u, delta, rate, B, C, y, starts)
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
    parallel(scan_backward, G * blocks, u, delta, rate, B, C, starts, dy.contiguous(), *sums)
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


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5], output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_scan_backward(*ctx.saved_tensors, dy), None)


_scan.register_autograd(_backward, setup_context=_setup_context)


@without_autocast
def selective_scan_numba(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` for CPU tensors of at most 32 bits."""
    dtype = torch.float32
    # Rates to base 2, channels last: the kernel's inner loop computes 2**(Δ · rate) over channels.
    rate = (-LOG2_E * A_log.to(dtype).exp()).mT.contiguous()
    delta, B, C = select(u, x_proj, dt_proj, dt_bias, dtype)
    sequences = [t.to(dtype).flatten(0, 1).contiguous() for t in (u, delta, B, C)]
    save = torch.is_grad_enabled()
    y: Tensor = _scan(sequences[0], sequences[1], rate, *sequences[2:], save)[0]
    return y.view(u.shape).to(u.dtype)
