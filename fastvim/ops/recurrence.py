"""The scan as one operator of torch, for programs that are exported: nothing is unrolled.

`fastvim.use_engine("scan")` serves `selective_scan` by torch's `scan` operator, which ONNX has as
`Scan`; `"loop"` by `while_loop`, which torch's compilers can lower. Both take any number of steps.
They are for `torch.export`: without a compiler each step is a call from Python.

B  batch, S  segments, E  inner width, N  state size, R  rank of the step size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan_op
from torch._higher_order_ops.while_loop import while_loop_op

from fastvim.ops.reference import cast, compute_dtype

# From the state (2, B, N, E), A (2, 1, N, E), and Δ, Δu (S, 2, B, 1, E), B, C (S, 2, B, N, 1) of
# all steps to y (S, 2, B, E). The state's last axis is E: the longer one is contiguous.
_Run = Callable[[Tensor, Tensor, list[Tensor]], Tensor]


def selective_scan_operator(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` by torch's `scan`."""
    return _recurrence(u, x_proj, dt_proj, dt_bias, A_log, _by_scan)


def selective_scan_loop(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor
) -> Tensor:
    """`fastvim.ops.selective_scan` by torch's `while_loop`."""
    return _recurrence(u, x_proj, dt_proj, dt_bias, A_log, _by_loop)


def _recurrence(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, A_log: Tensor, run: _Run
) -> Tensor:
    dtype, rank, (batch, steps) = compute_dtype(u), dt_proj.shape[2], u.shape[1:3]
    states = A_log.shape[-1]
    # Direction 1 is flipped once, before anything is made of it: both then run forwards.
    x = cast(torch.stack([u[0], u[1].flip(1)]), dtype).flatten(1, 2)  # (2, B·S, E)
    dt, B, C = torch.bmm(x, cast(x_proj, dtype).mT).split([rank, states, states], dim=-1)
    delta = F.softplus(torch.baddbmm(cast(dt_bias, dtype)[:, None], dt, cast(dt_proj, dtype).mT))
    A = -cast(A_log, dtype).exp().mT.contiguous()[:, None]
    each = [delta.unsqueeze(2), (delta * x).unsqueeze(2), B.unsqueeze(3), C.unsqueeze(3)]
    each = [_copied(t.unflatten(1, (batch, steps)).movedim(2, 0)) for t in each]
    y = _copied(run(x.new_zeros(2, batch, states, x.shape[-1]), A, each).movedim(0, 2))
    return cast(torch.stack([y[0], y[1].flip(1)]), u.dtype)


def _copied(x: Tensor) -> Tensor:
    """`x.contiguous()`, without a question that would tie a program to one kind of size."""
    return x.clone(memory_format=torch.contiguous_format)


def _step(
    h: Tensor, A: Tensor, delta: Tensor, v: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """The next state, and y (2, B, E)."""
    h = torch.exp(delta * A) * h + v * B
    return h, (C * h).sum(-2)


def _by_scan(h: Tensor, A: Tensor, each: list[Tensor]) -> Tensor:
    def step(h: Tensor, A: Tensor, *now: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, y = _step(h, A, *now)
        return h, A.clone(), y

    # A is carried on from step to step: OpenVINO's Scan sees nothing from outside.
    y: Tensor = scan_op(step, [h, A], each, [])[2]
    return y


def _by_loop(h: Tensor, A: Tensor, each: list[Tensor]) -> Tensor:
    steps = each[0].shape[0]
    numbers = torch.arange(steps, device=h.device)[:, None, None, None]

    def go(i: Tensor, h: Tensor, y: Tensor, numbers: Tensor, A: Tensor, *each: Tensor) -> Tensor:
        return i < each[0].shape[0]

    def step(
        i: Tensor, h: Tensor, y: Tensor, numbers: Tensor, A: Tensor, *each: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        h, now = _step(h, A, *[t.index_select(0, i.view(1))[0] for t in each])
        return i + 1, h, torch.where(numbers == i, now, y)

    first = torch.zeros([], dtype=torch.int64, device=h.device)
    carried: Any = (first, h, h.new_zeros(steps, *h.shape[:2], h.shape[3]))
    # The operator itself: torch's function would keep its sizes for the next program.
    y: Tensor = while_loop_op(go, step, carried, (numbers, A, *each))[2]
    return y
