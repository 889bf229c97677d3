"""Images with a class for every pixel, in the layout of ADE20K.

C, H, W: channels, height and width
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as TF

from fastvim.data.base import DenseDataModule, Orientation
from fastvim.data.classes import check_different, places
from fastvim.data.colours import distort
from fastvim.data.dense_data import (
    chance,
    integer,
    prepare_scene,
    to_tensor,
    uniform,
)
from fastvim.data.folders import describe_endings, list_images
from fastvim.data.issues import Issues, Look, SplitReport, look_at_picture
from fastvim.data.masks import Labels, count, read_names, read_pair
from fastvim.data.pixels import PictureReader, UnreadableImageError
from fastvim.data.resizing import Window, fit, nearest, resize
from fastvim.errors import OptionError, UserError
from fastvim.labels import IGNORE_INDEX
from fastvim.options import (
    FINITE,
    POSITIVE,
    SHARE,
    SHARE_ABOVE_0,
    SIDE,
    Range,
    check,
    check_given,
    check_pair,
    per_channel,
)
from fastvim.weights import same_classes

CROP_TRIES = 10

Pair = tuple[Tensor, Tensor]  # float32 image (3, H, W), normalised; int64 classes (H, W)


class TrainingTransform:
    """Random resizing, crop, flip and colours; the classes follow the image.

    An image smaller than the crop is padded at the bottom and right with the mean colour, its
    classes with `IGNORE_INDEX`. The arguments are those of `SegmentationData`.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        base_size: tuple[int, int] | None,
        ratio: tuple[float, float],
        max_share: float,
        hflip: float,
        distortion: float,
        mean: Sequence[float],
        std: Sequence[float],
        antialias: bool = True,
    ) -> None:
        self.img_size, self.base_size = img_size, base_size
        self.ratio, self.max_share = ratio, max_share
        self.hflip, self.distortion = hflip, distortion
        self.mean, self.std = list(mean), list(std)
        self.antialias = antialias

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Pair:
        """An RGB image and its classes, uint8 (H, W), to a pair of `img_size`."""
        size = self.resized(image.size, uniform(*self.ratio))
        window = self._crop(nearest(mask, size, self.antialias))
        pixels, classes = self.cut(image, mask, size, window, chance(self.hflip))
        return self.finish(distort(pixels, self.distortion), classes)

    def resized(self, stored: tuple[int, int], factor: float) -> tuple[int, int]:
        """Width and height of an image resized by a factor on `base_size`, or on its own size."""
        longer, shorter = self.base_size or (max(stored), min(stored))
        return fit(stored, (max(1, int(longer * factor)), max(1, int(shorter * factor))))

    def cut(
        self,
        image: Image.Image,
        mask: np.ndarray,
        size: tuple[int, int],
        window: Window,
        flipped: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The window of a resized image, uint8 (h, w, 3), and its classes (h, w)."""
        pixels = np.asarray(resize(image, size, self.antialias, window))
        classes = nearest(mask, size, self.antialias, window)
        return (pixels[:, ::-1], classes[:, ::-1]) if flipped else (pixels, classes)

    def finish(self, pixels: np.ndarray, classes: np.ndarray) -> Pair:
        """Normalise and pad to `img_size`."""
        tensor = to_tensor(Image.fromarray(np.ascontiguousarray(pixels)))
        labels = torch.from_numpy(classes.astype(np.int64))
        missing = (0, self.img_size[1] - labels.shape[1], 0, self.img_size[0] - labels.shape[0])
        image = F.pad(TF.normalize(tensor, self.mean, self.std), missing)
        return image, F.pad(labels, missing, value=IGNORE_INDEX)

    def _crop(self, mask: np.ndarray) -> Window:
        """A random crop of two classes or more, of which none has too large a share.

        It is drawn again up to ten times, and then taken as it is; at once with `max_share` 1.
        """
        height, width = (min(pair) for pair in zip(self.img_size, mask.shape, strict=True))
        tries = CROP_TRIES if self.max_share < 1 else 0
        for attempt in range(tries + 1):
            top = integer(mask.shape[0] - height)
            left = integer(mask.shape[1] - width)
            crop = mask[top : top + height, left : left + width]
            counts = np.bincount(crop[crop != IGNORE_INDEX])
            varied = np.count_nonzero(counts) > 1
            if attempt == tries or (varied and counts.max() < self.max_share * counts.sum()):
                break
        return left, top, left + width, top + height


class EvaluationTransform:
    """An image resized to fit in `base_size`; its classes as they are stored.

    The arguments are those of `SegmentationData`.
    """

    def __init__(
        self,
        base_size: tuple[int, int] | None,
        mean: Sequence[float],
        std: Sequence[float],
        antialias: bool = True,
    ) -> None:
        self.base_size, self.mean, self.std = base_size, mean, std
        self.antialias = antialias

    def __call__(self, image: Image.Image, mask: np.ndarray) -> Pair:
        """An RGB image and its classes, uint8 (H, W); the sizes of the pair may differ."""
        pixels = prepare_scene(image, self.base_size, self.mean, self.std, self.antialias)
        return pixels, torch.from_numpy(mask.astype(np.int64))


class SegmentationFiles(Dataset[Pair]):
    """Images, each with a PNG file of the class index of every pixel.

    Args:
        pairs: paths of an image and its classes.
        transform: of both.
        labels: what the stored values stand for.
        read_picture: opens an image file.
        orientation: of the masks, as of `DenseDataModule`.

    Raises:
        UnreadableImageError: when reading, naming the file: it is damaged, its indices are out of
            range, or an image and its classes are of different sizes.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Path, Path]],
        transform: TrainingTransform | EvaluationTransform,
        labels: Labels,
        read_picture: PictureReader,
        orientation: Orientation = "auto",
    ) -> None:
        self.pairs = pairs
        self.transform = transform
        self.labels = labels
        self.read_picture = read_picture
        self.orientation = orientation

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        return self.transform(*self.read(index))

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """An RGB image and its classes, uint8 (H, W)."""
        image, values, _ = self._pair(index)
        return image, self.labels.indices(values, self.pairs[index][1])

    def look(self, index: int) -> Look:
        """What a pair shows, for `fastvim.data.checks`."""
        image, values, odd = self._pair(index)
        found = look_at_picture(image)._replace(values=count(values))
        found = found._replace(odd=odd or found.odd)
        try:
            self.labels.indices(values, self.pairs[index][1])
        except UnreadableImageError as error:
            return found._replace(kind=error.kind, message=str(error))
        return found

    def filename(self, index: int) -> str:
        """The path of an image."""
        return str(self.pairs[index][0])

    def sources(self, index: int) -> tuple[str, ...]:
        """The image and its mask."""
        return tuple(map(str, self.pairs[index]))

    def _pair(self, index: int) -> tuple[Image.Image, np.ndarray, str]:
        return read_pair(*self.pairs[index], self.read_picture, self.orientation)


