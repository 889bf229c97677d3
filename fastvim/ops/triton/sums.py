"""Sums over programs, the second stage of every gradient to which many programs contribute.

The order is fixed and there are no atomics, so two runs give the same bits. Torch's own sum takes
10 µs for tensors as tall and narrow as these.

A  sums, P  programs, M  values of each
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.triton.launch import Launch, Launches

TILE = 2048  # values that a program loads at a time

_launches: Launches[Launch] = Launches()


@triton.jit
def _sum_kernel(parts, out, P, M, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out (A, M) of parts (A, P, M)."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    outer = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, P, ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < P)[:, None] & (columns < M)[None, :]
        offsets = (outer * P + rows)[:, None] * M + columns[None, :]
        total += tl.load(parts + offsets, mask=mask, other=0.0)
    tl.store(out + outer * M + columns, tl.sum(total, axis=0), mask=columns < M)


def sum_parts(parts: Tensor, rows: int = 128) -> Tensor:
    """Sum float32 parts (A, P, ...) over P to (A, ...). A program adds `rows` of them at a time."""
    A, P = parts.shape[:2]
    M = parts.shape[2:].numel()
    out = torch.empty((A, *parts.shape[2:]), dtype=torch.float32, device=parts.device)
    if M == 0:
        return out
    if P == 0:
        return out.zero_()
    columns = TILE // rows
    launch = _launches.get(
        (parts,),
        rows,
        lambda: Launch(
            _sum_kernel,
            device=parts.device,
            grid=(triton.cdiv(M, columns), A),
            P=P,
            M=M,
            ROWS=rows,
            BLOCK=columns,
        ),
    )
    launch(parts=parts, out=out)
    return out
