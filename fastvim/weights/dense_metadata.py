"""The metadata of segmentors and detectors: their heads, and how their images are prepared.

Sizes come from the weights, the rest from the caller, the file or the table, in this order. Each
function returns the metadata, and beside them what is assumed because nothing tells it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from fastvim.errors import UserError
from fastvim.labels import ADE20K_CLASSES, COCO_CATEGORIES
from fastvim.weights.names import MAP_NORMS
from fastvim.weights.table import Entry

Described = tuple[dict[str, Any], dict[str, Any]]

# Of mmdetection's Cascade Mask R-CNN, as published.
_HEADS = {"samples": 512, "score_thresh": 0.05, "nms_thresh": 0.5, "detections": 100}
# What the caller may say of a head, beside the options of the backbone.
OPTIONS = {
    "segmentation": ("window", "stride", "base_size"),
    "detection": ("pad_to", "eval_size", "proposals"),
}
_IN_HEAD = ("window", "stride", "pad_to", "proposals")  # the others stand beside the head


class Source(NamedTuple):
    """Where the metadata of a dense model come from.

    Attributes:
        given: by the caller: `out_indices` and what `OPTIONS` names.
        told: by the file; see `Checkpoint.told`.
        entry: of the table; None for a file that is not in it.
        img_size: side that the position embedding is made for, or height and width.
        depth: blocks of the backbone.
    """

    given: Mapping[str, Any]
    told: Mapping[str, Any]
    entry: Entry | None
    img_size: int | Sequence[int]
    depth: int

    def find(self, name: str, told: Any, published: Any) -> Any:
        """What the caller, the file or the table says; None if none of them does."""
        return next((v for v in (self.given.get(name), told, published) if v is not None), None)

    @property
    def published_images(self) -> Mapping[str, Any]:
        return {} if self.entry is None else self.entry.images

    def published_head(self, kind: str) -> Mapping[str, Any]:
        return {} if self.entry is None else self.entry.head.get(kind, {})


def _check_given(given: Mapping[str, Any]) -> None:
    """Raise a UserError for an option of the caller that is not the whole numbers it takes."""
    for name, value in given.items():
        numbers = list(value) if isinstance(value, list | tuple) else [value]
        whole = all(type(number) is int for number in numbers)
        if name == "out_indices":
            expected, fits = "a list of blocks", isinstance(value, list | tuple)
        elif name == "base_size":
            pair = len(numbers) == 2 and whole and min(numbers) >= 1
            expected, fits = "the longer and the shorter side", pair
        else:
            expected, fits = "1 or more", whole and min(numbers, default=0) >= 1
        whole_images = name == "window" and value is None
        if not whole_images and not (whole and fits):
            raise UserError(f"{name}={value!r}: expected {expected}")


def describe(kind: str | None, state: Mapping[str, Tensor], source: Source) -> Described:
    """Of a whole model under our names, of a backbone with norms for its maps, or of neither.

    Args:
        kind: "segmentation", "detection", or None for a backbone's or classifier's weights.
        state: the weights.
        source: what else is known of them.

    Raises:
        UserError: maps that the model does not have, or a head that ours does not compute.
    """
    _check_given(source.given)
    if kind is not None and (elsewise := source.told.get("elsewise")):
        raise UserError(
            f"its configuration sets {', '.join(elsewise)}: not what this head computes"
        )
    if kind is not None:
        return _KINDS[kind](state, source)
    count = count_maps(state, MAP_NORMS)
    indices = source.given.get("out_indices")
    if not count and indices is None:
        return {}, {}
    blocks, assumed = _out_indices(count, source, "segmentation")
    return {"features": {"out_indices": blocks, "source": "mixer"}}, assumed


def change(kind: str, metadata: Mapping[str, Any], source: Source) -> dict[str, Any]:
    """The metadata of a whole model of this library that the caller says otherwise.

    Raises:
        UserError: maps that the model does not have.
    """
    _check_given(source.given)
    head, found = dict(metadata[kind]), dict(source.given)
    if "out_indices" in found:
        depth = source.depth
        count = len(head.get("out_indices", [depth - 1]))
        blocks = _given_blocks(found.pop("out_indices"), count, depth)
        if kind == "detection":
            _check_last(blocks, depth)
        else:
            head["out_indices"] = blocks
    if "proposals" in found:
        head.pop("candidates", None)
    if found.get("window", 0) is None:
        found["stride"] = None
    head |= {name: found.pop(name) for name in list(found) if name in _IN_HEAD}
    return {**found, kind: head}


def _given_blocks(given: Sequence[int], count: int, depth: int) -> list[int]:
    """The blocks that the caller names, from 0 on."""
    if len(given) != count:
        raise UserError(f"out_indices {list(given)}: the weights are for {count} maps")
    if not all(-depth <= index < depth for index in given):
        raise UserError(f"out_indices {list(given)}: the weights have {depth} blocks")
    return [index % depth for index in given]


def _check_last(blocks: list[int], depth: int) -> None:
    if blocks != [depth - 1]:
        raise UserError(f"out_indices {blocks}: a detector takes the last block, {depth - 1}")


def count_maps(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of maps that a dense model's weights have norms for."""
    place = prefix.count(".")
    return len({name.split(".")[place] for name in state if name.startswith(prefix)})