class SegmentationData(DenseDataModule):
    """Images and the class of each pixel, in the layout of ADE20K (ADEChallengeData2016).

    The images are `root/images/{training,validation}/NAME.jpg` (or another file that Pillow reads),
    their classes `root/annotations/{training,validation}/NAME.png`, an index a pixel; 255 does not
    count. Both may lie in subfolders of the same names.

    A training batch is (images, classes): float32 (B, 3, H, W), normalised, and int64 (B, H, W). An
    evaluation batch is a pair of lists, of one image (3, H, W) whose shorter side is resized, and
    of its classes (H', W') as stored. Training resumes with the batches that it would have seen
    (`fastvim.data.sampler`). The defaults are the published ADE20K recipe, but
    for `antialias`.

    Args:
        root: the directory, or `sample:NAME` for a set of `fastvim.data.samples`.
        num_classes: that the files use, 2 to 255.
        reduce_zero_label: a stored 0 is ignored and the classes are stored from 1, as in ADE20K.
        class_file: text file below `root` with a class name a line. Of a table with tabs, such as
            `objectInfo150.txt`, it is the last column below the header. None numbers the classes.
        classes: names of the classes, instead of a file; one for each.
        train_split: name of the folders of the training split.
        val_split: of the validation split.
        test_split: of the test split; None for `val_split`.
        batch_size: training images per process.
        img_size: height and width of a training crop, or one number for both.
        base_size: longer and shorter side that an image is resized to fit in, keeping its shape;
            None for its own size.
        ratio: range of a random factor on `base_size` in training.
        max_share: a crop of one class alone, or in which one has this share or more, is drawn
            again, ten times at most.
        hflip: probability of a horizontal flip.
        distortion: probability of each change of brightness, contrast, saturation and hue.
        mean: per channel, for values in 0..1.
        std: as `mean`.
        kwargs: further arguments of `DenseDataModule`.

    Raises:
        UserError: for an argument out of range, and in `setup` for missing files;
            `UnreadableImageError` when reading.
    """

    list_batches = ("val", "test")

    def __init__(
        self,
        root: str,
        num_classes: int = 150,
        reduce_zero_label: bool = True,
        class_file: str | None = None,
        classes: list[str] | None = None,
        train_split: str = "training",
        val_split: str = "validation",
        test_split: str | None = None,
        batch_size: int = 2,
        img_size: int | tuple[int, int] = 512,
        base_size: tuple[int, int] | None = (2048, 512),
        ratio: tuple[float, float] = (0.5, 2.0),
        max_share: float = 0.75,
        hflip: float = 0.5,
        distortion: float = 0.5,
        mean: tuple[float, float, float] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, float, float] = IMAGENET_DEFAULT_STD,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, batch_size=batch_size, eval_batch_size=1, **kwargs)
        check(Range(2, IGNORE_INDEX, whole=True), num_classes=num_classes)
        check(SIDE, img_size=img_size)
        check_given(SIDE, base_size=base_size)
        if base_size is not None and base_size[0] < base_size[1]:
            raise OptionError("base_size", base_size, "the longer side first")
        check_pair(POSITIVE, ratio=ratio)
        check(SHARE_ABOVE_0, max_share=max_share)
        check(SHARE, hflip=hflip, distortion=distortion)
        per_channel("mean", mean, 3, FINITE)
        per_channel("std", std, 3, POSITIVE)
        self.mean, self.std = tuple(mean), tuple(std)
        self._labels = Labels(num_classes, reduce_zero_label)
        self.class_file = class_file
        if classes is not None and len(classes) != num_classes:
            raise OptionError("classes", classes, f"num_classes = {num_classes} names")
        self._class_names = list(classes or [])
        check_different(self._class_names, "classes")
        test = val_split if test_split is None else test_split
        self._splits = {"train": train_split, "val": val_split, "test": test}
        crop = (img_size, img_size) if isinstance(img_size, int) else img_size
        self._train_transform = TrainingTransform(
            crop, base_size, ratio, max_share, hflip, distortion, mean, std, self.antialias
        )
        self._eval_transform = EvaluationTransform(base_size, mean, std, self.antialias)

    def open(self, role: str) -> SegmentationFiles:
        self._class_names = self._known_names(self._class_names or self._find_class_names())
        pairs, missing, _ = find_pairs(Path(self.folder()), self._splits[role])
        if missing:
            raise UserError(f"{missing}; see fastvim data check")
        return self._files(role, pairs)

    def check(self, role: str) -> SplitReport:
        split = self._splits[role]
        pairs, missing, unused = find_pairs(Path(self.folder()), split)
        return SplitReport(
            split,
            self._files(role, pairs),
            self._labels,
            errors=missing,
            warnings=unused,
            facts={"images": len(pairs)},
            classes=dict.fromkeys(self._find_class_names(), 0),
            counted="pixels",
        )

    def reading(self, role: str) -> list[Any]:
        return [*super().reading(role), *astuple(self._labels), self.orientation]

    def _files(self, role: str, pairs: list[tuple[Path, Path]]) -> SegmentationFiles:
        transform = self._train_transform if role == "train" else self._eval_transform
        return SegmentationFiles(
            pairs, transform, self._labels, self.read_picture, self.orientation
        )

    def _find_class_names(self) -> list[str]:
        if self.class_file is None:
            return [str(index) for index in range(self._labels.num_classes)]
        return read_names(self.path(self.class_file), self._labels.num_classes)

    def _known_names(self, own: list[str]) -> list[str]:
        """The classes that the weights know; masks of some of them are mapped by name."""
        if self.known is None or self._labels.places is not None:
            return own
        names = self.known.names
        if same_classes(own, names):
            return names if own == [str(index) for index in range(len(own))] else own
        where, of = self.class_file or "classes", f"of {self.known.source}"
        self._labels = replace(self._labels, places=tuple(places(own, names, where, of)))
        return names


