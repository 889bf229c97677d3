"""Gradients of selective_scan on GPUs: launches and the registered op.

Letters as in `selective_scan_kernels`. Only the inputs are saved by the forward pass. Chunks are
those of the forward pass. The gradient that flows into a chunk from the following ones is found as
the states are, in reverse.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastvim.ops.reference import selective_scan_reference
from fastvim.ops.registered import gradients_of
from fastvim.ops.triton.launch import Launch, Launches, Op, multiprocessors
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
    carry_launch,
    prepared,
)
from fastvim.ops.triton.sums import sum_parts

SPLIT = 4  # lanes that share the states of a channel
V = 2  # channels of a lane
STEPS = 5  # steps whose states stay in registers
ROWS = 16  # steps of a program of `select_backward_kernel`
WEIGHT_ROWS = 32  # steps of a program of `weights_backward_kernel`, at a time
WEIGHT_CHANNELS = 64  # most channels of such a program; more would spill registers
SPLIT_ROWS = 32  # rows that `sum_parts` adds at a time
# Precision of the matrix products, and the channels taken at a time, for each dtype of u. TF32
# cuts a float32 factor to 11 bits. That is precise enough beside bfloat16 (8 bits), but not beside
# float16 (11 bits), which takes three products (tf32x3).
PRODUCTS = {
    torch.float32: ("ieee", EXACT_DEPTH),
    torch.float16: ("tf32x3", 64),
    torch.bfloat16: ("tf32", 128),
}


class _ScanBackward:
    """The launches for one kind of input, on top of those of the forward pass."""

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
        block = LANES // SPLIT
        self.blocks = triton.cdiv(E, V * block)
        self.groups = triton.cdiv(chunk, STEPS)
        shared: dict[str, Any] = {
            "G": G, "S": S, "E": E, "chunk": chunk, "chunks": chunks, "NP": NP,
            "dy_direction": dy.stride(0), "dy_sequence": dy.stride(1), "FAST": self.scan.fast,
        }  # fmt: skip
        self.flow_back = Launch(
            flow_back_kernel, device=u.device, grid=(G, triton.cdiv(E, LANES), chunks),
            num_warps=1, BLOCK=LANES, **shared,
        )  # fmt: skip
        self.carry = carry_launch(u.device, self.scan.states, last=True)
        self.last = Launch(
            scan_backward_kernel, device=u.device, grid=(G, self.blocks, chunks), num_warps=1,
            groups=self.groups, CARRY=chunks > 1, STEPS=STEPS, V=V, SPLIT=SPLIT, BLOCK=block,
            **shared,
        )  # fmt: skip

        precision, depth = PRODUCTS[u.dtype]
        enough = SPREAD * multiprocessors(u.device)
        M = G // 2 * S
        self.rank_block = max(16, triton.next_power_of_2(R))
        programs = triton.cdiv(M, ROWS)
        parts = min(triton.cdiv(E, depth), triton.cdiv(enough, 2 * programs))
        self.select = Launch(
            select_backward_kernel, device=u.device, grid=(programs, 2, parts),
            M=M, parts=parts, blocks=self.blocks, E=E, R=R, N=N,
            R_BLOCK=self.rank_block, NP=NP, PRECISION=precision, ROWS=ROWS, DEPTH=depth,
        )  # fmt: skip
        depth = min(depth, WEIGHT_CHANNELS)
        blocks = triton.cdiv(E, depth)
        self.splits = min(triton.cdiv(M, WEIGHT_ROWS), triton.cdiv(enough, 2 * blocks))
        self.weights = Launch(
            weights_backward_kernel, device=u.device, grid=(blocks, 2, self.splits),
            M=M, E=E, splits=self.splits,
            R_BLOCK=self.rank_block, NP=NP, PRECISION=precision, ROWS=WEIGHT_ROWS, DEPTH=depth,
        )  # fmt: skip

    def __call__(
        self,
        u: Tensor,
        x_proj: Tensor,
        dt_proj: Tensor,
        dt_bias: Tensor,
        A_log: Tensor,
        dy: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of u, of the projections, and of A_log (2, NP, E).

        Those of the projections are one tensor (2, 2·R_BLOCK + 2·NP + 1, E), laid out as in
        `weights_backward_kernel`.
        """
        G, chunks, NP, E = self.scan.states

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=u.device)

        dt, slopes = empty(*u.shape[:3], self.rank_block), empty(*u.shape)
        delta, BC, rates = self.scan.selected(u, x_proj, dt_proj, dt_bias, A_log, (dt, slopes))
        states = self.scan.starts(u, delta, BC, rates)
        flows = None
        if chunks > 1:
            flows, sums = empty(*self.scan.states), empty(G, chunks, E)
            self.flow_back(delta=delta, BC=BC, p_rates=rates, dy=dy, flows=flows, sums=sums)
            self.carry(rates=rates, states=flows, sums=sums)
        saved = empty(G, chunks, self.groups, NP, E)
        scan_du, draw = empty(*u.shape), empty(*u.shape)
        dBC = empty(self.blocks, *BC.shape)
        drates = empty(2, G // 2 * chunks, NP, E)
        self.last(
            u=u, delta=delta, slopes=slopes, BC=BC, p_rates=rates, dy=dy, states=states,
            flows=flows, saved=saved, du=scan_du, draw=draw, dBC=dBC, drates=drates,
        )  # fmt: skip
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        dprojected = empty(*u.shape[:3], self.rank_block + 2 * NP)
        self.select(
            x_proj=x_proj, dt_proj=dt_proj, scan_du=scan_du, draw=draw,
            partial_dBC=dBC, du=du, dprojected=dprojected,
        )  # fmt: skip
        partial = empty(self.splits, 2, 2 * self.rank_block + 2 * NP + 1, E)
        self.weights(u=u, dt=dt, draw=draw, dprojected=dprojected, partial=partial)
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
    # Directions and sequences may have any stride: dy is often one tensor for both directions.
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


def _definition(*arguments: Tensor) -> list[Tensor]:
    *inputs, dy = arguments
    return gradients_of(selective_scan_reference, inputs, (dy,))


selective_scan_backward = Op(
    "fastvim::selective_scan_triton_backward", _run, _fake, definition=_definition
)
