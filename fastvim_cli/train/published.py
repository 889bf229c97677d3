"""`fastvim test NAME`: published weights, evaluated as they were when they were published."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.data import ImageNetInfo

from fastvim.errors import UserError
from fastvim.labels import ADE20K_CLASSES, COCO_CATEGORIES
from fastvim.weights import find, is_file_name, resolve
from fastvim.weights.table import ENTRIES, Entry, find_entry, of_file

Section = dict[str, Any]  # `class_path` and `init_args`

METRICS = {"top1": "acc1", "top5": "acc5"}  # where a task names a number otherwise
# Of the metadata of weights, what each data module takes.
_IMAGES = {
    "imagenet": ("img_size", "in_chans", "mean", "std", "crop_pct", "interpolation"),
    "jumpcp": ("img_size", "in_chans", "mean", "std"),
    "ade20k": ("img_size", "mean", "std", "base_size", "antialias"),
    "coco": ("img_size", "eval_size", "antialias"),
}


@dataclass(frozen=True)
class Published:
    """Published weights and how to evaluate them.

    Attributes:
        entry: of the table.
        configuration: sections `model`, `data` and `trainer`; the data lack their root.
    """

    entry: Entry
    configuration: dict[str, Any]

    def compare(self, results: Mapping[str, float]) -> list[str]:
        """A line for each published number, beside what came out."""
        measured = {name.partition("/")[2]: (name, value) for name, value in results.items()}
        lines = []
        for number, published in self.entry.number.items():
            if found := measured.get(METRICS.get(number, number)):
                stage = found[0].partition("/")[0]
                lines.append(f"{stage} {number} {100 * found[1]:.2f} %   {published} published")
        return lines


def as_published(name_or_file: str) -> Published:
    """How to evaluate weights of the table.

    Args:
        name_or_file: name of published weights, their file, or what `convert` made of it.

    Raises:
        UserError: other weights than those, or weights without a published number.
    """
    entry = _entry(name_or_file)
    if not entry.number:
        raise UserError(
            f"{entry.name} is a masked autoencoder, without a published number: "
            f"see fastvim reconstruct --model {entry.name}"
        )
    _, metadata = resolve(find(name_or_file))
    make = {"imagenet": _photos, "jumpcp": _cells, "ade20k": _scenes, "coco": _objects}[entry.data]
    model, data = make(metadata)
    model["init_args"] |= {"model": metadata["model"], "checkpoint": name_or_file}
    told = {**entry.images, **metadata}
    images = {name: told[name] for name in _IMAGES[entry.data]}
    data["init_args"] |= images
    trainer = {"default_root_dir": f"runs/{entry.name}"}
    return Published(entry, {"model": model, "data": data, "trainer": trainer})


def _entry(name_or_file: str) -> Entry:
    if not is_file_name(name_or_file):
        return find_entry(name_or_file)
    told = of_file(name_or_file.rpartition("/")[2])
    entry = told or ENTRIES.get(find(name_or_file).metadata.get("published", ""))
    if entry is None:
        raise UserError(
            f"{name_or_file} holds no published weights: give the recipe that trained them, "
            f"--config FILE --model.checkpoint {name_or_file}"
        )
    return entry


# The task and the data module of each data set.


def _photos(metadata: Mapping[str, Any]) -> tuple[Section, Section]:
    """ImageNet's folders are named after WordNet's synsets."""
    model = _classification(metadata)
    data: Section = {"class_path": "fastvim.data.images.ImageData"}
    data["init_args"] = {"test_split": "val"}
    info = ImageNetInfo("imagenet-1k")
    if model["init_args"]["num_classes"] == info.num_classes():
        data["init_args"]["classes"] = {
            folder: info.index_to_description(index).partition(",")[0]
            for index, folder in enumerate(info.label_names())
        }
    return model, data


def _cells(metadata: Mapping[str, Any]) -> tuple[Section, Section]:
    """The tables have the names that the recipes give them."""
    tables = {name: f"{name}.csv" for name in ("plate_map", "metadata")}
    data = {"cells": "cells.parquet", **tables}
    return _classification(metadata), {
        "class_path": "fastvim.data.jumpcp.CellData",
        "init_args": data,
    }


def _classification(metadata: Mapping[str, Any]) -> Section:
    options = dict(metadata["model_args"])
    arguments = {"num_classes": options.pop("num_classes", 1000), "model_args": options}
    return {"class_path": "fastvim.tasks.Classification", "init_args": arguments}


def _scenes(metadata: Mapping[str, Any]) -> tuple[Section, Section]:
    head = metadata["segmentation"]
    model = {
        "class_path": "fastvim.tasks.segmentation.Segmentation",
        "init_args": {**head, "model_args": metadata["model_args"]},
    }
    names = metadata.get("class_names")
    if names is None and head["num_classes"] == len(ADE20K_CLASSES):
        names = ADE20K_CLASSES
    data = {"num_classes": head["num_classes"], "reduce_zero_label": True, "classes": names}
    return model, {"class_path": "fastvim.data.segmentation.SegmentationData", "init_args": data}


def _objects(metadata: Mapping[str, Any]) -> tuple[Section, Section]:
    head = dict(metadata["detection"])
    options = {**head.pop("heads", {}), **head, "model_args": metadata["model_args"]}
    model = {"class_path": "fastvim.tasks.Detection", "init_args": options}
    names, data = list(COCO_CATEGORIES.values()), {}
    if len(names) == head["num_classes"] and metadata.get("class_names", names) == names:
        data["categories"] = COCO_CATEGORIES
    return model, {"class_path": "fastvim.data.detection.DetectionData", "init_args": data}
