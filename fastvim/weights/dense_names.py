"""Names of whole segmentors and detectors: published ones to ours, and back.

Published are mmsegmentation's UPerNet and mmdetection's Cascade Mask R-CNN. There the background is
the last class of a detector; here it is the first, as torchvision has it, with box offsets and
masks of its own that are never used: they are zero, and dropped on the way back.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastvim.weights import names


class _Head(NamedTuple):
    """The names of one kind of model.

    Attributes:
        mark: pattern of published names that no other model has.
        own_mark: pattern of our names that no other model has.
        backbone: prefix of the backbone's names, ours.
        norms: prefix of the norms of its maps, ours.
        pairs: published and our names, `{}` for a number, equal on both sides and in order.
    """

    mark: str
    own_mark: str
    backbone: str
    norms: str
    pairs: tuple[tuple[str, str], ...]


def _with_norm(published: str, ours: str, norm: str) -> tuple[tuple[str, str], ...]:
    """A convolution and the norm after it, which ours numbers 0 and 1."""
    return ((f"{published}.conv", f"{ours}.0"), (f"{published}.{norm}", f"{ours}.1"))


_SEGMENTATION = _Head(
    mark=r"decode_head\.(?:psp_modules|fpn_bottleneck)\.",
    own_mark=r"aux_head\.",
    backbone="maps.backbone.",
    norms="maps.",
    pairs=(
        *_with_norm("decode_head.psp_modules.{}.1", "head.pools.{}.1", "bn"),
        *_with_norm("decode_head.bottleneck", "head.pooled", "bn"),
        *_with_norm("decode_head.lateral_convs.{}", "head.laterals.{}", "bn"),
        *_with_norm("decode_head.fpn_convs.{}", "head.smooth.{}", "bn"),
        *_with_norm("decode_head.fpn_bottleneck", "head.fusion", "bn"),
        ("decode_head.conv_seg", "head.classifier"),
        *_with_norm("auxiliary_head.convs.0", "aux_head.convolution", "bn"),
        ("auxiliary_head.conv_seg", "aux_head.classifier"),
    ),
)
_BOXES, _MASKS = "roi_head.bbox_head.{}", "roi_head.mask_head.{}"
_STAGE, _MASK_STAGE = "heads.stages.{}", "heads.mask_stages.{}"
_DETECTION = _Head(
    mark=r"roi_head\.bbox_head\.\d+\.fc_cls\.",
    own_mark=r"heads\.stages\.",
    backbone="backbone.backbone.",
    norms="backbone.",
    pairs=(
        ("neck.fpn1.0", "pyramid.levels.0.0.0"),
        ("neck.fpn1.1", "pyramid.levels.0.0.1"),
        ("neck.fpn1.3", "pyramid.levels.0.0.3"),
        ("neck.fpn2.0", "pyramid.levels.1.0"),
        ("neck.lateral_convs.{}.conv", "pyramid.levels.{}.1"),
        ("neck.lateral_convs.{}.norm_layer", "pyramid.levels.{}.2"),
        ("neck.fpn_convs.{}.conv", "pyramid.levels.{}.3"),
        ("neck.fpn_convs.{}.norm_layer", "pyramid.levels.{}.4"),
        ("rpn_head.rpn_conv.{}.conv", "rpn.head.conv.{}.0"),
        ("rpn_head.rpn_cls", "rpn.head.cls_logits"),
        ("rpn_head.rpn_reg", "rpn.head.bbox_pred"),
        *_with_norm(f"{_BOXES}.shared_convs.{{}}", f"{_STAGE}.box_head.{{}}", "norm_layer"),
        (f"{_BOXES}.shared_fcs.0", f"{_STAGE}.box_head.5"),
        (f"{_BOXES}.fc_cls", f"{_STAGE}.box_predictor.cls_score"),
        (f"{_BOXES}.fc_reg", f"{_STAGE}.box_predictor.bbox_pred"),
        *_with_norm(f"{_MASKS}.convs.{{}}", f"{_MASK_STAGE}.head.{{}}", "norm_layer"),
        (f"{_MASKS}.upsample", f"{_MASK_STAGE}.predictor.conv5_mask"),
        (f"{_MASKS}.conv_logits", f"{_MASK_STAGE}.predictor.mask_fcn_logits"),
    ),
)
_HEADS = {"segmentation": _SEGMENTATION, "detection": _DETECTION}
_BACKBONE = "backbone."  # published


def published_head(state: Mapping[str, Tensor]) -> str | None:
    """The kind of a whole model under published names, "segmentation" or "detection", or None."""
    return next((kind for kind, head in _HEADS.items() if _holds(state, head.mark)), None)


def own_head(state: Mapping[str, Tensor]) -> str | None:
    """The kind of a whole model under our names, "segmentation" or "detection", or None."""
    return next((kind for kind, head in _HEADS.items() if _holds(state, head.own_mark)), None)


def head_of(state: Mapping[str, Tensor]) -> str | None:
    """As `published_head` and `own_head`, for names of either."""
    return published_head(state) or own_head(state)


def _holds(state: Mapping[str, Tensor], mark: str) -> bool:
    return any(re.match(mark, name) for name in state)


def published_backbone(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a whole model under published names, without their prefix."""
    return _under(state, _BACKBONE)


