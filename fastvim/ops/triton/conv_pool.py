"""conv_pool on GPUs: both convolutions, SiLU, pooling and the skip in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments
A row is the path's fastest axis, cut into `pieces` runs of P tokens. The kernels are in
`conv_pool_kernels`, the gradients in `conv_pool_backward`.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton
from torch import Tensor

from fastvim.ops.traversal import Pooling, Segments
from fastvim.ops.triton.common import INTERPRETED, collapse, four_taps, pad_axes, pools_rows
from fastvim.ops.triton.conv_pool_backward import backward_op
from fastvim.ops.triton.conv_pool_kernels import cells_kernel, channels_kernel, runs_kernel
from fastvim.ops.triton.launch import Launch, Launches, Op

CHANNELS = 64  # of a program
PER_THREAD = 2  # channels of a thread
WARPS = 4
MAX_RUN = 16  # most tokens of a run; the loop over them is unrolled
AHEAD = 16  # tokens that are loaded before they are used
MAX_RUNS = 64  # most runs of a program
MAX_VALUES = 1024  # most values of a program: runs times channels
# `channels_kernel` serves cells and rows that are no longer than this:
MAX_CELL = 16  # tokens of a cell, the channels of an image
MAX_CELLS = 256  # cells of a row
SCATTERED_SEGMENTS = 16  # of a program of `cells_kernel`


_launches: Launches[Launch] = Launches()


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: str,
    pool_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    if x.stride(2) != 1:
        x = x.contiguous()
    weight, bias, D = four_taps(weight), bias.contiguous(), D.contiguous()
    B, L, E = x.shape
    segments = Segments.unflatten(walk)
    pooled = torch.empty(2, B, segments.num_segments, E, dtype=dtype, device=x.device)
    skip = torch.empty(B, L, E, dtype=x.dtype, device=x.device)
    if skip.numel() == 0:
        return pooled, skip
    launch = _launches.get(
        (x, weight, bias, D),
        (segments, pooling, pool_scale, dtype),
        lambda: _plan(x, segments, pooling, pool_scale),
    )
    launch(x=x, weight=weight, bias=bias, D=D, pooled=pooled, skip=skip)
    return pooled, skip


def _plan(x: Tensor, segments: Segments, pooling: str, pool_scale: float) -> Launch:
    """The launch of the kernel that suits the traversal."""
    B, L, E = x.shape[0], x.shape[1], int(x.shape[2])
    S, segment_size = segments.num_segments, int(segments.segment_size)
    sizes, strides, pooled = collapse(segments)
    (n0, n1, n2), (m0, m1, m2) = pad_axes(sizes, 1), pad_axes(strides, 0)
    divides = segments.pools and pooling == "mean"
    shared: dict[str, Any] = {
        "B": B, "L": L, "S": S, "E": E, "n1": n1, "m0": m0, "m1": m1, "m2": m2,
        "scale": pool_scale / segment_size if divides else pool_scale,
        "direction": B * S * E, "stride_batch": x.stride(0), "stride_token": x.stride(1),
        "MAX": pooling == "max", "FAST": x.dtype != torch.float32 and not INTERPRETED,
    }  # fmt: skip
    pieces = triton.cdiv(n2, min(MAX_RUN, n2))
    if segments.pools:
        pieces = triton.next_power_of_2(pieces)
    block = min(CHANNELS, triton.next_power_of_2(E))
    if not segments.pools or (pools_rows(pooled) and pieces <= MAX_RUNS):
        P = triton.cdiv(n2, pieces)
        group = pieces if segments.pools else 1
        runs = max(group, PER_THREAD * WARPS * 32 // block)
        block = min(block, MAX_VALUES // runs)
        return Launch(
            runs_kernel, device=x.device,
            grid=(triton.cdiv(B * (L // n2) * pieces, runs), triton.cdiv(E, block)),
            num_warps=max(1, runs * block // (PER_THREAD * 32)),
            pieces=pieces, n2=n2, P=P, EVEN=n2 == pieces * P, SHORT=n2 < 4,
            POOLED=segments.pools, AHEAD=AHEAD, RUNS=runs, GROUP=group, BLOCK=block, **shared,
        )  # fmt: skip
    if pooled[-2:] == [True, False] and 3 <= n2 <= MAX_CELL and n1 <= MAX_CELLS:
        runs = max(1, PER_THREAD * WARPS * 32 // block)
        return Launch(
            channels_kernel, device=x.device,
            grid=(triton.cdiv(B * n0, runs), triton.cdiv(E, block)), num_warps=WARPS,
            n0=n0, CELL=n2, RUNS=runs, BLOCK=block, **shared,
        )  # fmt: skip
    k1, s0, s1 = _axis_pair(sizes, pooled, pool=False)
    q1, t0, t1 = _axis_pair(sizes, pooled, pool=True)
    return Launch(
        cells_kernel, device=x.device,
        grid=(triton.cdiv(B * S, SCATTERED_SEGMENTS), triton.cdiv(E, block)), num_warps=WARPS,
        n2=n2, k1=k1, s0=s0, s1=s1, q1=q1, t0=t0, t1=t1, P=segment_size,
        RUNS=SCATTERED_SEGMENTS, BLOCK=block, **shared,
    )  # fmt: skip


def _axis_pair(sizes: list[int], pooled: list[bool], pool: bool) -> tuple[int, int, int]:
    """For the axes that are pooled, or are not: size of the fast one, and strides of both.

    Strides are along the path. There are two such axes at most, as `cells_kernel` expects. A single
    one is the slow axis.
    """
    axes = [axis for axis in range(len(sizes)) if pooled[axis] == pool]
    strides = [prod(sizes[axis + 1 :]) for axis in axes]
    if len(axes) == 2:
        return sizes[axes[1]], strides[0], strides[1]
    return 1, strides[0] if axes else 0, 0


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    pooling: str,
    pool_scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    B, L, E = x.shape
    steps = Segments.unflatten(walk).num_segments
    return x.new_empty(2, B, steps, E, dtype=dtype), x.new_empty(B, L, E)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.walk, ctx.pooling, ctx.pool_scale, _ = inputs[4:]


def _backward(ctx: Any, dpooled: Tensor, dskip: Tensor) -> tuple[Tensor | None, ...]:
    op = backward_op(Segments.unflatten(ctx.walk), ctx.pooling)
    gradients = op(*ctx.saved_tensors, ctx.walk, ctx.pooling, ctx.pool_scale, dpooled, dskip)
    return (*gradients, None, None, None, None)


_op = Op("fastvim::conv_pool_triton", _run, _fake, _setup_context, _backward)


def conv_pool_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.conv_pool` for unmasked GPU tensors of at most 32 bits.

    `dtype` is that of the pooled values; None for x's.
    """
    options = (segments.flatten(), pooling, pool_scale, dtype or x.dtype)
    out: tuple[Tensor, Tensor] = _op(x, weight, bias, D, *options)
    return out
