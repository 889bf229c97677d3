"""Kernels of selective_scan: two matrix products select, a thread walks the steps of a channel.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size, R  rank of dt
Where there are few sequences, each is cut into chunks so that the GPU is full. A first launch finds
what every chunk adds to a state of 0, a second one carries the states from chunk to chunk, and the
last one scans every chunk from its true state.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED, exp2, softplus
from fastvim.ops.triton.launch import Launch

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK = 64  # channels of a program of the scan: two for each thread of a warp
FULL = 2048  # programs that fill a GPU
SHORTEST = 8  # steps of a chunk at least
ROWS = 32  # steps of a program of the projection
SPARSE_ROWS = 16  # where there are fewer steps than
MANY = 16384
SPREAD = 264  # programs that the projection is spread over at least: two a multiprocessor
DEPTH = 128  # channels summed at a time; in float32 fewer, as long chains lose accuracy:
EXACT_DEPTH = 32
SELECT_WARPS = 4
SELECT_STAGES = 3


@triton.jit
def _select_kernel(
    u, x_proj, dt_proj, dt_bias, A_log, delta, p_BC, rates,
    M, parts, E: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
    R_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr, EXACT: tl.constexpr, FAST: tl.constexpr,
    ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Step sizes (2, M, E) of the M steps of each direction, B beside C (2, M, 2N), and what a step
    size is multiplied by to base 2, rates (2, N, E).

    A program has every `parts`-th block of channels of its steps, and projects dt for itself.
    """
    direction = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    present = (rows < M)[:, None]
    places = (direction.to(tl.int64) * M + rows)[:, None]
    ranks = tl.arange(0, R_BLOCK)
    states = tl.arange(0, 2 * N_BLOCK)
    depth = tl.arange(0, DEPTH)
    p_u = u + places * E + depth[None, :]
    p_dt = x_proj + direction * (R + 2 * N) * E + ranks[None, :] * E + depth[:, None]
    p_states = x_proj + direction * (R + 2 * N) * E + (R + states[None, :]) * E + depth[:, None]
    dt = tl.zeros((ROWS, R_BLOCK), tl.float32)
    bc = tl.zeros((ROWS, 2 * N_BLOCK), tl.float32)
    precision: tl.constexpr = "ieee" if EXACT else "tf32"
    for k in range(0, E, DEPTH):
        inside = depth < E - k
        b_u = tl.load(p_u + k, mask=present & inside[None, :], other=0.0)
        mask = inside[:, None] & (ranks < R)[None, :]
        # Sums of sums: float32 would lose more in one long chain.
        dt += tl.dot(b_u, tl.load(p_dt + k, mask=mask, other=0.0), input_precision=precision)
        mask = inside[:, None] & (states < 2 * N)[None, :]
        bc += tl.dot(b_u, tl.load(p_states + k, mask=mask, other=0.0), input_precision=precision)
    if tl.program_id(2) == 0:
        mask = present & (states < 2 * N)[None, :]
        tl.store(p_BC + places * 2 * N + states[None, :], bc, mask=mask)

    # Rounding dt would cost accuracy: its rest goes through a second product.
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
        raw = softplus(raw + b_bias.to(tl.float32)[None, :], FAST)
        tl.store(delta + places * E + columns[None, :], raw, mask=present & (columns < E)[None, :])
        if tl.program_id(0) == 0:
            n = tl.arange(0, N_BLOCK)
            wanted = (columns < E)[:, None] & (n < N)[None, :]
            p_A = A_log + (direction * E + columns)[:, None] * N + n[None, :]
            rate = -LOG2_E * tl.exp(tl.load(p_A, mask=wanted, other=0.0).to(tl.float32))
            p_rates = rates + (direction * N + n[None, :]) * E + columns[:, None]
            tl.store(p_rates, rate, mask=wanted)


@triton.jit
def _load_step(u, delta, p_BC, row, E, columns, mask, WRITE: tl.constexpr, N: tl.constexpr):
    """Step size, input, and the rows of B and C of one step."""
    b_delta = tl.load(delta + row * E + columns, mask=mask, other=0.0)
    b_u = tl.load(u + row * E + columns, mask=mask, other=0.0)
    b = ()
    c = ()
    for n in tl.static_range(N):
        b = b + (tl.load(p_BC + row * 2 * N + n),)
        if WRITE:
            c = c + (tl.load(p_BC + row * 2 * N + N + n),)
    return b_delta, b_u, b, c


