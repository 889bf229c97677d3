"""Every registered model: its configuration, and that in small it is its family's model."""

from __future__ import annotations

import pytest
import timm
import torch
from families import (
    CHANNEL_FAMILIES,
    CLASSES,
    IMAGE_FAMILIES,
    MASKED_FAMILIES,
    SIDE,
    create,
    has_channels,
    image,
    patch_of,
)
from timm.data import resolve_model_data_config
from torch import nn

from fastvim.weights import to_published

FAMILIES = {**IMAGE_FAMILIES, **CHANNEL_FAMILIES, **MASKED_FAMILIES}
OF_FAMILY = {name: family for family, names in FAMILIES.items() for name in names}
AUTOENCODERS = [name for name in OF_FAMILY if name.startswith("mae_")]


def test_every_model_has_a_family():
    names = timm.list_models()
    ours = [n for n in names if timm.model_entrypoint(n).__module__.startswith("fastvim.")]
    assert sorted(OF_FAMILY) == sorted(ours)


@pytest.mark.parametrize("name", [name for name in OF_FAMILY if name not in AUTOENCODERS])
def test_default_cfg(name):
    cfg = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    channels, height, width = cfg.input_size
    assert channels == len(cfg.mean) == len(cfg.std) == (8 if has_channels(name) else 3)
    assert model.patch_embed.grid_size(height, width) == model.grid_size
    assert f"_{height}" in name
    if has_channels(name):
        assert cfg.first_conv == ()  # else timm would adapt its weights to `in_chans`
    else:
        assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
    assert model.get_submodule(cfg.classifier) is model.get_classifier()
    assert model.get_classifier().out_features == cfg.num_classes
    assert not cfg.fixed_input_size
    data = resolve_model_data_config(model)
    crop = 1.0 if has_channels(name) else 0.875
    assert (data["input_size"], data["crop_pct"]) == (cfg.input_size, crop)
    assert data["interpolation"] == "bicubic"


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_default_cfg_of_autoencoders(name):
    cfg = timm.get_pretrained_cfg(name)
    with torch.device("meta"):
        model = timm.create_model(name)
    assert model.encoder.patch_embed.grid_size(*cfg.input_size[1:]) == model.encoder.grid_size
    assert isinstance(model.get_submodule(cfg.first_conv), nn.Conv2d)
    assert cfg.classifier is None
    assert cfg.num_classes == model.num_classes == 0
    assert resolve_model_data_config(model)["input_size"] == cfg.input_size == (3, 224, 224)


def assert_same(model: nn.Module, twin: nn.Module, x: torch.Tensor) -> None:
    """The same modules, weights, and logits or predicted pixels."""
    assert str(model) == str(twin)
    assert model.state_dict().keys() == twin.state_dict().keys()
    for key, tensor in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    outputs = []
    for each in (model, twin):
        torch.manual_seed(1)  # for an autoencoder's mask
        with torch.no_grad():
            output = each(x)
        outputs.append(getattr(output, "prediction", output))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", OF_FAMILY)
def test_in_small_it_is_its_familys_model(name, tmp_path):
    """Whether its weights are drawn, or read through timm's `pretrained`."""
    patch, x = patch_of(name), image(name)
    stride = {"patch_stride": 8} if "stride8" in name else {}
    twin = create(OF_FAMILY[name], patch_size=patch, img_size=SIDE * patch, **stride)
    assert_same(create(name), twin, x)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            parameter.detach().add_(0.01)
    file = tmp_path / "weights.pth"
    torch.save(to_published(twin.state_dict()), file)
    overlay = {"file": str(file)}
    if name not in AUTOENCODERS:
        overlay["num_classes"] = CLASSES
    assert_same(create(name, pretrained=True, pretrained_cfg_overlay=overlay), twin, x)
