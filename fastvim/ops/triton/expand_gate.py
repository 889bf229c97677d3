"""expand_gate on GPUs: broadcast of the scan, skip, norm and gate in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments
A program takes a few neighbouring tokens of the path: those of one segment find its scan in the
cache. The norm needs whole rows of E channels, which stay in registers. Rows are held in pieces, so
that no thread is idle where E is not a power of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fastvim.ops.reference import expand_gate_reference
from fastvim.ops.registered import gradients_of
from fastvim.ops.traversal import Segments
from fastvim.ops.triton.common import INTERPRETED, pad_axes, pools_rows, row_pieces
from fastvim.ops.triton.expand_gate_kernels import (
    expand_gate_backward_kernel,
    expand_gate_kernel,
)
from fastvim.ops.triton.launch import Launch, Launches, Op, multiprocessors
from fastvim.ops.triton.sums import sum_parts

PIECE = 256  # most channels of a piece
PER_THREAD = 8  # channels of a piece that a thread holds
WARPS = 4
# The backward pass holds three times as much.
BACKWARD_PIECE = 512
BACKWARD_PER_THREAD = 8
BACKWARD_CHANNELS = 768  # of a row, per warp
PROGRAMS = 16  # most of the backward pass, for each multiprocessor

_launches: Launches[Launch] = Launches()
_backward_launches: Launches[tuple[Launch, int]] = Launches()


def _run(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    skip, z, y, norm_weight, norm_bias = _prepared(skip, z, y, norm_weight, norm_bias)
    out = torch.empty(skip.shape, dtype=skip.dtype, device=skip.device)
    if out.numel() == 0:
        return out
    launch = _launches.get(
        (skip, z, y, norm_weight, norm_bias),
        (tuple(walk), eps),
        lambda: _plan(skip, z, y, Segments.unflatten(walk), norm_weight is not None, eps),
    )
    launch(skip=skip, z=z, y=y, norm_weight=norm_weight, norm_bias=norm_bias, out=out)
    return out


def _run_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of skip, z, one direction of y, and of the norm's weight and bias."""
    skip, z, y, norm_weight, norm_bias = _prepared(skip, z, y, norm_weight, norm_bias)
    dout = dout.contiguous()
    E = int(skip.shape[2])
    dskip = torch.empty(skip.shape, dtype=skip.dtype, device=skip.device)
    dz = torch.empty(skip.shape, dtype=z.dtype, device=skip.device)
    segments = Segments.unflatten(walk)
    scattered = segments.pools and not pools_rows(segments.pooled)
    # Scattered segments: the kernel gives one value per token; they are summed below.
    steps = skip.shape[1] if scattered else segments.num_segments
    dtype = torch.float32 if scattered else y.dtype
    dy = torch.empty((skip.shape[0], steps, E), dtype=dtype, device=skip.device)
    launch, programs = _backward_launches.get(
        (skip, z, y, norm_weight, norm_bias, dout),
        (segments, eps),
        lambda: _plan_backward(skip, z, y, segments, norm_weight is not None, eps),
    )
    sums = None
    if norm_weight is not None:
        sums = torch.empty((programs, 2, E), dtype=torch.float32, device=skip.device)
    if dskip.numel():
        launch(
            skip=skip, z=z, y=y, norm_weight=norm_weight, norm_bias=norm_bias,
            dout=dout, dskip=dskip, dz=dz, dy=dy, sums=sums,
        )  # fmt: skip
    if scattered:
        dy = segments.sum_of_path(dy).to(y.dtype)
    if norm_weight is None or sums is None:
        none = skip.new_empty(0)
        return dskip, dz, dy, none, none
    dweight, dbias = sum_parts(sums[None])[0].to(norm_weight.dtype).unbind()
    return dskip, dz, dy, dweight.clone(), dbias.clone()


