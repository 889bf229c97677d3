"""The models that `timm.create_model` knows: sizes, configurations, constructors."""

from __future__ import annotations

import logging
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from fastvim.building import build, published_cfg
from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.errors import UserError
from fastvim.models.channel import FastChannelVim
from fastvim.models.masked import MaskedAutoencoder
from fastvim.models.vision import FastVim
from fastvim.weights.fit import checkpoint_filter_fn
from fastvim.weights.table import ENTRIES

_logger = logging.getLogger(__name__)
_CHANNELS = "patch_embed.channel_embed.weight"


def _cfg(url: str = "", **kwargs: Any) -> dict[str, Any]:
    return {
        "url": url,
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2502.00594",
        **kwargs,
    }


def _channel_cfg() -> dict[str, Any]:
    """Of the published cell images: eight channels, values of 0..255."""
    return _cfg(
        num_classes=161,
        input_size=(8, 224, 224),
        crop_pct=1.0,
        mean=tuple(value / 255 for value in JUMPCP_MEAN),
        std=tuple(value / 255 for value in JUMPCP_STD),
        first_conv=(),  # timm shall not adapt its weights: one channel, however many images have
    )


def _mae_cfg() -> dict[str, Any]:
    return _cfg(num_classes=0, first_conv="encoder.patch_embed.proj", classifier=None)


_VIM_PAPER = {"paper_ids": "arXiv:2401.09417"}
_CFGS = {
    "fastvim_tiny_patch16_224": _cfg(),
    "fastvim_small_patch16_224": _cfg(),
    "fastvim_base_patch16_224": _cfg(),
    "fastvim_large_patch16_224": _cfg(),
    "fastvim_huge_patch14_224": _cfg(),
    "fastvim_huge_patch14_448": _cfg(input_size=(3, 448, 448)),
    "vim_tiny_patch16_224": _cfg(**_VIM_PAPER),
    "vim_tiny_patch16_stride8_224": _cfg(**_VIM_PAPER),
    "vim_small_patch16_224": _cfg(**_VIM_PAPER),
    "vim_small_patch16_stride8_224": _cfg(**_VIM_PAPER),
    "vim_base_patch16_224": _cfg(**_VIM_PAPER),
    "vim_large_patch16_224": _cfg(**_VIM_PAPER),
    "fastchannelvim_small_patch16_224": _channel_cfg(),
    "fastchannelvim_small_patch8_224": _channel_cfg(),
    "channelvim_small_patch16_224": _channel_cfg(),
    "channelvim_small_patch8_224": _channel_cfg(),
    "mae_fastvim_tiny_patch16_224": _mae_cfg(),
    "mae_fastvim_small_patch16_224": _mae_cfg(),
    "mae_fastvim_base_patch16_224": _mae_cfg(),
    "mae_fastvim_large_patch16_224": _mae_cfg(),
    "mae_fastvim_huge_patch14_224": _mae_cfg(),
    "mae_vim_tiny_patch16_224": _mae_cfg(),
    "mae_vim_small_patch16_224": _mae_cfg(),
    "mae_vim_base_patch16_224": _mae_cfg(),
    "mae_vim_large_patch16_224": _mae_cfg(),
}
_TAGGED = {
    entry.name: {**_CFGS[entry.backbone], **published_cfg(entry)}
    for entry in ENTRIES.values()
    if not entry.head
}
_UNTAGGED = _CFGS.keys() - {name.partition(".")[0] for name in _TAGGED}
# The first tag of a model is timm's default one.
default_cfgs = generate_default_cfgs({**_TAGGED, **{name: _CFGS[name] for name in _UNTAGGED}})

_TINY = {"embed_dim": 192, "depth": 24}
_SMALL = {"embed_dim": 384, "depth": 24}
_BASE = {"embed_dim": 768, "depth": 24}
_LARGE = {"embed_dim": 1024, "depth": 48}
_HUGE = {"embed_dim": 1280, "depth": 64, "patch_size": 14}
_MAE_TINY = {**_TINY, "decoder_embed_dim": 192}
_MAE_SMALL = {**_SMALL, "decoder_embed_dim": 384}
_MAE_VIM = {"pooling": "none", "class_token": True}
_VIM = {**_MAE_VIM, "global_pool": "token"}


def _create(
    variant: str,
    pretrained: bool,
    defaults: dict[str, Any],
    model: type[nn.Module] = FastVim,
    filter_fn: Any = checkpoint_filter_fn,
    **given: Any,
) -> Any:
    cfg = _CFGS[variant]
    return build(model, variant, pretrained, cfg, defaults, given, pretrained_filter_fn=filter_fn)


@register_model
def fastvim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-T: width 192, 24 blocks."""
    return _create("fastvim_tiny_patch16_224", pretrained, _TINY, **kwargs)


@register_model
def fastvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-S: width 384, 24 blocks."""
    return _create("fastvim_small_patch16_224", pretrained, _SMALL, **kwargs)


@register_model
def fastvim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-B: width 768, 24 blocks."""
    return _create("fastvim_base_patch16_224", pretrained, _BASE, **kwargs)


@register_model
def fastvim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-L: width 1024, 48 blocks."""
    return _create("fastvim_large_patch16_224", pretrained, _LARGE, **kwargs)


