"""Masked layers on GPUs: the unmasked kernels, with tokens moved into path order and back.

B  batch, n  kept tokens, E  inner width, S  segments
A mask usually keeps a quarter of the tokens, so moving them is cheap. Three moves serve both ops:
`take` reorders rows, `sum_segments` sums the tokens of each segment, `spread` copies the scan of a
segment to its tokens. `conv_pool` convolves the tokens in path order without pooling and sums the
segments afterwards. The gradient of each move is again one of the three. Segments are summed member
by member, without atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.reference import conv_pool_reference
from fastvim.ops.traversal import Pooling, Segments
from fastvim.ops.triton.conv_pool import conv_pool_triton
from fastvim.ops.triton.expand_gate import expand_gate_triton
from fastvim.ops.triton.launch import Launch, Launches, Op

CHANNELS = 128  # of a program
ROWS = 8  # of a program, except for sums

_launches: Launches[Launch] = Launches()


@triton.jit
def _take_kernel(
    source, table, out, scale: tl.constexpr,
    rows, n, stride_sequence, stride_row, E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (G, n, E) = scale · rows of source (G, length, E), chosen by table (G, n)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    mask = present[:, None] & (columns < E)[None, :]
    source_row = tl.load(table + row, mask=present, other=0)
    p_source = source + (row // n).to(tl.int64) * stride_sequence + source_row * stride_row
    value = tl.load(p_source[:, None] + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64)[:, None] * E + columns[None, :], value * scale, mask=mask)


@triton.jit
def _spread_kernel(
    y, order, index, out, rows, n, S, E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """out (B, n, E) in memory order: y at the segment of each token, averaged over directions."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = row < rows
    mask = present[:, None] & (columns < E)[None, :]
    batch = (row // n).to(tl.int64)
    sequences = rows // n
    first = batch * S + tl.load(index + row, mask=present, other=0)
    second = (sequences + batch) * S + tl.load(index + rows + row, mask=present, other=0)
    value = tl.load(y + first[:, None] * E + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    value += tl.load(y + second[:, None] * E + columns[None, :], mask=mask, other=0.0)
    token = batch * n + tl.load(order + row, mask=present, other=0)
    tl.store(out + token[:, None] * E + columns[None, :], 0.5 * value, mask=mask)


@triton.jit
def _sum_segments_kernel(
    values, members, starts, out, scale: tl.constexpr,
    B, n, S, stride_direction, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (2, B, S, E) = scale · sum of values (2, B, n, E) over the members of each segment.

    members (2, B, n) lists rows of values, segment after segment. starts (2, B, S + 1) tells where
    in members a segment begins.
    """
    sequence = (tl.program_id(0) // S).to(tl.int64)  # of both directions
    segment = tl.program_id(0) % S
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < E
    p_values = values + sequence // B * stride_direction + sequence % B * n * E + columns
    begin = tl.load(starts + sequence * (S + 1) + segment)
    end = tl.load(starts + sequence * (S + 1) + segment + 1)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(begin, end):
        row = tl.load(members + sequence * n + i)
        total += tl.load(p_values + row * E, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (sequence * S + segment) * E + columns, total * scale, mask=mask)


def _blocks(E: int) -> tuple[int, int]:
    """Channels of a program, and the number of programs that cover E channels."""
    block = min(CHANNELS, triton.next_power_of_2(E))
    return block, triton.cdiv(E, block)


def _take(source: Tensor, table: Tensor, inverse: Tensor, scale: float) -> Tensor:
    if source.stride(2) != 1:
        source = source.contiguous()
    G, n = table.shape
    E = int(source.shape[2])
    out = torch.empty((G, n, E), dtype=source.dtype, device=source.device)
    block, blocks = _blocks(E)
    launch = _launches.get(
        (source, table),
        ("take", scale),
        lambda: Launch(
            _take_kernel, device=source.device, grid=(triton.cdiv(G * n, ROWS), blocks),
            scale=scale, rows=G * n, n=n,
            stride_sequence=source.stride(0), stride_row=source.stride(1),
            E=E, ROWS=ROWS, BLOCK=block,
        ),
    )  # fmt: skip
    if out.numel():
        launch(source=source, table=table, out=out)
    return out


def _take_fake(source: Tensor, table: Tensor, inverse: Tensor, scale: float) -> Tensor:
    return source.new_empty((*table.shape, source.shape[2]))


def _take_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, table, inverse, ctx.scale = inputs
    ctx.save_for_backward(table, inverse)


def _take_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    table, inverse = ctx.saved_tensors
    return take(dout, inverse, table, ctx.scale), None, None, None


# Reorders rows: (source (G, n, E), table (G, n), its inverse (G, n), scale) to (G, n, E).
take = Op("fastvim::take_triton", _take, _take_fake, _take_setup_context, _take_backward)


def _sum(
    values: Tensor,
    index: Tensor,
    members: Tensor,
    starts: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    values = values.contiguous()
    _, B, n, E = values.shape
    S = starts.shape[2] - 1
    out = torch.empty((2, B, S, int(E)), dtype=dtype, device=values.device)
    block, blocks = _blocks(int(E))
    launch = _launches.get(
        (values, members, starts),
        ("sum", scale, dtype),
        lambda: Launch(
            _sum_segments_kernel, device=values.device, grid=(2 * B * S, blocks), num_warps=1,
            scale=scale, B=B, n=n, S=S,
            stride_direction=values.stride(0) if values.shape[0] == 2 else 0,
            E=int(E), BLOCK=block,
        ),
    )  # fmt: skip
    if out.numel():
        launch(values=values, members=members, starts=starts, out=out)
    return out


def _sum_fake(
    values: Tensor,
    index: Tensor,
    members: Tensor,
    starts: Tensor,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    shape = (2, values.shape[1], starts.shape[2] - 1, values.shape[3])
    return values.new_empty(shape, dtype=dtype)


def _sum_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.scale, ctx.dtype = inputs[4], inputs[0].dtype


def _sum_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (index,) = ctx.saved_tensors
    table = index.flatten(0, 1)
    source = dout.to(ctx.dtype).flatten(0, 1)
    if torch.is_grad_enabled():
        # Gradients of gradients: the table is no permutation and has no inverse, as `take` needs.
        rows = table[:, :, None].expand(-1, -1, source.shape[2])
        dvalues = source.gather(1, rows) * ctx.scale
    else:
        dvalues = take(source, table, table, ctx.scale)
    dvalues = dvalues.view(*index.shape, dout.shape[3])
    return dvalues, None, None, None, None, None


# Sums segments: (values (2, B, n, E), index, members, starts, scale, dtype of the sums) to
# (2, B, S, E). Values of shape (1, B, n, E) serve both directions.
sum_segments = Op(
    "fastvim::sum_segments_triton", _sum, _sum_fake, _sum_setup_context, _sum_backward
)


def _spread(y: Tensor, order: Tensor, index: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    y = y.contiguous()
    B, n = order.shape
    S, E = y.shape[2], int(y.shape[3])
    out = torch.empty((B, n, E), dtype=torch.float32, device=y.device)
    block, blocks = _blocks(E)
    launch = _launches.get(
        (y, order, index),
        "spread",
        lambda: Launch(
            _spread_kernel, device=y.device, grid=(triton.cdiv(B * n, ROWS), blocks),
            rows=B * n, n=n, S=S, E=E, ROWS=ROWS, BLOCK=block,
        ),
    )  # fmt: skip
    if out.numel():
        launch(y=y, order=order, index=index, out=out)
    return out


def _spread_fake(y: Tensor, order: Tensor, index: Tensor, tokens: Tensor, starts: Tensor) -> Tensor:
    return y.new_empty((*order.shape, y.shape[3]), dtype=torch.float32)


def _spread_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, _, *tables = inputs
    ctx.dtype = y.dtype
    ctx.save_for_backward(*tables)


def _spread_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    index, tokens, starts = ctx.saved_tensors
    dy = sum_segments(dout[None], index, tokens, starts, 0.5, ctx.dtype)
    return dy, None, None, None, None


# Copies to tokens: (y (2, B, S, E), order, index, tokens, starts) to (B, n, E) in float32.
spread = Op(
    "fastvim::spread_triton", _spread, _spread_fake, _spread_setup_context, _spread_backward
)


def conv_pool_masked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.conv_pool` for masked GPU tensors of at most 32 bits."""
    if pooling == "max" and segments.pools:
        options: dict[str, Any] = {"pooling": pooling, "pool_scale": pool_scale}
        return conv_pool_reference(x, weight, bias, D, segments, **options)
    masked = segments.masked
    assert masked is not None
    path = take(x, masked.order, masked.ids_restore, 1.0)
    scale, dtype = (1.0, torch.float32) if segments.pools else (pool_scale, x.dtype)
    # Values that are summed afterwards stay in float32 until then.
    values, skip = conv_pool_triton(path, weight, bias, D, _line(x), pool_scale=scale, dtype=dtype)
    if segments.pools:
        mean = pool_scale / segments.segment_size
        tables = (masked.index, masked.members, masked.starts)
        values = sum_segments(values, *tables, mean, x.dtype)
    return values, take(skip, masked.ids_restore, masked.order, 1.0)


def expand_gate_masked(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate` for masked GPU tensors of at most 32 bits."""
    masked = segments.masked
    assert masked is not None
    scanned = spread(y, masked.order, masked.index, masked.tokens, masked.starts)
    return expand_gate_triton(skip, z, scanned[None], _line(skip), norm_weight, norm_bias, eps=eps)


def _line(x: Tensor) -> Segments:
    """The walk over tokens (B, n, E) in memory order, without pooling."""
    return Segments((x.shape[1],), (0,), (False,))
