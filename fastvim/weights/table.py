"""The published weights: where each file is, and what no file tells about its model.

A name is a timm name and a tag. The tag chooses the options of the model, with weights or without.
Segmentors and detectors are named after their head, their backbone and the side of their images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from fastvim.constants import JUMPCP_MEAN, JUMPCP_STD
from fastvim.errors import UserError, nearest

NON_COMMERCIAL = "CC-BY-NC-SA-4.0"
APACHE = "Apache-2.0"
_FASTVIM = "https://github.com/insitro/FastVim/releases/download/v0/"
_VIM = "https://huggingface.co/hustvl/"


@dataclass(frozen=True)
class Entry:
    """A published file of weights.

    Attributes:
        name: of the whole model, with its tag.
        url: of the file.
        backbone: timm name of the model, or of a dense model's backbone, without a tag.
        licence: of the weights, as SPDX names it.
        data: what it was trained on last: "imagenet", "jumpcp", "ade20k" or "coco".
        number: published score in percent, by the name of the metric here; empty for an encoder.
        recipe: file below `recipes/` that trains it, without its ending; "" if there is none.
        model_args: options of the backbone that its name does not imply.
        head: "segmentation" or "detection" with its sizes, as the metadata of a file hold them.
        images: how evaluation prepares an image, in the words of the metadata of a file.
        averaged: whether the number is of the averaged weights.
        sha256: of the file, where it is known.
        megabytes: of the file, where they are known.
    """

    name: str
    url: str
    backbone: str
    licence: str
    data: str
    number: Mapping[str, float]
    recipe: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    head: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    averaged: bool = False
    sha256: str | None = None
    megabytes: float | None = None

    @property
    def file(self) -> str:
        """Name of the published file."""
        return self.url.rpartition("/")[2]

    @property
    def task(self) -> str:
        """What the model does: "classification", "masked pre-training", or its head's task."""
        if self.backbone.startswith("mae_"):
            return "masked pre-training"
        return next(iter(self.head), "classification")

    @property
    def tag(self) -> str:
        return self.name.partition(".")[2]


_RGB = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_PHOTOS = {**_RGB, "img_size": 224, "in_chans": 3, "crop_pct": 0.875, "interpolation": "bicubic"}
_CELLS = {
    "img_size": 224,
    "in_chans": 8,
    "mean": JUMPCP_MEAN,  # of values 0 to 255
    "std": JUMPCP_STD,
}
# Published dense models see images that OpenCV resized, without antialiasing.
_SCENES = {**_RGB, "img_size": 512, "base_size": (2048, 512), "antialias": False}
_OBJECTS = {**_RGB, "img_size": 1024, "eval_size": 1024, "antialias": False}

_UPERNET = {
    "num_classes": 150,
    "out_indices": (5, 11, 17, 23),
    "source": "mixer",
    "channels": 512,
    "aux_channels": 256,
    "window": 512,
    "stride": 341,
}
_CASCADE = {
    "num_classes": 80,
    "source": "mixer",
    "channels": 256,
    "pad_to": 1024,
    "proposals": 1000,
    "heads": {
        "hidden_dim": 1024,
        "samples": 512,
        "score_thresh": 0.05,
        "nms_thresh": 0.5,
        "detections": 100,
    },
}
_WITHOUT_TOKEN = {"class_token": False, "global_pool": "avg"}


def _classifier(
    name: str, file: str, top1: float, recipe: str, averaged: bool = True, **model_args: Any
) -> Entry:
    backbone = name.partition(".")[0]
    return Entry(
        name=name,
        url=_FASTVIM + file,
        backbone=backbone,
        licence=NON_COMMERCIAL,
        data="imagenet",
        number={"top1": top1},
        recipe=recipe,
        model_args=model_args,
        images=_PHOTOS,
        averaged=averaged,
    )


