"""Fit weights to a model that exists, and load them strictly."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastvim.errors import UserError, first_few
from fastvim.layers import resize_grid
from fastvim.models.heads.earlier import fit_mask_heads
from fastvim.models.masked import MaskedAutoencoder
from fastvim.models.vision import FastVim
from fastvim.weights import dense_names
from fastvim.weights.dense_names import published_head
from fastvim.weights.files import Checkpoint, check_finite, read
from fastvim.weights.names import (
    encoder_state,
    from_published,
    is_channel,
    is_masked,
    is_published,
    square_side,
)
from fastvim.weights.resolve import take_backbone

_logger = logging.getLogger(__name__)

# Of the layers whose size is the number of classes: a classifier's, a segmentor's, a detector's.
_CLASSES = re.compile(
    r"head\.(weight|bias)$|(aux_)?head\.classifier\.|heads\.stages\.\d+\.box_predictor\."
    r"|heads\.mask_stages\.\d+\.predictor\.mask_fcn_logits\."
)


def take_classes(state: Mapping[str, Tensor], rows: Sequence[int] | None) -> dict[str, Tensor]:
    """A state dict whose layers of classes have these of their rows; None leaves the layers out."""
    taken = {}
    for name, weight in state.items():
        if not _CLASSES.match(name):
            taken[name] = weight
        elif rows is not None:
            taken[name] = weight[list(rows)]
    return taken


def load_weights(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    ema: bool | None = None,
    new_head: bool = False,
) -> Checkpoint:
    """Load a file into a model; nothing may be missing and nothing left over.

    A position embedding of another grid is resized; published names are translated.

    Args:
        model: any model. One of this library takes published files too; a FastVim or Vim takes
            the encoder of a masked autoencoder's file.
        path: see `read`.
        ema: see `read`.
        new_head: keep the model's own layers of classes where the file has none (a masked
            autoencoder) or those of another number of classes, which is said once.

    Raises:
        UserError: the weights are another architecture's; says which names and shapes.
    """
    checkpoint = read(path, ema=ema)
    load_state(model, checkpoint, new_head=new_head)
    return checkpoint


def load_state(model: nn.Module, checkpoint: Checkpoint, *, new_head: bool = False) -> None:
    """`load_weights` from a file that is already read."""
    model.load_state_dict(fit_state(model, checkpoint, new_head=new_head))
    check_finite(checkpoint.path, model.state_dict())  # after the cast to the model's types


def fit_state(
    model: nn.Module, checkpoint: Checkpoint, *, new_head: bool = False
) -> dict[str, Tensor]:
    """The state dict for a model, out of a file; nothing is missing and nothing left over.

    A whole published segmentor or detector is taken by such a model of ours, and its backbone by a
    FastVim or Vim.

    Raises:
        UserError: as `load_weights`.
    """
    if isinstance(model, FastVim | MaskedAutoencoder):
        state = checkpoint_filter_fn(take_backbone(checkpoint).state, model)
    else:
        state = _fit_dense(checkpoint, model)
    own = model.state_dict()
    state = fit_mask_heads(state, own)
    if new_head:
        sized = {name: weight for name, weight in own.items() if _CLASSES.match(name)}
        other = [n for n, w in sized.items() if n in state and state[n].shape != w.shape]
        if other:
            _logger.warning(
                "%s is of other classes: %s start anew", checkpoint.path, first_few(other)
            )
        new = {n: w for n, w in sized.items() if n not in state or n in other}
        state = {**state, **new}
    problems = differences(own, state)
    if problems:
        raise UserError(f"{checkpoint.path} does not fit the model: {'; '.join(problems)}")
    return state


def checkpoint_filter_fn(
    state_dict: dict[str, Tensor], model: FastVim | MaskedAutoencoder
) -> dict[str, Tensor]:
    """Fit a state dict to `model`: published names to ours, position embedding to its grid.

    A FastVim takes the encoder of a masked autoencoder's weights.
    """
    if isinstance(model, MaskedAutoencoder):
        return _fit_autoencoder(state_dict, model)
    if is_published(state_dict):
        column_grid = None
        rows_last = model.scan_path == "column" and not is_masked(state_dict)
        if rows_last and "pos_embed" in state_dict:
            column_grid = _grid_of(state_dict["pos_embed"].shape[1], model)
        state_dict = from_published(state_dict, column_grid)
    if is_masked(state_dict):
        state_dict = encoder_state(state_dict)
    position = state_dict.get("pos_embed")
    if position is not None and position.shape != model.pos_embed.shape:
        with_class = "cls_token" in state_dict and not is_channel(state_dict)
        resized = _resize_position(position, with_class, model)
        state_dict = {**state_dict, "pos_embed": resized}
    return state_dict


def _fit_dense(checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
    """Weights for a head over a FastVim: published names to ours, positions to the model's grid.

    Blocks after those that the model's maps come from are left out. Other models' weights are
    returned as they are.
    """
    state = checkpoint.state
    inner = [(name, part) for name, part in model.named_modules() if isinstance(part, FastVim)]
    if len(inner) != 1:
        return state
    prefix, backbone = inner[0]
    if published_head(state):
        position, column_grid = state.get("backbone.pos_embed"), None
        if backbone.scan_path == "column" and position is not None:
            column_grid = _grid_of(position.shape[1], backbone)
        state = dense_names.from_published(state, column_grid)
    inside = {
        n.removeprefix(f"{prefix}."): t for n, t in state.items() if n.startswith(f"{prefix}.")
    }
    kept = {n: t for n, t in inside.items() if _block_of(n) < len(backbone.blocks)}
    if len(kept) < len(inside):
        _logger.warning(
            "%s: blocks from %d on are left out, no map comes from them",
            checkpoint.path,
            len(backbone.blocks),
        )
    fitted = checkpoint_filter_fn(kept, backbone)
    outside = {n: t for n, t in state.items() if not n.startswith(f"{prefix}.")}
    return {**{f"{prefix}.{n}": t for n, t in fitted.items()}, **outside}


def _block_of(name: str) -> int:
    """The block that one of a backbone's parameters belongs to; -1 for none."""
    return int(name.split(".")[1]) if name.startswith("blocks.") else -1


