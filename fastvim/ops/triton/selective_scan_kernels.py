"""Kernels of selective_scan and their launches.

G  2 x batch sequences (directions outer), S  steps, M  batch · S, E  inner width, N  state size
NP  N filled up to a power of two, R  rank of the step size dt, R_BLOCK  R filled up likewise
B, C  the input and output projections of the states, as in the paper

`_select_kernel` computes step sizes, B and C with matrix products. `_scan_kernel` then walks the
steps, with the states of a channel in the registers of one lane. If there are few sequences,
several lanes share the states of a channel. If the sequences are long as well, each is cut into
chunks, to fill the GPU. Chunks take three launches: `_scan_kernel` finds the state that each chunk
gives from a state of 0, `carry_kernel` carries states from chunk to chunk, and `_scan_kernel` scans
each chunk from its true state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED, exp, exp2, softplus
from fastvim.ops.triton.launch import Launch, multiprocessors

LOG2_E = tl.constexpr(1.4426950408889634)
# Each walk: lanes that share the states of a channel, channels of a program (one warp), and steps
# that are loaded before they are used. The first walk that gives ENOUGH programs is taken.
WALKS = ((1, 64, 1), (1, 32, 2), (2, 16, 4), (4, 8, 8))
ENOUGH = 1024
# If no walk gives enough programs, a sequence of LONG steps or more is cut into chunks. Shorter
# sequences take the last walk.
LONG = 512
FULL = 2048  # most programs that chunks may make
SHORTEST = 64  # fewest steps of a chunk
LANES = 32  # of a warp
# Steps of a program of the projection: ROWS if there are MANY steps, else SPARSE_ROWS.
MANY = 16384
ROWS = 32
SPARSE_ROWS = 16
SPREAD = 2  # fewest programs of the projection, for each multiprocessor
# Channels that the projection multiplies at a time. Fewer in float32, where long sums would lose
# accuracy.
DEPTH = 128
EXACT_DEPTH = 32
SELECT_WARPS = 4
SELECT_STAGES = 3


@triton.jit
def _select_kernel(
    u, x_proj, dt_proj, dt_bias, A_log, delta, BC, rates, dt_saved, slopes,
    M, parts, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    R_BLOCK: tl.constexpr, NP: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """What is selected for the M steps of each direction.

    delta (2, M, E): step sizes.
    BC (2, M, 2·NP): B beside C. States from N on are 0.
    rates (2, NP, E): A · log2(e). The decay of a state is 2**(step size · rate).
    KEEP, for the backward pass: dt_saved (2, M, R_BLOCK), which the step sizes are projected from,
    and slopes (2, M, E) of softplus.

    A program takes every `parts`-th block of channels of its steps. It projects dt for itself.
    """
    direction = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < M)[:, None]
    places = (direction.to(tl.int64) * M + rows)[:, None]
    ranks = tl.arange(0, R_BLOCK)
    state = tl.arange(0, 2 * NP)
    is_state = state % NP < N
    depth = tl.arange(0, DEPTH)
    p_u = u + places * E + depth[None, :]
    p_ranks = x_proj + direction * (R + 2 * N) * E + ranks[None, :] * E + depth[:, None]
    source = R + state // NP * N + state % NP
    p_states = x_proj + direction * (R + 2 * N) * E + source[None, :] * E + depth[:, None]
    dt = tl.zeros((ROWS, R_BLOCK), tl.float32)
    bc = tl.zeros((ROWS, 2 * NP), tl.float32)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for k in range(0, E, DEPTH):
        inside = depth < E - k
        b_u = tl.load(p_u + k, mask=present & inside[None, :], other=0.0)
        mask = inside[:, None] & (ranks < R)[None, :]
        b_ranks = tl.load(p_ranks + k, mask=mask, other=0.0)
        mask = inside[:, None] & is_state[None, :]
        b_states = tl.load(p_states + k, mask=mask, other=0.0)
        if EXACT:
            # Each block is summed apart: one long float32 sum would lose accuracy. 0.0 * dt keeps
            # the compiler from merging the sums, as it does with a constant 0.
            dt += tl.dot(b_u, b_ranks, 0.0 * dt, input_precision=precision)
            bc += tl.dot(b_u, b_states, 0.0 * bc, input_precision=precision)
        else:
            dt = tl.dot(b_u, b_ranks, dt, input_precision=precision)
            bc = tl.dot(b_u, b_states, bc, input_precision=precision)
    if tl.program_id(2) == 0:
        tl.store(BC + places * 2 * NP + state[None, :], bc, mask=present)
        if KEEP:
            tl.store(dt_saved + places * R_BLOCK + ranks[None, :], dt, mask=present)

    # Rounding dt would cost accuracy: what it cuts off goes through a second product.
    high = dt.to(u.dtype.element_ty)
    low = (dt - high.to(tl.float32)).to(u.dtype.element_ty)
    for k in range(tl.program_id(2) * DEPTH, E, parts * DEPTH):
        columns = k + depth
        mask = (columns < E)[None, :] & (ranks < R)[:, None]
        p_weight = dt_proj + direction * E * R + columns[None, :] * R + ranks[:, None]
        weight = tl.load(p_weight, mask=mask, other=0.0)
        raw = tl.dot(high, weight, input_precision=precision)
        if not EXACT:
            raw = tl.dot(low, weight, raw)
        b_bias = tl.load(dt_bias + direction * E + columns, mask=columns < E, other=0.0)
        raw += b_bias.to(tl.float32)[None, :]
        mask = present & (columns < E)[None, :]
        tl.store(delta + places * E + columns[None, :], softplus(raw, FAST), mask=mask)
        if KEEP:
            slope = 1.0 / (1.0 + exp(-raw, FAST))
            tl.store(slopes + places * E + columns[None, :], slope, mask=mask)
        if tl.program_id(0) == 0:
            n = tl.arange(0, NP)
            in_row = (columns < E)[:, None]
            p_A = A_log + (direction * E + columns)[:, None] * N + n[None, :]
            b_A = tl.load(p_A, mask=in_row & (n < N)[None, :], other=0.0).to(tl.float32)
            rate = -LOG2_E * exp(b_A, FAST)
            p_rates = rates + (direction * NP + n[None, :]) * E + columns[:, None]
            tl.store(p_rates, rate, mask=in_row)


@triton.jit
def load_states(p_pairs, lane, WHICH: tl.constexpr, J: tl.constexpr, NP: tl.constexpr):
    """J values of B (WHICH 0) or C (WHICH 1) of one step for each lane, two at a load."""
    values = ()
    p_pairs += WHICH * (NP // 2)
    for j in tl.static_range(J // 2):
        # With J = NP all lanes load the same scalars: one-element tensors compile very slowly.
        pair = tl.load(p_pairs + lane * (J // 2) + j) if J < NP else tl.load(p_pairs + j)
        values = values + ((pair & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True),)
        values = values + ((pair >> 32).to(tl.int32).to(tl.float32, bitcast=True),)
    return values


@triton.jit
def _load_step(
    p_u, p_delta, p_pairs, lane, mask, i, end, WRITE: tl.constexpr, J: tl.constexpr,
    NP: tl.constexpr,
):  # fmt: skip
    """Step size, input, B and C of step i. From `end` on the step size is 0."""
    b_delta = tl.load(p_delta, mask=mask & (i < end), other=0.0)
    b_u = tl.load(p_u, mask=mask, other=0.0)
    b = load_states(p_pairs, lane, 0, J, NP)
    c = load_states(p_pairs, lane, 1, J, NP) if WRITE else ()
    return b_delta, b_u, b, c


@triton.jit
def _scan_kernel(
    u, delta, BC, p_rates, y, states, sums,
    G, S, E, chunk, chunks,
    WRITE: tl.constexpr, CARRY: tl.constexpr, NP: tl.constexpr, FAST: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Scan one chunk of BLOCK channels. SPLIT lanes share the states of a channel.

    WRITE: give y. With CARRY the scan starts from `states`, else from 0.
    Not WRITE: give the last state in `states`, and the sum of the step sizes in `sums`.
    states (G, chunks, NP, E), sums (G, chunks, E).
    """
    J: tl.constexpr = NP // SPLIT
    g = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    lane = tl.arange(0, SPLIT)[:, None]
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    if CARRY or not WRITE:
        p_states = states + ((g * chunks + k) * NP + lane * J) * E + columns
    rates = ()
    h = ()
    for j in tl.static_range(J):
        p_rate = p_rates + (direction * NP + lane * J + j) * E + columns
        rates = rates + (tl.load(p_rate, mask=mask, other=0.0),)
        if CARRY:
            h = h + (tl.load(p_states + j * E, mask=mask, other=0.0),)
        else:
            h = h + (tl.zeros((SPLIT, BLOCK), tl.float32),)
    total = tl.zeros((1, BLOCK), tl.float32)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    onward = 1 - 2 * direction.to(tl.int32)
    row = g * S + direction * (S - 1) + begin * onward
    p_u = u + row * E + columns
    p_delta = delta + row * E + columns
    if WRITE:
        p_y = y + row * E + columns
    p_pairs = BC.to(tl.pointer_type(tl.int64)) + row * NP
    # The values of a step are loaded AHEAD steps early. Past the end those of the last are loaded.
    loaded = ()
    for t in tl.static_range(AHEAD):
        loaded = loaded + (
            _load_step(p_u, p_delta, p_pairs, lane, mask, begin + t, end, WRITE, J, NP),
        )
        on = tl.where(begin + t + 1 < end, onward, 0)
        p_u += on * E
        p_delta += on * E
        p_pairs += on * NP
    for first in range(begin, end, AHEAD):
        following = ()
        for t in tl.static_range(AHEAD):
            i = first + t
            following = following + (
                _load_step(p_u, p_delta, p_pairs, lane, mask, i + AHEAD, end, WRITE, J, NP),
            )
            on = tl.where(i + AHEAD + 1 < end, onward, 0)
            p_u += on * E
            p_delta += on * E
            p_pairs += on * NP
            step = loaded[t][0]
            inflow = step * loaded[t][1].to(tl.float32)
            total += step
            b_y = tl.zeros((SPLIT, BLOCK), tl.float32)
            after = ()
            for j in tl.static_range(J):
                state = exp2(step * rates[j], FAST) * h[j] + inflow * loaded[t][2][j]
                if WRITE:
                    b_y += loaded[t][3][j] * state
                after = after + (state,)
            h = after
            if WRITE:
                if SPLIT > 1:
                    b_y = tl.sum(b_y, axis=0, keep_dims=True)
                tl.store(p_y, b_y, mask=mask & (i < end))
                p_y += onward * E
        loaded = following
    if not WRITE:
        tl.store(sums + (g * chunks + k) * E + columns, total, mask=mask)
        for j in tl.static_range(J):
            tl.store(p_states + j * E, h[j], mask=mask)


