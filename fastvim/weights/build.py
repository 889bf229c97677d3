"""Build the model that the metadata of a file of weights describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fastvim.models.factory import create_model
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.vision import FastVim


def build_model(metadata: Mapping[str, Any]) -> nn.Module:
    """The whole model that a file's metadata describe, with its initial weights.

    Args:
        metadata: `model` and `model_args` of the model or of its backbone; of a dense model
            one of `segmentation`, `detection` and `features`.
    """
    backbone = create_model(metadata["model"], **metadata["model_args"])
    heads = {"segmentation", "detection", "features"} & metadata.keys()
    if not heads:
        return backbone
    assert isinstance(backbone, FastVim)
    if head := metadata.get("segmentation"):
        maps = FeatureMaps(backbone, head["out_indices"], head["source"])
        sizes = {name: head[name] for name in ("num_classes", "channels", "aux_channels")}
        return UPerNet(maps, **sizes)
    if head := metadata.get("detection"):
        # Imported here: torchvision's detection modules are slow to import.
        from fastvim.models.heads.cascade import build_detector

        return build_detector(backbone, **head)
    return FeatureMaps(backbone, **metadata["features"])
