"""Registration of the Triton ops with torch, and torch.compile of them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from inputs import (
    DEVICE,
    call_of,
    conv_inputs,
    engine_of,
    normal,
    on_device,
    run_with_gradients,
    to,
)
from torch.library import opcheck

from fastvim.ops import Traversal
from fastvim.ops.dispatch import OPS
from fastvim.ops.triton.conv_pool import conv_pool_triton
from fastvim.ops.triton.masked import (
    conv_pool_masked,
    expand_gate_masked,
    spread,
    sum_segments,
    take,
)

KEPT = [[0, 1, 5, 10, 11], [2, 3, 4, 5, 7]]  # of 4 x 3 cells, with empty rows and columns
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"


def test_kept_cells_compiled_whole():
    """The tables are made inside, as in a model that gets the mask with each call."""
    x, weight, bias, D = (t.to(DEVICE) for t in to(conv_inputs(2, 5, 8), torch.float32))

    def layer(x, kept):
        segments = Traversal("w h", "h").over({"h": 4, "w": 3}, kept)
        pooled, skip = conv_pool_masked(x, weight, bias, D, segments)
        return expand_gate_masked(skip, x, pooled, segments).square().mean()

    kept = torch.tensor(KEPT, device=DEVICE)
    results = []
    for run in (torch.compile(layer, fullgraph=True, backend=BACKEND), layer):
        leaf = x.clone().requires_grad_()
        value = run(leaf, kept)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("grad", [False, True])
def test_registration_of_moves(grad):
    segments = Traversal("w h", "h").over({"h": 4, "w": 3}, torch.tensor(KEPT, device=DEVICE))
    masked = segments.masked
    (x,) = (t.to(DEVICE).requires_grad_(grad) for t in to([normal(2, 5, 8)], torch.float32))
    values, y = (t.detach().clone().requires_grad_(grad) for t in (x.expand(2, -1, -1, -1),) * 2)
    opcheck(take.registered, (x, masked.order, masked.ids_restore, 0.5))
    tables = (masked.index, masked.members, masked.starts)
    opcheck(sum_segments.registered, (values, *tables, 0.5, x.dtype))
    y = y[:, :, : segments.num_segments]
    opcheck(spread.registered, (y, masked.order, masked.index, masked.tokens, masked.starts))


SCHEMAS = {
    "add_norm": lambda t: (*t, True, 1e-5),
    "conv_pool": lambda t: (*t, [5, 3, 1, 0, 0, 1], "mean", 0.5, torch.float32),
    "selective_scan": lambda t: tuple(t),
    "expand_gate": lambda t: (*t[:3], [5, 3, 1, 0, 0, 1], *t[3:], 1e-5),
}


REGISTERED = {
    "add_norm": lambda: torch.ops.fastvim.add_norm_triton,
    "conv_pool": lambda: torch.ops.fastvim.conv_pool_triton,
    "selective_scan": lambda: torch.ops.fastvim.selective_scan_triton,
    "expand_gate": lambda: torch.ops.fastvim.expand_gate_triton,
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_registration(op, grad):
    engine_of(op)
    _, inputs = on_device(op)
    inputs = to(inputs.values(), torch.float32, grad)
    opcheck(REGISTERED[op]().default, SCHEMAS[op](inputs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS)
def test_compiled_whole(op, dynamic):
    _, inputs = on_device(op)
    engine = engine_of(op)
    compiled = torch.compile(engine, fullgraph=True, dynamic=dynamic, backend=BACKEND)

    def run(function):
        def with_walk(*tensors):
            return function(*call_of(op, list(tensors)))

        return run_with_gradients(with_walk, inputs.values(), torch.float32)

    for actual, expected in zip(run(compiled), run(engine), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "pool", "pooling"), [("w h", "h", "max"), ("w h", "w", "mean"), ("h w", "", "max")]
)
def test_gradients_by_the_reference_compiled_whole(path, pool, pooling):
    """Maxima, and segments that are not rows of the path."""
    segments = Traversal(path, pool).over({"h": 3, "w": 5})
    inputs = [t.to(DEVICE) for t in conv_inputs(2, 15, 8)]

    def layer(*tensors):
        return conv_pool_triton(*tensors, segments, pooling=pooling)

    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    results = (run_with_gradients(f, inputs, torch.float32) for f in (compiled, layer))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
