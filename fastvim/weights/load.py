"""Build the model that a file's weights are of, and load them."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import Any

import timm
from torch import nn

from fastvim.errors import UserError, first_few, nearest
from fastvim.models.factory import create_model
from fastvim.models.feature_maps import FeatureMaps
from fastvim.weights.build import build_model
from fastvim.weights.files import read
from fastvim.weights.fit import load_state
from fastvim.weights.names import MAP_NORMS
from fastvim.weights.published import published_file, read_metadata
from fastvim.weights.resolve import is_known, resolve, untold_options
from fastvim.weights.table import ENTRIES, find_entry, has_published

_logger = logging.getLogger(__name__)


def load_model(
    name: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    ema: bool | None = None,
    **model_args: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with published weights or a file's, built as they say, and their metadata.

    A segmentor's file gives the whole `UPerNet`, a detector's the whole `CascadeMaskRCNN`, the
    backbone of either alone `FeatureMaps`.

    Args:
        name: timm name or published name; None for the one that the file names.
        path: weights; None for the published ones of the name, with or without its tag; for the
            initial ones, with a warning, where none are published.
        ema: True for averaged weights, False for those that are not, where a file has both. None,
            and by name True as well, for those that the published number belongs to.
        **model_args: options of the model, over those of the file; of a dense model's file also
            `out_indices`, `window`, `stride`, `base_size`, or `pad_to`, `eval_size`, `proposals`.

    Raises:
        UserError: neither a name nor a file, an unknown model or option, weights that do not fit.
    """
    if path is None:
        if name is None:
            raise UserError("expected the name of a model, or a checkpoint that holds one")
        return _by_name(name, ema is not False, model_args)
    checkpoint = read(path, ema=ema)
    written, plain = checkpoint.metadata.get("model"), name and name.partition(".")[0]
    if name is not None and written not in (None, plain):
        raise UserError(f"{path} holds weights of {written}, not of {name}")
    state = checkpoint.state
    if is_known(checkpoint):
        named = ENTRIES.get(name or "")  # the tag chooses options
        options = {**({} if named is None else untold_options(named)), **model_args}
        state, metadata = resolve(checkpoint, options, model=plain)
    elif name is not None:
        metadata = {"model": name, "model_args": model_args}
    else:
        raise UserError(
            f"{path} holds weights of no FastVim or Vim ({first_few(list(state))}): expected the "
            "name of their model as well"
        )
    model = build_model(metadata)
    if isinstance(model, FeatureMaps):
        state = {n if n.startswith(MAP_NORMS) else f"backbone.{n}": t for n, t in state.items()}
    load_state(model, replace(checkpoint, state=state))
    return model, metadata


def _by_name(name: str, ema: bool, model_args: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The published weights of a name, in a model that timm adapts; initial ones without any."""
    if not has_published(name):
        if not timm.is_model(name):
            near = nearest(name, [*ENTRIES, *timm.list_models()])
            raise UserError(f"no model or file {name!r}{near}")
        model = create_model(name, **model_args)
        _logger.warning("%s has no published weights: its weights are the initial ones", name)
        return model, {"model": name, "model_args": model_args}
    entry = find_entry(name)
    file = published_file(entry.name, ema=None if ema else False)
    if entry.head:
        return load_model(path=file, **model_args)
    overlay = {} if ema else {"file": str(file)}
    model = create_model(entry.name, pretrained=True, pretrained_cfg_overlay=overlay, **model_args)
    metadata = read_metadata(file)
    metadata["model_args"] |= model_args
    metadata |= {name: model_args[name] for name in ("img_size", "in_chans") if name in model_args}
    if getattr(model, "num_classes", 0) != len(metadata.get("class_names", ())):
        metadata.pop("class_names", None)  # another head
    return model, metadata
