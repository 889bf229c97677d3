"""What the data modules share: splits, classes, loaders, and where the files are."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sized
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader, Dataset

from fastvim.data import samples
from fastvim.data.classes import KnownClasses
from fastvim.data.finishing import CPU, Finish
from fastvim.data.issues import SplitReport
from fastvim.data.pixels import MAX_PIXELS, PictureReader
from fastvim.data.remote import is_url
from fastvim.data.sampler import evaluation_loader, training_loader
from fastvim.data.workers import WatchedLoader
from fastvim.errors import OptionError, UserError
from fastvim.options import COUNT, NOT_NEGATIVE, SEED, WORKERS, check, check_given

Orientation = Literal["auto", "exif", "stored"]
ORIENTATIONS = get_args(Orientation)
SAMPLE_PREFIX = "sample:"
ROLES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}  # by Lightning's stage


class DataModule(L.LightningDataModule):
    """The base data module. A subclass opens a split and thereby settles `_class_names`.

    Args:
        root: the directory (or URL), or `sample:NAME` for a set of `fastvim.data.samples`.
        batch_size: training images per process.
        eval_batch_size: images per process in evaluation; None for `batch_size`.
        num_workers: loading processes per process.
        timeout: seconds that a loading process may take for a batch; the run then ends and names
            it. 0 waits for ever.
        seed: of order and augmentation, at least 0.
        value_range: the stored values that become black and white, as `[0, 4095]` of a camera of 12
            bits; None takes the type's (`fastvim.data.pixels`).
        max_pixels: an image of more is refused; None for no limit.

    Attributes:
        known: classes of the weights that are evaluated or trained on, set before `setup`: the
            targets are then places among these, by name. None takes the classes of the data.

    Raises:
        UserError: for an argument out of range, and in `setup` for a class that is not `known`.
    """

    # Roles whose batches are a pair of lists, since their samples differ in size.
    list_batches: ClassVar[Collection[str]] = ()

    def __init__(
        self,
        root: str,
        batch_size: int = 128,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
        value_range: tuple[float, float] | None = None,
        max_pixels: int | None = MAX_PIXELS,
        timeout: float = 300,
    ) -> None:
        super().__init__()
        check(COUNT, batch_size=batch_size)
        check_given(COUNT, eval_batch_size=eval_batch_size)
        check(WORKERS, num_workers=num_workers)
        check(SEED, seed=seed)
        check(NOT_NEGATIVE, timeout=timeout)
        self.root = str(root)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed, self.timeout = seed, timeout
        self.value_range, self.max_pixels = value_range, max_pixels
        self.read_picture = PictureReader("RGB", value_range, max_pixels)
        self.known: KnownClasses | None = None
        self._class_names: list[str] = []
        self._datasets: dict[str, Dataset[Any]] = {}
        self._examined: set[str] = set()  # roles whose report says what the lists of files tell

    @property
    def class_names(self) -> list[str]:
        """The classes in index order; known after `setup`."""
        if not self._class_names:
            raise RuntimeError(f"{type(self).__name__}.class_names: call setup() first")
        return self._class_names

    @property
    def num_classes(self) -> int:
        """The number of classes; known after `setup`."""
        return len(self.class_names)

    @property
    def classes_from(self) -> str:
        """The file or folder that has the classes, for messages."""
        return self.root

    def prepare_data(self) -> None:
        """Fetch a sample set, once for all processes of a machine."""
        self.directory()

    def setup(self, stage: str) -> None:
        """Open the splits of a stage: "fit", "validate" or "test"; those already open stay so."""
        for role in ROLES.get(stage, ()):
            self.opened(role)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train", training_loader, self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val", evaluation_loader, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test", evaluation_loader, self.eval_batch_size)

    def open(self, role: str) -> Dataset[Any]:
        """The dataset of a role, "train", "val" or "test"; the first one settles the classes."""
        raise NotImplementedError

    def samples(self, role: str) -> Dataset[Any]:
        """What the loading processes of an opened role read from."""
        return self._datasets[role]

    def finish(self, role: str) -> Finish | None:
        """What makes images of what the loading processes give for a role; None if they do."""
        return None

    def check(self, role: str) -> SplitReport:
        """What is wrong with the files of a role, counted and not raised; before `setup`.

        Raises:
            UserError: no such files at all, or data that cannot be checked.
        """
        raise UserError(f"{type(self).__name__} cannot be checked")

    def reading(self, role: str) -> list[Any]:
        """All that changes what the images of a role show, but their files; JSON's values."""
        root = self.directory()
        place = root if is_url(root) else os.path.abspath(root)
        return [type(self).__name__, place, self.value_range, self.max_pixels]

    def digest(self, role: str) -> str:
        """A digest of what an opened role lists: classes, number of files, a thousand names.

        Folders are left out: they may be elsewhere on another machine.
        """
        dataset: Any = self._datasets[role]
        told = ["\0".join(self._class_names)]
        if isinstance(dataset, Sized) and hasattr(dataset, "filename"):
            size = len(dataset)
            some = range(0, size, max(1, size // 1000))
            told += [str(size), *(os.path.basename(dataset.filename(index)) for index in some)]
        return sha256("\n".join(told).encode("utf-8", "surrogateescape")).hexdigest()[:12]

    def opened(self, role: str) -> Dataset[Any]:
        """The dataset of a role, opened once."""
        if role not in self._datasets:
            self._datasets[role] = self.open(role)
        return self._datasets[role]

    def directory(self) -> str:
        """Where the files are: the root, or a sample set's folder."""
        if self.root.startswith(SAMPLE_PREFIX):
            return str(samples.fetch(self.root.removeprefix(SAMPLE_PREFIX)))
        return self.root if is_url(self.root) else os.path.expanduser(self.root)

    def folder(self) -> str:
        """`directory()`, for layouts that are read from disks alone.

        Raises:
            UserError: the root is an address.
        """
        if is_url(self.root):
            expected = (
                "a folder on a disk; what can be read from an address are shards "
                "(dataset wds/NAME) and the images that a table lists (ChannelData)"
            )
            raise OptionError("root", self.root, expected)
        return self.directory()

    def path(self, name: str) -> Path:
        """A file or folder below the root, on a disk; an absolute path stays as it is."""
        name = os.path.expanduser(name)
        return Path(name) if os.path.isabs(name) else Path(self.folder(), name)

    def _loader(
        self, role: str, make: Callable[..., WatchedLoader], batch_size: int
    ) -> WatchedLoader:
        loader = make(
            self.samples(role),
            batch_size=batch_size,
            num_workers=self.num_workers,
            seed=self.seed,
            timeout=self.timeout,
            trainer=self.trainer,
        )
        if role in self.list_batches:
            loader.collate_fn = _collate_lists
        if (finish := self.finish(role)) is not None:
            device = self.device
            loader.finish = partial(_finished, finish, device)
            if device.type == "cuda":
                finish.warm_up(device)
                # Without processes the thread would draw from the generators of the training.
                loader.ahead = device if loader.num_workers else None
        return loader

    @property
    def device(self) -> torch.device:
        """Where batches are finished: the trainer's device, or the CPU without one."""
        return CPU if self.trainer is None else self.trainer.strategy.root_device


class DenseDataModule(DataModule):
    """Images of sizes of their own, with boxes and masks or with a class for every pixel.

    Args:
        root: as of `DataModule`.
        antialias: how images are resized. True averages over all pixels that a smaller image
            covers; a class or mask is the one under the middle of a new pixel. False takes the
            nearest four alone, and a class under the corner, bit for bit as OpenCV does: the
            published segmentors and detectors were trained and are evaluated so.
        orientation: of the annotations of a photograph that its EXIF tag turns: "exif" as upright,
            "stored" as its file has it, "auto" by the size that they were drawn for, "exif" if both
            fit.
        kwargs: further arguments of `DataModule`.
    """

    def __init__(
        self,
        root: str,
        *,
        antialias: bool = True,
        orientation: Orientation = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.antialias = antialias
        self.orientation = orientation
        if orientation not in ORIENTATIONS:
            raise UserError(f"orientation {orientation!r}: expected {', '.join(ORIENTATIONS)}")


def _finished(finish: Finish, device: torch.device, batch: Any) -> list[Any]:
    images, targets = batch
    return [finish(images, device), move_data_to_device(targets, device)]


def _collate_lists(samples: list[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [first for first, _ in samples], [second for _, second in samples]
