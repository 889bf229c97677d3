"""selective_scan on GPUs: a thread holds the states of its channels and walks the segments.

G  2 x batch sequences (directions outer), S  steps, E  inner width, N  state size
Where there are few sequences, each is cut into chunks so that the GPU is full. A first launch finds
what every chunk adds to a state of 0, a second one carries the states from chunk to chunk, and the
last one scans every chunk from its true state.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.common import INTERPRETED, exp2, softplus

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCK = 64  # channels of a program: two for each thread of a warp
FULL = 4096  # programs that fill a GPU
SHORTEST = 16  # steps of a chunk at least


@triton.jit
def _scan_kernel(
    u, raw, bias, A_log, p_B, p_C, y, states, sums,
    G, S, E, chunk, chunks, b_sequence, b_step, c_sequence, c_step,
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
    b_bias = tl.load(bias + direction * E + columns, mask=mask, other=0.0).to(tl.float32)
    p_states = states + (g * chunks + k) * N * E + columns
    rates = ()
    h = ()
    for n in tl.static_range(N):
        p_A = A_log + (direction * E + columns) * N + n
        A = tl.exp(tl.load(p_A, mask=mask, other=0.0).to(tl.float32))
        rates = rates + (-LOG2_E * A,)
        if CARRY:
            h = h + (tl.load(p_states + n * E, mask=mask, other=0.0),)
        else:
            h = h + (tl.zeros((BLOCK,), tl.float32),)
    total = tl.zeros((BLOCK,), tl.float32)
    begin = k * chunk
    for i in range(begin, tl.minimum(begin + chunk, S)):
        s = i + direction * (S - 1 - 2 * i)
        offsets = (g * S + s) * E + columns
        b_raw = tl.load(raw + offsets, mask=mask, other=0.0).to(tl.float32) + b_bias
        b_u = tl.load(u + offsets, mask=mask, other=0.0).to(tl.float32)
        step = softplus(b_raw)
        inflow = step * b_u
        total += step
        b_y = tl.zeros((BLOCK,), tl.float32)
        after = ()
        for n in tl.static_range(N):
            b = tl.load(p_B + g * b_sequence + s * b_step + n).to(tl.float32)
            state = exp2(step * rates[n], FAST) * h[n] + inflow * b
            if WRITE:
                c = tl.load(p_C + g * c_sequence + s * c_step + n).to(tl.float32)
                b_y += c * state
            after = after + (state,)
        h = after
        if WRITE:
            tl.store(y + offsets, b_y, mask=mask)
    if not WRITE:
        tl.store(sums + (g * chunks + k) * E + columns, total, mask=mask)
        for n in tl.static_range(N):
            tl.store(p_states + n * E, h[n], mask=mask)


@triton.jit
def _carry_kernel(A_log, states, sums, G, E, chunks, N: tl.constexpr, BLOCK: tl.constexpr):
    """Replace what each chunk adds by the state that it starts from."""
    g = tl.program_id(0).to(tl.int64)
    n = tl.program_id(2)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    direction = (g >= G // 2).to(tl.int64)
    p_A = A_log + (direction * E + columns) * N + n
    rate = -LOG2_E * tl.exp(tl.load(p_A, mask=mask, other=0.0).to(tl.float32))
    h = tl.zeros((BLOCK,), tl.float32)
    for k in range(chunks):
        row = g * chunks + k
        p_state = states + (row * N + n) * E + columns
        added = tl.load(p_state, mask=mask, other=0.0)
        step = tl.load(sums + row * E + columns, mask=mask, other=0.0)
        tl.store(p_state, h, mask=mask)
        h = tl.exp2(rate * step) * h + added


def _project(dt: Tensor, dt_proj: Tensor) -> Tensor:
    """(2, B, S, R) by (2, E, R) to (2, B·S, E) in float32, without the bias."""
    rows, weight = dt.flatten(1, 2), dt_proj.mT
    if dt.dtype == dt_proj.dtype != torch.float32 and dt.is_cuda:
        return torch.bmm(rows, weight, out_dtype=torch.float32)
    return torch.bmm(rows.float(), weight.float())


def selective_scan_triton(
    u: Tensor, dt: Tensor, B: Tensor, C: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` for GPU tensors of at most 32 bits, forward."""
    _, batch, S, E = u.shape
    N = A_log.shape[2]
    u, dt_bias, A_log = u.contiguous(), dt_bias.contiguous(), A_log.contiguous()
    y = torch.empty_like(u)
    if y.numel() == 0:
        return y
    with torch.autocast(u.device.type, enabled=False):
        raw = _project(dt, dt_proj)
    B, C = B.flatten(0, 1), C.flatten(0, 1)
    G = 2 * batch
    block = min(BLOCK, max(16, triton.next_power_of_2(E)))
    blocks = triton.cdiv(E, block)
    chunks = max(1, min(S // SHORTEST, FULL // (G * blocks)))
    chunk = triton.cdiv(S, chunks)
    chunks = triton.cdiv(S, chunk)
    states = u.new_empty(G, chunks, N, E, dtype=torch.float32) if chunks > 1 else y
    sums = u.new_empty(G, chunks, E, dtype=torch.float32) if chunks > 1 else y
    strides = (B.stride(0), B.stride(1), C.stride(0), C.stride(1))

    def scan(write: bool) -> None:
        _scan_kernel[(G, blocks, chunks)](
            u, raw, dt_bias, A_log, B, C, y, states, sums, G, S, E, chunk, chunks, *strides,
            WRITE=write, CARRY=write and chunks > 1, N=N, FAST=not INTERPRETED,
            BLOCK=block, num_warps=1,
        )  # fmt: skip

    if chunks > 1:
        scan(write=False)
        _carry_kernel[(G, blocks, N)](
            A_log, states, sums, G, E, chunks, N=N, BLOCK=block, num_warps=1
        )
    scan(write=True)
    return y
