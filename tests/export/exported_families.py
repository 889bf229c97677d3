"""A small model of each family that can be exported, with the metadata of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastvim.models import FeatureMaps, UPerNet, create_model

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
HEAD = {"num_classes": 3, "channels": 12, "aux_channels": 8}
MAPS = {"out_indices": [0, 1], "source": "mixer"}
OF_IMAGES: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.2] * 3}


def fastvim() -> tuple[nn.Module, dict[str, Any]]:
    return _model("fastvim_tiny_patch16_224", num_classes=4, pooling="max")


def vim() -> tuple[nn.Module, dict[str, Any]]:
    """Patches that overlap, and a class token."""
    return _model("vim_tiny_patch16_224", num_classes=4, patch_stride=4, global_pool="token")


def channels() -> tuple[nn.Module, dict[str, Any]]:
    model, metadata = _model("fastchannelvim_small_patch16_224", num_classes=4, in_chans=5)
    return model, {**metadata, "mean": [120.0] * 5, "std": [60.0] * 5}


def autoencoder() -> tuple[nn.Module, dict[str, Any]]:
    return _model("mae_fastvim_tiny_patch16_224", decoder_embed_dim=16, decoder_depth=1)


def autoencoder_of_vim() -> tuple[nn.Module, dict[str, Any]]:
    return _model("mae_vim_tiny_patch16_224", decoder_embed_dim=16, decoder_depth=1)


def backbone() -> tuple[nn.Module, dict[str, Any]]:
    model, metadata = _model("fastvim_tiny_patch16_224", norm="layer")
    return FeatureMaps(model, **MAPS), {**metadata, "features": MAPS}


def segmentor() -> tuple[nn.Module, dict[str, Any]]:
    maps, metadata = backbone()
    head = {**HEAD, **MAPS, "window": None, "stride": None}
    images = {**OF_IMAGES, "base_size": None, "class_names": ["ground", "cat", "dog"]}
    del metadata["features"]
    return UPerNet(maps, **HEAD), {**metadata, "segmentation": head, **images}


FAMILIES = {
    "fastvim": fastvim,
    "vim": vim,
    "channels": channels,
    "autoencoder": autoencoder,
    "autoencoder of vim": autoencoder_of_vim,
    "backbone": backbone,
    "segmentor": segmentor,
}


def _model(name: str, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    options = {**SMALL, **options}
    return create_model(name, **options), {"model": name, "model_args": options}