@triton.jit
def carry_kernel(
    rates, states, sums, G, E, chunks, NP: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Replace the state that each chunk adds by the state that it starts from. LAST: in reverse."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    rate = tl.load(rates + (direction * NP + n) * E + columns, mask=mask, other=0.0)
    h = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        row = g * chunks + (chunks - 1 - k if LAST else k)
        p_state = states + (row * NP + n) * E + columns
        inside = mask & (k < chunks - 1)  # no chunk follows the last
        added = tl.load(p_state, mask=inside, other=0.0)
        step = tl.load(sums + row * E + columns, mask=inside, other=0.0)
        tl.store(p_state, h, mask=mask)
        h = exp2(rate * step, False) * h + added


def prepared(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Contiguous inputs, as the kernels expect them.

    The matrix units take operands of one dtype, so the projections are rounded to u's.
    """
    return (
        u.contiguous(),
        x_proj.to(u.dtype).contiguous(),
        dt_proj.to(u.dtype).contiguous(),
        dt_bias.contiguous(),
        A_log.contiguous(),
    )


def choose_walk(sequences: int, steps: int, width: int) -> tuple[tuple[int, int, int], int]:
    """One of `WALKS`, and the number of chunks of a sequence."""
    for walk in WALKS:
        if sequences * triton.cdiv(width, walk[1]) >= ENOUGH:
            return walk, 1
    if steps < LONG:
        return WALKS[-1], 1
    programs = sequences * triton.cdiv(width, WALKS[0][1])
    return WALKS[0], max(1, min(steps // SHORTEST, FULL // programs))


def carry_launch(device: torch.device, states: tuple[int, int, int, int], last: bool) -> Launch:
    """The launch of `carry_kernel` for states (G, chunks, NP, E)."""
    G, chunks, NP, E = states
    return Launch(
        carry_kernel, device=device, grid=(G, triton.cdiv(E, LANES), NP), num_warps=1,
        G=G, E=E, chunks=chunks, NP=NP, BLOCK=LANES, LAST=last,
    )  # fmt: skip


class Scan:
    """The launches for one kind of input: one scan of whole sequences, or three over chunks.

    The backward pass has launches of its own on top of these (`selective_scan_backward`).
    """

    def __init__(
        self, u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
    ) -> None:
        batch, S, E = u.shape[1], u.shape[2], int(u.shape[3])
        G, N = 2 * batch, int(A_log.shape[2])
        R = int(x_proj.shape[1]) - 2 * N
        NP = max(8, triton.next_power_of_2(N))
        (split, block, ahead), chunks = choose_walk(G, S, E)
        chunk = triton.cdiv(S, chunks)
        chunks = triton.cdiv(S, chunk)
        # As few as still give the same number of turns: less is loaded past the end.
        ahead = triton.cdiv(chunk, triton.cdiv(chunk, ahead))
        self.states = (G, chunks, NP, E)

        rows = ROWS if batch * S >= MANY else SPARSE_ROWS
        depth = EXACT_DEPTH if u.dtype == torch.float32 else DEPTH
        programs = triton.cdiv(batch * S, rows)
        enough = SPREAD * multiprocessors(u.device)
        parts = min(triton.cdiv(E, depth), triton.cdiv(enough, 2 * programs))
        self.fast = u.dtype != torch.float32 and not INTERPRETED
        self.select, self.select_and_keep = (
            Launch(
                _select_kernel, device=u.device, grid=(programs, 2, parts),
                num_warps=SELECT_WARPS, num_stages=SELECT_STAGES,
                M=batch * S, parts=parts, E=E, R=R, N=N,
                R_BLOCK=max(16, triton.next_power_of_2(R)), NP=NP,
                EXACT=u.dtype == torch.float32, FAST=self.fast, ROWS=rows, DEPTH=depth, KEEP=keep,
            )
            for keep in (False, True)
        )  # fmt: skip
        self.first, self.last = (
            Launch(
                _scan_kernel, device=u.device, num_warps=1,
                grid=(G, triton.cdiv(E, block), chunks if write else chunks - 1),
                G=G, S=S, E=E, chunk=chunk, chunks=chunks, WRITE=write,
                CARRY=write and chunks > 1, NP=NP, FAST=self.fast,
                SPLIT=split, BLOCK=block, AHEAD=ahead,
            )
            for write in (False, True)
        )  # fmt: skip
        self.carry = carry_launch(u.device, self.states, last=False)

    def selected(
        self,
        u: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        kept: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (2, B, S, E), B beside C (2, B, S, 2·NP), and rates (2, NP, E).

        `kept` are tensors to fill for the backward pass: dt (2, B, S, R_BLOCK) and the slopes of
        softplus (2, B, S, E).
        """
        _, _, NP, E = self.states
        delta = torch.empty(u.shape, dtype=torch.float32, device=u.device)
        BC = torch.empty((*u.shape[:3], 2 * NP), dtype=torch.float32, device=u.device)
        rates = torch.empty((2, NP, E), dtype=torch.float32, device=u.device)
        dt, slopes = kept or (None, None)
        select = self.select if kept is None else self.select_and_keep
        select(
            u=u, x_proj=x_proj, dt_proj=dt_proj, dt_bias=dt_bias, A_log=A_log,
            delta=delta, BC=BC, rates=rates, dt_saved=dt, slopes=slopes,
        )  # fmt: skip
        return delta, BC, rates

    def starts(self, u: Tensor, delta: Tensor, BC: Tensor, rates: Tensor) -> Tensor | None:
        """The state before each chunk, (G, chunks, NP, E). None: a single chunk, from 0."""
        G, chunks, _, E = self.states
        if chunks == 1:
            return None
        states = torch.empty(self.states, dtype=torch.float32, device=u.device)
        sums = torch.empty((G, chunks, E), dtype=torch.float32, device=u.device)
        self.first(u=u, delta=delta, BC=BC, p_rates=rates, y=None, states=states, sums=sums)
        self.carry(rates=rates, states=states, sums=sums)
        return states

    def __call__(self, y: Tensor, u: Tensor, delta: Tensor, BC: Tensor, rates: Tensor) -> None:
        """Fill y."""
        states = self.starts(u, delta, BC, rates)
        self.last(u=u, delta=delta, BC=BC, p_rates=rates, y=y, states=states, sums=None)
