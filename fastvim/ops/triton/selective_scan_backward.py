"""Gradients of selective_scan on GPUs: the op over its kernels.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size, R  rank of dt
NP  N filled up to a power of two
Nothing but the inputs is kept from the forward pass. Chunks are those of the forward pass; what
flows back from the chunks that follow is found as their states are, in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastvim.ops.triton.launch import Launch, Launches, Op
from fastvim.ops.triton.selective_scan_backward_kernels import (
    flow_back_kernel,
    scan_backward_kernel,
    select_backward_kernel,
    weights_backward_kernel,
)
from fastvim.ops.triton.selective_scan_kernels import (
    EXACT_DEPTH,
    LANES,
    SPREAD,
    Scan,
    carry_kernel,
    prepared,
)
from fastvim.ops.triton.sums import sum_parts

SPLIT = 4  # lanes that share the states of a channel
V = 2  # channels of a lane
STEPS = 5  # K, scanned at a time
ROWS = 16  # steps of a program that gives gradients of what the projections take,
WEIGHT_ROWS = 32  # and of their weights
SPLIT_ROWS = 32  # of the partial sums of these weights
WEIGHT_CHANNELS = 64  # at most, of a program that gives gradients of weights: more spill
# Of products, for each dtype of u: their precision, and the channels taken at a time. TF32 cuts
# numbers off after 11 bits, as many as float16 has. Where both factors are float32 it would do so
# twice: such products take three even in bfloat16.
PRODUCTS = {
    torch.float32: ("ieee", EXACT_DEPTH),
    torch.float16: ("tf32x3", 64),
    torch.bfloat16: ("tf32", 128),
}


class _ScanBackward:
    """The launches for one kind of input."""

    def __init__(
        self,
        u: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        dy: Tensor,
    ) -> None:
        self.scan = Scan(u, x_proj, dt_proj, dt_bias, A_log)
        G, chunks, NP, E = self.scan.states
        S, N = u.shape[2], int(A_log.shape[2])
        R = int(dt_proj.shape[2])
        chunk = triton.cdiv(S, chunks)
        channels = LANES // SPLIT
        self.blocks = triton.cdiv(E, V * channels)
        self.groups = triton.cdiv(chunk, STEPS)
        strides = (dy.stride(0), dy.stride(1))
        fast = self.scan.fast
        numbers: tuple[Any, ...] = (G, S, E, chunk, chunks, *strides, NP, fast, LANES)
        grid = (G, triton.cdiv(E, LANES), chunks)
        self.back = Launch(flow_back_kernel, u.device, grid, numbers, num_warps=1)
        numbers = (G, E, chunks, NP, LANES, True)
        grid = (G, triton.cdiv(E, LANES), NP)
        self.carry = Launch(carry_kernel, u.device, grid, numbers, num_warps=1)
        numbers = (
            G, S, E, chunk, chunks, self.groups, *strides, chunks > 1, NP, fast, STEPS,
            V, SPLIT, channels,
        )  # fmt: skip
        grid = (G, self.blocks, chunks)
        self.last = Launch(scan_backward_kernel, u.device, grid, numbers, num_warps=1)

        precision, depth = PRODUCTS[u.dtype]
        steps = G // 2 * S
        blocks = triton.cdiv(E, depth)
        programs = triton.cdiv(steps, ROWS)
        parts = min(blocks, triton.cdiv(SPREAD, 2 * programs))
        self.rank_block = max(16, triton.next_power_of_2(R))
        tail = (self.rank_block, NP, precision)
        numbers = (steps, parts, self.blocks, E, R, N, *tail, ROWS, depth)
        grid = (programs, 2, parts)
        self.select = Launch(select_backward_kernel, u.device, grid, numbers, num_warps=4)
        depth = min(depth, WEIGHT_CHANNELS)
        blocks = triton.cdiv(E, depth)
        self.splits = min(triton.cdiv(steps, WEIGHT_ROWS), triton.cdiv(SPREAD, 2 * blocks))
        numbers = (steps, E, self.splits, *tail, WEIGHT_ROWS, depth)
        grid = (blocks, 2, self.splits)
        self.weights = Launch(weights_backward_kernel, u.device, grid, numbers, num_warps=4)

    def __call__(
        self,
        u: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient of u, those of the projections (2, 2·R_BLOCK + 2·NP + 1, E) as the kernel has
        them, and of A_log (2, NP, E)."""
        G, chunks, NP, E = self.scan.states

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        dt, slopes = empty(*u.shape[:3], self.rank_block), empty(*u.shape)
        delta, BC, rates = self.scan.selected(u, x_proj, dt_proj, dt_bias, A_log, (dt, slopes))
        states = self.scan.starts(u, delta, BC, rates)
        flows = rates
        if chunks > 1:
            flows, sums = empty(*self.scan.states), empty(G, chunks, E)
            self.back(delta, BC, rates, dy, flows, sums)
            self.carry(rates, flows, sums)
        saved = empty(G, chunks, self.groups, NP, E)
        scan_du, draw = empty(*u.shape), empty(*u.shape)
        dBC = empty(self.blocks, *BC.shape)
        drates = empty(2, G // 2 * chunks, NP, E)
        self.last(
            u, delta, slopes, BC, rates, dy, states, flows, saved, scan_du, draw, dBC, drates
        )  # fmt: skip
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        dprojected = empty(*u.shape[:3], self.rank_block + 2 * NP)
        self.select(x_proj, dt_proj, scan_du, draw, dBC, du, dprojected)
        partial = empty(self.splits, 2, 2 * self.rank_block + 2 * NP + 1, E)
        self.weights(u, dt, draw, dprojected, partial)
        projections = sum_parts(partial[None], rows=SPLIT_ROWS)[0]
        return du, projections, sum_parts(drates) * rates


_launches: Launches[_ScanBackward] = Launches()


def _run(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, x_proj, dt_proj, dt_bias and A_log."""
    inputs = prepared(u, x_proj, dt_proj, dt_bias, A_log)
    if u.numel() == 0:
        zeros = [torch.zeros_like(t) for t in (u, x_proj, dt_proj, dt_bias, A_log)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4]
    # One gradient for both directions is common; of each sequence the steps lie together.
    if dy.stride(3) != 1 or dy.stride(2) != dy.shape[3]:
        dy = dy.contiguous()
    launch = _launches.get((*inputs, dy), None, lambda: _ScanBackward(*inputs, dy))
    du, projections, dA_log = launch(*inputs, dy)
    R, N = dt_proj.shape[2], A_log.shape[2]
    NP, r = dA_log.shape[1], launch.rank_block
    dB, dC = projections[:, r : r + N], projections[:, r + NP : r + NP + N]
    return (
        du,
        torch.cat([projections[:, :R], dB, dC], dim=1).to(x_proj.dtype),
        projections[:, r + 2 * NP : r + 2 * NP + R].mT.to(dt_proj.dtype).contiguous(),
        projections[:, -1].to(dt_bias.dtype).clone(),
        dA_log[:, :N].mT.to(A_log.dtype).contiguous(),
    )


def _fake(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, bias, A = (torch.empty_like(t) for t in (x_proj, dt_proj, dt_bias, A_log))
    return u.new_empty(u.shape), x, dt, bias, A


# Opaque: torch 2.11 compiles it for one size, but fails where sizes may change.
selective_scan_backward = Op("fastvim::selective_scan_triton_backward", _run, _fake, opaque=True)