def _out_indices(count: int, source: Source, kind: str) -> tuple[list[int], dict[str, Any]]:
    """The blocks whose maps a head takes, by default spread evenly."""
    given, depth = source.given.get("out_indices"), source.depth
    if given is not None:
        return _given_blocks(given, count, depth), {}
    for blocks in (source.told.get("out_indices"), source.published_head(kind).get("out_indices")):
        if blocks and len(blocks) == count and all(-depth <= index < depth for index in blocks):
            return [index % depth for index in blocks], {}
    evenly = [(i + 1) * depth // count - 1 for i in range(count)]
    return evenly, {} if count == 1 else {"out_indices": evenly}


def _segmentation(state: Mapping[str, Tensor], source: Source) -> Described:
    told, published = source.told, source.published_head("segmentation")
    blocks, assumed = _out_indices(count_maps(state, f"maps.{MAP_NORMS}"), source, "segmentation")
    classes = _rows(state, "head.classifier.bias")
    side = source.img_size if isinstance(source.img_size, int) else min(source.img_size)
    window = source.find("window", told.get("window"), _fitting(source, published.get("window")))
    stride = source.find("stride", told.get("stride"), _fitting(source, published.get("stride")))
    whole = source.given["window"] is None if "window" in source.given else told.get("whole")
    if whole:
        window = stride = None
    elif window is None:
        window, stride = side, stride or round(side * 2 / 3)
        assumed |= {"window": window, "stride": stride}
    base = source.find(
        "base_size", told.get("scale"), _fitting(source, source.published_images.get("base_size"))
    )
    if base is None:
        base = assumed["base_size"] = [4 * side, side]
    head = {
        "num_classes": classes,
        "out_indices": blocks,
        "source": "mixer",
        "channels": _rows(state, "head.fusion.0.weight"),
        "aux_channels": _rows(state, "aux_head.convolution.0.weight"),
        "window": window,
        "stride": stride,
    }
    found = {"segmentation": head, "base_size": sorted(base, reverse=True), **_images(source)}
    names = _class_names(classes, source, list(ADE20K_CLASSES), assumed)
    if "reduce_zero_label" in told:
        found["reduce_zero_label"] = told["reduce_zero_label"]
    return {**found, "class_names": names}, assumed


def _detection(state: Mapping[str, Tensor], source: Source) -> Described:
    told, published = source.told, source.published_head("detection")
    blocks, assumed = _out_indices(count_maps(state, f"backbone.{MAP_NORMS}"), source, "detection")
    _check_last(blocks, source.depth)
    classes = _rows(state, "heads.stages.0.box_predictor.cls_score.bias") - 1
    pad_to = source.find("pad_to", told.get("padded"), _fitting(source, published.get("pad_to")))
    scale = told.get("scale") or []
    longer = max(scale) if scale else None
    side = source.find(
        "eval_size", longer, _fitting(source, source.published_images.get("eval_size"))
    )
    if not isinstance(pad_to, int | None) or len(set(scale)) > 1:
        raise UserError(f"images resized to {scale} and padded to {pad_to}: expected a square")
    if pad_to is None:
        pad_to = source.img_size if isinstance(source.img_size, int) else max(source.img_size)
        assumed["pad_to"] = pad_to
    if side is None:
        side = assumed["eval_size"] = pad_to
    hidden = _rows(state, "heads.stages.0.box_head.5.bias")
    proposals = source.find("proposals", told.get("proposals"), published.get("proposals")) or 1000
    head: dict[str, Any] = {
        "num_classes": classes,
        "source": "mixer",
        "channels": _rows(state, "pyramid.levels.0.1.weight"),
        "pad_to": pad_to,
        "proposals": proposals,
        "heads": {"hidden_dim": hidden, **_HEADS, **told.get("heads", {})},
    }
    candidates = told.get("candidates", proposals)
    if "proposals" not in source.given and candidates != proposals:
        head["candidates"] = candidates
    images = _images(source)
    if images["mean"] != list(IMAGENET_DEFAULT_MEAN) or images["std"] != list(IMAGENET_DEFAULT_STD):
        head |= {"image_mean": images["mean"], "image_std": images["std"]}
    names = _class_names(classes, source, list(COCO_CATEGORIES.values()), assumed)
    coco = names == list(COCO_CATEGORIES.values())
    ids = told.get("category_ids", [])
    if len(ids) != classes:
        ids = list(COCO_CATEGORIES) if coco else list(range(1, classes + 1))
    found = {"detection": head, **images, "eval_size": side}
    return {**found, "class_names": names, "category_ids": ids}, assumed


_KINDS: dict[str, Callable[[Mapping[str, Tensor], Source], Described]] = {
    "segmentation": _segmentation,
    "detection": _detection,
}


def _images(source: Source) -> dict[str, Any]:
    """Mean and deviation, of values 0 to 1, the size, and the resizing without antialiasing."""
    found: dict[str, Any] = {
        "img_size": source.img_size,
        "antialias": source.told.get("antialias", False),
    }
    for name, usual in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        told = source.told.get(name, usual)
        alike = len(told) == len(usual) and all(
            abs(a - b) < 1e-6 for a, b in zip(told, usual, strict=True)
        )
        found[name] = list(usual if alike else told)
    return found


def _fitting(source: Source, published: Any) -> Any:
    """What the table says in pixels, for weights of the size that it says."""
    entry = source.entry
    alike = entry is not None and entry.model_args.get("img_size") == source.img_size
    return published if alike else None


def _class_names(
    count: int, source: Source, usual: list[str], assumed: dict[str, Any]
) -> list[str]:
    """The names of the file, or the published ones in a file of the table; else numbers."""
    told = source.told.get("class_names", [])
    if len(told) == count:
        return list(told)
    if source.entry is not None and len(usual) == count:
        return usual
    numbers = [str(number) for number in range(count)]
    assumed["class_names"] = "numbers"
    return numbers


def _rows(state: Mapping[str, Tensor], name: str) -> int:
    if name not in state or not state[name].ndim:
        raise UserError(f"not weights of a whole published model: {name} (here) missing")
    return state[name].shape[0]