@triton.jit
def _scan_kernel(
    u, delta, p_BC, p_rates, y, states, sums,
    G, S, E, chunk, chunks,
    WRITE: tl.constexpr, CARRY: tl.constexpr, N: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk. WRITE: give y, from `states` if CARRY. Else: give the chunk's own end in `states`
    and the sum of its step sizes in `sums`. states (G, chunks, N, E), sums (G, chunks, E)."""
    g = tl.program_id(0).to(tl.int64)
    k = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_states = states + (g * chunks + k) * N * E + columns
    rates = ()
    h = ()
    for n in tl.static_range(N):
        p_rate = p_rates + (direction * N + n) * E + columns
        rates = rates + (tl.load(p_rate, mask=mask, other=0.0),)
        if CARRY:
            h = h + (tl.load(p_states + n * E, mask=mask, other=0.0),)
        else:
            h = h + (tl.zeros((BLOCK,), tl.float32),)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = k * chunk
    end = tl.minimum(begin + chunk, S)
    row = g * S + direction * (S - 1)
    stride = 1 - 2 * direction
    # Each step's values are loaded during the step before.
    now = _load_step(u, delta, p_BC, row + begin * stride, E, columns, mask, WRITE, N)
    for i in range(begin, end):
        ahead = row + tl.minimum(i + 1, end - 1) * stride
        following = _load_step(u, delta, p_BC, ahead, E, columns, mask, WRITE, N)
        step = now[0]
        inflow = step * now[1].to(tl.float32)
        total += step
        b_y = tl.zeros((BLOCK,), tl.float32)
        after = ()
        for n in tl.static_range(N):
            state = exp2(step * rates[n], FAST) * h[n] + inflow * now[2][n]
            if WRITE:
                b_y += now[3][n] * state
            after = after + (state,)
        h = after
        now = following
        if WRITE:
            tl.store(y + (row + i * stride) * E + columns, b_y, mask=mask)
    if not WRITE:
        tl.store(sums + (g * chunks + k) * E + columns, total, mask=mask)
        for n in tl.static_range(N):
            tl.store(p_states + n * E, h[n], mask=mask)


@triton.jit
def carry_kernel(
    rates, states, sums, G, E, chunks, N: tl.constexpr, BLOCK: tl.constexpr, LAST: tl.constexpr
):
    """Replace what each chunk adds by the state that it starts from; LAST: from the last one on."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    rate = tl.load(rates + (direction * N + n) * E + columns, mask=mask, other=0.0)
    h = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        row = g * chunks + (chunks - 1 - k if LAST else k)
        p_state = states + (row * N + n) * E + columns
        added = tl.load(p_state, mask=mask, other=0.0)
        step = tl.load(sums + row * E + columns, mask=mask, other=0.0)
        tl.store(p_state, h, mask=mask)
        h = tl.exp2(rate * step) * h + added


def prepared(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The inputs as the kernels ask for them, contiguous.

    The matrix units take operands of one dtype: parameters of another are rounded to u's.
    """
    return (
        u.contiguous(),
        x_proj.to(u.dtype).contiguous(),
        dt_proj.to(u.dtype).contiguous(),
        dt_bias.contiguous(),
        A_log.contiguous(),
    )


class Scan:
    """The launches for one kind of input: one scan of whole sequences, or three over chunks."""

    def __init__(
        self, u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
    ) -> None:
        batch, S, E = u.shape[1], u.shape[2], int(u.shape[3])
        G, N = 2 * batch, int(A_log.shape[2])
        R = int(x_proj.shape[1]) - 2 * N
        block = min(BLOCK, max(16, triton.next_power_of_2(E)))
        blocks = triton.cdiv(E, block)
        chunks = max(1, min(S // SHORTEST, FULL // (G * blocks)))
        chunk = triton.cdiv(S, chunks)
        chunks = triton.cdiv(S, chunk)
        self.states = (G, chunks, N, E)

        rows = ROWS if batch * S >= MANY else SPARSE_ROWS
        depth = EXACT_DEPTH if u.dtype == torch.float32 else DEPTH
        programs = 2 * triton.cdiv(batch * S, rows)
        parts = min(triton.cdiv(E, depth), triton.cdiv(SPREAD, programs))
        numbers: tuple[Any, ...] = (
            batch * S, parts, E, R, N,
            max(16, triton.next_power_of_2(R)), max(8, triton.next_power_of_2(N)),
            u.dtype == torch.float32, u.dtype != torch.float32 and not INTERPRETED, rows, depth,
        )  # fmt: skip
        self.select = Launch(
            _select_kernel, u.device, (programs // 2, 2, parts), numbers,
            num_warps=SELECT_WARPS, num_stages=SELECT_STAGES,
        )  # fmt: skip

        def scan(write: bool) -> Launch:
            numbers = (
                G, S, E, chunk, chunks, write, write and chunks > 1, N, not INTERPRETED, block
            )  # fmt: skip
            return Launch(_scan_kernel, u.device, (G, blocks, chunks), numbers, num_warps=1)

        self.first = scan(write=False)
        numbers = (G, E, chunks, N, block, False)
        self.carry = Launch(carry_kernel, u.device, (G, blocks, N), numbers, num_warps=1)
        self.last = scan(write=True)

    def selected(
        self, u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Step sizes (2, B, S, E), B beside C (2, B, S, 2N), and rates (2, N, E)."""
        _, _, N, E = self.states
        delta = torch.empty(u.shape, dtype=torch.float32, device=u.device)
        BC = torch.empty((*u.shape[:3], 2 * N), dtype=torch.float32, device=u.device)
        rates = torch.empty((2, N, E), dtype=torch.float32, device=u.device)
        self.select(u, x_proj, dt_proj, dt_bias, A_log, delta, BC, rates)
        return delta, BC, rates

    def starts(self, u: Tensor, delta: Tensor, BC: Tensor, rates: Tensor) -> tuple[Tensor, Tensor]:
        """The state that each chunk starts from (G, chunks, N, E), its step sizes' sum without N.

        Of a single chunk nothing is asked: it starts from 0.
        """
        G, chunks, _, E = self.states
        if chunks == 1:
            return rates, rates
        states = torch.empty(self.states, dtype=torch.float32, device=u.device)
        sums = torch.empty((G, chunks, E), dtype=torch.float32, device=u.device)
        self.first(u, delta, BC, rates, u, states, sums)
        self.carry(rates, states, sums)
        return states, sums

    def __call__(self, y: Tensor, u: Tensor, delta: Tensor, BC: Tensor, rates: Tensor) -> None:
        """Fill y."""
        self.last(u, delta, BC, rates, y, *self.starts(u, delta, BC, rates))
