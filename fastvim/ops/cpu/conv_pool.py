"""conv_pool on the CPU: both convolutions, SiLU, pooling and the skip in one pass over the tokens.

B  batch, L  tokens, E  inner width, K  taps, S  segments
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.threads import bits_of, blocks_of, ready, rows_of, run
from fastvim.ops.cpu.walks import Walk, arguments_of, segments_of, walk_of
from fastvim.ops.recompute import note
from fastvim.ops.reference import conv_pool_reference
from fastvim.ops.registered import Op, gradients_of
from fastvim.ops.traversal import Pooling, Segments

STRETCH = 128  # path positions of a task, about


def compute(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """All float32; x with any strides but 1 along E, the others contiguous."""
    B, L, E = x.shape
    tables = walk_of(walk, order, index)
    pooled, skip = x.new_zeros(2, B, tables.steps, E), x.new_empty(B, L, E)
    chunks, stretch = _split(L, tables.run)
    sizes = (*_sizes(x, weight, tables, chunks, stretch), bits_of(scale / tables.size))
    arrays = (x, weight, bias, D, tables.order, tables.segment, pooled, skip)
    run("forward:conv_pool", B * blocks_of(E) * chunks, sizes, arrays)
    return pooled, skip


def _split(length: int, run: int) -> tuple[int, int]:
    """Stretches of the path that are tasks of their own, and the positions of each.

    No run of tokens of one segment is in two stretches.
    """
    chunks = -(-length // STRETCH)
    stretch = -(-length // (chunks * run)) * run if length else STRETCH
    return -(-length // stretch), stretch


def _sizes(x: Tensor, weight: Tensor, walk: Walk, chunks: int, stretch: int) -> tuple[int, ...]:
    B, L, E = x.shape
    directions, batch = walk.strides
    sizes = (B, L, E, weight.shape[2], walk.steps, chunks, stretch)
    return (*sizes, x.stride(0), x.stride(1), batch, directions, batch)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    B, L, E = x.shape
    segments = Segments.unflatten(walk)
    count = segments.num_segments if segments.pools else L
    return x.new_empty(2, B, count, E), x.new_empty(B, L, E)


def _run_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, E = x.shape
    tables, K = walk_of(walk, order, index), weight.shape[2]
    dpooled, dskip = dpooled.contiguous(), dskip.contiguous()
    chunks, stretch = _split(L, 1)
    dx = x.new_empty(B, L, E)
    sums = x.new_empty(B * chunks, 2, K + 2, E)  # of taps, bias and D
    sizes = (*_sizes(x, weight, tables, chunks, stretch), bits_of(scale / tables.size))
    arrays = (x, weight, bias, D, tables.order, tables.segment, dpooled, dskip, dx, sums)
    run("backward:conv_pool", B * blocks_of(E) * chunks, sizes, arrays)
    total = sums.sum(0)
    return dx, total[:, :K].mT.contiguous(), total[:, K].clone(), total[:, K + 1].clone()


def _fake_backward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parameters = (torch.empty_like(t) for t in (weight, bias, D))
    return (x.new_empty(x.shape), *parameters)  # type: ignore[return-value]


def _backward_definition(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    scale: float,
    dpooled: Tensor,
    dskip: Tensor,
) -> list[Tensor]:
    segments = segments_of(walk, order, index)

    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, bias, D = inputs
        return conv_pool_reference(x, weight, bias, D, segments, pool_scale=scale)

    return gradients_of(forward, (x, weight, bias, D), (dpooled, dskip))


_backward_op = Op(
    "fastvim::conv_pool_cpu_backward",
    _run_backward,
    _fake_backward,
    device="cpu",
    definition=_backward_definition,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, D, ctx.walk, order, index, ctx.scale = inputs
    ctx.save_for_backward(x, weight, bias, D, order, index)


def _backward(ctx: Any, dpooled: Tensor, dskip: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, D, order, index = ctx.saved_tensors
    inputs = (x, weight, bias, D, ctx.walk, order, index, ctx.scale)
    return (*_backward_op(*inputs, dpooled, dskip), None, None, None, None)


_op = Op("fastvim::conv_pool_cpu", compute, _fake, _setup_context, _backward, device="cpu")


def _skip_of(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    order: Tensor | None,
    index: Tensor | None,
    *,
    walk: Sequence[int],
    scale: float,
) -> Tensor:
    skip: Tensor = _op(x, weight, bias, D, walk, order, index, scale)[1]
    return skip


def conv_pool_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.conv_pool` for CPU tensors of at most 32 bits.

    Maxima are taken of all convolved tokens, in a second pass.
    """
    dtype = x.dtype
    x = rows_of(x)
    parameters = [ready(t) for t in (weight, bias, D)]
    maxima = pooling == "max" and segments.pools
    walk, order, index = arguments_of(_apart(segments) if maxima else segments)
    scale = 1.0 if maxima else pool_scale
    pooled, skip = _op(x, *parameters, walk, order, index, scale)
    again = functools.partial(_skip_of, walk=walk, scale=scale)
    note(skip, again, x, *parameters, order, index)
    if maxima:
        pooled = segments.reduce(pooled, "max") * pool_scale
    return pooled.to(dtype), skip.to(dtype)


def _apart(segments: Segments) -> Segments:
    """The same walk, each token a segment of its own."""
    masked = segments.masked
    if masked is not None:
        steps = torch.arange(masked.index.shape[2]).expand_as(masked.index)
        masked = replace(masked, index=steps)
    return replace(segments, pooled=(False,) * len(segments.pooled), masked=masked)
