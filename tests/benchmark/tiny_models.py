"""Models of the size of a test, registered with timm so that the command finds them."""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from torch import Tensor, nn

from fastvim.models import FastVim
from fastvim.ops import engine_name

SIZES: dict[str, Any] = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_classes": 5}


class Conv(nn.Module):
    """A convolutional classifier, for images of any size, without `img_size`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2)
        self.head = nn.Linear(8, 5)
        nn.init.zeros_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu().mean((2, 3)))


class Wrong(FastVim):
    """A FastVim whose engine errs."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        served = engine_name("selective_scan", x.device.type) != "reference"
        return logits + torch.ones_like(logits) if served else logits


def _options(**kwargs: Any) -> dict[str, Any]:
    """Without what timm's own builder takes away."""
    timms = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    return {key: value for key, value in kwargs.items() if key not in timms}


@register_model
def tiny_fastvim_test(pretrained: bool = False, **kwargs: Any) -> FastVim:
    return FastVim(**SIZES, **_options(**kwargs))


@register_model
def tiny_vim_test(pretrained: bool = False, **kwargs: Any) -> FastVim:
    vim = {"pooling": "none", "class_token": True, "global_pool": "token"}
    return FastVim(**SIZES, **vim, **_options(**kwargs))


@register_model
def tiny_wrong_test(pretrained: bool = False, **kwargs: Any) -> FastVim:
    return Wrong(**SIZES, **_options(**kwargs))


@register_model
def tiny_conv_test(pretrained: bool = False, **kwargs: Any) -> Conv:
    return Conv(**_options(**kwargs))


OURS, VIM, WRONG, CONV = "tiny_fastvim_test", "tiny_vim_test", "tiny_wrong_test", "tiny_conv_test"