def _original_vim(
    name: str,
    repository: str,
    file: str,
    top1: float,
    top5: float,
    megabytes: float | None = None,
    sha256: str | None = None,
    revision: str = "main",
) -> Entry:
    """Of the original Vim's release: no norm after the scan; the number is of the raw weights."""
    return Entry(
        name=name,
        url=f"{_VIM}{repository}/resolve/{revision}/{file}",
        backbone=name.partition(".")[0],
        licence=APACHE,
        data="imagenet",
        number={"top1": top1, "top5": top5},
        model_args={"norm_after_ssm": False},
        images=_PHOTOS,
        sha256=sha256,
        megabytes=megabytes,
    )


def _autoencoder(backbone: str, file: str, recipe: str) -> Entry:
    return Entry(
        name=f"{backbone}.in1k",
        url=_FASTVIM + file,
        backbone=backbone,
        licence=NON_COMMERCIAL,
        data="imagenet",
        number={},
        recipe=recipe,
        images=_PHOTOS,
    )


def _cells(name: str, file: str, top1: float, recipe: str, **model_args: Any) -> Entry:
    return Entry(
        name=name,
        url=_FASTVIM + file,
        backbone=name.partition(".")[0],
        licence=NON_COMMERCIAL,
        data="jumpcp",
        number={"top1": top1},
        recipe=recipe,
        model_args=model_args,
        images=_CELLS,
    )


def _segmentor(size: str, miou: float) -> Entry:
    return Entry(
        name=f"upernet_fastvim_{size}_patch16_512.ade20k",
        url=f"{_FASTVIM}FastVim_{size}_iter_160000.pth",
        backbone=f"fastvim_{size}_patch16_224",
        licence=NON_COMMERCIAL,
        data="ade20k",
        number={"miou": miou},
        recipe=f"ade20k/fastvim_{size}",
        model_args={"img_size": 512, "norm": "layer"},
        head={"segmentation": _UPERNET},
        images=_SCENES,
    )


def _detector(backbone: str, file: str, box_ap: float, **model_args: Any) -> Entry:
    return Entry(
        name=f"cascade_mask_rcnn_{backbone}_patch16_1024.coco",
        url=_FASTVIM + file,
        backbone=f"{backbone}_patch16_224",
        licence=NON_COMMERCIAL,
        data="coco",
        number={"box_ap": box_ap},
        recipe=f"coco/{backbone}",
        model_args={"img_size": 1024, "norm": "layer", **model_args},
        head={"detection": _CASCADE},
        images=_OBJECTS,
    )


