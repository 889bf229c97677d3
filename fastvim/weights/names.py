"""Published names of weights to ours, and back.

Published files (FastVim's and the original Vim's) keep each parameter of the backward direction
beside its forward twin, with the suffix `_b`; here the two are one tensor, direction first. A
published masked autoencoder names its encoder's parameters as a classifier does; here they begin
with `encoder.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from fastvim.errors import UserError

# Published forward and backward names of the tensors that are stacked here.
_STACKED = {
    "conv_weight": ("conv1d.weight", "conv1d_b.weight"),
    "conv_bias": ("conv1d.bias", "conv1d_b.bias"),
    "x_proj": ("x_proj.weight", "x_proj_b.weight"),
    "dt_proj": ("dt_proj.weight", "dt_proj_b.weight"),
    "dt_bias": ("dt_proj.bias", "dt_proj_b.bias"),
    "A_log": ("A_log", "A_b_log"),
    "D": ("D", "D_b"),
}
_PARTS = {published: ours for ours, pair in _STACKED.items() for published in pair}

# Published and our patterns of every other name that differs.
_RENAMED = (
    (r"^layers\.(\d+)\.", r"^blocks\.(\d+)\.", r"blocks.\1.", r"layers.\1."),
    (r"^norm_f\.", r"^norm\.", r"norm.", r"norm_f."),
    (r"^outnorm_(\d+)\.", r"^norms\.(\d+)\.", r"norms.\1.", r"outnorm_\1."),
    (r"\.mixer\.layernorm\.", r"\.mixer\.norm\.", r".mixer.norm.", r".mixer.layernorm."),
)

_CHANNELS, _PATCHES = "patch_embed.channel_embed.weight", "patch_embed.proj.weight"
_ENCODER = "encoder."
MAP_NORMS = "norms."  # of a dense model's feature maps, ours
_DECODER = ("decoder_", "mask_token")


def is_masked(state: Mapping[str, Tensor]) -> bool:
    """Whether the names, ours or published, are those of a masked autoencoder."""
    return "mask_token" in state


def is_channel(state: Mapping[str, Tensor]) -> bool:
    """Whether the names, ours or published, are those of a channel model."""
    return _CHANNELS in state


def has_map_norms(state: Mapping[str, Tensor]) -> bool:
    """Whether the names, ours or published, are those of a dense model's backbone."""
    return any(name.startswith((MAP_NORMS, "outnorm_")) for name in state)


def encoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a masked autoencoder's weights, in our names, under a classifier's."""
    return {
        name.removeprefix(_ENCODER): tensor
        for name, tensor in state.items()
        if name.startswith(_ENCODER)
    }


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a published file."""
    return any(name.startswith("layers.") and ".mixer." in name for name in state)


def from_published(
    state: Mapping[str, Tensor], column_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Published names to ours; `to_published` undoes it exactly.

    Args:
        state: tensors under published names, without prefixes such as `backbone.`.
        column_grid: (H, W) of the position embedding of a model with `scan_path="column"`, which is
            published column by column. Ours is row by row, as every other model's.

    Raises:
        UserError: one direction of a parameter without the other.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, dot, part = name.rpartition("mixer.")
        if part not in _PARTS:
            ours[_rename(name, published=True)] = tensor
            continue
        forward, backward = (block + dot + twin for twin in _STACKED[_PARTS[part]])
        if forward not in state or backward not in state:
            missing = backward if forward in state else forward
            raise UserError(f"the weights hold {name} but not {missing}")
        target = _rename(block + dot + _PARTS[part], published=True)
        if target not in ours:
            pair = torch.stack([state[forward], state[backward]])
            ours[target] = pair.squeeze(2) if _PARTS[part] == "conv_weight" else pair
    if column_grid is not None:
        ours["pos_embed"] = _transpose(ours["pos_embed"], column_grid[::-1])
    if is_channel(ours) and ours[_PATCHES].ndim == 5:  # published as a 3-D convolution
        ours[_PATCHES] = ours[_PATCHES].squeeze(2)
    return _split_encoder(ours) if is_masked(ours) else ours


def to_published(
    state: Mapping[str, Tensor], column_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Our names to published ones; see `from_published`."""
    published: dict[str, Tensor] = {}
    if is_masked(state):
        state = _join_encoder(state)
    for name, tensor in state.items():
        block, dot, part = name.rpartition("mixer.")
        if not dot or part not in _STACKED:
            published[_rename(name, published=False)] = tensor
            continue
        for twin, direction in zip(_STACKED[part], tensor, strict=True):
            value = direction.unsqueeze(1) if part == "conv_weight" else direction
            published[_rename(block, published=False) + dot + twin] = value.clone()
    if column_grid is not None:
        published["pos_embed"] = _transpose(published["pos_embed"], column_grid)
    if is_channel(published):
        published[_PATCHES] = published[_PATCHES].unsqueeze(2)
    return published


def _rename(name: str, *, published: bool) -> str:
    for theirs, ours, to_ours, to_theirs in _RENAMED:
        name = re.sub(theirs, to_ours, name) if published else re.sub(ours, to_theirs, name)
    return name


def _split_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A masked autoencoder's names, and its positions in the order of its tokens.

    Published, the class token's position comes first. Here it stands where the token does: in the
    middle of the encoder's, as a classifier has it, and at the end of the decoder's.
    """
    ours = {n if n.startswith(_DECODER) else _ENCODER + n: t for n, t in state.items()}
    if "cls_token" in state:
        for name in ("encoder.pos_embed", "decoder_pos_embed"):
            if name in ours:
                ours[name] = _move(ours[name], 0, _class_place(name, ours[name]))
    return ours


def _join_encoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_split_encoder`."""
    joined = dict(state)
    if "encoder.cls_token" in state:
        for name in ("encoder.pos_embed", "decoder_pos_embed"):
            if name in joined:
                joined[name] = _move(joined[name], _class_place(name, joined[name]), 0)
    return {name.removeprefix(_ENCODER): tensor for name, tensor in joined.items()}


def _class_place(name: str, position: Tensor) -> int:
    last = position.shape[1] - 1
    return last if name.startswith(_DECODER) else last // 2


def _move(position: Tensor, source: int, target: int) -> Tensor:
    """An embedding (1, L, d) with one vector moved to another index."""
    order = list(range(position.shape[1]))
    order.insert(target, order.pop(source))
    return position[:, order]


def _transpose(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, H·W, d) laid out over `grid`, to the layout of its transpose."""
    return position.unflatten(1, grid).transpose(1, 2).flatten(1, 2).contiguous()


def square_side(cells: int) -> int | None:
    """Side of a square grid with this number of cells; None if there is none."""
    side = math.isqrt(cells)
    return side if side**2 == cells else None
