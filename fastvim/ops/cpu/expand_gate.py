"""expand_gate on the CPU: broadcast, norm and gate in one pass over the tokens.

B  batch, L  tokens, E  inner width, S  segments
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.threads import bits_of, blocks_of, ready, rows_of, run
from fastvim.ops.cpu.walks import Walk, arguments_of, segments_of, walk_of
from fastvim.ops.recompute import restored, saved_for
from fastvim.ops.reference import expand_gate_reference
from fastvim.ops.registered import Op, gradients_of
from fastvim.ops.traversal import Segments

TOKENS = 16  # of a task
BACKWARD_TOKENS = 64


def _sizes(
    skip: Tensor, z: Tensor, walk: Walk, stretch: int, normed: bool, eps: float
) -> tuple[int, ...]:
    B, L, E = skip.shape
    sizes = (B, L, E, walk.steps, stretch, int(normed))
    return (*sizes, z.stride(0), z.stride(1), *walk.strides, bits_of(eps))


def _run(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """All float32; z with any strides but 1 along E, the others contiguous."""
    out = torch.empty_like(skip)
    fill(out, skip, z, y, walk_of(walk, order, index), weight, bias, eps)
    return out


def fill(
    out: Tensor,
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    tables: Walk,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> None:
    """The same into `out`, which may be `skip`: a token is read before it is written."""
    B, L, _ = skip.shape
    sizes = _sizes(skip, z, tables, TOKENS, weight is not None, eps)
    arrays = (skip, z, y, tables.tokens, weight, bias, out)
    run("forward:expand_gate", -(-B * L // TOKENS), sizes, arrays)


def _fake(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.empty_like(skip)


def _run_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, L, E = skip.shape
    tables, dout = walk_of(walk, order, index), dout.contiguous()
    tasks = -(-B * L // BACKWARD_TOKENS)
    dskip, dz, dy = torch.empty_like(skip), torch.empty_like(skip), torch.zeros_like(y)
    sums = skip.new_zeros(tasks, 2, E)  # of weight and bias
    sizes = _sizes(skip, z, tables, BACKWARD_TOKENS, weight is not None, eps)
    arrays = (skip, z, y, tables.tokens, weight, bias, dout, dskip, dz, sums)
    run("backward:expand_gate", tasks, sizes, arrays)
    sizes = (B, L, E, tables.steps, *tables.strides)
    run("backward:sum_segments", B * blocks_of(E), sizes, (dskip, tables.order, tables.segment, dy))
    dweight, dbias = sums.sum(0)
    return dskip, dz, dy, dweight.clone(), dbias.clone()


def _fake_backward(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    vector = skip.new_empty(skip.shape[2])
    dz = torch.empty_like(skip)
    return torch.empty_like(skip), dz, torch.empty_like(y), vector, vector.clone()


def _backward_definition(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    walk: list[int],
    order: Tensor | None,
    index: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dout: Tensor,
) -> list[Tensor]:
    segments = segments_of(walk, order, index)

    def forward(skip: Tensor, z: Tensor, y: Tensor, *norm: Tensor) -> Tensor:
        return expand_gate_reference(skip, z, y, segments, *norm, eps=eps)

    norm = [t for t in (weight, bias) if t is not None]
    found = gradients_of(forward, (skip, z, y, *norm), (dout,))
    return [*found, *(skip.new_empty(0) for _ in range(5 - len(found)))]


_backward_op = Op(
    "fastvim::expand_gate_cpu_backward",
    _run_backward,
    _fake_backward,
    device="cpu",
    definition=_backward_definition,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    skip, z, y, ctx.walk, order, index, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(z, y, order, index, weight, bias, *saved_for(ctx, skip))


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    z, y, order, index, weight, bias, *saved = ctx.saved_tensors
    skip = restored(ctx, saved)
    inputs = (skip, z, y, ctx.walk, order, index, weight, bias, ctx.eps)
    dskip, dz, dy, dweight, dbias = _backward_op(*inputs, dout)
    parameters = (None if weight is None else dweight, None if bias is None else dbias)
    return (dskip, dz, dy, None, None, None, *parameters, None)


_op = Op("fastvim::expand_gate_cpu", _run, _fake, _setup_context, _backward, device="cpu")


def expand_gate_cpu(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate` for CPU tensors of at most 32 bits."""
    values = (ready(skip), rows_of(z), ready(y))
    norm = [None if t is None else ready(t) for t in (norm_weight, norm_bias)]
    out: Tensor = _op(*values, *arguments_of(segments), *norm, eps)
    return out.to(skip.dtype)
