"""What the configuration of mmengine's tools says of a model: read as syntax, never run.

A file of those tools holds the whole configuration as text, Python assignments such as
`model = dict(backbone=dict(type='MM_FastVim', …))`. Literals, `dict(…)`, lists, tuples and names
assigned earlier are evaluated; anything else is left out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

from fastvim.errors import UserError

_UNKNOWN = object()
_FIXED_PAD = "BatchFixedSizePad"  # pads all images to one size
# What our heads compute, by the names of a configuration's settings; the published models set this.
_PREPROCESSED = {"data_preprocessor.bgr_to_rgb": True}
_COMPUTED: dict[str, dict[str, Any]] = {
    "segmentation": {
        **_PREPROCESSED,
        "decode_head.align_corners": False,
        "decode_head.in_index": [0, 1, 2, 3],
        "decode_head.pool_scales": [1, 2, 3, 6],
        "auxiliary_head.align_corners": False,
    },
    "detection": {
        **_PREPROCESSED,
        "rpn_head.anchor_generator.scales": [8],
        "rpn_head.anchor_generator.ratios": [0.5, 1.0, 2.0],
        "rpn_head.anchor_generator.center_offset": 0,
        "roi_head.bbox_roi_extractor.roi_layer.sampling_ratio": 0,
        "roi_head.mask_roi_extractor.roi_layer.sampling_ratio": 0,
        "roi_head.bbox_head.0.bbox_coder.target_stds": [0.1, 0.1, 0.2, 0.2],
        "roi_head.bbox_head.1.bbox_coder.target_stds": [0.05, 0.05, 0.1, 0.1],
        "roi_head.bbox_head.2.bbox_coder.target_stds": [0.033, 0.033, 0.067, 0.067],
        "test_cfg.rpn.min_bbox_size": 0,
        "test_cfg.rpn.nms.type": "nms",
        "test_cfg.rpn.nms.iou_threshold": 0.7,
        "test_cfg.rcnn.nms.type": "nms",
        "test_cfg.rcnn.mask_thr_binary": 0.5,
    },
}


def parse(text: str) -> dict[str, Any]:
    """The values that a configuration assigns, as far as they are plain; {} for other text."""
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target, value = statement.targets[0], _evaluate(statement.value, values)
                if isinstance(target, ast.Name):
                    values[target.id] = value
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    return {name: value for name, value in values.items() if value is not _UNKNOWN}


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:
    """The plain value of an expression; entries of a dict that have none are left out."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return values.get(node.id, _UNKNOWN)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            items = [_evaluate(item, values) for item in node.elts]
            if any(item is _UNKNOWN for item in items):
                return _UNKNOWN
            return tuple(items) if isinstance(node, ast.Tuple) else items
        case ast.Dict():
            keys = [None if key is None else _evaluate(key, values) for key in node.keys]
            return _dict(zip(keys, node.values, strict=True), values)
        case ast.Call(func=ast.Name(id="dict"), args=[]):
            return _dict(((word.arg, word.value) for word in node.keywords), values)
    return _UNKNOWN