_ALL = (
    _classifier(
        "fastvim_tiny_patch16_224.in1k", "FastVim_tiny.ckpt", 75.4, "imagenet/fastvim_tiny"
    ),
    _classifier(
        "fastvim_small_patch16_224.in1k", "FastVim_small.ckpt", 81.1, "imagenet/fastvim_small"
    ),
    _classifier(
        "fastvim_base_patch16_224.in1k", "FastVim_base.ckpt", 82.6, "imagenet/fastvim_base"
    ),
    _classifier(
        "vim_base_patch16_224.in1k", "Vim_base_withlayernorm.ckpt", 82.6, "imagenet/vim_base"
    ),
    _classifier(
        "fastvim_base_patch16_224.mae_in1k_ft_in1k",
        "finetune_FastVim_base.ckpt",
        83.0,
        "mae/finetune_fastvim_base",
        averaged=False,
        pool_scale=0.25,  # its encoder saw a quarter of the patches
    ),
    _classifier(
        "vim_base_patch16_224.mae_in1k_ft_in1k",
        "finetune_Vim_base.ckpt",
        83.3,
        "mae/finetune_vim_base",
        averaged=False,
    ),
    _autoencoder(
        "mae_fastvim_base_patch16_224", "FastMaskVim_base.ckpt", "mae/pretrain_fastvim_base"
    ),
    _autoencoder("mae_vim_base_patch16_224", "pretrain_Vim_base.ckpt", "mae/pretrain_vim_base"),
    _original_vim(
        "vim_tiny_patch16_224.midcls_in1k",
        "Vim-tiny-midclstok",
        "vim_t_midclstok_76p1acc.pth",
        76.1,
        93.0,
    ),
    _original_vim(
        "vim_tiny_patch16_stride8_224.midcls_ft_in1k",
        "Vim-tiny-midclstok",
        "vim_t_midclstok_ft_78p3acc.pth",
        78.3,
        94.2,
        111.2,
    ),
    _original_vim(
        "vim_small_patch16_224.midcls_in1k",
        "Vim-small-midclstok",
        "vim_s_midclstok_80p5acc.pth",
        80.5,
        95.1,
        394.2,
        "aae4583e2def6389b66cfaf292cfade47a873182a39adbec19ec55b730ea9fe3",
        "babc4440f5fab6e08d97e371afa639c8cf98bf2c",  # which the checksum is of
    ),
    _original_vim(
        "vim_small_patch16_stride8_224.midcls_ft_in1k",
        "Vim-small-midclstok",
        "vim_s_midclstok_ft_81p6acc.pth",
        81.6,
        95.4,
        397.4,
    ),
    _original_vim(
        "vim_base_patch16_224.midcls_in1k",
        "Vim-base-midclstok",
        "vim_b_midclstok_81p9acc.pth",
        81.9,
        95.8,
        1489.8,
    ),
    _cells(
        "fastchannelvim_small_patch16_224.jumpcp",
        "FastChannelVim_small.ckpt",
        73.6,
        "jumpcp/fastchannelvim_small_patch16",
    ),
    _cells(
        "fastchannelvim_small_patch16_224.jumpcp_maxpool",
        "FastChannelVim_small_maxpool.ckpt",
        72.9,
        "jumpcp/fastchannelvim_small_patch16_max",
        pooling="max",
    ),
    _cells(
        "channelvim_small_patch16_224.jumpcp",
        "ChannelVim_small.ckpt",
        73.5,
        "jumpcp/channelvim_small_patch16",
    ),
    _cells(
        "fastchannelvim_small_patch8_224.jumpcp",
        "FastChannelVim_small_ps8.ckpt",
        83.1,
        "jumpcp/fastchannelvim_small_patch8",
    ),
    _cells(
        "fastchannelvim_small_patch8_224.jumpcp_maxpool",
        "FastChannelVim_small_maxpool_ps8.ckpt",
        85.0,
        "jumpcp/fastchannelvim_small_patch8_max",
        pooling="max",
    ),
    _cells(
        "channelvim_small_patch8_224.jumpcp",
        "ChannelVim_small_ps8.ckpt",
        83.0,
        "jumpcp/channelvim_small_patch8",
    ),
    _segmentor("tiny", 41.8),
    _segmentor("small", 44.9),
    _segmentor("base", 47.8),
    _detector("fastvim_tiny", "FastVim_tiny_iter_184375.pth", 45.1),
    _detector("fastvim_small", "FastVim_small_iter_184375.pth", 48.4),
    _detector("fastvim_base", "FastVim_base_iter_184375.pth", 50.0),
    _detector("vim_small", "Vim_small_transferfromgithub_iter_184375.pth", 47.1, **_WITHOUT_TOKEN),
)
ENTRIES: dict[str, Entry] = {entry.name: entry for entry in _ALL}


def has_published(name: str) -> bool:
    """Whether the model of this name, with or without a tag, has published weights."""
    model = name.partition(".")[0]
    return any(entry.name.partition(".")[0] == model for entry in ENTRIES.values())


def find_entry(name: str) -> Entry:
    """The entry of a name with its tag, or of a name whose first published weights are meant.

    Raises:
        UserError: no such entry; with the tags that the model has, or the nearest names.
    """
    model = name.partition(".")[0]
    entries = [entry for entry in ENTRIES.values() if entry.name.startswith(f"{model}.")]
    if name == model and entries:
        return entries[0]
    if name in ENTRIES:
        return ENTRIES[name]
    if entries:
        tags = ", ".join(entry.tag for entry in entries)
        raise UserError(f"no published weights {name!r}: {model} has the tags {tags}")
    raise UserError(f"no published weights {name!r}{nearest(name, ENTRIES)}")


def of_file(file: str) -> Entry | None:
    """The entry whose published file has this name, without folders; None for another."""
    return next((entry for entry in ENTRIES.values() if entry.file == file), None)
