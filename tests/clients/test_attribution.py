"""Grad-CAM and captum, on the modules that a user names."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

import fastvim  # noqa: F401  (registers the models)

pytestmark = pytest.mark.clients

SIDE, GRID = 64, 4
MODELS = ["fastvim_tiny_patch16_224", "vim_tiny_patch16_224", "fastchannelvim_small_patch16_224"]
# Where a class token is read, the last block's patches have no gradient: there as in a ViT.
LAYERS = ["blocks.2", "blocks.1", "blocks.3.norm", "blocks.2.mixer", "blocks.2.mixer.norm"]


def build(name: str):
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 4, "in_chans": 3, "num_classes": 5, "img_size": SIDE}
    return timm.create_model(name, **options).eval()


def to_map(model, tokens: torch.Tensor) -> torch.Tensor:
    """(B, L, d) to (B, d, H, W), without a class token, channels of a cell averaged."""
    if model.cls_token is not None:
        middle = (tokens.shape[1] - 1) // 2
        tokens = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    return tokens.unflatten(1, (GRID, GRID, -1)).mean(3).permute(0, 3, 1, 2)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """An image, and another one that differs from it in one patch: second row, third column."""
    torch.manual_seed(1)
    image = torch.randn(1, 3, SIDE, SIDE)
    other = image.clone()
    other[:, :, 16:32, 32:48] = torch.randn(3, 16, 16)
    return image, other


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layer", LAYERS)
def test_grad_cam(name, layer):
    """The map is that of the activations and gradients, by hand."""
    cams = pytest.importorskip("pytorch_grad_cam")
    targets = pytest.importorskip("pytorch_grad_cam.utils.model_targets")
    model, image = build(name), torch.randn(1, 3, SIDE, SIDE)
    module = model.get_submodule(layer)
    with cams.GradCAM(model, [module], reshape_transform=lambda x: to_map(model, x)) as cam:
        found = cam(image, [targets.ClassifierOutputTarget(2)])
    kept = []
    module.register_forward_hook(lambda *a: (a[2].retain_grad(), kept.append(a[2]))[1])
    model(image)[0, 2].backward()
    activations, gradients = to_map(model, kept[0])[0], to_map(model, kept[0].grad)[0]
    assert gradients.any()
    expected = (gradients.mean((1, 2))[:, None, None] * activations).sum(0).clamp(min=0)
    assert found.shape == (1, SIDE, SIDE)
    assert np.isfinite(found).all()
    coarse = torch.nn.functional.avg_pool2d(torch.from_numpy(found), SIDE // GRID)[0]
    if expected.max() > 0:
        assert found.max() > 0.5
        agreement = torch.corrcoef(torch.stack([coarse.flatten(), expected.flatten()]))[0, 1]
        assert agreement > 0.9


def test_the_patch_projection_is_a_layer_of_grad_cam():
    cams = pytest.importorskip("pytorch_grad_cam")
    model = build(MODELS[0])
    with cams.LayerCAM(model, [model.patch_embed.proj]) as cam:
        found = cam(pair()[0], [lambda logits: logits[2]])
    assert found.shape == (1, SIDE, SIDE)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", MODELS)
def test_integrated_gradients_add_up_to_the_logit(name):
    attr = pytest.importorskip("captum.attr")
    model, (image, baseline) = build(name), pair()
    given = attr.IntegratedGradients(model).attribute(image, baseline, target=1, n_steps=64)
    with torch.no_grad():
        difference = (model(image) - model(baseline))[0, 1]
    torch.testing.assert_close(given.sum().float(), difference, rtol=0.05, atol=1e-4)
    outside = given.clone()
    outside[:, :, 16:32, 32:48] = 0
    assert not outside.any()


@pytest.mark.parametrize("layer", ["blocks.2", "norm", "patch_embed.proj", "blocks.0.mixer.norm"])
def test_attribution_of_a_layer(layer):
    """A layer's activations and their gradients add up to the change of the logit too."""
    attr = pytest.importorskip("captum.attr")
    model, (image, baseline) = build(MODELS[0]), pair()
    module = model.get_submodule(layer)
    activation = attr.LayerActivation(model, module).attribute(image)
    assert isinstance(activation, torch.Tensor)
    assert activation.isfinite().all()
    given = attr.LayerGradientXActivation(model, module).attribute(image, target=1)
    assert given.shape == activation.shape
    assert given.any()
    if layer == "norm":  # linear from here on: the sum is the logit without the head's bias
        with torch.no_grad():
            logit = model(image)[0, 1] - model.head.bias[1]
        torch.testing.assert_close(given.sum(), logit)
    if layer == "blocks.0.mixer.norm":  # the stream goes past it, so that it has a part alone
        return
    whole = attr.LayerIntegratedGradients(model, module).attribute(
        image, baseline, target=1, n_steps=64
    )
    with torch.no_grad():
        difference = (model(image) - model(baseline))[0, 1]
    torch.testing.assert_close(whole.sum().float(), difference, rtol=0.1, atol=1e-3)