def _fit_autoencoder(state_dict: dict[str, Tensor], model: MaskedAutoencoder) -> dict[str, Tensor]:
    """Published names to ours; the model's own fixed positions replace those of another grid."""
    state = from_published(state_dict) if is_published(state_dict) else dict(state_dict)
    for name in ("encoder.pos_embed", "decoder_pos_embed"):
        own = model.get_parameter(name)
        if name in state and state[name].shape[1] != own.shape[1]:
            state[name] = own.detach()
    return state


def _grid_of(cells: int, model: FastVim) -> tuple[int, int]:
    """The grid of this number of cells: the model's own if it fits, else a square one."""
    height, width = model.grid_size
    if cells == height * width:
        return height, width
    side = square_side(cells)
    if side is None:
        raise UserError(f"pos_embed of {cells} positions: not of a square grid, cannot resize")
    return side, side


def without_class_token(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Vim's weights, our names or published ones, without the class token and its position."""
    position = state["pos_embed"]
    middle = (position.shape[1] - 1) // 2
    kept = torch.cat([position[:, :middle], position[:, middle + 1 :]], dim=1)
    return {**{n: t for n, t in state.items() if n != "cls_token"}, "pos_embed": kept}


def _resize_position(position: Tensor, with_class: bool, model: FastVim) -> Tensor:
    """An embedding of another grid, with or without a class token, on the model's grid."""
    cells = position.shape[1] - int(with_class)
    old = _grid_of(cells, model)
    if with_class != model.positions_class:
        raise UserError(
            f"the weights {'have' if with_class else 'lack'} a class token, unlike the model"
        )
    if not with_class:
        return resize_grid(position, old, model.grid_size)
    middle = cells // 2
    before, token, after = position.split([middle, 1, cells - middle], dim=1)
    resized = resize_grid(torch.cat([before, after], dim=1), old, model.grid_size)
    middle = resized.shape[1] // 2
    return torch.cat([resized[:, :middle], token, resized[:, middle:]], dim=1)


def differences(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """What keeps a state dict from being loaded: names and shapes, in words."""
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    return [
        f"{what} {first_few(names)}"
        for what, names in (
            ("missing", [name for name in own if name not in state]),
            ("unexpected", [name for name in state if name not in own]),
            ("other shapes", shapes),
        )
        if names
    ]