def backbone_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone of a whole model under our names, and the norms of its maps as `norms.*`."""
    kind = own_head(state)
    assert kind is not None
    head = _HEADS[kind]
    norms = head.norms + names.MAP_NORMS
    inside = {}
    for name, tensor in state.items():
        if name.startswith(head.backbone):
            inside[name.removeprefix(head.backbone)] = tensor
        elif name.startswith(norms):
            inside[name.removeprefix(head.norms)] = tensor
    return inside


def from_published(
    state: Mapping[str, Tensor], column_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Published names of a whole model to ours; `to_published` undoes it exactly.

    A name that no such model has stays as it is.

    Args:
        state: a whole model, as `published_head` knows it.
        column_grid: see `names.from_published`.
    """
    kind = published_head(state)
    assert kind is not None
    head = _HEADS[kind]
    inside = published_backbone(state)
    ours = {
        (head.norms if name.startswith(names.MAP_NORMS) else head.backbone) + name: tensor
        for name, tensor in names.from_published(inside, column_grid).items()
    }
    for name, tensor in state.items():
        if not name.startswith(_BACKBONE):
            target = _rename(name, head.pairs)
            ours[target] = _add_background(target, tensor)
    return ours


def to_published(
    state: Mapping[str, Tensor], column_grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Our names of a whole model to published ones; see `from_published`."""
    kind = own_head(state)
    assert kind is not None
    head = _HEADS[kind]
    published = {
        _BACKBONE + name: tensor
        for name, tensor in names.to_published(backbone_state(state), column_grid).items()
    }
    pairs = tuple((ours, theirs) for theirs, ours in head.pairs)
    for name, tensor in state.items():
        if not name.startswith((head.backbone, head.norms + names.MAP_NORMS)):
            published[_rename(name, pairs)] = _drop_background(name, tensor)
    return published


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}


def _rename(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    module, _, tensor = name.rpartition(".")
    for source, target in pairs:
        found = re.fullmatch(re.escape(source).replace(r"\{\}", r"(\d+)"), module)
        if found is not None:
            return f"{target.format(*found.groups())}.{tensor}"
    return name


def _add_background(name: str, tensor: Tensor) -> Tensor:
    """A detector's rows with the background's first, from the published ones."""
    if ".box_predictor.cls_score." in name:
        return tensor.roll(1, 0)
    rows = _unused_rows(name)
    return torch.cat([tensor.new_zeros(rows, *tensor.shape[1:]), tensor]) if rows else tensor


def _drop_background(name: str, tensor: Tensor) -> Tensor:
    """The inverse of `_add_background`."""
    if ".box_predictor.cls_score." in name:
        return tensor.roll(-1, 0)
    rows = _unused_rows(name)
    return tensor[rows:].clone() if rows else tensor


def _unused_rows(name: str) -> int:
    """How many of a tensor's first rows are the background's and are never used."""
    if ".box_predictor.bbox_pred." in name:
        return 4
    return 1 if ".predictor.mask_fcn_logits." in name else 0
