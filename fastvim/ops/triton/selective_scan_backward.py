"""Gradients of selective_scan on GPUs.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size, R  rank of dt
NP  N filled up to a power of two
Nothing but the inputs is kept from the forward pass. A program scans its chunk again, leaving the
states before every K-th step in memory, then walks back: K steps at a time are scanned once more
from such a state, held in registers, and used in reverse. Chunks are those of the forward pass;
what flows back from the chunks that follow is found as their states are, in reverse. SPLIT lanes
share the states of a channel, and a lane has those of V channels, so that sums over states and
sums over channels both take few exchanges between lanes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED, exp2
from fastvim.ops.triton.launch import Launch, Launches, Op
from fastvim.ops.triton.selective_scan_kernels import (
    EXACT_DEPTH,
    LANES,
    SPREAD,
    Scan,
    carry_kernel,
    load_states,
    prepared,
)

LN_2 = tl.constexpr(0.6931471805599453)
SPLIT = 4  # lanes that share the states of a channel
V = 4  # channels of a lane
STEPS = 4  # K
ROWS = 16  # steps of a program that gives gradients of what the projections take,
WEIGHT_ROWS = 32  # and of their weights
SELECT_DEPTH = 64  # channels that it sums at a time; in float32 EXACT_DEPTH


@triton.jit
def _flow_back_kernel(
    delta, BC, p_rates, dy, flows, sums,
    G, S, E, chunk, chunks, dy_direction, dy_sequence,
    NP: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradients of a chunk's own outputs give to the state before it, and the sum of its
    step sizes; flows (G, chunks, NP, E), sums (G, chunks, E)."""
    g = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence + columns
    rates = ()
    flow = ()
    for n in tl.static_range(NP):
        rates = rates + (tl.load(p_rates + (direction * NP + n) * E + columns, mask=mask, other=0),)
        flow = flow + (tl.zeros((BLOCK,), tl.float32),)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    for i in range(begin, end):
        walked = begin + end - 1 - i
        s = walked + direction * (S - 1 - 2 * walked)
        step = tl.load(delta + (g * S + s) * E + columns, mask=mask, other=0.0)
        b_dy = tl.load(p_dy + s * E, mask=mask, other=0.0).to(tl.float32)
        total += step
        after = ()
        for n in tl.static_range(NP):
            c = tl.load(BC + (g * S + s) * 2 * NP + NP + n)
            after = after + (exp2(step * rates[n], FAST) * (flow[n] + c * b_dy),)
        flow = after
    tl.store(sums + (g * chunks + k) * E + columns, total, mask=mask)
    for n in tl.static_range(NP):
        tl.store(flows + ((g * chunks + k) * NP + n) * E + columns, flow[n], mask=mask)


