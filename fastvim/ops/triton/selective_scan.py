"""selective_scan on GPUs: the registered op. Its kernels are in `selective_scan_kernels`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvim.ops.triton.launch import Launches, Op
from fastvim.ops.triton.selective_scan_backward import selective_scan_backward
from fastvim.ops.triton.selective_scan_kernels import Scan, prepared

_launches: Launches[Scan] = Launches()


def _run(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    inputs = prepared(u, x_proj, dt_proj, dt_bias, A_log)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    if y.numel() == 0:
        return y
    scan = _launches.get(inputs, None, lambda: Scan(*inputs))
    scan(y, inputs[0], *scan.selected(*inputs))
    return y


def _fake(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    return u.new_empty(u.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    return tuple(selective_scan_backward(*ctx.saved_tensors, dy))


_op = Op("fastvim::selective_scan_triton", _run, _fake, _setup_context, _backward)


def selective_scan_triton(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` for GPU tensors of at most 32 bits."""
    out: Tensor = _op(u, x_proj, dt_proj, dt_bias, A_log)
    return out
