"""What a model costs, against torch's own counts, what kernels keep, and what was measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import fastvim
from fastvim.benchmark.cases import PRECISIONS
from fastvim.benchmark.profile import Profile, Shape, channels_of, parts_of, profile
from fastvim.models import create_model
from fastvim.models.masked import encoder_of
from fastvim.ops import dispatch, selective_scan

MEASURED = Path(__file__).parents[2] / "measurements"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3}
CLASSES = {**SMALL, "num_classes": 5}
DECODER = {**SMALL, "decoder_embed_dim": 16, "decoder_depth": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[int, int], int | None]] = {
    "FastVim": ("fastvim_tiny_patch16_224", CLASSES, (32, 48), None),
    "columns": ("fastvim_tiny_patch16_224", {**CLASSES, "scan_path": "column"}, (30, 50), None),
    "fixed": ("fastvim_tiny_patch16_224", {**CLASSES, "alternate": False}, (32, 48), None),
    "sizes": (
        "fastvim_tiny_patch16_224",
        {**CLASSES, "d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5, "in_chans": 4},
        (32, 32),
        None,
    ),
    "features": ("fastvim_tiny_patch16_224", {**SMALL, "num_classes": 0}, (32, 32), None),
    "tokens": ("fastvim_tiny_patch16_224", {**CLASSES, "global_pool": "max_logit"}, (32, 32), None),
    "Vim": ("vim_tiny_patch16_224", CLASSES, (32, 48), None),
    "overlap": ("vim_tiny_patch16_224", {**CLASSES, "patch_stride": 4}, (32, 32), None),
    "channels": ("fastchannelvim_small_patch16_224", {**CLASSES, "in_chans": 5}, (32, 40), 3),
    "two axes": ("fastchannelvim_small_patch16_224", {**CLASSES, "pooled_axes": 2}, (32, 40), None),
    "ChannelVim": ("channelvim_small_patch16_224", {**CLASSES, "in_chans": 3}, (32, 32), 2),
    "masked": ("mae_fastvim_tiny_patch16_224", DECODER, (64, 32), None),
    "masked Vim": ("mae_vim_tiny_patch16_224", {**DECODER, "mask_ratio": 0.5}, (64, 32), None),
    "masked, unpooled": (
        "mae_vim_tiny_patch16_224",
        {**DECODER, "class_token": False},
        (64, 32),
        None,
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request) -> tuple[nn.Module, tuple[int, int], int | None]:
    """A model without values, the size of its images, and a choice of their channels."""
    name, options, size, channels = FAMILIES[request.param]
    with torch.device("meta"):
        return create_model(name, **options), size, channels


def draw(model: nn.Module, batch: int, size: tuple[int, int], channels: int | None) -> Tensor:
    return torch.randn(batch, channels_of(encoder_of(model), channels), *size)


def test_products_are_those_that_torch_counts(family):
    model, size, channels = family
    model.to_empty(device="cpu")
    for weight in model.parameters():
        nn.init.zeros_(weight)
    counter = FlopCounterMode(display=False)
    with fastvim.use_engine("reference"), torch.no_grad(), counter:
        model(draw(model, 2, size, channels))
    found = profile(model, 2, size, PRECISIONS["float32"], channels)
    assert 2 * found.products == counter.get_total_flops()


def test_the_scan_is_counted_as_the_reference_computes_it():
    class Multiplications(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.count += out.numel() if func is torch.ops.aten.mul.Tensor else 0
            return out

    batch, steps, width, states, rank = 2, 5, 7, 3, 4
    shapes = [(2, batch, steps, width), (2, rank + 2 * states, width), (2, width, rank)]
    inputs = [torch.randn(shape) for shape in (*shapes, (2, width), (2, width, states))]
    counter = Multiplications()
    with fastvim.use_engine("reference"), counter:
        selective_scan(*inputs)
    shape = Shape(0, batch * steps, dim=1, inner=width, taps=4, states=states, rank=rank)
    assert shape.scan == counter.count


# The kernels' registrations say what is written and what is kept, without a GPU.


@pytest.fixture
def kernels(monkeypatch) -> Iterator[FakeTensorMode]:
    """Tensors without values, on which the kernels for GPUs serve all operations."""
    pytest.importorskip("triton")
    from fastvim.ops.triton.common import INTERPRETED

    if not INTERPRETED:
        pytest.skip("on a GPU the registrations are traced, which needs tensors there")
    for op, engines in dispatch.ENGINES.items():
        own = tuple(replace(each, device="cpu") for each in engines if each.name == "triton")
        monkeypatch.setitem(dispatch.ENGINES, op, own)
    dispatch._cached_candidates.cache_clear()
    with FakeTensorMode() as mode:
        yield mode
    dispatch._cached_candidates.cache_clear()


def materialise(model: nn.Module) -> set[int]:
    """Give a model weights in the current mode; returns their storages."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                fake = nn.Parameter(torch.empty(tuple(weight.shape)), weight.requires_grad)
                module._parameters[name] = fake
    return {weight.untyped_storage()._cdata for weight in model.parameters()}