@register_model
def fastvim_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-H: width 1280, 64 blocks, patches of 14."""
    return _create("fastvim_huge_patch14_224", pretrained, _HUGE, **kwargs)


@register_model
def fastvim_huge_patch14_448(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastVim-H with its position embedding stored for 448 pixels."""
    return _create("fastvim_huge_patch14_448", pretrained, {**_HUGE, "img_size": 448}, **kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-T with the norm after the scan: width 192, 24 blocks, class token in the middle."""
    return _create("vim_tiny_patch16_224", pretrained, {**_TINY, **_VIM}, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-T whose patches of 16 pixels begin every 8 pixels."""
    defaults = {**_TINY, **_VIM, "patch_stride": 8}
    return _create("vim_tiny_patch16_stride8_224", pretrained, defaults, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-S with the norm after the scan: width 384, 24 blocks, class token in the middle."""
    return _create("vim_small_patch16_224", pretrained, {**_SMALL, **_VIM}, **kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-S whose patches of 16 pixels begin every 8 pixels."""
    defaults = {**_SMALL, **_VIM, "patch_stride": 8}
    return _create("vim_small_patch16_stride8_224", pretrained, defaults, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-B with the norm after the scan: width 768, 24 blocks, class token in the middle."""
    return _create("vim_base_patch16_224", pretrained, {**_BASE, **_VIM}, **kwargs)


@register_model
def vim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """Vim-L with the norm after the scan: width 1024, 48 blocks, class token in the middle."""
    return _create("vim_large_patch16_224", pretrained, {**_LARGE, **_VIM}, **kwargs)


def _create_channel(
    variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any
) -> FastVim:
    sizes = {**_SMALL, **defaults}
    return _create(variant, pretrained, sizes, FastChannelVim, _channel_filter, **kwargs)


def _channel_filter(state_dict: dict[str, Tensor], model: FastVim) -> dict[str, Tensor]:
    """Weights for a model of fewer channels: the vectors of the first ones."""
    state_dict = checkpoint_filter_fn(state_dict, model)
    vectors = state_dict[_CHANNELS]
    known, wanted = len(vectors), model.in_chans
    if wanted > known:
        raise UserError(f"in_chans={wanted}: the weights know {known} channels")
    if wanted < known:
        _logger.warning("the vectors of the first %d of %d channels are taken", wanted, known)
    return {**state_dict, _CHANNELS: vectors[:wanted]}


@register_model
def fastchannelvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastChannelVim-S for 8 channels and 161 classes: width 384, 24 blocks, patches of 16."""
    return _create_channel("fastchannelvim_small_patch16_224", pretrained, {}, **kwargs)


@register_model
def fastchannelvim_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """FastChannelVim-S for 8 channels and 161 classes: width 384, 24 blocks, patches of 8."""
    defaults = {"patch_size": 8}
    return _create_channel("fastchannelvim_small_patch8_224", pretrained, defaults, **kwargs)


@register_model
def channelvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """ChannelVim-S, which pools nothing, for 8 channels and 161 classes: patches of 16."""
    return _create_channel("channelvim_small_patch16_224", pretrained, _VIM, **kwargs)


@register_model
def channelvim_small_patch8_224(pretrained: bool = False, **kwargs: Any) -> FastVim:
    """ChannelVim-S, which pools nothing, for 8 channels and 161 classes: patches of 8."""
    defaults = {**_VIM, "patch_size": 8}
    return _create_channel("channelvim_small_patch8_224", pretrained, defaults, **kwargs)


def _mae(
    variant: str, pretrained: bool, defaults: dict[str, Any], **kwargs: Any
) -> MaskedAutoencoder:
    model = MaskedAutoencoder
    return _create(variant, pretrained, defaults, model, **kwargs)


@register_model
def mae_fastvim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of FastVim-T; its decoder is as wide as its encoder."""
    return _mae("mae_fastvim_tiny_patch16_224", pretrained, _MAE_TINY, **kwargs)


@register_model
def mae_fastvim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of FastVim-S; its decoder is as wide as its encoder."""
    return _mae("mae_fastvim_small_patch16_224", pretrained, _MAE_SMALL, **kwargs)


@register_model
def mae_fastvim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of FastVim-B; its decoder is 512 wide."""
    return _mae("mae_fastvim_base_patch16_224", pretrained, _BASE, **kwargs)


@register_model
def mae_fastvim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of FastVim-L; its decoder is 512 wide."""
    return _mae("mae_fastvim_large_patch16_224", pretrained, _LARGE, **kwargs)


@register_model
def mae_fastvim_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of FastVim-H; its decoder is 512 wide."""
    return _mae("mae_fastvim_huge_patch14_224", pretrained, _HUGE, **kwargs)


@register_model
def mae_vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of Vim-T; its decoder is as wide as its encoder."""
    return _mae("mae_vim_tiny_patch16_224", pretrained, {**_MAE_TINY, **_MAE_VIM}, **kwargs)


@register_model
def mae_vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of Vim-S; its decoder is as wide as its encoder."""
    return _mae("mae_vim_small_patch16_224", pretrained, {**_MAE_SMALL, **_MAE_VIM}, **kwargs)


@register_model
def mae_vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of Vim-B; its decoder is 512 wide."""
    return _mae("mae_vim_base_patch16_224", pretrained, {**_BASE, **_MAE_VIM}, **kwargs)


@register_model
def mae_vim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> MaskedAutoencoder:
    """Masked autoencoder of Vim-L; its decoder is 512 wide."""
    return _mae("mae_vim_large_patch16_224", pretrained, {**_LARGE, **_MAE_VIM}, **kwargs)
