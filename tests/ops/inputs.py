"""Seeded inputs of the four ops, and the gradients of their outputs."""

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
from fastvim.ops.dispatch import ENGINES as SERVED
from fastvim.ops.dispatch import resolve

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the Triton engine; CPU: interpreted
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ENGINES = ["reference", "numba"]
WALKS = [("h w", "w"), ("w h", "h"), ("h w", "")]


def normal(*shape: int, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def scan_inputs(batch: int, steps: int, width: int, states: int = 4, rank: int = 3):
    """u, x_proj, dt_proj, dt_bias, A_log, with steps and rates like those of a trained model.

    dt, B and C come out of x_proj with a variance of 1.
    """
    return (
        normal(2, batch, steps, width, seed=1),
        normal(2, rank + 2 * states, width, scale=width**-0.5, seed=2),
        normal(2, width, rank, scale=0.5, seed=5),
        normal(2, width, seed=6) - 3,
        normal(2, width, states, scale=0.3, seed=7)
        + torch.arange(1, states + 1, dtype=torch.float64).log(),
    )


def conv_inputs(batch: int, length: int, width: int = 6, taps: int = 4):
    """x, weight, bias, D."""
    return (
        normal(batch, length, width, seed=1),
        normal(2, width, taps, scale=0.5, seed=2),
        normal(2, width, scale=0.5, seed=3),
        1 + normal(2, width, scale=0.2, seed=6),
    )


def gate_inputs(batch: int, length: int, steps: int, width: int = 6, norm: bool = True):
    """skip, z, y, and the norm's weight and bias."""
    return (
        normal(batch, length, width, seed=1),
        normal(batch, length, width, seed=4),
        normal(2, batch, steps, width, seed=5),
        1 + normal(width, scale=0.2, seed=7) if norm else None,
        normal(width, scale=0.2, seed=8) if norm else None,
    )


def to(tensors, dtype: torch.dtype, grad: bool = False):
    """Copies in `dtype`; with `grad`, leaves that get gradients."""
    return [
        None if t is None else t.detach().to(dtype).clone().requires_grad_(grad) for t in tensors
    ]


def outputs_of(result) -> tuple[torch.Tensor, ...]:
    """The outputs of an op as a tuple, be it one tensor or several."""
    return result if isinstance(result, tuple) else (result,)


def probe_backward(outputs, exact: torch.dtype | None = None) -> None:
    """Backpropagate the sum of all outputs, each multiplied by a random probe.

    Outputs that depend on nothing with a gradient are left out. The probes are numbers of the dtype
    `exact` (default: of the outputs).
    """
    probed = [(out, normal(*out.shape, seed=99 + i)) for i, out in enumerate(outputs)]
    probed = [
        (out, p.to(exact or out.dtype).to(out.device, out.dtype))
        for out, p in probed
        if out.requires_grad
    ]
    torch.autograd.backward(*zip(*probed, strict=True))


def run_with_gradients(
    function,
    tensors,
    dtype: torch.dtype,
    engine: str | None = None,
    exact: torch.dtype | None = None,
):
    """Every output, then the gradient of every input that is not None, as computed in `dtype`.

    In float64, for comparison. `exact` as in `probe_backward`.
    """
    leaves = to(tensors, dtype, grad=True)
    if engine is None:
        outputs = outputs_of(function(*leaves))
    else:
        with use_engine(engine):
            outputs = outputs_of(function(*leaves))
    assert outputs[0].dtype == dtype
    assert all(out.requires_grad for out in outputs)
    probe_backward(outputs, exact)
    gradients = [leaf.grad for leaf in leaves if leaf is not None]
    return [tensor.detach().double() for tensor in (*outputs, *gradients)]


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
            ("x", "weight", "bias", "D"),
            conv_inputs(batch, 15),
        ),
        "selective_scan": (
            selective_scan,
            ("u", "x_proj", "dt_proj", "dt_bias", "A_log"),
            scan_inputs(batch, 5, 6),
        ),
        "expand_gate": (
            lambda *a: expand_gate(*a[:3], grid, *a[3:]),
            ("skip", "z", "y", "norm_weight", "norm_bias"),
            gate_inputs(batch, 15, 5),
        ),
    }
    return {
        op: (f, dict(zip(names, to(tensors, dtype), strict=True)))
        for op, (f, names, tensors) in named.items()
    }


def on_device(op: str, dtype: torch.dtype = torch.float32):
    """`cases` on the GPU, if there is one."""
    function, inputs = cases(dtype)[op]
    return function, {name: t.to(DEVICE) for name, t in inputs.items()}


def engine_of(op: str):
    """The Triton engine's function for an op."""
    engine = next(engine for engine in SERVED[op] if engine.name == "triton")
    return resolve(engine.function)


def call_of(op: str, tensors: list) -> list:
    """The arguments of the op, with the traversal that `cases` uses."""
    grid = Traversal("w h", "h").over({"h": 3, "w": 5})
    place = {"conv_pool": 4, "expand_gate": 3}.get(op)
    return tensors if place is None else [*tensors[:place], grid, *tensors[place:]]
