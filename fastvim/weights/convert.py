"""From a published file to ours, and back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models.factory import create_model
from fastvim.models.vision import FastVim
from fastvim.weights import config_text, dense_names, names
from fastvim.weights.build import build_model
from fastvim.weights.files import PICKLED, Checkpoint, save, save_pickled
from fastvim.weights.fit import fit_state
from fastvim.weights.hub import save_folder
from fastvim.weights.published import find
from fastvim.weights.resolve import UNTOLD, resolve, take_backbone

_logger = logging.getLogger(__name__)


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    ema: bool | None = None,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    backbone: bool = False,
) -> dict[str, Any]:
    """Translate a published file to ours (`.safetensors`), or ours to a published one (`.ckpt`).

    A folder gets our file, and beside it what timm, transformers and the hub read
    (`fastvim.weights.hub`).

    A segmentor or detector is translated whole. Back, it becomes a file of mmengine's tools, with
    the part of its configuration that this library reads; other models become Lightning's files.

    Args:
        source: file or name, see `find`.
        target: file to write; `.ckpt`, `.pth` and `.pt` mean published names. A name without an
            ending, or of a folder that is there, is a folder.
        ema: see `read`.
        model: timm name to write into our file; None finds the one of these sizes.
        model_args: options that leave no trace in published weights (`scan_path`, `pooling`,
            `alternate`, `pool_scale`; of channel models `token_order` and `pooled_axes`), and
            `img_size` where it was not 224; of dense models also what `load_model` names.
        backbone: of a segmentor or detector the backbone alone.

    Returns:
        The metadata of our file: which weights they are, the model, its options as found.

    Raises:
        UserError: an unreadable source, weights that do not make a whole segmentor or detector, or
            a target of another suffix.
    """
    target = Path(target)
    to_folder = target.is_dir() or not target.suffix
    if not to_folder and target.suffix not in (".safetensors", *PICKLED):
        raise UserError(
            f"{target}: expected a name in .safetensors (ours) or .ckpt (published), or a folder"
        )
    checkpoint = find(source, ema=ema)
    if backbone:
        checkpoint = take_backbone(checkpoint)
    state, metadata = resolve(checkpoint, model_args, model=model)
    if {"segmentation", "detection"} & metadata.keys():
        state = _whole(replace(checkpoint, state=state), metadata)
    if to_folder:
        with torch.device("meta"):
            save_folder(target, state, metadata, build_model(metadata))
    elif target.suffix == ".safetensors":
        save(target, state, metadata)
    else:
        save_pickled(target, _published(target, state, metadata))
    return metadata


def _whole(checkpoint: Checkpoint, metadata: Mapping[str, Any]) -> dict[str, Tensor]:
    """All weights of a segmentor or detector; raises for one that lacks some or has others."""
    with torch.device("meta"):
        model = build_model(metadata)
    # Blocks that give no map are kept, for the way back.
    blocks = {name: tensor for name, tensor in checkpoint.state.items() if ".blocks." in name}
    return {**blocks, **fit_state(model, checkpoint)}


def _published(
    target: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """What a published file of these weights holds."""
    grid = _column_grid(metadata)
    if dense_names.own_head(state):
        weights = dense_names.to_published(state, grid)
    else:
        weights = {f"backbone.{n}": t for n, t in names.to_published(state, grid).items()}
    licence = {"licence": metadata["licence"]} if "licence" in metadata else {}
    if metadata.get("value_range"):
        _logger.warning(
            "%s cannot say value_range %s: its commands need --value-range",
            *(target, metadata["value_range"]),
        )
    if {"segmentation", "detection", "features"} & metadata.keys():
        return {"meta": config_text.compose(metadata), "state_dict": weights, **licence}
    options = metadata["model_args"]
    lost = [f"{n}={options[n]!r}" for n, usual in UNTOLD.items() if options.get(n, usual) != usual]
    if lost and not options.get("class_token"):
        _logger.warning("%s cannot say %s: say it again to its reader", target, ", ".join(lost))
    return {"state_dict": weights, **licence}


def _column_grid(metadata: Mapping[str, Any]) -> tuple[int, int] | None:
    """The grid of a position embedding that is published column by column; see `from_published`."""
    if metadata["model_args"].get("scan_path") != "column":
        return None
    with torch.device("meta"):
        backbone = create_model(metadata["model"], **metadata["model_args"])
    assert isinstance(backbone, FastVim)
    return backbone.grid_size
