"""Image folders and timm's datasets for training and evaluating a classifier."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import torch
from timm.data import IterableImageDataset, create_dataset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset
from torchvision.datasets import VisionDataset
from torchvision.transforms import Compose

from fastvim.data.base import DataModule
from fastvim.data.classes import places
from fastvim.data.files import Chosen, ImageFiles, reader_classes
from fastvim.data.finishing import Finish
from fastvim.data.folders import ClassFolder, ClassFolders
from fastvim.data.gpu.loading import Decode, Sent, encoded, finish_batches, what_is_sent
from fastvim.data.issues import NoFiles, SplitReport
from fastvim.data.pixels import DAMAGED
from fastvim.data.splits import find_split, open_folder
from fastvim.data.torch_datasets import (
    NAMES,
    PREFIX,
    TorchFiles,
    open_torch_dataset,
    torch_class_names,
)
from fastvim.data.transforms import (
    IMAGE_MODES,
    ImageTransform,
    Transform,
    evaluation_transform,
    to_mode,
    training_transform,
)
from fastvim.data.workers import WatchedLoader
from fastvim.errors import OptionError, UserError, nearest
from fastvim.options import COUNT, check_choice, check_given

_logger = logging.getLogger(__name__)

READERS = ("torch", "hfds", "hfids", "tfds", "wds")  # timm's, besides folders and tar files


class ImageData(DataModule):
    """Images in class folders, or what timm's dataset readers open.

    The folder layout is `root/train/CLASS/**` and `root/val/CLASS/**`, of all files that Pillow
    reads but hidden ones (`validation` serves for `val`; `train.tar` for `train/`). The class of an
    image is the first folder below the split; the training split's names, in natural order, number
    the classes, and the other splits are mapped by name. When validating or testing without a
    training split, that split's own names do; where weights know the classes (`known`), they
    number them. What is left out is said once. Pre-training takes images without class folders
    too: they have the target -1, and asking for their `class_names` is an error.

    A batch of a loader is (images, targets): float32 (B, C, H, W), normalised, and int64 (B,), on
    the device of the trainer, or on the CPU without one. Loading processes give uint8 pixels and
    the rectangles to erase (`fastvim.data.finishing`), as the loader's `dataset` does; the loader
    normalises and erases a whole batch. The defaults are the published ImageNet recipe; Mixup is
    the task's. Training resumes with the batches that
    it would have seen (`fastvim.data.sampler`). They do not depend on the number of workers, except
    with iterable datasets (`wds/`, `hfids/`, `tfds/`). In training an unreadable image is replaced,
    with a warning; in evaluation it is an error (`fastvim.data.files`). timm's reader of `wds/`
    skips it with a warning in both.

    Args:
        root: the directory, or `sample:NAME` for a set of `fastvim.data.samples`; with `wds/` an
            address too.
        dataset: "" for folders; otherwise timm's name of a dataset whose files are at `root`:
            `hfds/NAME`, `wds/NAME`, or `torch/NAME` for one that torchvision downloads there, as
            `torch/cifar10`.
        train_split: name of the training split.
        val_split: name of the validation split.
        test_split: name of the test split; None for `test` if the folder has one, else `val_split`.
        class_folder: which folder is the class of the images in it: "outer", the first one below
            the split, or "inner", the one that holds the image.
        train_images: number of training images, a random choice drawn with `seed`; None for all.
        num_classes: for datasets that do not name their classes (`wds/`); None to read them.
        classes: name of the class of each folder, by the folder's name, in the order of a model's
            outputs: a split may hold some of them. None takes the training split's folders.
        img_size: height and width in pixels, or one number for both.
        in_chans: 3 (RGB) or 1 (grey).
        mean: per channel, for values in 0..1; a single value serves every channel.
        std: as `mean`.
        interpolation: of every resizing.
        crop_pct: evaluation resizes to `img_size / crop_pct` and crops the centre.
        scale: range of a training crop's share of the area.
        ratio: range of a training crop's width / height.
        hflip: probability of a horizontal flip.
        vflip: probability of a vertical flip.
        color_jitter: strength of brightness, contrast, saturation; used without `auto_augment`.
        auto_augment: timm's description of an augmentation policy; None or "" for none.
        re_prob: probability of random erasing.
        re_mode: what fills an erased rectangle: "const", "rand" or "pixel".
        decode: where training images are decoded, cropped and augmented: "gpu" in batches on the
            trainer's device, "cpu" in the loading processes, "auto" on a GPU that can. The random
            numbers are the same, and the pixels but for a few levels in some (`fastvim.data.gpu`).
        eval_decode: likewise of validation and test; "cpu" has Pillow's pixels, which a GPU only
            crops and resizes, to the same values.
        kwargs: further arguments of `DataModule`.

    Raises:
        UserError: for an argument out of range, and in `setup` for missing or odd files.
    """

    def __init__(
        self,
        root: str,
        dataset: str = "",
        train_split: str = "train",
        val_split: str = "val",
        test_split: str | None = None,
        class_folder: ClassFolder = "outer",
        train_images: int | None = None,
        num_classes: int | None = None,
        classes: dict[str, str] | None = None,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
        interpolation: str = "bicubic",
        crop_pct: float = 0.875,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        hflip: float = 0.5,
        vflip: float = 0.0,
        color_jitter: float = 0.0,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        re_prob: float = 0.25,
        re_mode: str = "pixel",
        decode: Decode = "auto",
        eval_decode: Decode = "cpu",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        check_choice(get_args(Decode), decode=decode, eval_decode=eval_decode)
        self.decode, self.eval_decode = decode, eval_decode
        check_given(COUNT, train_images=train_images, num_classes=num_classes)
        self.dataset = dataset
        self.train_split = train_split
        self.val_split = val_split
        self.test_split = test_split
        self.class_folder: ClassFolder = class_folder
        self.train_images = train_images
        self._check_dataset()
        self._train_transform = training_transform(
            *(img_size, mean, std, interpolation, in_chans),
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            vflip=vflip,
            color_jitter=color_jitter,
            auto_augment=auto_augment,
            re_prob=re_prob,
            re_mode=re_mode,
        )
        self._eval_transform = evaluation_transform(
            img_size, mean, std, crop_pct, interpolation, in_chans
        )
        self.mean, self.std = tuple(mean), tuple(std)
        self.read_picture = replace(self.read_picture, mode=IMAGE_MODES[in_chans])
        self._to_mode = to_mode(in_chans, self.value_range)
        self._num_classes = num_classes
        self._classes = classes
        self._folders: list[str] = []  # the folder of each class
        self._unlabelled = ""  # why there are no classes

    def eval_transform(self) -> Transform:
        """What evaluation does to a PIL image: a function to a float32 tensor (C, H, W)."""
        return self._eval_transform

    @property
    def class_names(self) -> list[str]:
        """The classes in index order; known after `setup`.

        Raises:
            UserError: there are images outside class folders.
        """
        if self._unlabelled:
            raise UserError(self._unlabelled)
        return super().class_names

    @property
    def classes_from(self) -> str:
        return self.dataset or str(find_split(self.directory(), self.train_split) or self.root)

    def _transform(self, role: str) -> ImageTransform:
        return self._train_transform if role == "train" else self._eval_transform

    def finish(self, role: str) -> Finish:
        return self._transform(role).finish

    def open(self, role: str) -> Dataset[Any]:
        """The dataset of a role, "train", "val" or "test"; the first one settles the classes."""
        split = self._split(role)
        training, transform = role == "train", self._transform(role).pixels
        source = self._source(split, training)
        if isinstance(source, ClassFolders):
            self._unlabelled = self._unlabelled or source.outside
            if source.unused and role not in self._examined:
                _logger.warning("left out: %s", source.unused)
        if not self._class_names and not self._unlabelled:
            self._settle_classes(source, training)
        if isinstance(source, IterableImageDataset):
            if training and self.train_images is not None:
                expected = f"null, as {self.dataset} has no length"
                raise OptionError("train_images", self.train_images, expected)
            source.transform = Compose([self._to_mode, transform])
            source.target_transform = self._indices(source)
            return source
        files: Dataset[Any]
        if isinstance(source, VisionDataset):
            source.target_transform = self._indices(source)
            files = TorchFiles(source, f"{self.dataset}/{split}", self._to_mode, transform)
        else:
            location = f"{self.dataset}/{split}" if self.dataset else str(source.root)
            read, of = self.read_picture, self._whose
            folders = None if self._unlabelled else self._folders
            files = ImageFiles(source, location, read, transform, folders, training, of)
        return self._choose(files) if training and self.train_images is not None else files

    def samples(self, role: str) -> Dataset[Any]:
        files, sent = super().samples(role), self._sent(role)
        return files if sent is None else encoded(files, self._transform(role), sent)

    def _loader(self, role: str, *how: Any) -> WatchedLoader:
        loader = super()._loader(role, *how)
        if (sent := self._sent(role)) is not None:
            known = self._transform(role), self.read_picture, self.device
            finish_batches(loader, *known, sent, training=role == "train")
        return loader

    def _sent(self, role: str) -> Sent | None:
        """What the trainer's device makes images of; None if the loading processes make them."""
        training = role == "train"
        option, decode = ("decode", self.decode) if training else ("eval_decode", self.eval_decode)
        batch_size = None if training else self.eval_batch_size
        known = self._transform(role), self.read_picture, self.device
        sent, why = what_is_sent(self._datasets[role], *known, option, decode, batch_size)
        if why and option not in self._examined:
            self._examined.add(option)
            _logger.warning("the loading processes decode the images, not the GPU: %s", why)
        return sent

    def check(self, role: str) -> SplitReport:
        self._examined.add(role)
        files = self.opened(role)
        if isinstance(files, IterableImageDataset):
            note = "stream, not examined"
            return SplitReport(self._split(role), NoFiles(), facts={note: 1})
        assert isinstance(files, ImageFiles | TorchFiles | Chosen)
        report = SplitReport(self._split(role), files, facts={"images": len(files)})
        reader = getattr(getattr(files, "dataset", files), "reader", None)
        if isinstance(reader, ClassFolders):
            report.left_out |= reader.unused
        if (targets := files.targets) is not None:
            report.count(targets, self.class_names)
        elif self._unlabelled:
            report.unlabelled = self._unlabelled
        else:
            report.classes = dict.fromkeys(self.class_names, 0)
            report.read_labels = Counter()
        if role == "train":
            report.skips = (DAMAGED,)
        return report

    def reading(self, role: str) -> list[Any]:
        return [*super().reading(role), self.dataset, self.read_picture.mode]

    def _decoded_mode(self) -> str:
        """What timm converts images to: nothing, as `to_mode` does, but what `tfds/` decodes to."""
        mode = self.read_picture.mode
        return mode if mode and self.dataset.lower().startswith("tfds/") else ""

    def _choose(self, files: Dataset[Any]) -> Dataset[Any]:
        """The `train_images` of the training split."""
        assert self.train_images is not None
        size = len(files)  # type: ignore[arg-type]
        if not 1 <= self.train_images <= size:
            raise OptionError("train_images", self.train_images, f"1 to {size}, as the split has")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(size, generator=generator)
        return Chosen(files, order[: self.train_images].tolist())

    def prepare_data(self) -> None:
        """Fetch a sample set or a dataset of torchvision, once for all processes of a machine."""
        super().prepare_data()
        if self._is_torch:
            for split in {self._split(role): None for role in ("train", "val", "test")}:
                open_torch_dataset(self.dataset, self.folder(), split, download=True)

    @property
    def _is_torch(self) -> bool:
        return self.dataset.lower().startswith(PREFIX)

    def _source(self, split: str, training: bool) -> Any:
        """The dataset of a split without a transform, or its `ClassFolders` or timm's reader."""
        if not self.dataset:
            return open_folder(self.folder(), split, self.class_folder)
        if self._is_torch:
            return open_torch_dataset(self.dataset, self.folder(), split)
        try:
            source = create_dataset(
                self.dataset,
                root=self.directory(),
                split=split,
                is_training=training,
                batch_size=self.batch_size if training else self.eval_batch_size,
                seed=self.seed,
                input_img_mode=self._decoded_mode(),
            )
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"{self.dataset}: cannot open split {split!r}: {reason}") from error
        return source if isinstance(source, IterableImageDataset) else source.reader

    def _settle_classes(self, source: Any, training: bool) -> None:
        """The classes that the weights know, by name; without any, those of the data."""
        names = self._classes or {}
        if self.known is None:
            self._folders = self._find_folders(source, training)
        elif not names and not _own_classes(source):
            if self._num_classes not in (None, len(self.known.names)):
                expected = f"{len(self.known.names)}, as {self.known.source} knows"
                raise OptionError("num_classes", self._num_classes, expected)
            self._folders = self.known.names
        else:
            places(list(names.values()), self.known.names, "classes", self._whose)
            folder_of = {name: folder for folder, name in names.items()}
            self._folders = [folder_of.get(name, name) for name in self.known.names]
        self._class_names = [names.get(folder, folder) for folder in self._folders]

    @property
    def _whose(self) -> str:
        """Whose the classes are, for messages."""
        return "expected" if self.known is None else f"of {self.known.source}"

    def _indices(self, source: VisionDataset | IterableImageDataset) -> Callable[[int], int] | None:
        """From the index that a dataset gives to that of the weights; None for the same."""
        own = _own_classes(source)
        if self.known is None or self._classes is not None or not own:
            return None
        return places(own, self._folders, self.dataset, self._whose).__getitem__

    def _find_folders(self, source: Any, training: bool) -> list[str]:
        """The classes as the files name them: those given, or the training split's.

        Without a training split, those of the split that is opened.
        """
        if self._classes is not None:
            return self._checked(list(self._classes))
        if isinstance(source, ClassFolders) and not training:
            if find_split(self.directory(), self.train_split):
                source = self._source(self.train_split, training)
                if source.outside:
                    raise UserError(source.outside)
            else:
                _logger.warning("%s: no training split; its own folders give classes", source.root)
        return self._checked(_own_classes(source))

    def _checked(self, names: list[str]) -> list[str]:
        """The class names; without any, numbers up to `num_classes`."""
        if not names and self._num_classes is None:
            raise UserError(f"{self.dataset}: the dataset names no classes; give num_classes")
        if names and self._num_classes not in (None, len(names)):
            expected = f"{len(names)}, the number of classes in the data"
            raise OptionError("num_classes", self._num_classes, expected)
        return names or [str(index) for index in range(self._num_classes or 0)]

    def _split(self, role: str) -> str:
        if role == "train":
            return self.train_split
        if role == "test" and self.test_split:
            return self.test_split
        if role == "test" and not self.dataset and find_split(self.directory(), "test"):
            return "test"
        return self.val_split

    def _check_dataset(self) -> None:
        if self.dataset and self.dataset.partition("/")[0].lower() not in READERS:
            names = ", ".join(f"{reader}/" for reader in READERS) + nearest(self.dataset, NAMES)
            expected = f'"" for folders or a name that begins with {names}'
            raise OptionError("dataset", self.dataset, expected)


def _own_classes(source: Any) -> list[str]:
    """The names of a source's classes in index order; empty where it has none."""
    if isinstance(source, VisionDataset):
        return torch_class_names(source)
    return reader_classes(source.reader if isinstance(source, IterableImageDataset) else source)
