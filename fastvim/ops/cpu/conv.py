"""conv_pool on the CPU: convolution and SiLU fused, forward and backward.

B  batch, L  tokens in path order, E  inner width, K  taps
These dominate the runtime; the rest uses the reference.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.kernels import conv_backward, conv_forward
from fastvim.ops.cpu.threads import blocks_of, parallel
from fastvim.ops.reference import conv_pool_reference


@torch.library.custom_op("fastvim::conv_silu_cpu", mutates_args=())
def _conv_silu(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    """x (B, L, E), taps (2, K, E), bias (2, E), contiguous float32, to (2, B, L, E)."""
    out = x.new_empty(2, *x.shape)
    parallel(conv_forward, x.shape[0] * blocks_of(x.shape[2]), x, taps, bias, out)
    return out


@_conv_silu.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    return x.new_empty(2, *x.shape)


@torch.library.custom_op("fastvim::conv_silu_cpu_backward", mutates_args=())
def _conv_silu_backward(
    x: Tensor, taps: Tensor, bias: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch = x.shape[0]
    dx, dtaps, dbias = (
        torch.empty_like(x),
        x.new_empty(batch, *taps.shape),
        x.new_empty(batch, *bias.shape),
    )
    tasks = batch * blocks_of(x.shape[2])
    parallel(conv_backward, tasks, x, taps, bias, dout.contiguous(), dx, dtaps, dbias)
    return dx, dtaps.sum(0), dbias.sum(0)


@_conv_silu_backward.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(taps), torch.empty_like(bias)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = _conv_silu_backward(*ctx.saved_tensors, dout)
    return gradients


_conv_silu.register_autograd(_backward, setup_context=_setup_context)


def conv_silu_numba(x_path: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`fastvim.ops.reference.conv_silu` for float32 tensors on the CPU."""
    taps = weight.to(x_path.dtype).mT.contiguous()
    out: Tensor = _conv_silu(x_path.contiguous(), taps, bias.to(x_path.dtype).contiguous())
    return out


conv_pool_numba = functools.partial(conv_pool_reference, convolve=conv_silu_numba)
