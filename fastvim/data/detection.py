"""Images with boxes and masks of the objects in them, in the layout of COCO.

H, W: an image's height and width; n: objects in it
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastvim.data.base import DenseDataModule
from fastvim.data.classes import MOST_NAMES
from fastvim.data.coco import Id, Instances, Records, is_learned, masks_of, read_instances
from fastvim.data.coco_rules import DAMAGED_MASK
from fastvim.data.dense_data import integer, prepare_objects
from fastvim.data.frames import FramedReader, find_frame
from fastvim.data.issues import Issues, Look, SplitReport, look_at_picture
from fastvim.data.jitter import LargeScaleJitter
from fastvim.data.pixels import UnreadableImageError
from fastvim.errors import UserError, first_few
from fastvim.options import POSITIVE, SHARE, SIDE, check, check_given, check_pair

_logger = logging.getLogger(__name__)

FRAME_SAMPLE = 300  # images whose headers tell which way up a split was annotated
MOST_TRIES = 1000  # images in a row that may show nothing of their objects

Sample = tuple[Tensor, dict[str, Any]]  # float32 image (3, H, W) in 0..1, and what is in it


class DetectionFiles(Dataset[Sample]):
    """The images of a split and the objects in them.

    In training the objects are {"boxes", "labels", "masks"}: float32 (n, 4) as x1, y1, x2, y2 in
    pixels, the boxes of what the masks show, int64 (n,) from 1 on, and uint8 (n, H, W). Crowds,
    what `is_learned` leaves out and what the crop has cut off are not among them. In evaluation
    they are {"image_id", "size", "annotations"}, as the file has them, crowds included; `size` is
    the height and width of the image, to which the annotations refer.

    Args:
        instances: of the split.
        folder: of its images.
        eval_size: longer side of an image in evaluation.
        jitter: the augmentation in training; None in evaluation.
        read_image: opens an image file the way up that it was annotated.
        antialias: in evaluation, as of `DenseDataModule`.

    Raises:
        UnreadableImageError: when reading, naming the file: it is damaged, of another size than the
            instances say, or has a damaged mask.
    """

    def __init__(
        self,
        instances: Instances,
        folder: Path,
        eval_size: int,
        jitter: LargeScaleJitter | None,
        read_image: FramedReader,
        antialias: bool = True,
    ) -> None:
        self.records, self.folder = instances.records, folder
        self.eval_size, self.jitter, self.antialias = eval_size, jitter, antialias
        self.read_image = read_image
        self._labels = {category: label for label, category in enumerate(instances.category_ids, 1)}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        if self.jitter is not None:
            return self._training_sample(index, self.jitter)
        record = self.records[index]
        image = self._read_image(record)
        size = {"size": (record["height"], record["width"])}
        target = {"image_id": record["id"], **size, "annotations": record["annotations"]}
        return prepare_objects(image, self.eval_size, self.antialias), target

    def read(self, index: int) -> tuple[Image.Image, list[dict[str, Any]], np.ndarray]:
        """An RGB image, the objects that training learns, and their masks, uint8 (H, W, n)."""
        record = self.records[index]
        image = self._read_image(record)
        objects = [a for a in record["annotations"] if is_learned(a, image.width, image.height)]
        try:
            return image, objects, masks_of(objects, image.height, image.width)
        except ValueError as error:
            path = self.folder / record["file_name"]
            raise UnreadableImageError(f"{path}: {DAMAGED_MASK} ({error})", DAMAGED_MASK) from error

    def look(self, index: int) -> Look:
        """What an image shows, for `fastvim.data.checks`."""
        image, *_ = self.read(index)
        found = look_at_picture(image)
        return found._replace(odd=self.read_image.oddity(image) or found.odd)

    def filename(self, index: int) -> str:
        """The path of an image."""
        return str(self.folder / self.records[index]["file_name"])

    def sources(self, index: int) -> tuple[str, ...]:
        """The image."""
        return (self.filename(index),)

    def _read_image(self, record: dict[str, Any]) -> Image.Image:
        size = record["width"], record["height"]
        return self.read_image(self.folder / record["file_name"], size)

    def _training_sample(self, index: int, jitter: LargeScaleJitter) -> Sample:
        for _ in range(MOST_TRIES):
            image, objects, masks = self.read(index)
            boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).reshape(-1, 4)
            boxes[:, 2:] += boxes[:, :2]
            changed = jitter.apply(jitter.draw(image.size), image, boxes, masks)
            if changed is not None:
                break
            index = integer(len(self) - 1)  # as published, another image takes its place
        else:
            raise UserError(f"{self.folder}: no mask shows in {MOST_TRIES:,} images in a row")
        pixels, boxes, shown, kept = changed
        labels = [self._labels[annotation["category_id"]] for annotation in objects]
        return pixels, {
            "boxes": boxes,
            "labels": torch.tensor(labels, dtype=torch.int64)[kept],
            "masks": shown,
        }


class DetectionData(DenseDataModule):
    """Images with boxes and masks of objects, in the layout of COCO.

    A split is a folder of images and a file that lists them and the objects in them, with masks as
    polygons or run lengths. Labels 1 to K stand for its categories in the order of their ids.

    A batch is a pair of lists: of images, float32 (3, H, W) with values in 0 to 1, not normalised
    and of sizes of their own, and of what is in them (`DetectionFiles`). Training resumes with the
    batches that it would have seen (`fastvim.data.sampler`). The defaults are the published COCO
    recipe, but for `antialias`.

    Args:
        root: the directory, or `sample:NAME` for a set of `fastvim.data.samples`.
        train_folder: of the training images, below `root`.
        train_file: of their objects, below `root`.
        val_folder: of the validation images.
        val_file: of their objects.
        test_folder: of the test images; None for the validation images.
        test_file: of their objects; None for those of the validation images.
        batch_size: training images per process.
        eval_batch_size: images per process in evaluation.
        img_size: longest side of a training image, in pixels.
        eval_size: longer side of an image in evaluation; None for `img_size`.
        scale: range of the random factor of large-scale jitter; at 1 an image fits `img_size`.
        hflip: probability of a horizontal flip in training.
        train_all: train on images without an annotation too, and on those with a side under 32
            pixels.
        categories: names of the categories by their ids, in the order of a model's labels: a file
            may have some of them. None takes those of `known`, or the training file's; the other
            files may have some of them.
        kwargs: further arguments of `DenseDataModule`. Images are read as their annotations were
            drawn, upright or as stored; where "auto" fits both, as most images of the split.

    Raises:
        UserError: for an argument out of range, and in `setup` for missing files and for instances
            that cannot be used, with their number; `UnreadableImageError` when reading.
    """

    list_batches = ("train", "val", "test")

    def __init__(
        self,
        root: str,
        train_folder: str = "train2017",
        train_file: str = "annotations/instances_train2017.json",
        val_folder: str = "val2017",
        val_file: str = "annotations/instances_val2017.json",
        test_folder: str | None = None,
        test_file: str | None = None,
        batch_size: int = 8,
        eval_batch_size: int = 1,
        img_size: int = 1024,
        eval_size: int | None = None,
        scale: tuple[float, float] = (0.1, 2.0),
        hflip: float = 0.5,
        train_all: bool = False,
        categories: dict[int, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, batch_size=batch_size, eval_batch_size=eval_batch_size, **kwargs)
        check(SIDE, img_size=img_size)
        check_given(SIDE, eval_size=eval_size)
        check_pair(POSITIVE, scale=scale)
        check(SHARE, hflip=hflip)
        self.img_size = img_size
        self.eval_size = img_size if eval_size is None else eval_size
        if (test_folder is None) != (test_file is None):
            raise UserError("test_folder and test_file: expected both, or none of them")
        validation = val_folder, val_file
        test = (test_folder, test_file) if test_folder and test_file else validation
        self._splits = {"train": (train_folder, train_file), "val": validation, "test": test}
        self._jitter = LargeScaleJitter(img_size, scale, hflip, self.antialias)
        self._train_all = train_all
        self._categories = categories
        self._category_ids: list[Id] = []
        self._instances: dict[tuple[str, str, bool], Instances] = {}
        self._frame = ""

    @property
    def frame(self) -> str:
        """Whether images are turned by EXIF, "exif", or taken as "stored"; after `setup`."""
        return self._frame

    @property
    def category_ids(self) -> list[Id]:
        """The file's ids of the labels 1 to K; known after `setup`."""
        if not self._category_ids:
            raise RuntimeError("DetectionData.category_ids: call setup() first")
        return self._category_ids

    def open(self, role: str) -> DetectionFiles:
        instances = self._read(role)
        if instances.errors:
            raise UserError(f"{instances.file}: {instances.errors}; see fastvim data check")
        if role == "train" and instances.dropped:
            _logger.warning("%s: training leaves out %s", instances.file, instances.dropped)
        instances = self._among_known(instances)
        if instances.warnings and role not in self._examined:
            _logger.warning("%s: %s; see fastvim data check", instances.file, instances.warnings)
        files = self._files(role, instances)
        if role == "train" or not self._frame:
            self._frame = files.read_image.frame
        return files

    def check(self, role: str) -> SplitReport:
        self._examined.add(role)
        found = self._read(role)
        errors, warnings = Issues(found.errors), Issues(found.warnings)
        try:
            warnings |= self._among_known(found).warnings
        except UserError as error:
            errors.add("category unlike those expected", str(error))
        if absent := [name for name in self._class_names if name not in found.class_names]:
            where = f"{found.file.name} has no {first_few(absent, MOST_NAMES)}"
            warnings.add("category that a split lacks", where, len(absent))
        folder, file = self._splits[role]
        alone = len({other for same, other in self._splits.values() if same == folder}) == 1
        number = Counter(found.class_names)
        named = zip(found.category_ids, found.class_names, strict=True)
        names = [name if number[name] == 1 else f"{name} ({own})" for own, name in named]
        return SplitReport(
            folder if alone else Path(file).name,
            self._files(role, found),
            errors=errors,
            dropped=Issues(found.dropped),
            warnings=warnings,
            facts=found.facts,
            classes=dict(zip(names, found.objects, strict=True)),
            counted="objects",
        )

    def reading(self, role: str) -> list[Any]:
        told = os.stat(self.path(self._splits[role][1]))
        return [*super().reading(role), self.orientation, told.st_size, told.st_mtime_ns]

    def _read(self, role: str) -> Instances:
        """The instances of a role; a file is read once."""
        folder, file = self._splits[role]
        key = folder, file, role != "train" or self._train_all
        if key not in self._instances:
            self._instances[key] = read_instances(self.path(file), self._folder(role), key[2])
        return self._instances[key]

    def _among_known(self, instances: Instances) -> Instances:
        """The instances with the categories that are expected; the first ones settle them.

        Raises:
            UserError: a category that is none of them, or of another name.
        """
        expected: Mapping[Any, str] | None = self._categories
        of = "expected"
        if expected is None and self.known is not None:
            expected = dict(zip(self.known.ids, self.known.names, strict=True))
            of = f"of {self.known.source}"
        if expected is None and self._class_names:
            expected = dict(zip(self._category_ids, self._class_names, strict=True))
            of = "of the split before"
        if expected is not None:
            instances = _among(instances, expected, of)
        if not self._class_names:
            self._class_names, self._category_ids = instances.class_names, instances.category_ids
        return instances

    def _files(self, role: str, instances: Instances) -> DetectionFiles:
        folder = self._folder(role)
        frame: str = self.orientation
        if frame == "auto":
            number = len(instances.records)
            drawn = np.random.default_rng(self.seed).permutation(number)[:FRAME_SAMPLE]
            some = [instances.records[index] for index in drawn.tolist()]
            paths = [folder / record["file_name"] for record in some]
            frame = find_frame(paths, [(record["width"], record["height"]) for record in some])
        return DetectionFiles(
            instances,
            folder,
            self.eval_size,
            self._jitter if role == "train" else None,
            FramedReader(self.read_picture, self.orientation, frame),
            self.antialias,
        )

    def _folder(self, role: str) -> Path:
        return self.path(self._splits[role][0])


