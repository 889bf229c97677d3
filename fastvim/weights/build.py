"""Build the model that the metadata of a file of weights describe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastvim.errors import OptionError, UserError
from fastvim.models.factory import create_model
from fastvim.models.feature_maps import FeatureMaps
from fastvim.models.heads.upernet import UPerNet
from fastvim.models.vision import FastVim
from fastvim.weights.files import Checkpoint
from fastvim.weights.metadata import of_file

# How much more a file may describe than it holds: a larger grid of positions, a new head.
_LARGER, _LARGER_BY = 4, 1 << 24


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
    if not isinstance(backbone, FastVim):
        raise UserError(f"{metadata['model']} has no maps for a head")
    if head := metadata.get("segmentation"):
        maps = _maps(backbone, **{name: head[name] for name in ("out_indices", "source")})
        sizes = {name: head[name] for name in ("num_classes", "channels", "aux_channels")}
        return UPerNet(maps, **sizes)
    if head := metadata.get("detection"):
        # Imported here: torchvision's detection modules are slow to import.
        from fastvim.models.heads.cascade import build_detector

        return build_detector(backbone, **head)
    return _maps(backbone, **metadata["features"])


def _maps(backbone: FastVim, out_indices: Sequence[int], **options: Any) -> FeatureMaps:
    depth = len(backbone.blocks)
    blocks = {index % depth for index in out_indices if -depth <= index < depth}
    if not blocks or len(blocks) < len(out_indices):
        expected = f"different blocks, from 0 to {depth - 1}"
        raise OptionError("out_indices", list(out_indices), expected)
    return FeatureMaps(backbone, out_indices, **options)


def check_described(checkpoint: Checkpoint) -> None:
    """Raise UserError where the metadata of a file describe a model far larger than its weights.

    Args:
        checkpoint: whose metadata name one of our models.
    """
    metadata = checkpoint.metadata
    with of_file(checkpoint.path), torch.device("meta"):
        if "model_args" not in metadata:
            raise UserError(f"of {metadata['model']}, and no model_args")
        described = build_model(metadata)
        own = getattr(described, "in_chans", None)
        if own is not None and metadata.get("in_chans", own) != own:
            raise OptionError("in_chans", metadata["in_chans"], f"{own}, as the model has")
    needed = sum(weight.numel() for weight in described.state_dict().values())
    held = sum(weight.numel() for weight in checkpoint.state.values())
    if needed > _LARGER * held + _LARGER_BY:
        raise UserError(
            f"{checkpoint.path}: its metadata describe a model of {needed:,} values, and its "
            f"weights are {held:,}"
        )
