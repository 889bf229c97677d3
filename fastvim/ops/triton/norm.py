"""add_norm on GPUs: residual sum and norm in one pass, their gradients in another.

M  rows (batch x tokens), d  model width
The backward pass starts from the sum, which is an output of the forward pass. Gradients of weight
and bias are summed over the rows of each program first, then over the programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvim.ops.reference import NormKind, add_norm_reference
from fastvim.ops.registered import gradients_of
from fastvim.ops.triton.launch import Launch, Launches, Op, multiprocessors
from fastvim.ops.triton.sums import sum_parts

TILE = 1024  # values that a program holds
WARPS = 4
PROGRAMS = 4  # most of the backward pass, for each multiprocessor

_launches: Launches[Launch] = Launches()
_backward_launches: Launches[Launch] = Launches()


@triton.jit
def _add_norm_kernel(
    hidden, residual, weight, bias, normed, total, M, d, eps: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (rows < M)[:, None] & (columns < d)[None, :]
    offsets = rows[:, None].to(tl.int64) * d + columns[None, :]
    b_total = tl.load(hidden + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        b_total += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(total + offsets, b_total, mask=mask)
    b_centred = b_total
    if not RMS:
        mean = tl.sum(b_total, axis=1) / d
        b_centred = tl.where(mask, b_total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(b_centred * b_centred, axis=1) / d + eps)
    b_weight = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)
    b_normed = b_centred * scale[:, None] * b_weight[None, :]
    if HAS_BIAS:
        b_bias = tl.load(bias + columns, mask=columns < d, other=0.0).to(tl.float32)
        b_normed += b_bias[None, :]
    tl.store(normed + offsets, b_normed, mask=mask)


@triton.jit
def _add_norm_backward_kernel(
    total, weight, dnormed, dtotal, dresidual, dhidden, dweight, dbias,
    M, d, eps: tl.constexpr, programs,
    HAS_DTOTAL: tl.constexpr, HAS_BIAS: tl.constexpr, RMS: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dresidual is the gradient of the sum. APART: dhidden is the same in another dtype."""
    columns = tl.arange(0, BLOCK)
    b_weight = tl.load(weight + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :]
    sum_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    sum_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(tl.program_id(0) * ROWS, M, programs * ROWS):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < M)[:, None] & (columns < d)[None, :]
        offsets = rows[:, None].to(tl.int64) * d + columns[None, :]
        b_total = tl.load(total + offsets, mask=mask, other=0.0)
        gradient = tl.load(dnormed + offsets, mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            mean = tl.sum(b_total, axis=1) / d
            b_total = tl.where(mask, b_total - mean[:, None], 0.0)
        scale = tl.rsqrt(tl.sum(b_total * b_total, axis=1) / d + eps)[:, None]
        unit = b_total * scale
        sum_weight += gradient * unit
        if HAS_BIAS:
            sum_bias += gradient
        gradient *= b_weight
        b_dtotal = gradient - unit * (tl.sum(gradient * unit, axis=1) / d)[:, None]
        if not RMS:
            b_dtotal -= (tl.sum(gradient, axis=1) / d)[:, None]
        b_dtotal *= scale
        if HAS_DTOTAL:
            b_dtotal += tl.load(dtotal + offsets, mask=mask, other=0.0)
        tl.store(dresidual + offsets, b_dtotal, mask=mask)
        if APART:
            tl.store(dhidden + offsets, b_dtotal, mask=mask)
    o_sums = tl.program_id(0) * d + columns
    tl.store(dweight + o_sums, tl.sum(sum_weight, axis=0), mask=columns < d)
    if HAS_BIAS:
        tl.store(dbias + o_sums, tl.sum(sum_bias, axis=0), mask=columns < d)


def _run(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    hidden, weight = hidden.contiguous(), weight.contiguous()
    residual, bias = (None if t is None else t.contiguous() for t in (residual, bias))
    normed = torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
    total = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
    if normed.numel() == 0:
        return normed, total
    launch = _launches.get(
        (hidden, residual, weight, bias),
        (rms, eps),
        lambda: _plan(hidden, residual is not None, bias is not None, rms, eps),
    )
    launch(hidden=hidden, residual=residual, weight=weight, bias=bias, normed=normed, total=total)
    return normed, total


def _rows(hidden: Tensor) -> dict[str, int]:
    """Parameters of both kernels: M rows of width d, and the tile of a program."""
    d = int(hidden.shape[-1])
    block = triton.next_power_of_2(d)
    return {"M": hidden.numel() // d, "d": d, "ROWS": max(1, TILE // block), "BLOCK": block}


def _plan(hidden: Tensor, has_residual: bool, has_bias: bool, rms: bool, eps: float) -> Launch:
    rows = _rows(hidden)
    return Launch(
        _add_norm_kernel,
        device=hidden.device,
        grid=(triton.cdiv(rows["M"], rows["ROWS"]),),
        num_warps=WARPS,
        eps=eps,
        HAS_RESIDUAL=has_residual,
        HAS_BIAS=has_bias,
        RMS=rms,
        **rows,
    )


def _run_backward(
    total: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    has_bias: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the sum, in float32 and in the dtype of `dnormed`, of weight and of bias."""
    total, weight, dnormed = total.contiguous(), weight.contiguous(), dnormed.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    rows = _rows(total)
    programs = min(triton.cdiv(rows["M"], rows["ROWS"]), PROGRAMS * multiprocessors(total.device))
    dresidual = torch.empty(total.shape, dtype=torch.float32, device=total.device)
    apart = dnormed.dtype != torch.float32
    dhidden = torch.empty(total.shape if apart else 0, dtype=dnormed.dtype, device=total.device)
    sums = torch.empty(1 + has_bias, programs, rows["d"], dtype=torch.float32, device=total.device)
    if rows["M"]:
        launch = _backward_launches.get(
            (total, weight, dnormed, dtotal),
            (has_bias, rms, eps),
            lambda: Launch(
                _add_norm_backward_kernel,
                device=total.device,
                grid=(programs,),
                num_warps=WARPS,
                eps=eps,
                programs=programs,
                HAS_DTOTAL=dtotal is not None,
                HAS_BIAS=has_bias,
                RMS=rms,
                APART=apart,
                **rows,
            ),
        )
        launch(
            total=total,
            weight=weight,
            dnormed=dnormed,
            dtotal=dtotal,
            dresidual=dresidual,
            dhidden=dhidden if apart else None,
            dweight=sums[0],
            dbias=sums[1] if has_bias else None,
        )
    dweights = sum_parts(sums).to(weight.dtype)
    dbias = dweights[1].clone() if has_bias else dweights.new_empty(0)
    return dresidual, dhidden, dweights[0].clone(), dbias


def _fake_backward(
    total: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    has_bias: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    apart = dnormed.dtype != torch.float32
    dhidden = dnormed.new_empty(total.shape if apart else 0)
    bias = weight.shape if has_bias else 0
    return torch.empty_like(total), dhidden, torch.empty_like(weight), weight.new_empty(bias)


def _backward_definition(
    total: Tensor,
    weight: Tensor,
    dnormed: Tensor,
    dtotal: Tensor | None,
    has_bias: bool,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def norm(total: Tensor, weight: Tensor) -> Tensor:
        kind: NormKind = "rms" if rms else "layer"
        return add_norm_reference(total, None, weight, kind=kind, eps=eps)[0]

    gradient = dnormed.to(total.dtype)
    dresidual, dweight = gradients_of(norm, (total, weight), (gradient,))
    dresidual = dresidual if dtotal is None else dresidual + dtotal
    apart = dnormed.dtype != torch.float32
    dhidden = dresidual.to(dnormed.dtype) if apart else dnormed.new_empty(0)
    dbias = gradient.sum(tuple(range(gradient.ndim - 1))).to(weight.dtype)
    return dresidual, dhidden, dweight, dbias if has_bias else weight.new_empty(0)


_backward_op = Op(
    "fastvim::add_norm_triton_backward",
    _run_backward,
    _fake_backward,
    definition=_backward_definition,
)


def _fake(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    rms: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, bias, ctx.rms, ctx.eps = inputs
    ctx.has_residual, ctx.has_bias = residual is not None, bias is not None
    ctx.save_for_backward(output[1], weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dnormed: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
    total, weight = ctx.saved_tensors
    if dnormed is None:
        dnormed = torch.zeros_like(total)
    dresidual, dhidden, dweight, dbias = _backward_op(
        total, weight, dnormed, dtotal, ctx.has_bias, ctx.rms, ctx.eps
    )
    return (
        dhidden if dhidden.numel() else dresidual,
        dresidual if ctx.has_residual else None,
        dweight,
        dbias if ctx.has_bias else None,
        None,
        None,
    )


_op = Op("fastvim::add_norm_triton", _run, _fake, _setup_context, _backward)


def add_norm_triton(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.add_norm` for GPU tensors of at most 32 bits."""
    out: tuple[Tensor, Tensor] = _op(hidden, residual, weight, bias, kind == "rms", eps)
    return out