def _among(instances: Instances, categories: Mapping[Id, str], of: str) -> Instances:
    """The instances with all of these categories, of which their file has some.

    A file with ids of its own is mapped by name, which is said among `warnings`. Where all ids are
    known and stand for other names, either may be wrong: that is an error.

    Raises:
        UserError: the file has another category, or one of these under another name.
    """
    own = dict(zip(instances.category_ids, instances.class_names, strict=True))
    lists = f"{_names(categories)}; found {_names(own)}"
    unknown = [number for number in own if number not in categories]
    id_of = {name: number for number, name in categories.items()}
    names = {*own.values()}
    different = len(id_of) == len(categories) and len(names) == len(own)
    if unknown and different and names <= id_of.keys():
        instances = _renumbered(instances, {number: id_of[name] for number, name in own.items()})
        instances.warnings.add("category of another id, taken by name", lists, len(own))
        own = dict(zip(instances.category_ids, instances.class_names, strict=True))
    elif unknown:
        number = unknown[0]
        raise UserError(
            f"{instances.file}: category {number} ({own[number]}) is none of the "
            f"{len(categories)} {of}, {lists}"
        )
    for number, name in own.items():
        if name not in (categories[number], str(number)):  # a file may lack the names
            raise UserError(
                f"{instances.file}: category {number} is {name!r}; expected {categories[number]!r} "
                f"of {lists}"
            )
    objects = dict(zip(instances.category_ids, instances.objects, strict=True))
    return replace(
        instances,
        category_ids=list(categories),
        class_names=list(categories.values()),
        objects=[objects.get(number, 0) for number in categories],
    )


def _renumbered(instances: Instances, new: Mapping[Id, Id]) -> Instances:
    """The instances with new ids of their categories, by the old ones."""

    def changed(record: dict[str, Any]) -> dict[str, Any]:
        annotations = [{**a, "category_id": new[a["category_id"]]} for a in record["annotations"]]
        return {**record, "annotations": annotations}

    return replace(
        instances,
        records=Records(map(changed, instances.records)),
        category_ids=[new[number] for number in instances.category_ids],
        warnings=Issues(instances.warnings),
    )


def _names(categories: Mapping[Id, str]) -> str:
    """`"1 red, 3 green and 4 more"`."""
    return first_few([f"{number} {name}" for number, name in categories.items()], MOST_NAMES)