def _dict(entries: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Of (name, expression) pairs; the name None is of `**expression`."""
    found: dict[str, Any] = {}
    for key, expression in entries:
        value = _evaluate(expression, values)
        if key is None and isinstance(value, dict):
            found.update(value)
        elif isinstance(key, str) and value is not _UNKNOWN:
            found[key] = value
    return found


def tell(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of its model; see `Checkpoint.told`. {} for a file that says nothing.

    Args:
        content: what the file holds.
    """
    meta = content.get("meta")
    if not isinstance(meta, dict):
        return {}
    text = meta.get("cfg", meta.get("config"))
    config = parse(text) if isinstance(text, str) else {}
    told = {**_of_model(_Node(config.get("model"))), **_of_images(config)}
    told |= _of_data(_Node(meta.get("dataset_meta")), meta.get("CLASSES"))
    return {name: value for name, value in told.items() if value is not None}


class _Node:
    """A value of a configuration, whose entries are asked for by name, whatever they are."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __getitem__(self, name: str) -> _Node:
        return _Node(self.value.get(name) if isinstance(self.value, dict) else None)

    def items(self) -> list[_Node]:
        value = self.value
        return [_Node(item) for item in value] if isinstance(value, list | tuple) else []

    def text(self) -> str | None:
        return self.value if isinstance(self.value, str) else None

    def flag(self) -> bool | None:
        return self.value if isinstance(self.value, bool) else None

    def number(self) -> float | None:
        plain = isinstance(self.value, int | float) and not isinstance(self.value, bool)
        return self.value if plain else None

    def integers(self) -> list[int] | None:
        """Of a list of integers, or of one."""
        value = list(self.value) if isinstance(self.value, list | tuple) else [self.value]
        plain = all(isinstance(one, int) and not isinstance(one, bool) for one in value)
        return value if value and plain else None

    def side(self) -> int | list[int] | None:
        """Of an image or window: an integer, or height and width where they differ."""
        sides = self.integers()
        if sides is None or len(sides) > 2:
            return None
        return sides[0] if len(set(sides)) == 1 else sides


def family_of(kind: str | None) -> str | None:
    """The family of a backbone's type in any spelling: MM_FastVim, MM_Vim, MM_ViM; or None."""
    word = re.sub(r"[^a-z]", "", (kind or "").lower())
    if "vim" not in word:
        return None
    return "fastvim" if "fast" in word else "vim"


def _of_model(model: _Node) -> dict[str, Any]:
    backbone, test = model["backbone"], model["test_cfg"]
    told: dict[str, Any] = {
        "family": family_of(backbone["type"].text()),
        "out_indices": backbone["out_indices"].integers(),
        "img_size": backbone["img_size"].side(),
    }
    if told["family"] is not None:
        # What a configuration does not set has the published default.
        scan_path = (backbone["scanpath_type"].text() or "row").lower()
        alternate, pool_scale = backbone["rotate_every_block"].flag(), backbone["scaling_factor"]
        told["model_args"] = {
            "scan_path": "column" if scan_path.startswith("col") else "row",
            "alternate": True if alternate is None else alternate,
            "pooling": backbone["collapse_method"].text() or "mean",
            "pool_scale": 1.0 if pool_scale.number() is None else pool_scale.number(),
        }
    if model["decode_head"].value is not None:
        told |= {"head": "segmentation", **_of_segmentor(test)}
    if model["roi_head"].value is not None:
        told |= {"head": "detection", **_of_detector(test)}
    if "head" in told:
        told["elsewise"] = _elsewise(model, _COMPUTED[told["head"]]) or None
    return told


def _elsewise(model: _Node, computed: Mapping[str, Any]) -> list[str]:
    """What a configuration sets otherwise than this library computes it, in words."""
    found = []
    for path, expected in computed.items():
        node = model
        for name in path.split("."):
            node = node.items()[int(name)] if name.isdecimal() and node.items() else node[name]
        value = list(node.value) if isinstance(node.value, tuple) else node.value
        if value not in (None, expected):
            found.append(f"{path}={value!r} (expected {expected!r})")
    return found


def _of_segmentor(test: _Node) -> dict[str, Any]:
    if test["mode"].text() == "slide":
        return {"window": test["crop_size"].side(), "stride": test["stride"].side()}
    return {"whole": True} if test["mode"].text() == "whole" else {}


def _of_detector(test: _Node) -> dict[str, Any]:
    boxes, proposals = test["rcnn"], test["rpn"]
    heads = {
        "score_thresh": boxes["score_thr"].number(),
        "nms_thresh": boxes["nms"]["iou_threshold"].number(),
        "detections": boxes["max_per_img"].number(),
    }
    return {
        "proposals": proposals["max_per_img"].number(),
        "candidates": proposals["nms_pre"].number(),
        "heads": {name: value for name, value in heads.items() if value is not None},
    }


def _of_images(config: Mapping[str, Any]) -> dict[str, Any]:
    """How images are prepared: normalised, resized, padded."""
    images = _Node(config.get("model"))["data_preprocessor"]
    pads = [one for one in images["batch_augments"].items() if one["type"].text() == _FIXED_PAD]
    pads += [step for step in _Node(config.get("test_pipeline")).items() if _is(step, "Pad")]
    padded = next((side for pad in pads if (side := pad["size"].side()) is not None), None)
    told: dict[str, Any] = {"padded": padded}
    if padded is None and isinstance(images.value, dict):
        told["padded"] = 0
    for name in ("mean", "std"):
        values = [one.number() for one in images[name].items()]
        if values and None not in values:
            told[name] = [value / 255 for value in values if value is not None]
    for step in _steps(config):
        scale = step["scale"].integers() or []
        if len(scale) == 2:
            # OpenCV, which the tools take by default, resizes without antialiasing.
            return {**told, "scale": scale, "antialias": step["backend"].text() == "pillow"}
    return told


def _steps(config: Mapping[str, Any]) -> Iterator[_Node]:
    """Steps that resize, of the test's pipeline before the training's."""
    for name in ("test", "val", "train"):
        direct = _Node(config.get(f"{name}_pipeline"))
        loader = _Node(config.get(f"{name}_dataloader"))["dataset"]["pipeline"]
        for step in (*loader.items(), *direct.items()):
            if _is(step, "Resize"):
                yield step


def _is(step: _Node, kind: str) -> bool:
    """Whether a step of a pipeline is of a kind, such as RandomResize of Resize."""
    return (step["type"].text() or "").endswith(kind)


def _of_data(data: _Node, classes: Any) -> dict[str, Any]:
    names = data["classes"].value or data["CLASSES"].value or classes
    plain = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    return {
        "class_names": list(names) if plain and names else None,
        "reduce_zero_label": data["reduce_zero_label"].flag(),
        "category_ids": data["category_ids"].integers(),  # of a file that `compose` describes
    }


def compose(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The `meta` of a file of mmengine's tools, from which `tell` reads the model again.

    Args:
        metadata: of a segmentor, a detector or the backbone of one.

    Raises:
        UserError: maps that no published model takes.
    """
    kind = next(k for k in ("segmentation", "detection", "features") if k in metadata)
    head = metadata[kind]
    if (source := head.get("source", "mixer")) != "mixer":
        raise UserError(f"maps of the {source} stream: published models take the mixers'")
    model: dict[str, Any] = {"backbone": _backbone(metadata, head.get("out_indices"))}
    if kind != "features":
        model |= _COMPOSE[kind](head) | {"data_preprocessor": _preprocessor(metadata, head)}
    config: dict[str, Any] = {"model": model}
    side = metadata.get("eval_size") or metadata.get("img_size")
    scale = metadata.get("base_size") or ([side, side] if kind == "detection" else [None])
    if None not in scale:
        backend = "pillow" if metadata.get("antialias", True) else "cv2"
        resize = {"type": "Resize", "scale": tuple(scale), "keep_ratio": True, "backend": backend}
        config["test_pipeline"] = [{"type": "LoadImageFromFile"}, resize]
    data: dict[str, Any] = {"classes": list(metadata.get("class_names", []))}
    for name in ("reduce_zero_label", "category_ids"):
        if name in metadata:
            data[name] = metadata[name]
    text = "".join(f"{name} = {value!r}\n" for name, value in config.items())
    return {"cfg": text, "dataset_meta": data}


def _backbone(metadata: Mapping[str, Any], out_indices: Any) -> dict[str, Any]:
    options, name = metadata["model_args"], metadata["model"]
    pooling = options.get("pooling", "mean" if "fast" in name else "none")
    told = {
        "type": "MM_Vim" if pooling == "none" else "MM_FastVim",
        "img_size": options.get("img_size", 224),
        "out_indices": out_indices,
        "scanpath_type": "colwise" if options.get("scan_path") == "column" else "rowwise",
        "rotate_every_block": options.get("alternate", True),
        "collapse_method": pooling,
        "scaling_factor": options.get("pool_scale", 1.0),
    }
    if pooling == "none":
        del told["collapse_method"], told["scaling_factor"]
    return {name: value for name, value in told.items() if value is not None}


def _preprocessor(metadata: Mapping[str, Any], head: Mapping[str, Any]) -> dict[str, Any]:
    told: dict[str, Any] = {"bgr_to_rgb": True}
    for name in ("mean", "std"):
        if name in metadata:
            told[name] = [round(value * 255, 6) for value in metadata[name]]
    if pad_to := head.get("pad_to"):
        told["batch_augments"] = [{"type": _FIXED_PAD, "size": (pad_to, pad_to)}]
    return told


def _composed_segmentor(head: Mapping[str, Any]) -> dict[str, Any]:
    test: dict[str, Any] = {"mode": "whole"}
    if head["window"] is not None:
        sides = {"crop_size": _pair(head["window"]), "stride": _pair(head["stride"])}
        test = {"mode": "slide", **sides}
    shared = {"num_classes": head["num_classes"], "align_corners": False}
    return {
        "type": "EncoderDecoder",
        "decode_head": {"type": "UPerHead", "channels": head["channels"], **shared},
        "auxiliary_head": {"type": "FCNHead", "channels": head["aux_channels"], **shared},
        "test_cfg": test,
    }


def _composed_detector(head: Mapping[str, Any]) -> dict[str, Any]:
    heads = head.get("heads") or {}
    boxes = {
        "score_thr": heads.get("score_thresh", 0.05),
        "nms": {"type": "nms", "iou_threshold": heads.get("nms_thresh", 0.5)},
        "max_per_img": heads.get("detections", 100),
    }
    proposals = head.get("proposals", 1000)
    candidates = head.get("candidates", proposals)
    return {
        "type": "CascadeRCNN",
        "roi_head": {"type": "CascadeRoIHead"},
        "test_cfg": {"rpn": {"nms_pre": candidates, "max_per_img": proposals}, "rcnn": boxes},
    }


_COMPOSE = {"segmentation": _composed_segmentor, "detection": _composed_detector}


def _pair(side: Any) -> tuple[int, int]:
    return (side, side) if isinstance(side, int) else (side[0], side[1])
