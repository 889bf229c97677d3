"""Device functions of the Triton kernels, on a GPU or in the interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from inputs import DEVICE

from fastvim.ops.triton.common import exp, exp2, softplus

COUNT = 1 << 14
UNIT = 2.0**-24  # half of the last place of a float32 just above a power of two


@triton.jit
def _apply(x, out, WHICH: tl.constexpr, COUNT: tl.constexpr):
    index = tl.arange(0, COUNT)
    value = tl.load(x + index)
    if WHICH == 0:
        result = exp2(value, False)
    elif WHICH == 1:
        result = exp(value, False)
    else:
        result = softplus(value, False)
    tl.store(out + index, result)


def apply(which: int, x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _apply[(1,)](x, out, which, COUNT)
    return out


@pytest.mark.parametrize(
    ("which", "exact", "low", "high"),
    [
        (0, torch.exp2, -126.0, 127.0),
        (0, torch.exp2, -1.0, 0.0),
        (1, torch.exp, -87.0, 88.0),
        (1, torch.exp, -1.0, 1.0),
    ],
)
def test_exponentials_are_exact_to_rounding_and_not_biased(which, exact, low, high):
    """A bias of half a unit in the last place would show in gradients of thousands of steps."""
    x = torch.linspace(low, high, COUNT, device=DEVICE)
    error = apply(which, x).double() / exact(x.double()) - 1
    assert error.abs().max() < 2 * UNIT
    assert error.mean().abs() < 0.1 * UNIT


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_nan_propagates(which):
    x = torch.full((COUNT,), torch.nan, device=DEVICE)
    assert apply(which, x).isnan().all()


def test_exponentials_are_clamped():
    x = torch.tensor([-1000.0, 1000.0], device=DEVICE).repeat(COUNT // 2)
    assert apply(0, -x.abs()).max() <= 2.0**-126
    low, high = apply(1, x)[:2]
    assert 0 <= low < 1e-37
    assert 1e38 < high < torch.inf
