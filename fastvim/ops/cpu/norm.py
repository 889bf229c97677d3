"""add_norm on the CPU: residual sum and norm in one pass, their gradients in another.

M  rows (batch x tokens), d  model width
The backward pass starts from the sum, which is an output of the forward pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.threads import bits_of, ready, run
from fastvim.ops.recompute import note
from fastvim.ops.reference import NormKind, add_norm_reference
from fastvim.ops.registered import Op, gradients_of

ROWS = 16  # of a task
BACKWARD_ROWS = 64


def _run(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """All float32 and contiguous, to the norm and the sum."""
    total, normed = torch.empty_like(hidden), torch.empty_like(hidden)
    d = weight.shape[0]
    M = hidden.numel() // d
    sizes = (M, d, ROWS, int(rms), bits_of(eps))
    arrays = (hidden, residual, weight, bias, total, normed)
    run("forward:add_norm", -(-M // ROWS), sizes, arrays)
    return normed, total


def _fake(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(hidden)


def _run_backward(
    total: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor | None, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the sum, of weight and of bias."""
    d = weight.shape[0]
    M = total.numel() // d
    tasks = -(-M // BACKWARD_ROWS)
    dnormed, dtotal = dnormed.contiguous(), None if dtotal is None else dtotal.contiguous()
    dhidden, sums = torch.empty_like(total), total.new_zeros(tasks, 2, d)
    sizes = (M, d, BACKWARD_ROWS, int(rms), bits_of(eps))
    run("backward:add_norm", tasks, sizes, (total, weight, dnormed, dtotal, dhidden, sums))
    dweight, dbias = sums.sum(0)
    return dhidden, dweight.clone(), dbias.clone()


def _fake_backward(
    total: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor | None, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(total), torch.empty_like(weight), torch.empty_like(weight)


def _backward_definition(
    total: Tensor, weight: Tensor, dnormed: Tensor, dtotal: Tensor | None, rms: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def norm(total: Tensor, weight: Tensor) -> Tensor:
        kind: NormKind = "rms" if rms else "layer"
        return add_norm_reference(total, None, weight, kind=kind, eps=eps)[0]

    dhidden, dweight = gradients_of(norm, (total, weight), (dnormed,))
    return (
        dhidden if dtotal is None else dhidden + dtotal,
        dweight,
        dnormed.sum(tuple(range(dnormed.ndim - 1))),
    )


_backward_op = Op(
    "fastvim::add_norm_cpu_backward",
    _run_backward,
    _fake_backward,
    device="cpu",
    definition=_backward_definition,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, bias, ctx.rms, ctx.eps = inputs
    ctx.adds, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(output[1], weight)


def _backward(ctx: Any, dnormed: Tensor, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    dhidden, dweight, dbias = _backward_op(total, weight, dnormed, dtotal, ctx.rms, ctx.eps)
    residual = dhidden if ctx.adds else None
    return dhidden, residual, dweight, dbias if ctx.has_bias else None, None, None


_op = Op("fastvim::add_norm_cpu", _run, _fake, _setup_context, _backward, device="cpu")


def _norm_of(
    total: Tensor, weight: Tensor, bias: Tensor | None, *, rms: bool, eps: float
) -> Tensor:
    normed: Tensor = _op(total, None, weight, bias, rms, eps)[0]
    return normed


def add_norm_cpu(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.add_norm` for CPU tensors of at most 32 bits."""
    first, second, *norm = (
        None if t is None else ready(t) for t in (hidden, residual, weight, bias)
    )
    normed, total = _op(first, second, *norm, kind == "rms", eps)
    note(normed, functools.partial(_norm_of, rms=kind == "rms", eps=eps), total, *norm)
    return normed.to(hidden.dtype), total
