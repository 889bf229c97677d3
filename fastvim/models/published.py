"""Names in published files and names in this library, both ways.

Published files (FastVim's and the original Vim's) keep each parameter of the backward direction
beside its forward twin, with the suffix `_b`; here the two are one tensor, direction first.
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


def is_published(state: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a published file."""
    return any(name.startswith("layers.") and ".mixer." in name for name in state)


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published names to ours; `to_published` undoes it exactly.

    The position embedding of a model with `scan_path="column"` also needs `transpose_position`.

    Args:
        state: tensors under published names, without prefixes such as `backbone.`.

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
    return ours


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to published ones; see `from_published`."""
    published: dict[str, Tensor] = {}
    for name, tensor in state.items():
        block, dot, part = name.rpartition("mixer.")
        if not dot or part not in _STACKED:
            published[_rename(name, published=False)] = tensor
            continue
        for twin, direction in zip(_STACKED[part], tensor, strict=True):
            value = direction.unsqueeze(1) if part == "conv_weight" else direction
            published[_rename(block, published=False) + dot + twin] = value.clone()
    return published


def _rename(name: str, *, published: bool) -> str:
    for theirs, ours, to_ours, to_theirs in _RENAMED:
        name = re.sub(theirs, to_ours, name) if published else re.sub(ours, to_theirs, name)
    return name


def transpose_position(position: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position embedding (1, H·W, d) laid out over `grid`, to the layout of its transpose.

    The published column variant transposes its tokens after the patch embedding, so its embedding
    lies column by column; ours lies row by row like every other.
    """
    return position.unflatten(1, grid).transpose(1, 2).flatten(1, 2).contiguous()


def square_side(cells: int) -> int | None:
    """Side of the square grid of so many cells; None where they make no square."""
    side = math.isqrt(cells)
    return side if side**2 == cells else None
