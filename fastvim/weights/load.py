"""Build the model that a file's weights are of, and load them."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from torch import nn

from fastvim.errors import UserError
from fastvim.models.factory import create_model
from fastvim.models.feature_maps import FeatureMaps
from fastvim.weights.build import build_model
from fastvim.weights.files import read
from fastvim.weights.fit import load_state
from fastvim.weights.names import MAP_NORMS, is_published
from fastvim.weights.options import is_ours
from fastvim.weights.resolve import resolve


def load_model(
    name: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    ema: bool = True,
    **model_args: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """A model with a file's weights, built as the file says, and the file's metadata.

    A file of the segmentation task gives the whole `UPerNet`, one of the detection task the whole
    `CascadeMaskRCNN`, one of a published segmentor's or detector's backbone `FeatureMaps`.

    Args:
        name: timm name; None for the one that the file names.
        path: weights; None for the initial ones.
        ema: take the averaged weights where the file has them.
        **model_args: options of the model, over those of the file.

    Raises:
        UserError: neither a name nor a file, an unknown model or option, weights that do not fit.
    """
    if path is None:
        if name is None:
            raise UserError("expected the name of a model, or a checkpoint that holds one")
        return create_model(name, **model_args), {"model": name, "model_args": model_args}
    checkpoint = read(path, ema=ema)
    state, written = checkpoint.state, checkpoint.metadata.get("model")
    if name is not None and written not in (None, name):
        raise UserError(f"{path} holds weights of {written}, not of {name}")
    if written is not None or is_published(state) or is_ours(state):
        state, metadata = resolve(checkpoint, model_args)
    elif name is not None:
        metadata = {"model": name, "model_args": model_args}
    else:
        raise UserError(f"{path} does not say which model it is of: expected its name as well")
    model = build_model({**metadata, "model": name or metadata["model"]})
    if isinstance(model, FeatureMaps):
        state = {n if n.startswith(MAP_NORMS) else f"backbone.{n}": t for n, t in state.items()}
    load_state(model, replace(checkpoint, state=state))
    return model, metadata