@triton.jit
def _load_channels(p, columns, E, present, V: tl.constexpr, C: tl.constexpr):
    """V rows of C channels each, in float32."""
    values = ()
    for v in tl.static_range(V):
        mask = present & (columns + v * C < E)
        values = values + (tl.load(p + columns + v * C, mask=mask, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _scan_backward_kernel(
    u, delta, slopes, BC, p_rates, dy, states, flows, saved, du, draw, dBC, drates,
    G, S, E, chunk, chunks, groups, dy_direction, dy_sequence,
    CARRY: tl.constexpr, NP: tl.constexpr, FAST: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, SPLIT: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One chunk. saved (G, chunks, groups, NP, E): states before each group of K steps. draw: the
    gradient of the step size before softplus. dBC (blocks, G, S, 2·NP) and drates (G, chunks, NP,
    E), without the rates as a factor, are partial sums.

    A lane has states j of channels v: entry v · J + j of what it holds of them.
    """
    J: tl.constexpr = NP // SPLIT
    g = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    k = tl.program_id(2)
    columns = block * V * C + tl.arange(0, C)[None, :]
    lane = tl.arange(0, SPLIT)[:, None]
    direction = (g >= G // 2).to(tl.int64)
    p_pairs = BC.to(tl.pointer_type(tl.int64))
    p_dy = dy + direction * dy_direction + (g % (G // 2)) * dy_sequence
    o_states = ((g * chunks + k) * NP + lane * J) * E + columns
    p_saved = saved + ((g * chunks + k) * groups * NP + lane * J) * E + columns
    p_dBC = dBC + (block * G + g) * S * 2 * NP + tl.arange(0, SPLIT) * J
    rates = ()
    h = ()
    flow = ()
    drate = ()
    zero = tl.zeros((SPLIT, C), tl.float32)
    for v in tl.static_range(V):
        mask = columns + v * C < E
        for j in tl.static_range(J):
            p_rate = p_rates + (direction * NP + lane * J + j) * E + columns + v * C
            rates = rates + (tl.load(p_rate, mask=mask, other=0.0),)
            drate = drate + (zero,)
            if CARRY:
                h = h + (tl.load(states + o_states + j * E + v * C, mask=mask, other=0.0),)
                flow = flow + (tl.load(flows + o_states + j * E + v * C, mask=mask, other=0.0),)
            else:
                h = h + (zero,)
                flow = flow + (zero,)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)

    for i in range(begin, end):
        if (i - begin) % K == 0:
            for v in tl.static_range(V):
                for j in tl.static_range(J):
                    p_state = p_saved + ((i - begin) // K * NP + j) * E + v * C
                    tl.store(p_state, h[v * J + j], mask=columns + v * C < E)
        row = g * S + i + direction * (S - 1 - 2 * i)
        steps = _load_channels(delta + row * E, columns, E, True, V, C)
        inputs = _load_channels(u + row * E, columns, E, True, V, C)
        b = load_states(p_pairs, row, lane, 0, J, NP)
        after = ()
        for v in tl.static_range(V):
            for j in tl.static_range(J):
                decay = exp2(steps[v] * rates[v * J + j], FAST)
                after = after + (decay * h[v * J + j] + steps[v] * inputs[v] * b[j],)
        h = after

    last = (end - begin + K - 1) // K
    for turn in range(last):
        group = last - 1 - turn
        first = begin + group * K
        path = ()  # the states before each step of the group, and after it
        for v in tl.static_range(V):
            for j in tl.static_range(J):
                p_state = p_saved + (group * NP + j) * E + v * C
                path = path + (tl.load(p_state, mask=columns + v * C < E, other=0.0),)
        for t in tl.static_range(K):
            i = tl.minimum(first + t, end - 1)
            row = g * S + i + direction * (S - 1 - 2 * i)
            inside = first + t < end  # steps behind the end change nothing
            steps = _load_channels(delta + row * E, columns, E, inside, V, C)
            inputs = _load_channels(u + row * E, columns, E, inside, V, C)
            b = load_states(p_pairs, row, lane, 0, J, NP)
            for v in tl.static_range(V):
                for j in tl.static_range(J):
                    decay = exp2(steps[v] * rates[v * J + j], FAST)
                    before = path[(t * V + v) * J + j]
                    path = path + (decay * before + steps[v] * inputs[v] * b[j],)
        for t in tl.static_range(K - 1, -1, -1):
            i = tl.minimum(first + t, end - 1)
            s = i + direction * (S - 1 - 2 * i)
            row = g * S + s
            inside = first + t < end
            steps = _load_channels(delta + row * E, columns, E, inside, V, C)
            inputs = _load_channels(u + row * E, columns, E, inside, V, C)
            upstream = _load_channels(p_dy + s * E, columns, E, inside, V, C)
            slope = _load_channels(slopes + row * E, columns, E, inside, V, C)
            b = load_states(p_pairs, row, lane, 0, J, NP)
            c = load_states(p_pairs, row, lane, 1, J, NP)
            for j in tl.static_range(J):
                db = zero
                dc = zero
                for v in tl.static_range(V):
                    dh = flow[v * J + j] + c[j] * upstream[v]
                    db += dh * (steps[v] * inputs[v])
                    dc += upstream[v] * path[((t + 1) * V + v) * J + j]
                tl.store(p_dBC + s * 2 * NP + j, tl.sum(db, axis=1), mask=inside)
                tl.store(p_dBC + s * 2 * NP + NP + j, tl.sum(dc, axis=1), mask=inside)
            after = ()
            sums = ()
            for v in tl.static_range(V):
                dinflow = zero
                dstep = zero
                for j in tl.static_range(J):
                    dh = flow[v * J + j] + c[j] * upstream[v]
                    dinflow += dh * b[j]
                    dh *= exp2(steps[v] * rates[v * J + j], FAST)
                    exponent = dh * path[(t * V + v) * J + j]
                    dstep += exponent * rates[v * J + j]
                    sums = sums + (drate[v * J + j] + exponent * steps[v] * LN_2,)
                    after = after + (dh,)
                dinflow = tl.sum(dinflow, axis=0, keep_dims=True)
                dstep = tl.sum(dstep, axis=0, keep_dims=True) * LN_2 + dinflow * inputs[v]
                present = inside & (columns + v * C < E)
                tl.store(du + row * E + columns + v * C, dinflow * steps[v], mask=present)
                tl.store(draw + row * E + columns + v * C, dstep * slope[v], mask=present)
            flow = after
            drate = sums
    for v in tl.static_range(V):
        for j in tl.static_range(J):
            p_drate = drates + o_states + j * E + v * C
            tl.store(p_drate, drate[v * J + j], mask=columns + v * C < E)


@triton.jit
def _select_backward_kernel(
    x_proj, dt_proj, scan_du, draw, partial_dBC, du, dprojected,
    M, parts, blocks, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    R_BLOCK: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of the projected values, dprojected (2, M, R_BLOCK + 2·NP), and of u.

    A program has every `parts`-th block of channels of its steps, and projects for itself.
    """
    direction = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < M)[:, None]
    places = (direction.to(tl.int64) * M + rows)[:, None]
    ranks = tl.arange(0, R_BLOCK)
    state = tl.arange(0, 2 * NP)
    source = R + state // NP * N + state % NP
    is_state = state % NP < N
    depth = tl.arange(0, DEPTH)

    dbc = tl.zeros((ROWS, 2 * NP), tl.float32)
    for block in range(blocks):
        p_dBC = partial_dBC + (block * 2 * M + places) * 2 * NP + state[None, :]
        dbc += tl.load(p_dBC, mask=present, other=0.0)
    ddt = tl.zeros((ROWS, R_BLOCK), tl.float32)
    for k in range(0, E, DEPTH):
        inside = k + depth < E
        p_draw = draw + places * E + k + depth[None, :]
        b_draw = tl.load(p_draw, mask=present & inside[None, :], other=0.0)
        p_weight = dt_proj + (direction * E + k + depth[:, None]) * R + ranks[None, :]
        mask = inside[:, None] & (ranks < R)[None, :]
        weight = tl.load(p_weight, mask=mask, other=0.0).to(tl.float32)
        # Sums of sums, as in the forward pass.
        ddt += tl.dot(b_draw, weight, 0.0 * ddt, input_precision=PRECISION)
    if tl.program_id(2) == 0:
        p_out = dprojected + places * (R_BLOCK + 2 * NP)
        tl.store(p_out + ranks[None, :], ddt, mask=present)
        tl.store(p_out + R_BLOCK + state[None, :], dbc, mask=present)
    p_weight = x_proj + direction * (R + 2 * N) * E
    for k in range(tl.program_id(2) * DEPTH, E, parts * DEPTH):
        columns = (k + depth)[None, :]
        mask = present & (columns < E)
        b_du = tl.load(scan_du + places * E + columns, mask=mask, other=0.0)
        inside = (ranks < R)[:, None] & (columns < E)
        weight = tl.load(p_weight + ranks[:, None] * E + columns, mask=inside, other=0.0)
        b_du = tl.dot(ddt, weight.to(tl.float32), b_du, input_precision=PRECISION)
        inside = is_state[:, None] & (columns < E)
        weight = tl.load(p_weight + source[:, None] * E + columns, mask=inside, other=0.0)
        b_du = tl.dot(dbc, weight.to(tl.float32), b_du, input_precision=PRECISION)
        tl.store(du + places * E + columns, b_du, mask=mask)


@triton.jit
def _weights_backward_kernel(
    u, dt, draw, dprojected, partial,
    M, E, splits,
    R_BLOCK: tl.constexpr, NP: tl.constexpr, PRECISION: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Gradients of x_proj, dt_proj and dt_bias from every `splits`-th block of steps; partial
    (splits, 2, 2·R_BLOCK + 2·NP + 1, E): the rows of x_proj, columns of dt_proj, and the bias."""
    direction = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * DEPTH + tl.arange(0, DEPTH)
    ranks = tl.arange(0, R_BLOCK)
    state = tl.arange(0, 2 * NP)
    of_dt = tl.zeros((R_BLOCK, DEPTH), tl.float32)
    of_states = tl.zeros((2 * NP, DEPTH), tl.float32)
    of_ranks = tl.zeros((R_BLOCK, DEPTH), tl.float32)
    of_bias = tl.zeros((ROWS, DEPTH), tl.float32)
    for first in range(tl.program_id(2) * ROWS, M, splits * ROWS):
        rows = first + tl.arange(0, ROWS)
        present = (rows < M)[:, None]
        places = direction * M + rows
        mask = present & (columns < E)[None, :]
        p_tile = places[:, None] * E + columns[None, :]
        b_u = tl.load(u + p_tile, mask=mask, other=0.0).to(tl.float32)
        b_draw = tl.load(draw + p_tile, mask=mask, other=0.0)
        p_row = dprojected + places[:, None] * (R_BLOCK + 2 * NP)
        ddt = tl.load(p_row + ranks[None, :], mask=present, other=0.0)
        dbc = tl.load(p_row + R_BLOCK + state[None, :], mask=present, other=0.0)
        b_dt = tl.load(dt + places[:, None] * R_BLOCK + ranks[None, :], mask=present, other=0.0)
        of_dt = tl.dot(tl.trans(ddt), b_u, of_dt, input_precision=PRECISION)
        of_states = tl.dot(tl.trans(dbc), b_u, of_states, input_precision=PRECISION)
        of_ranks = tl.dot(tl.trans(b_dt), b_draw, of_ranks, input_precision=PRECISION)
        of_bias += b_draw
    count: tl.constexpr = 2 * R_BLOCK + 2 * NP + 1
    p_partial = partial + (tl.program_id(2) * 2 + direction) * count * E + columns[None, :]
    mask = (columns < E)[None, :]
    tl.store(p_partial + ranks[:, None] * E, of_dt, mask=mask)
    tl.store(p_partial + (R_BLOCK + state[:, None]) * E, of_states, mask=mask)
    tl.store(p_partial + (R_BLOCK + 2 * NP + ranks[:, None]) * E, of_ranks, mask=mask)
    of_bias = tl.sum(of_bias, axis=0)
    tl.store(p_partial + (count - 1) * E, of_bias[None, :], mask=mask)


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
        fast = not INTERPRETED
        numbers: tuple[Any, ...] = (G, S, E, chunk, chunks, *strides, NP, fast, LANES)
        grid = (G, triton.cdiv(E, LANES), chunks)
        self.back = Launch(_flow_back_kernel, u.device, grid, numbers, num_warps=1)
        numbers = (G, E, chunks, NP, LANES, True)
        grid = (G, triton.cdiv(E, LANES), NP)
        self.carry = Launch(carry_kernel, u.device, grid, numbers, num_warps=1)
        numbers = (
            G, S, E, chunk, chunks, self.groups, *strides, chunks > 1, NP, fast, STEPS,
            V, SPLIT, channels,
        )  # fmt: skip
        grid = (G, self.blocks, chunks)
        self.last = Launch(_scan_backward_kernel, u.device, grid, numbers, num_warps=1)

        exact = u.dtype == torch.float32
        precision = "ieee" if exact else "tf32x3"  # products of float32
        steps = G // 2 * S
        depth = EXACT_DEPTH if exact else SELECT_DEPTH
        blocks = triton.cdiv(E, depth)
        programs = triton.cdiv(steps, ROWS)
        parts = min(blocks, triton.cdiv(SPREAD, 2 * programs))
        self.rank_block = max(16, triton.next_power_of_2(R))
        tail = (self.rank_block, NP, precision)
        numbers = (steps, parts, self.blocks, E, R, N, *tail, ROWS, depth)
        grid = (programs, 2, parts)
        self.select = Launch(_select_backward_kernel, u.device, grid, numbers, num_warps=4)
        self.splits = min(triton.cdiv(steps, WEIGHT_ROWS), triton.cdiv(SPREAD, 2 * blocks))
        numbers = (steps, E, self.splits, *tail, WEIGHT_ROWS, depth)
        grid = (blocks, 2, self.splits)
        self.weights = Launch(_weights_backward_kernel, u.device, grid, numbers, num_warps=4)

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
        return du, partial.sum(0), drates.sum(1) * rates


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


selective_scan_backward = Op("fastvim::selective_scan_triton_backward", _run, _fake)
