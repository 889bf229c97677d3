"""Gradients of selective_scan on GPUs.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size, R  rank of dt
Nothing but the inputs is kept from the forward pass. A program scans its chunk again, leaving the
states before every K-th step in memory, then walks back: K steps at a time are scanned once more
from such a state, held in registers, and used in reverse. Chunks are those of the forward pass;
what flows back from the chunks that follow is found as their states are, in reverse.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED, exp2
from fastvim.ops.triton.launch import Launch, Launches, Op
from fastvim.ops.triton.selective_scan_kernels import Scan, carry_kernel, prepared

LN_2 = 0.6931471805599453
BLOCK = 32  # channels of a program: one for each thread of a warp
STEPS = 4  # K


@triton.jit
def _flow_back_kernel(
    delta, p_BC, p_rates, dy, flows,
    G, S, E, chunk, chunks, dy_direction, dy_sequence,
    N: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradients of a chunk's own outputs give to the state before it; flows
    (G, chunks, N, E)."""
    g = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence + columns
    rates = ()
    flow = ()
    for n in tl.static_range(N):
        rates = rates + (tl.load(p_rates + (direction * N + n) * E + columns, mask=mask, other=0),)
        flow = flow + (tl.zeros((BLOCK,), tl.float32),)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    for i in range(begin, end):
        walked = begin + end - 1 - i
        s = walked + direction * (S - 1 - 2 * walked)
        step = tl.load(delta + (g * S + s) * E + columns, mask=mask, other=0.0)
        b_dy = tl.load(p_dy + s * E, mask=mask, other=0.0).to(tl.float32)
        after = ()
        for n in tl.static_range(N):
            c = tl.load(p_BC + (g * S + s) * 2 * N + N + n)
            after = after + (exp2(step * rates[n], FAST) * (flow[n] + c * b_dy),)
        flow = after
    for n in tl.static_range(N):
        tl.store(flows + ((g * chunks + k) * N + n) * E + columns, flow[n], mask=mask)


