"""The options of a model, as the shapes of its weights tell them, and its registered name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor

from fastvim.errors import UserError
from fastvim.models.factory import create_model
from fastvim.models.masked import encoder_of
from fastvim.weights.names import encoder_state, is_channel, is_masked, square_side

# Their shapes tell most options.
_TELLING = (
    "patch_embed.proj.weight",
    "pos_embed",
    "blocks.0.mixer.A_log",
    "blocks.0.mixer.conv_weight",
    "blocks.0.mixer.dt_proj",
)


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Whether these are weights of one of our models, under our names."""
    return "blocks.0.mixer.A_log" in (encoder_state(state) if is_masked(state) else state)


def find_options(
    state: Mapping[str, Tensor], img_size: int | Sequence[int] | None = None
) -> dict[str, Any]:
    """The options of a FastVim, Vim, channel model or masked autoencoder, from its weights.

    Some options leave no trace: `pooling`, `alternate`, `scan_path` and `pool_scale`; a channel
    model's `token_order` and `pooled_axes`; a masked autoencoder's `mask_ratio`, `norm_pix_loss`
    and `mirror`. Weights with a class token are taken for Vim's, others for FastVim's.

    Args:
        state: weights under our names.
        img_size: side in pixels that the position embedding was made for. None: one patch per
            cell; but 224 for a model with a class token where that makes patches overlap by a
            whole stride, as in Vim's fine-tuned models.

    Raises:
        UserError: not weights of FastVim or Vim, or a position embedding of no square grid.
    """
    if not is_masked(state):
        return _backbone_options(state, img_size, overlaps="cls_token" in state)
    if missing := {"decoder_embed.weight", "decoder_pred.weight"} - state.keys():
        raise UserError(f"not weights of a masked autoencoder: {min(missing)} missing")
    options = _backbone_options(encoder_state(state), img_size, overlaps=False)
    if options["patch_stride"] != options["patch_size"]:
        raise UserError(f"img_size={img_size}: expected {options['patch_size']} pixels per patch")
    for option in ("patch_stride", "num_classes", "global_pool", "init_layer_scale"):
        del options[option]
    blocks = {name.split(".")[1] for name in state if name.startswith("decoder_blocks.")}
    return {
        **options,
        "decoder_embed_dim": state["decoder_embed.weight"].shape[0],
        "decoder_depth": len(blocks),
    }


def _backbone_options(
    state: Mapping[str, Tensor], img_size: int | Sequence[int] | None, overlaps: bool
) -> dict[str, Any]:
    missing = [name for name in _TELLING if name not in state]
    if missing or state[_TELLING[0]].ndim != 4:
        names = ", ".join(missing[:3])
        raise UserError(f"not weights of a FastVim or Vim image model: {names} missing")
    patches, _, A_log, conv_weight, dt_proj = (state[name] for name in _TELLING)
    embed_dim, in_chans, patch, _ = patches.shape
    class_token = "cls_token" in state
    size, stride = _find_stride(state, patch, img_size, overlaps and not is_channel(state))
    if is_channel(state):
        in_chans = state["patch_embed.channel_embed.weight"].shape[0]
    head = state.get("head.weight")
    return {
        "embed_dim": embed_dim,
        "depth": 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks.")),
        "img_size": size,
        "patch_size": patch,
        "patch_stride": stride,
        "in_chans": in_chans,
        "num_classes": 0 if head is None else head.shape[0],
        "class_token": class_token,
        "global_pool": "token" if class_token else "avg",
        "pooling": "none" if class_token else "mean",
        "norm": "layer" if "blocks.0.norm.bias" in state else "rms",
        "norm_after_ssm": "blocks.0.mixer.norm.weight" in state,
        "init_layer_scale": 1.0 if "blocks.0.mixer.gamma" in state else None,
        "d_state": A_log.shape[2],
        "d_conv": conv_weight.shape[2],
        "expand": A_log.shape[1] // embed_dim,
        "dt_rank": dt_proj.shape[2],
    }


def _find_stride(
    state: Mapping[str, Tensor], patch: int, img_size: int | Sequence[int] | None, overlaps: bool
) -> tuple[int | tuple[int, int], int]:
    """Side of the image, or both, and stride of the patches, from the position embedding."""
    position = state["pos_embed"]
    cells = position.shape[1] - int("cls_token" in state and not is_channel(state))
    if img_size is not None:
        return _stride_of(cells, patch, to_2tuple(img_size))
    side = square_side(cells)
    if side is None:
        raise UserError(f"pos_embed {tuple(position.shape)}: not of a square grid, give img_size")
    stride, rest = divmod(224 - patch, max(1, side - 1))
    overlapping = overlaps and stride < patch and not rest
    return (224, stride) if overlapping else (side * patch, patch)


def _stride_of(cells: int, patch: int, sides: Sequence[int]) -> tuple[int | tuple[int, int], int]:
    """The greatest stride by which patches cover an image of these sides with so many cells."""
    height, width = sides
    for stride in range(patch, 0, -1):
        rows, columns = (1 + (side - patch) // stride for side in sides)
        if rows * columns == cells and all((side - patch) % stride == 0 for side in sides):
            return height if height == width else (height, width), stride
    raise UserError(f"img_size={height} x {width} does not give the weights' {cells} positions")


def match(options: Mapping[str, Any], channels: bool = False) -> str:
    """The registered model with these sizes; if there is none, the smallest of its family.

    Args:
        options: as `find_options` returns them.
        channels: whether it is a channel model.
    """
    family = f"{'channel' if channels else ''}vim"
    if options["pooling"] != "none":
        family = f"fast{family}"
    if "decoder_depth" in options:
        family = f"mae_{family}"
    for name in timm.list_models(f"{family}_*"):
        with torch.device("meta"):
            # All blocks take a tenth of a second and more, even there.
            model = encoder_of(create_model(name, depth=1))
            if model.embed_dim != options["embed_dim"]:
                continue
            if model.patch_embed.patch_size != options["patch_size"]:
                continue
            if len(encoder_of(create_model(name)).blocks) == options["depth"]:
                return name
    return f"{family}_{'small' if channels else 'tiny'}_patch16_224"