class Live(TorchDispatchMode):
    """Bytes of all tensors that are there, and the most at once."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.now = self.peak = self.written = 0
        self._known = set(known)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        tensors = [result for result in results if isinstance(result, Tensor)]
        if func.namespace == "fastvim" or func.overloadpacket in PRODUCTS:
            self.written += sum(tensor.numel() for tensor in tensors)
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._add(storage)
        return out

    def _add(self, storage: Any) -> None:
        place, size = storage._cdata, storage.nbytes()
        self._known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self._known.discard(place)
            self.now -= size

        finalize(storage, gone)


PRODUCTS = [getattr(torch.ops.aten, name) for name in ("linear", "conv2d")]


@pytest.mark.parametrize("dtype", ["float32", "amp"])
def test_memory_and_activations_are_those_of_the_kernels(family, kernels, dtype):
    model, size, channels = family
    weights = materialise(model)
    batch = draw(model, 64, size, channels)  # so many that weights matter little
    given = weights | {batch.untyped_storage()._cdata}
    told = profile(model, 64, size, PRECISIONS[dtype], channels)
    layers = parts_of(model, 64, size, batch.shape[1]).layers
    context = torch.autocast("cpu", torch.bfloat16) if dtype == "amp" else nullcontext()

    held = 4 * told.parameters + 4 * batch.numel()
    with torch.inference_mode(), context, Live(given) as live:
        model.eval()(batch)
    masked = any(layer.masked for layer in layers)
    if not masked:  # where the reference reorders tokens, kernels write them once more
        assert live.written == told.activations
    # What a kernel takes for itself, as in a scan of many steps, is not seen here.
    itself = max(2 * layer.steps * 4 * (layer.inner + 2 * layer.states) for layer in layers)
    assert live.peak * 0.95 <= told.inference - held <= (live.peak + itself) * 1.05

    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in given:
            kept[storage._cdata] = storage.nbytes(), tensor
        return tensor

    model.train()
    with context, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(batch)
    saved = sum(size for size, _ in kept.values())
    kept.clear()
    with context, Live(given) as live:
        loss = model(batch)
        loss = loss.loss if hasattr(loss, "loss") else loss.sum()  # and the rest is gone
        loss.backward()
    assert saved <= told.training - held
    assert live.peak * 0.97 <= told.training - held <= live.peak * 1.03 + 5 * itself


@pytest.mark.parametrize("file", ["h100_channels", "h100_training"])
def test_memory_is_that_of_a_gpu(file):
    """Peaks of PyTorch's allocator on an H100, with workspaces of libraries: to a tenth."""
    rows = json.loads((MEASURED / f"{file}.json").read_text())["rows"]
    # A sequence of captured cases leaves memory in use; those of large models hide it.
    rows = [row for row in rows if row["ours"] and row["memory_gib"] > 2.3]
    assert len(rows) >= 4
    for row in rows:
        with torch.device("meta"):
            model = create_model(row["model"])
        told = profile(model, row["batch"], tuple(row["size"]), PRECISIONS[row["dtype"]])
        found = told.training if row["train"] else told.inference
        assert found / 2**30 == pytest.approx(row["memory_gib"], rel=0.1), row


def test_larger_images_are_counted_at_once():
    with torch.device("meta"):
        model = create_model("vim_tiny_patch16_224")
    small, large = (profile(model, 1, (side, side), PRECISIONS["float32"]) for side in (512, 4096))
    assert isinstance(small, Profile)
    assert large.scan / small.scan == pytest.approx(64, rel=0.01)