@triton.jit
def _scan_backward_kernel(
    u, delta, p_BC, p_rates, dy, states, flows, saved, du, ddelta, dBC, drates,
    G, S, E, chunk, chunks, groups, dy_direction, dy_sequence,
    CARRY: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr, K: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk. saved (G, chunks, groups, N, E): states before each group of K steps. dBC
    (blocks, G, S, 2N) and drates (G, chunks, N, E) are partial sums."""
    g = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    k = tl.program_id(2)
    columns = block * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence + columns
    p_saved = saved + (g * chunks + k) * groups * N * E + columns
    p_dBC = dBC + (block * G + g) * S * 2 * N
    rates = ()
    h = ()
    flow = ()
    drate = ()
    for n in tl.static_range(N):
        place = ((g * chunks + k) * N + n) * E + columns
        rates = rates + (tl.load(p_rates + (direction * N + n) * E + columns, mask=mask, other=0),)
        drate = drate + (tl.zeros((BLOCK,), tl.float32),)
        if CARRY:
            h = h + (tl.load(states + place, mask=mask, other=0.0),)
            flow = flow + (tl.load(flows + place, mask=mask, other=0.0),)
        else:
            h = h + (tl.zeros((BLOCK,), tl.float32),)
            flow = flow + (tl.zeros((BLOCK,), tl.float32),)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)

    for i in range(begin, end):
        if (i - begin) % K == 0:
            for n in tl.static_range(N):
                tl.store(p_saved + ((i - begin) // K * N + n) * E, h[n], mask=mask)
        row = g * S + i + direction * (S - 1 - 2 * i)
        step = tl.load(delta + row * E + columns, mask=mask, other=0.0)
        inflow = step * tl.load(u + row * E + columns, mask=mask, other=0.0).to(tl.float32)
        after = ()
        for n in tl.static_range(N):
            b = tl.load(p_BC + row * 2 * N + n)
            after = after + (exp2(step * rates[n], FAST) * h[n] + inflow * b,)
        h = after

    last = (end - begin + K - 1) // K
    for turn in range(last):
        group = last - 1 - turn
        first = begin + group * K
        path = ()  # the state before each step of the group, and after it
        for n in tl.static_range(N):
            path = path + (tl.load(p_saved + (group * N + n) * E, mask=mask, other=0.0),)
        for j in tl.static_range(K):
            i = tl.minimum(first + j, end - 1)
            row = g * S + i + direction * (S - 1 - 2 * i)
            present = mask & (first + j < end)  # steps behind the end change nothing
            step = tl.load(delta + row * E + columns, mask=present, other=0.0)
            b_u = tl.load(u + row * E + columns, mask=present, other=0.0).to(tl.float32)
            for n in tl.static_range(N):
                b = tl.load(p_BC + row * 2 * N + n)
                path = path + (exp2(step * rates[n], FAST) * path[j * N + n] + step * b_u * b,)
        for back in tl.static_range(K):
            i = tl.minimum(first + K - 1 - back, end - 1)
            s = i + direction * (S - 1 - 2 * i)
            row = g * S + s
            inside = first + K - 1 - back < end
            present = mask & inside
            step = tl.load(delta + row * E + columns, mask=present, other=0.0)
            b_u = tl.load(u + row * E + columns, mask=present, other=0.0).to(tl.float32)
            b_dy = tl.load(p_dy + s * E, mask=present, other=0.0).to(tl.float32)
            inflow = step * b_u
            dinflow = tl.zeros((BLOCK,), tl.float32)
            dstep = tl.zeros((BLOCK,), tl.float32)
            after = ()
            sums = ()
            for n in tl.static_range(N):
                b = tl.load(p_BC + row * 2 * N + n)
                c = tl.load(p_BC + row * 2 * N + N + n)
                dh = flow[n] + c * b_dy
                tl.store(p_dBC + s * 2 * N + n, tl.sum(dh * inflow), mask=inside)
                dc = tl.sum(b_dy * path[(K - back) * N + n])
                tl.store(p_dBC + s * 2 * N + N + n, dc, mask=inside)
                dinflow += dh * b
                dh *= exp2(step * rates[n], FAST)
                exponent = dh * path[(K - 1 - back) * N + n]
                dstep += exponent * rates[n]
                sums = sums + (drate[n] + exponent * step,)
                after = after + (dh,)
            flow = after
            drate = sums
            tl.store(du + row * E + columns, dinflow * step, mask=present)
            b_ddelta = dstep * 0.6931471805599453 + dinflow * b_u
            tl.store(ddelta + row * E + columns, b_ddelta, mask=present)
    for n in tl.static_range(N):
        place = ((g * chunks + k) * N + n) * E + columns
        tl.store(drates + place, drate[n], mask=mask)


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
        G, chunks, N, E = self.scan.states
        S = u.shape[2]
        chunk = triton.cdiv(S, chunks)
        block = min(BLOCK, max(16, triton.next_power_of_2(E)))
        self.blocks = triton.cdiv(E, block)
        self.groups = triton.cdiv(chunk, STEPS)
        grid = (G, self.blocks, chunks)
        strides = (dy.stride(0), dy.stride(1))
        fast = not INTERPRETED
        numbers = (G, S, E, chunk, chunks, *strides, N, fast, block)
        self.back = Launch(_flow_back_kernel, u.device, grid, numbers, num_warps=1)
        numbers = (G, E, chunks, N, block, True)
        carry_grid = (G, self.blocks, N)
        self.carry = Launch(carry_kernel, u.device, carry_grid, numbers, num_warps=1)
        numbers = (
            G, S, E, chunk, chunks, self.groups, *strides, chunks > 1, N, fast, STEPS, block
        )  # fmt: skip
        self.last = Launch(_scan_backward_kernel, u.device, grid, numbers, num_warps=1)

    def __call__(
        self, dy: Tensor, u: Tensor, delta: Tensor, BC: Tensor, rates: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of u (as the scan's input alone), delta, BC and rates · ln 2, all float32."""
        G, chunks, N, E = self.scan.states

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        states, sums = self.scan.starts(u, delta, BC, rates)
        flows = rates
        if chunks > 1:
            flows = empty(*self.scan.states)
            self.back(delta, BC, rates, dy, flows)
            self.carry(rates, flows, sums)
        saved = empty(G, chunks, self.groups, N, E)
        du, ddelta = empty(*u.shape), empty(*u.shape)
        dBC = empty(self.blocks, *BC.shape)
        drates = empty(2, G // 2 * chunks, N, E)
        self.last(u, delta, BC, rates, dy, states, flows, saved, du, ddelta, dBC, drates)
        return du, ddelta, dBC.sum(0), drates.sum(1)


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
    delta, BC, rates = launch.scan.selected(*inputs)
    du, ddelta, dBC, drates = launch(dy, inputs[0], delta, BC, rates)

    # The projections are small: their gradients are products in float32.
    with torch.autocast(u.device.type, enabled=False):
        rank = dt_proj.shape[2]
        steps = u.float().flatten(1, 2)
        weight, rank_weight = x_proj.float(), dt_proj.float()
        draw = (ddelta * -torch.expm1(-delta)).flatten(1, 2)  # softplus' slope, from its value
        dt = torch.bmm(steps, weight[:, :rank].mT)
        dprojected = torch.cat([torch.bmm(draw, rank_weight), dBC.flatten(1, 2)], dim=2)
        du = du + torch.bmm(dprojected, weight).view(u.shape)
        dweight = torch.bmm(dprojected.mT, steps)
        drank_weight = torch.bmm(draw.mT, dt)
    return (
        du.to(u.dtype),
        dweight.to(x_proj.dtype),
        drank_weight.to(dt_proj.dtype),
        draw.sum(1).to(dt_bias.dtype),
        (LN_2 * drates * rates).mT.to(A_log.dtype).contiguous(),
    )


def _fake(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, bias, A = (torch.empty_like(t) for t in (x_proj, dt_proj, dt_bias, A_log))
    return u.new_empty(u.shape), x, dt, bias, A


selective_scan_backward = Op("fastvim::selective_scan_triton_backward", _run, _fake)
