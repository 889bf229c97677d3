"""selective_scan on the CPU: step sizes and the recurrence in one pass over the steps.

B  batch, S  steps, E  inner width, N  state size, R  rank of the step-size projection
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastvim.ops.cpu.threads import blocks_of, ready, run
from fastvim.ops.reference import selective_scan_reference, without_autocast
from fastvim.ops.registered import Op, gradients_of

SHARE = 4  # images of a task, at most


def _select(u: Tensor, x_proj: Tensor) -> Tensor:
    """(2, B, S, E) to the values of dt, B and C, (2, B, S, R + 2N)."""
    selected = torch.bmm(u.flatten(1, 2), x_proj.mT)
    return selected.view(2, *u.shape[1:3], x_proj.shape[1])


def _sizes(u: Tensor, dt_proj: Tensor, A_log: Tensor) -> tuple[tuple[int, ...], int]:
    """What the kernels read first, and the number of tasks.

    The parameters of a block of channels are prepared once for a share of the images.
    """
    _, B, S, E = u.shape
    shares = -(-B // SHARE)
    return (B, S, E, A_log.shape[2], dt_proj.shape[2], shares), 2 * blocks_of(E) * shares


def compute(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    """All float32 and contiguous."""
    y = torch.empty_like(u)
    sizes, tasks = _sizes(u, dt_proj, A_log)
    run("forward:scan", tasks, sizes, (u, _select(u, x_proj), dt_proj, dt_bias, A_log, y))
    return y


def _fake(u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor) -> Tensor:
    return u.new_empty(u.shape)


def _run_backward(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _, B, S, E = u.shape
    N, R = A_log.shape[2], dt_proj.shape[2]
    selected, dy = _select(u, x_proj), dy.contiguous()
    sizes, tasks = _sizes(u, dt_proj, A_log)
    shares = sizes[-1]
    du, dselected = torch.empty_like(u), u.new_empty(blocks_of(E), 2, B, S, R + 2 * N)
    sums = u.new_zeros(shares, 2, R + N + 1, E)  # of dt_proj, A_log and dt_bias
    inputs = (u, selected, dt_proj, dt_bias, A_log)
    run("backward:scan", tasks, sizes, (*inputs, dy, du, dselected, sums))
    chosen, total = dselected.sum(0).flatten(1, 2), sums.sum(0)
    du = torch.baddbmm(du.flatten(1, 2), chosen, x_proj).view(u.shape)
    dx_proj = torch.bmm(chosen.mT, u.flatten(1, 2))
    ddt_proj, dA_log = total[:, :R].mT.contiguous(), total[:, R : R + N].mT.contiguous()
    return du, dx_proj, ddt_proj, total[:, -1].clone(), dA_log


def _fake_backward(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    inputs = (u, x_proj, dt_proj, dt_bias, A_log)
    return tuple(map(torch.empty_like, inputs))  # type: ignore[return-value]


def _backward_definition(*arguments: Tensor) -> list[Tensor]:
    *inputs, dy = arguments
    return gradients_of(selective_scan_reference, inputs, (dy,))


_backward_op = Op(
    "fastvim::selective_scan_cpu_backward",
    _run_backward,
    _fake_backward,
    device="cpu",
    definition=_backward_definition,
)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward_op(*ctx.saved_tensors, dy))


_op = Op("fastvim::selective_scan_cpu", compute, _fake, _setup_context, _backward, device="cpu")


@without_autocast
def selective_scan_cpu(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` for CPU tensors of at most 32 bits."""
    inputs = [ready(t) for t in (u, x_proj, dt_proj, dt_bias, A_log)]
    y: Tensor = _op(*inputs)
    return y.to(u.dtype)