def _prepared(
    skip: Tensor, z: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The inputs with the strides that the kernels expect, and a bias where there is a norm."""
    skip, z = (t if t.stride(2) == 1 else t.contiguous() for t in (skip, z))
    if weight is not None:
        weight = weight.contiguous()
        bias = torch.zeros_like(weight) if bias is None else bias.contiguous()
    # The two directions may be views of the same memory.
    return skip, z, y if y[0].is_contiguous() else y.contiguous(), weight, bias


def _shared(
    skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float
) -> dict[str, Any]:
    """The parameters that both kernels have."""
    (_, n1, n2), (m0, m1, m2) = pad_axes(segments.sizes, 1), pad_axes(segments.strides, 0)
    s0, s1, s2 = pad_axes(segments.segment_strides, 0)
    return {
        "M": skip.shape[0] * skip.shape[1], "L": skip.shape[1], "S": segments.num_segments,
        "E": int(skip.shape[2]), "direction": y.stride(0), "DIRECTIONS": int(y.shape[0]),
        "skip_batch": skip.stride(0), "skip_token": skip.stride(1),
        "z_batch": z.stride(0), "z_token": z.stride(1),
        "n1": n1, "n2": n2, "m0": m0, "m1": m1, "m2": m2, "s0": s0, "s1": s1, "s2": s2,
        "NORM": norm, "eps": eps, "FAST": skip.dtype != torch.float32 and not INTERPRETED,
    }  # fmt: skip


def _plan(skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float) -> Launch:
    block, pieces = row_pieces(int(skip.shape[2]), PIECE)
    rows = max(1, PER_THREAD * WARPS * 32 // block)
    grid = (triton.cdiv(skip.shape[0] * skip.shape[1], rows),)
    return Launch(
        expand_gate_kernel, device=skip.device, grid=grid, num_warps=WARPS,
        ROWS=rows, BLOCK=block, PIECES=pieces, **_shared(skip, z, y, segments, norm, eps),
    )  # fmt: skip


def _plan_backward(
    skip: Tensor, z: Tensor, y: Tensor, segments: Segments, norm: bool, eps: float
) -> tuple[Launch, int]:
    """The launch of the backward pass, and its programs, each with a row of sums."""
    E = int(skip.shape[2])
    block, pieces = row_pieces(E, BACKWARD_PIECE)
    warps = triton.next_power_of_2(triton.cdiv(E, BACKWARD_CHANNELS))
    rows = max(1, BACKWARD_PER_THREAD * warps * 32 // block)
    pooled = pools_rows(segments.pooled)
    run = int(segments.sizes[-1]) if pooled else rows
    programs = min(
        PROGRAMS * multiprocessors(skip.device), triton.cdiv(skip.shape[0] * skip.shape[1], run)
    )
    launch = Launch(
        expand_gate_backward_kernel, device=skip.device, grid=(programs,), num_warps=warps,
        programs=programs, ROWS=rows, BLOCK=block, PIECES=pieces, RUN=run, POOLED=pooled,
        **_shared(skip, z, y, segments, norm, eps),
    )  # fmt: skip
    return launch, programs


def _fake(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> Tensor:
    return skip.new_empty(skip.shape)


def _fake_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = skip.new_empty(0) if norm_weight is None else torch.empty_like(norm_weight)
    dz = z.new_empty(skip.shape)
    return skip.new_empty(skip.shape), dz, y.new_empty(y.shape[1:]), weight, weight.clone()


def _backward_definition(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    segments = Segments.unflatten(walk)

    def forward(skip: Tensor, z: Tensor, y: Tensor, *norm: Tensor) -> Tensor:
        return expand_gate_reference(skip, z, y, segments, *norm, eps=eps)

    norm = [t for t in (norm_weight, norm_bias) if t is not None]
    found = gradients_of(forward, (skip, z, y, *norm), (dout,))
    dskip, dz, dy, *dnorm = found
    dnorm += [skip.new_empty(0)] * (2 - len(dnorm))
    return dskip, dz, dy[0], dnorm[0], dnorm[1]


_backward_op = Op(
    "fastvim::expand_gate_triton_backward",
    _run_backward,
    _fake_backward,
    definition=_backward_definition,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    skip, z, y, ctx.walk, norm_weight, norm_bias, ctx.eps = inputs
    ctx.save_for_backward(skip, z, y, norm_weight, norm_bias)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    skip, z, y, weight, bias = ctx.saved_tensors
    dskip, dz, dy, dweight, dbias = _backward_op(skip, z, y, ctx.walk, weight, bias, ctx.eps, dout)
    return (
        dskip,
        dz,
        dy.expand(y.shape),  # y enters as the mean of its directions: one gradient for both
        None,
        None if weight is None else dweight,
        None if bias is None else dbias,
        None,
    )


_op = Op("fastvim::expand_gate_triton", _run, _fake, _setup_context, _backward)


def expand_gate_triton(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate` for unmasked GPU tensors of at most 32 bits.

    A y of shape (1, B, S, E) is taken as the mean of both directions.
    """
    out: Tensor = _op(skip, z, y, segments.flatten(), norm_weight, norm_bias, eps)
    return out
