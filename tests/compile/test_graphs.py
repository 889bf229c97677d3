"""torch.compile of whole models: one graph without a break, few graphs for any number of sizes."""

from __future__ import annotations

import contextlib

import pytest
import torch
from small_models import build, inputs, tensors_of
from torch._dynamo.utils import counters

from fastvim.layers import resize_grid

MOST = 4
SIZES = [(2, 48, 48), (2, 64, 48), (3, 70, 50), (1, 33, 90), (4, 100, 81)]
UNSEEN = [(2, 128, 64), (1, 48, 48), (5, 90, 40), (2, 40, 300)]
FAMILIES = ["fastvim", "vim", "channels", "channelvim", "encoder", "autoencoder", "maps"]


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled, nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compile_whole(model, **options):
    return torch.compile(model, backend="aot_eager", **options)


def graphs() -> int:
    """Graphs that were compiled so far; each is one of a whole frame, as there was no break."""
    assert sum(counters["graph_break"].values()) == 0
    return counters["frames"]["ok"]


def assert_same(compiled, model, arguments) -> None:
    pairs = zip(tensors_of(compiled(*arguments)), tensors_of(model(*arguments)), strict=True)
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "dynamic", "mode"),
    [
        ("fastvim", None, torch.inference_mode),
        *(
            pytest.param(family, None, torch.no_grad, marks=pytest.mark.programs)
            for family in ("vim", "channelvim", "encoder", "maps")
        ),
        *(
            pytest.param(family, None, torch.no_grad, marks=pytest.mark.slow)
            for family in ("channels", "autoencoder")
        ),
        pytest.param("fastvim", True, contextlib.nullcontext, marks=pytest.mark.slow),
    ],
)
def test_sizes_share_graphs(family, dynamic, mode):
    model = build(family)
    compiled = compile_whole(model, dynamic=dynamic)
    with mode():
        for size in SIZES:
            assert_same(compiled, model, inputs(family, *size))
        before = graphs()
        for size in UNSEEN:
            assert_same(compiled, model, inputs(family, *size))
    assert 1 <= before <= MOST
    assert graphs() == before


@pytest.mark.slow
@pytest.mark.parametrize("family", ["fastvim", "channels"])
def test_training_shares_graphs(family):
    model = build(family).train()
    compiled = compile_whole(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for size in (*SIZES, *UNSEEN):
        results = []
        for call in (compiled, model):
            loss = sum(out.square().mean() for out in tensors_of(call(*inputs(family, *size))))
            results.append(torch.autograd.grad(loss, trained))
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    assert 1 <= graphs() <= MOST


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes_without_data(family):
    """The meta device and fake tensors give the shapes and dtypes of real ones."""
    model = build(family)
    arguments = inputs(family, 2, 70, 50)
    expected = [(t.shape, t.dtype) for t in tensors_of(model(*arguments))]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = model(*(mode.from_tensor(t) for t in arguments))
    assert [(t.shape, t.dtype) for t in tensors_of(fake)] == expected
    meta = model.to("meta")(*(t.to("meta") for t in arguments))
    assert [(t.shape, t.dtype) for t in tensors_of(meta)] == expected
    assert all(t.device.type == "meta" for t in tensors_of(meta))


def test_positions_are_resized_in_float32_under_autocast():
    """And without products, on whose sizes inductor sets guards on a GPU (torch before 2.14)."""
    embedding = torch.randn(1, 14 * 14, 32, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(resize_grid, backend="aot_eager", fullgraph=True)
    for grid in ((9, 20), (20, 9), (30, 31)):
        with torch.autocast("cpu", torch.bfloat16):
            actual = compiled(embedding, (14, 14), grid)
        torch.testing.assert_close(actual, resize_grid(embedding, (14, 14), grid))