def find_pairs(root: Path, split: str) -> tuple[list[tuple[Path, Path]], Issues, Issues]:
    """The images of a split, sorted by name, with the files of their classes.

    Returns:
        The pairs; what is missing; what is not used, and images that share a mask.

    Raises:
        UserError: no such split, or no image in it.
    """
    images, masks = root / "images" / split, root / "annotations" / split
    if not images.is_dir():
        raise UserError(
            f"{images}: no such directory; expected {images}/NAME.jpg and {masks}/NAME.png"
        )
    listing = list_images(images)
    if not listing.paths:
        raise UserError(f"{images}: no images; expected files that Pillow reads, such as NAME.jpg")
    labelled = {}
    pairs, missing, unused = [], Issues(), Issues()
    left_out = [(images, "image", listing.left_out)]
    if masks.is_dir():
        found = list_images(masks, [".png"])
        labelled = {os.path.splitext(path)[0]: path for path in found.paths}
        left_out.append((masks, "annotation", found.left_out))
    for folder, what, others in left_out:
        if number := sum(others.values()):
            where = f"{folder}: {describe_endings(others)}"
            unused.add(f"file that is no {what}", where, number)
    taken: dict[str, str] = {}
    for path in sorted(listing.paths):
        stem = os.path.splitext(path)[0]
        if (first := taken.setdefault(stem, path)) != path:
            unused.add("image with the annotation of another", f"{images / path}, as {first}")
        if stem in labelled:
            pairs.append((images / path, masks / labelled[stem]))
        else:
            missing.add("missing annotation", str(masks / f"{stem}.png"))
    for stem in labelled.keys() - {os.path.splitext(path)[0] for path in listing.paths}:
        unused.add("annotation without an image", str(masks / labelled[stem]))
    return pairs, missing, unused
