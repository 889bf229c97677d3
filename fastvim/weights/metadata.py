"""What the metadata of weights may say: they come with a file, and choose nothing that is run.

The options of a model are those that its constructor has, of the types that it takes; it compares
them with their ranges. `FIELDS` and `HEADS` have the other fields. Fields with other names mean
nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import timm

from fastvim.errors import OptionError, UserError, nearest
from fastvim.models.factory import check_options, is_ours
from fastvim.models.intermediates import Source
from fastvim.options import (
    CLASSES,
    COUNT,
    FINITE,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_0,
    SIDE,
    SIZE,
    Range,
    check,
    describe_type,
    fits,
)

SIDE_OR_0 = Range(0, 1 << 13, whole=True)
REGIONS = Range(1, 1 << 16, whole=True)

Kind = tuple[Any, Range | None]  # a type, and the range of its numbers
Side = int | tuple[int, int]

FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("model", "weights", "licence", "started_from", "published"), (str, None)),
    "class_names": (list[str] | None, None),
    "metrics": (list[str], None),
    "category_ids": (list[int | str] | None, None),
    "img_size": (Side, SIDE),
    "in_chans": (int, SIZE),
    "mean": (list[float], FINITE),
    "std": (list[float], POSITIVE),
    "crop_pct": (float, SHARE_ABOVE_0),
    "interpolation": (str, None),
    "value_range": (tuple[float, float] | None, FINITE),
    "base_size": (tuple[int, int] | None, SIDE),
    "eval_size": (int | None, SIDE),
    "antialias": (bool, None),
    "orientation": (Literal["stored"] | None, None),
    "reduce_zero_label": (bool, None),
    "source": (Mapping[str, Any], None),
}
HEADS: dict[str, dict[str, Kind]] = {
    "segmentation": {
        "num_classes": (int, CLASSES),
        "out_indices": (list[int], None),
        "source": (Source, None),
        "channels": (int, SIZE),
        "aux_channels": (int, SIZE),
        "window": (Side | None, SIDE),
        "stride": (Side | None, SIDE),
    },
    "detection": {
        "num_classes": (int, CLASSES),
        "source": (Source, None),
        "channels": (int, SIZE),
        "pad_to": (int, SIDE_OR_0),
        "proposals": (int, REGIONS),
        "candidates": (int, REGIONS),
        "heads": (Mapping[str, Any], None),
        "image_mean": (list[float], FINITE),
        "image_std": (list[float], POSITIVE),
    },
    "features": {"out_indices": (list[int], None), "source": (Source, None)},
}
_BOX_HEADS: dict[str, Kind] = {
    "hidden_dim": (int, SIZE),
    "samples": (int, COUNT),
    "score_thresh": (float, SHARE),
    "nms_thresh": (float, SHARE),
    "detections": (int, REGIONS),
}
_REQUIRED = {
    "segmentation": tuple(HEADS["segmentation"]),
    "detection": ("num_classes",),
    "features": ("out_indices",),
}
# What `timm.create_model` takes for itself, which says where weights come from.
_OF_TIMM = {*inspect.signature(timm.create_model).parameters, "features_only", "out_indices"}
_OF_TIMM |= {"device", "dtype"}  # of the machine that it was built on


def parse(path: Path, text: str) -> dict[str, Any]:
    """The metadata of a file, from their JSON.

    Raises:
        UserError: as `check_metadata`, and for a text that is no JSON.
    """
    with of_file(path):
        try:
            metadata = json.loads(text)
        except ValueError as error:  # or a number of too many digits
            raise UserError(f"they are no JSON: {error}") from error
        return check_metadata(path, metadata)


def check_metadata(path: Path, metadata: Any) -> dict[str, Any]:
    """Metadata as they are, if all that means something is of its type and in its range.

    Args:
        path: of the file, for the message.
        metadata: of this library, as read.

    Raises:
        UserError: the first field that is not, or an option that the model does not have.
    """
    with of_file(path):
        if not isinstance(metadata, dict):
            raise UserError(f"expected a mapping, not {type(metadata).__name__}")
        _check_fields(metadata, FIELDS)
        _check_crop(metadata.get("img_size", 1), metadata.get("crop_pct", 1))
        for kind in HEADS.keys() & metadata.keys():
            _check_head(kind, metadata[kind], metadata)
        if "model_args" in metadata:
            _check_model_args(metadata.get("model", ""), metadata["model_args"])
    return metadata


def own_options(model_args: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model without those that say where its first weights come from."""
    return {
        name: value
        for name, value in model_args.items()
        if name not in _OF_TIMM and not name.startswith("pretrained")
    }


@contextmanager
def of_file(path: Path) -> Iterator[None]:
    """Names the file in the error of what its metadata say."""
    begin = f"{path}: its metadata: "
    try:
        yield
    except RecursionError as error:
        raise UserError(f"{begin}nested too deep") from error
    except UserError as error:
        raise UserError(begin + str(error).removeprefix(begin)) from error


def _check_fields(found: Mapping[str, Any], known: Mapping[str, Kind], where: str = "") -> None:
    for name, (kind, numbers) in known.items():
        if name not in found:
            continue
        value = found[name]
        if not fits(value, kind):
            raise OptionError(where + name, value, describe_type(kind))
        if numbers is not None and value is not None:
            check(numbers, **{where + name: value})


def _check_crop(img_size: int | Sequence[int], crop_pct: float) -> None:
    """An image is resized to `img_size / crop_pct` before it is cropped."""
    longest = img_size if isinstance(img_size, int) else max(img_size)
    if longest / crop_pct > SIDE.high:
        raise OptionError(
            "crop_pct", crop_pct, f"{longest / SIDE.high:g} to 1 for {longest} pixels"
        )


def _check_head(kind: str, head: Any, metadata: Mapping[str, Any]) -> None:
    if not isinstance(head, dict):
        raise OptionError(kind, head, "a mapping")
    groups = [(kind, head, HEADS[kind]), (f"{kind}.heads", head.get("heads") or {}, _BOX_HEADS)]
    for where, group, known in groups:
        _check_fields(group, known, f"{where}.")
        if unknown := [name for name in group if name not in known]:
            near = nearest(str(unknown[0]), known)
            raise UserError(f"{where} has no field {unknown[0]!r}{near}")
    if missing := [name for name in _REQUIRED[kind] if name not in head]:
        raise UserError(f"{kind} does not say {missing[0]}")
    for name in ("class_names", "category_ids"):
        count, classes = len(metadata.get(name) or ()), head.get("num_classes")
        if count and classes is not None and count != classes:
            raise UserError(f"{count} {name} for num_classes {classes}")


def _check_model_args(model: str, model_args: Any) -> None:
    if not isinstance(model_args, dict) or not all(isinstance(name, str) for name in model_args):
        raise OptionError("model_args", model_args, "a mapping of options")
    if is_ours(model):
        check_options(model, model_args, others=False)
        return
    plain = None | bool | int | float | str
    own = own_options(model_args)
    for name, value in model_args.items():
        if name not in own:
            raise UserError(f"model_args has {name!r}: a file of weights does not choose others")
        if not fits(value, plain | list[plain]):
            raise OptionError(f"model_args.{name}", value, "a plain value")
