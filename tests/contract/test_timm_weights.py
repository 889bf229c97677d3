"""What timm expects of a model's weights, and its precision. The rest is in `test_timm.py`."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from families import CLASSES, DEPTH, DIM, SIDE, create, gradients_of, image
from test_timm import MODEL, every_model, image_models
from torch import Tensor, nn

from fastvim.weights import checkpoint_filter_fn, to_published


def by_hand(model: nn.Module, side: int) -> Tensor:
    """Positions resized to another square grid, with the class token's in the middle."""
    vectors = list(model.pos_embed.detach()[0])
    token = vectors.pop(SIDE**2 // 2) if model.positions_class else None
    grid = torch.stack(vectors).reshape(1, SIDE, SIDE, DIM).permute(0, 3, 1, 2)
    resized = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    vectors = list(resized[0].flatten(1).T)
    if token is not None:
        vectors.insert(len(vectors) // 2, token)
    return torch.stack(vectors)[None]


@every_model
@pytest.mark.parametrize("side", [3, 2, 6])
def test_checkpoint_filter(name, side):
    source, target = create(name), create(name, side=side)
    expected = {**source.state_dict(), "pos_embed": by_hand(source, side)}
    for weights in (source.state_dict(), to_published(source.state_dict())):
        filtered = checkpoint_filter_fn(weights, target)
        assert filtered.keys() == target.state_dict().keys()
        for key, tensor in filtered.items():
            torch.testing.assert_close(tensor, expected[key], msg=key)


def test_checkpoint_filter_undoes_the_published_column_order():
    model = create("fastvim_tiny_patch16_224", scan_path="column")
    grid = model.pos_embed.detach().reshape(SIDE, SIDE, DIM)
    published = to_published(model.state_dict())
    published["pos_embed"] = grid.transpose(0, 1).reshape(1, -1, DIM)
    filtered = checkpoint_filter_fn(published, model)
    assert torch.equal(filtered["pos_embed"], model.pos_embed)


@every_model
def test_pretrained_weights_are_fitted_by_timm(name, tmp_path):
    source = create(name)
    torch.save(to_published(source.state_dict()), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": CLASSES}
    options = {"pretrained": True, "pretrained_cfg_overlay": overlay}
    same = create(name, **options)
    for key, tensor in source.state_dict().items():
        assert torch.equal(same.state_dict()[key], tensor), key
    other = create(name, side=4, num_classes=7, **options)
    assert other(image(name, 4)).shape == (2, 7)


@image_models
def test_pretrained_weights_are_fitted_to_other_channels(name, tmp_path):
    source = create(name)
    torch.save(to_published(source.state_dict()), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": CLASSES}
    other = create(name, in_chans=1, pretrained=True, pretrained_cfg_overlay=overlay)
    weight = source.patch_embed.proj.weight
    torch.testing.assert_close(other.patch_embed.proj.weight, weight.sum(1, keepdim=True))


@every_model
def test_copies_give_the_same_logits(name):
    model, x = create(name), image(name)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    loaded = create(name)
    nn.init.zeros_(loaded.blocks[0].mixer.A_log)
    loaded.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    with torch.no_grad():
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
            assert torch.equal(twin(x), model(x))
            assert twin.default_cfg == model.default_cfg


# Precision.


@every_model
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(name, dtype, engine):
    model, x = create(name), image(name)
    with torch.no_grad():
        expected = model(x)
        _, maps = model.forward_intermediates(x)
        model.to(dtype)
        logits = model(x.to(dtype))
        _, halves = model.forward_intermediates(x.to(dtype), norm=False)
    assert logits.dtype == dtype
    # Each of the blocks rounds its input, its projections and its output.
    bound = 4 * DEPTH**0.5 * torch.finfo(dtype).eps
    for actual, exact in zip([logits, *halves], [expected, *maps], strict=True):
        assert float((actual - exact).norm() / exact.norm()) < bound


@every_model
def test_autocast(name, engine):
    model, x = create(name, drop_path_rate=0.1), image(name)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(x)
    error = float((logits - expected).norm() / expected.norm())
    assert 0 < error < 8 * torch.finfo(torch.bfloat16).eps
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train()(x).float().square().sum()
    loss.backward()
    for key, gradient in gradients_of(model).items():
        assert gradient.dtype == torch.float32
        assert gradient.isfinite().all(), key
        assert gradient.any(), key


def test_a_model_on_the_meta_device_gives_shapes():
    model, x = create(MODEL).to("meta"), image(MODEL).to("meta")
    assert model(x).shape == (2, CLASSES)
