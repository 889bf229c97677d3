"""From a published file to ours, and back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastvim.errors import UserError
from fastvim.models.factory import create_model
from fastvim.models.vision import FastVim
from fastvim.weights.files import PICKLED, read, save, save_published
from fastvim.weights.names import to_published
from fastvim.weights.resolve import resolve


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ema: bool = True,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Translate a published file to ours (`.safetensors`), or ours to a published one (`.ckpt`).

    Args:
        source: see `read`.
        target: file to write; `.ckpt`, `.pth` and `.pt` mean published names.
        ema: take the averaged weights where the file has them.
        model: timm name to write into our file; None finds the one of these sizes.
        model_args: options that leave no trace in published weights (`scan_path`, `pooling`,
            `alternate`, `pool_scale`; of channel models `token_order` and `pooled_axes`; of dense
            models `out_indices`, by default spread evenly over the blocks), and `img_size` where it
            was not 224.

    Returns:
        The metadata of our file: which weights they are, the model, its options as found.

    Raises:
        UserError: an unreadable source, or a target of another suffix.
    """
    target = Path(target)
    if target.suffix not in (".safetensors", *PICKLED):
        raise UserError(f"{target}: expected a name in .safetensors (ours) or .ckpt (published)")
    state, metadata = resolve(read(source, ema=ema), model_args)
    metadata["model"] = model or metadata["model"]
    if target.suffix == ".safetensors":
        save(target, state, metadata)
        return metadata
    for head in {"segmentation", "detection"} & metadata.keys():
        raise UserError(f"{source} holds a {head} model: it has no published names")
    column_grid = None
    if metadata["model_args"].get("scan_path") == "column":
        with torch.device("meta"):
            backbone = create_model(metadata["model"], **metadata["model_args"])
        assert isinstance(backbone, FastVim)
        column_grid = backbone.grid_size
    save_published(target, to_published(state, column_grid))
    return metadata
