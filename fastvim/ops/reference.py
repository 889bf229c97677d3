"""The four ops in plain PyTorch: what every engine has to reproduce.

Differentiable, for any floating dtype on any device. Inputs are cast up to float32 (float64 stays
float64), and outputs are cast back.

B  batch, L  tokens, d  model width, E  inner width, K  taps of the convolution
S  segments, N  state size, R  rank of the step size
A leading 2 is the direction: 0 walks the path, 1 walks it backwards.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvim.ops.traversal import Pooling, Segments

NormKind = Literal["rms", "layer"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def without_autocast(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Decorate an op so that autocast does not lower the precision of its matrix products.

    Where autocast is off the op is called as it is: in a traced program each region without it is
    a graph of its own, and tracing 24 blocks takes more than twice as long.
    """

    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        first = args[0]
        assert isinstance(first, Tensor)
        device = first.device.type
        if not (_has_autocast(device) and torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype an op computes in: float64 for float64, float32 for everything else.

    Raises:
        ValueError: `x` is not a floating tensor.
    """
    if not x.is_floating_point():
        raise ValueError(f"expected a floating dtype, got {x.dtype}")
    # Not `promote_types`: it would be a node of a traced program.
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`. In a traced program a cast to the same dtype would be two nodes."""
    return x if x.dtype == dtype else x.to(dtype)


@without_autocast
def add_norm_reference(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    kind: NormKind = "rms",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.add_norm`."""
    dtype = compute_dtype(hidden)
    total = cast(hidden, dtype) if residual is None else cast(residual, dtype) + cast(hidden, dtype)
    shape = hidden.shape[-1:]
    weight = cast(weight, dtype)
    if kind == "rms":
        normed = F.rms_norm(total, shape, weight, eps)
        normed = normed if bias is None else normed + cast(bias, dtype)
    else:
        normed = F.layer_norm(
            total, shape, weight, None if bias is None else cast(bias, dtype), eps
        )
    return cast(normed, hidden.dtype), total


def conv_silu(x_path: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, L, E) in path order to SiLU of the convolution in each direction, (2, B, L, E)."""
    taps, channels = weight.shape[-1], x_path.shape[-1]
    weight, bias = cast(weight, x_path.dtype), cast(bias, x_path.dtype)
    x = x_path.mT
    causal, anticausal = weight[0].unsqueeze(1), weight[1].flip(-1).unsqueeze(1)
    forward = F.conv1d(F.pad(x, (taps - 1, 0)), causal, bias[0], groups=channels)
    backward = F.conv1d(F.pad(x, (0, taps - 1)), anticausal, bias[1], groups=channels)
    return F.silu(torch.stack([forward, backward]).mT)


@without_autocast
def conv_pool_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    D: Tensor,
    segments: Segments,
    *,
    pooling: Pooling = "mean",
    pool_scale: float = 1.0,
    convolve: Callable[[Tensor, Tensor, Tensor], Tensor] = conv_silu,
) -> tuple[Tensor, Tensor]:
    """`fastvim.ops.conv_pool`; an engine may bring its own `convolve`."""
    dtype = compute_dtype(x)
    convolved = convolve(segments.to_path(cast(x, dtype)), weight, bias)
    pooled = segments.reduce(convolved, pooling) * pool_scale
    skip = segments.from_path((cast(D, dtype)[:, None, None] * convolved).mean(0))
    return cast(pooled, x.dtype), cast(skip, x.dtype)


def select(
    u: Tensor, x_proj: Tensor, dt_proj: Tensor, dt_bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Step sizes Δ (2, B, S, E), and B and C (2, B, S, N) of each step, computed in `dtype`."""
    rank, steps = dt_proj.shape[2], u.shape[1:3]
    states = (x_proj.shape[1] - rank) // 2
    projected = torch.bmm(cast(u, dtype).flatten(1, 2), cast(x_proj, dtype).mT)
    dt, B, C = projected.split([rank, states, states], dim=-1)
    raw = torch.baddbmm(cast(dt_bias, dtype)[:, None], dt, cast(dt_proj, dtype).mT)
    return F.softplus(raw).unflatten(1, steps), B.unflatten(1, steps), C.unflatten(1, steps)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, reverse: bool) -> Tensor:
    """One direction: u, delta (B, S, E), A (E, N), B, C (B, S, N) to (B, S, E)."""
    steps = u.shape[1]
    h = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y: list[Tensor] = []
    for s in reversed(range(steps)) if reverse else range(steps):
        decay = torch.exp(delta[:, s, :, None] * A)
        h = decay * h + (delta[:, s] * u[:, s])[:, :, None] * B[:, s, None, :]
        y.append((h * C[:, s, None, :]).sum(-1))
    if not y:
        return torch.zeros_like(u)
    return torch.stack(y[::-1] if reverse else y, dim=1)


@without_autocast
def selective_scan_reference(
    u: Tensor,
    x_proj: Tensor,
    dt_proj: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
) -> Tensor:
    """`fastvim.ops.selective_scan`."""
    dtype = compute_dtype(u)
    delta, B, C = select(u, x_proj, dt_proj, dt_bias, dtype)
    x = cast(u, dtype)
    A = -cast(A_log, dtype).exp()
    directions = [
        _scan(x[d], delta[d], A[d], B[d], C[d], reverse=d == 1) for d in range(u.shape[0])
    ]
    return cast(torch.stack(directions), u.dtype)


@without_autocast
def expand_gate_reference(
    skip: Tensor,
    z: Tensor,
    y: Tensor,
    segments: Segments,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """`fastvim.ops.expand_gate`."""
    dtype = compute_dtype(skip)
    scanned = segments.from_path(segments.broadcast(cast(y, dtype)).mean(0))
    mixed = cast(skip, dtype) + scanned
    if norm_weight is not None:
        bias = None if norm_bias is None else cast(norm_bias, dtype)
        mixed = F.layer_norm(mixed, mixed.shape[-1:], cast(norm_weight, dtype), bias, eps)
    return cast(mixed * F.silu(cast(z, dtype)), skip.dtype)
