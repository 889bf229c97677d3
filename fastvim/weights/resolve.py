"""What a file's weights are of: our names for them, the model and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models.factory import create_model
from fastvim.weights.files import Checkpoint
from fastvim.weights.names import (
    MAP_NORMS,
    from_published,
    is_channel,
    is_published,
    square_side,
)
from fastvim.weights.options import find_options, match


def resolve(
    checkpoint: Checkpoint, model_args: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights under our names, and the metadata that `save` would write beside them.

    Args:
        checkpoint: of one of our models, in our names or published ones.
        model_args: what the weights cannot tell (see `convert`); it wins over what they tell.

    Raises:
        UserError: other weights than those, or options that contradict them.
    """
    state, metadata, given = checkpoint.state, checkpoint.metadata, dict(model_args or {})
    indices = given.pop("out_indices", None)
    if "model" in metadata:
        options = {**metadata["model_args"], **given}
        features = {} if indices is None else _features(state, indices)
        found = {"weights": checkpoint.weights, "model_args": options, **features}
        return state, {**metadata, **found}
    if is_published(state):
        column_grid = None
        if given.get("scan_path") == "column" and "pos_embed" in state:
            side = square_side(state["pos_embed"].shape[1])
            column_grid = None if side is None else (side, side)
        state = from_published(state, column_grid)
    features = _features(state, indices)
    options = {**find_options(state, given.get("img_size")), **given}
    model = match(options, is_channel(state))
    with torch.device("meta"):
        create_model(model, **options)  # raises for an option that the model does not take
    metadata = {"model": model, "model_args": options, "weights": checkpoint.weights, **features}
    return state, metadata


def _features(state: Mapping[str, Tensor], given: Sequence[int] | None) -> dict[str, Any]:
    """`features` of the metadata: which maps a dense model takes; empty for another model."""
    count = len({name.split(".")[1] for name in state if name.startswith(MAP_NORMS)})
    if given is not None and len(given) != count:
        raise UserError(f"out_indices {list(given)}: the weights are for {count} maps")
    if not count:
        return {}
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    evenly = [(i + 1) * depth // count - 1 for i in range(count)]
    return {"features": {"out_indices": list(given or evenly), "source": "mixer"}}
