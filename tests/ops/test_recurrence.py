"""The scan as one operator of torch, for exported programs."""

from __future__ import annotations

import pytest
import torch
from inputs import scan_inputs, to

from fastvim.ops import engine_name, selective_scan, use_engine

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("engine", ["scan", "loop"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (2, 7), (3, 14)])
def test_is_the_reference(engine, dtype, batch, steps):
    inputs = to(scan_inputs(batch, steps, 5), dtype)
    with use_engine("reference"):
        expected = selective_scan(*inputs)
    with use_engine(engine), torch.no_grad():
        found = selective_scan(*inputs)
    # Sums in another order, and for the halves one rounding at the end.
    eps = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize("engine", ["scan", "loop"])
def test_serves_on_request_alone(engine):
    assert engine_name("selective_scan", "cpu") == "numba"
    with use_engine(engine):
        assert engine_name("selective_scan", "cpu") == engine
        assert engine_name("conv_pool", "cpu") == "reference"
