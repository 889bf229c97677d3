"""Inputs of the four ops, seeded, and the gradients of what they give."""

from __future__ import annotations

import torch

from fastvim.ops import (
    Traversal,
    add_norm,
    conv_pool,
    expand_gate,
    selective_scan,
    use_engine,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ENGINES = ["reference", "numba"]
WALKS = [("h w", "w"), ("w h", "h"), ("h w", "")]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def scan_inputs(batch: int, steps: int, width: int, states: int = 4, rank: int = 3):
    """u, dt, B, C, dt_proj, dt_bias, A_log, with steps and rates like those of a trained model."""
    return (
        normal(2, batch, steps, width, seed=1),
        normal(2, batch, steps, rank, seed=2),
        normal(2, batch, steps, states, seed=3),
        normal(2, batch, steps, states, seed=4),
        normal(2, width, rank, scale=0.5, seed=5),
        normal(2, width, seed=6) - 3,
        normal(2, width, states, scale=0.3, seed=7)
        + torch.arange(1, states + 1, dtype=torch.float64).log(),
    )


def conv_inputs(batch: int, length: int, width: int = 6, taps: int = 4):
    return (
        normal(batch, length, width, seed=1),
        normal(2, width, taps, scale=0.5, seed=2),
        normal(2, width, scale=0.5, seed=3),
    )


def gate_inputs(batch: int, length: int, steps: int, width: int = 6, norm: bool = True):
    """x, z, y, conv_weight, conv_bias, D, and the norm's weight and bias."""
    x, weight, bias = conv_inputs(batch, length, width)
    return (
        x,
        normal(batch, length, width, seed=4),
        normal(2, batch, steps, width, seed=5),
        weight,
        bias,
        1 + normal(2, width, scale=0.2, seed=6),
        1 + normal(width, scale=0.2, seed=7) if norm else None,
        normal(width, scale=0.2, seed=8) if norm else None,
    )


def to(tensors, dtype: torch.dtype, grad: bool = False):
    """Copies in `dtype`: leaves of a graph, if they shall have gradients."""
    return [
        None if t is None else t.detach().to(dtype).clone().requires_grad_(grad) for t in tensors
    ]


def run_with_gradients(function, tensors, dtype: torch.dtype, engine: str | None = None):
    """Output and gradient of every input, in float64 for comparison, as computed in `dtype`."""
    leaves = to(tensors, dtype, grad=True)
    if engine is None:
        out = function(*leaves)
    else:
        with use_engine(engine):
            out = function(*leaves)
    assert out.dtype == dtype
    probe = normal(*out.shape, seed=99).to(dtype)
    out.backward(probe)
    return [out.detach().double(), *(leaf.grad.double() for leaf in leaves if leaf is not None)]


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual - exact).abs().max()) if exact.numel() else 0.0


def cases(dtype: torch.dtype = torch.float32, batch: int = 2):
    """Each op as a function of its tensors alone, and the tensors by name."""
    grid = Traversal("w h", "h").over({"h": 3, "w": 5})
    named = {
        "add_norm": (
            lambda *a: add_norm(*a)[0],
            ("hidden", "residual", "weight", "bias"),
            (normal(batch, 15, 6), normal(batch, 15, 6, seed=1), normal(6, seed=2), normal(6)),
        ),
        "conv_pool": (
            lambda *a: conv_pool(*a, grid),
            ("x", "weight", "bias"),
            conv_inputs(batch, 15),
        ),
        "selective_scan": (
            selective_scan,
            ("u", "dt", "B", "C", "dt_proj", "dt_bias", "A_log"),
            scan_inputs(batch, 5, 6),
        ),
        "expand_gate": (
            lambda *a: expand_gate(*a[:6], grid, *a[6:]),
            ("x", "z", "y", "conv_weight", "conv_bias", "D", "norm_weight", "norm_bias"),
            gate_inputs(batch, 15, 5),
        ),
    }
    return {
        op: (f, dict(zip(names, to(tensors, dtype), strict=True)))
        for op, (f, names, tensors) in named.items()
    }
