"""Images of any number of channels, listed in a table with a label each.

C, H, W: channels, height and width.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from fastvim.data.arrays import read_array
from fastvim.data.base import DataModule
from fastvim.data.channel_transforms import evaluation_transform, training_transform
from fastvim.data.classes import places
from fastvim.data.files import MAX_UNREADABLE
from fastvim.data.folders import natural_key
from fastvim.data.issues import Look, SplitReport, look_at, missing_files
from fastvim.data.moments import seen
from fastvim.data.pixels import DAMAGED, MISSING_IMAGE, UnreadableImageError
from fastvim.data.remote import UnreadableFileError, is_url, join
from fastvim.data.table import read_table, require_columns, require_values, splits_of, texts
from fastvim.errors import OptionError, UserError, nearest
from fastvim.options import (
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SIZE,
    check,
    check_choice,
    per_channel,
)

_logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
COUNTERS = 1024  # one for the main process and one for each worker


class ChannelImages(Dataset[tuple[Tensor, int]]):
    """Image files and their class indices, (float32 (C, H, W), int).

    With `on_error="skip"` the next readable image replaces an unreadable one, with a warning;
    `skipped` counts them. `MAX_UNREADABLE` in a row are an error. The order of the other images
    stays the same.

    Args:
        paths: files that `read` opens.
        targets: class index of each.
        transform: from the stored values (C, H, W), uint8 as such and others as float32, to the
            image.
        in_chans: what every file must have.
        read: opens a path as an array (C, H, W).
        on_error: "raise" or "skip".

    Raises:
        UnreadableFileError: when reading, naming the file.
    """

    def __init__(
        self,
        paths: Sequence[str],
        targets: Sequence[int] | np.ndarray,
        transform: Callable[[Tensor], Tensor],
        in_chans: int,
        *,
        read: Callable[[str], np.ndarray] = read_array,
        on_error: OnError = "raise",
    ) -> None:
        # Arrays, not lists: reference counts of list items would copy the pages into every worker.
        self._paths = np.array([path.encode("utf-8", "surrogateescape") for path in paths])
        self._targets = np.asarray(targets, dtype=np.int64)
        self.transform = transform
        self.in_chans = in_chans
        self.read = read
        self.on_error = on_error
        # Shared with the workers; each of them has a counter.
        self._skipped = torch.zeros(COUNTERS, dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> int:
        """How many unreadable images were replaced so far, in all workers."""
        return int(self._skipped.sum())

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        for attempt in range(MAX_UNREADABLE):
            position = (index + attempt) % len(self)
            try:
                image = self._read(position)
            except UnreadableFileError as error:
                if self.on_error == "raise":
                    raise
                message = str(error)
                worker = get_worker_info()
                self._skipped[0 if worker is None else 1 + worker.id % (COUNTERS - 1)] += 1
                _logger.warning("%s: the next one takes its place", message)
            else:
                return self.transform(image), int(self._targets[position])
        raise UnreadableFileError(f"{message}, the last of {MAX_UNREADABLE} such in a row")

    def filename(self, index: int) -> str:
        """The path or URL of an image."""
        return self._paths[index].decode("utf-8", "surrogateescape")

    def look(self, index: int) -> Look:
        """What an image shows, for `fastvim.data.checks`."""
        if not all(map(os.path.exists, self.sources(index))):
            raise UnreadableImageError(f"{self.filename(index)}: no such file", MISSING_IMAGE)
        array = self._array(index)
        mode = f"{len(array)} x {array.dtype}"
        found = look_at(array.transpose(1, 2, 0), mode)
        return found._replace(label=int(self._targets[index]), channels=seen(array))

    def sources(self, index: int) -> tuple[str, ...]:
        """The file, unless it is behind a URL."""
        path = self.filename(index)
        return () if is_url(path) else (path,)

    @property
    def targets(self) -> np.ndarray:
        """Class index of each image."""
        return self._targets

    def _read(self, index: int) -> Tensor:
        array = self._array(index)
        if array.dtype != np.uint8:
            return torch.from_numpy(array.astype(np.float32))
        return torch.from_numpy(np.require(array, requirements="W"))  # Pillow's is read-only

    def _array(self, index: int) -> np.ndarray:
        """The stored values (C, H, W).

        Raises:
            UnreadableFileError: another number of channels, or as `read`.
        """
        array = self.read(self.filename(index))
        if len(array) != self.in_chans:
            raise UnreadableFileError(
                f"{self.filename(index)}: shape {array.shape}: expected {self.in_chans} channels, "
                "then height and width"
            )
        return array


@dataclass(frozen=True)
class Rows:
    """The rows of a table as arrays of equal length.

    Attributes:
        paths: of the files, as read.
        labels: names of the classes.
        splits: "train", "val" or "test".
        class_names: all classes in index order; None for the labels in natural order.
        left_out: "train", "val" or "test" of the rows that the table has besides.
    """

    paths: np.ndarray
    labels: np.ndarray
    splits: np.ndarray
    class_names: list[str] | None = None
    left_out: Sequence[str] | np.ndarray = ()


class ChannelData(DataModule):
    """Images of any number of channels in a table with the columns path, label and split.

    The table is a CSV, TSV or Parquet file, the images are NPY, TIFF, OME-TIFF, PNG or JPEG files;
    all of them may be on disk or behind any URL that fsspec opens. The training split's labels, in
    natural order and without blanks around them, number the classes, or those of weights (`known`).
    Without a split column, a permutation of the rows drawn with `split_seed` divides them 60/20/20.
    Without test rows, the validation split is the test split.

    A batch is (images, targets): float32 (B, C, H, W), normalised, and int64 (B,). Training resumes
    with the batches that it would have seen (`fastvim.data.sampler`).

    Args:
        root: directory or URL that relative paths begin at, or `sample:NAME` for a set of
            `fastvim.data.samples`.
        table: path or URL of the table.
        in_chans: channels of every image.
        mean: per channel, of the values as stored (`fastvim data stats` computes them); a single
            value serves every channel.
        std: as `mean`.
        path_column: name of the column of the files.
        label_column: of the labels.
        split_column: of "train", "val" and "test"; a table may lack the default one.
        split_seed: of the permutation, at least 0.
        img_size: height and width in pixels, or one number for both.
        augment: options of `fastvim.data.channel_transforms.training_transform`.
        on_error: in training, an unreadable image ends the run ("raise") or is replaced by the
            next one ("skip"); a line at the end of the epoch says how many. In evaluation it is
            always an error.
        attempts: to fetch a file, at least 1.
        wait: seconds before the second attempt, doubled before each further one.
        storage_options: arguments of the fsspec filesystem, such as `{anon: true}` for S3.
        kwargs: further arguments of `DataModule`.

    Raises:
        UserError: for an argument out of range, and in `setup` for a missing or odd table.
    """

    def __init__(
        self,
        root: str,
        in_chans: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        table: str = "table.csv",
        path_column: str = "path",
        label_column: str = "label",
        split_column: str = "split",
        split_seed: int = 0,
        img_size: int | tuple[int, int] = 224,
        augment: dict[str, Any] | None = None,
        on_error: OnError = "raise",
        attempts: int = 4,
        wait: float = 0.5,
        storage_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(root, **kwargs)
        self.table = str(table)
        self.path_column = path_column
        self.label_column = label_column
        self.split_column = split_column
        self.split_seed = split_seed
        self.in_chans = in_chans
        self.on_error = on_error
        if self.value_range is not None:
            expected = "null, as channels keep their stored values; give mean and std of them"
            raise OptionError("value_range", self.value_range, expected)
        check(SEED, split_seed=split_seed)
        check(SIZE, in_chans=in_chans)
        check(COUNT, attempts=attempts)
        check(NOT_NEGATIVE, wait=wait)
        check_choice(get_args(OnError), on_error=on_error)
        self.mean = per_channel("mean", mean, in_chans, FINITE)
        self.std = per_channel("std", std, in_chans, POSITIVE)
        self._reading: dict[str, Any] = {
            "attempts": attempts,
            "wait": wait,
            "storage_options": storage_options,
        }
        common = (img_size, self.mean, self.std)
        self._train_transform = training_transform(*common, **_known_options(augment or {}))
        self._eval_transform = evaluation_transform(*common)
        self._rows: Rows | None = None
        self._reported = 0  # how many of `skipped` are logged

    @property
    def skipped(self) -> int:
        """How often an unreadable training image was replaced, in this process and its workers."""
        images = self._datasets.get("train")
        return images.skipped if isinstance(images, ChannelImages) else 0

    def eval_transform(self) -> Callable[[Tensor], Tensor]:
        """What evaluation does to stored values (C, H, W): a function to a float32 tensor."""
        return self._eval_transform

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """After the last training batch of an epoch, log how many images were replaced in it."""
        trainer = self.trainer
        if trainer is None or not trainer.training or not trainer.is_last_batch:
            return batch
        if new := self.skipped - self._reported:
            self._reported += new
            _logger.warning(
                "%s: %d unreadable images were replaced in this epoch, %d since the start",
                self._table_url(),
                new,
                self._reported,
            )
        return batch

    @property
    def classes_from(self) -> str:
        return self._table_url()

    def open(self, role: str) -> ChannelImages:
        if self._rows is None:
            self._rows = self._read_rows()
            self._class_names = self._find_class_names(self._rows)
        rows, training = self._rows, role == "train"
        split = self._split(role)
        if split not in rows.splits:
            raise UserError(f"{self._table_url()}: no rows of the split {split!r}")
        chosen = rows.splits == split
        index = {name: position for position, name in enumerate(self._class_names)}
        labels = rows.labels[chosen]
        own = sorted({*labels}, key=natural_key)
        where = f"{self._table_url()}, split {split!r}"
        of = "of the training split" if self.known is None else f"of {self.known.source}"
        places(own, self._class_names, where, of)
        directory = self.directory()
        return ChannelImages(
            [join(directory, path) for path in rows.paths[chosen]],
            [index[label] for label in labels],
            self._train_transform if training else self._eval_transform,
            self.in_chans,
            read=partial(read_array, max_pixels=self.max_pixels, **self._reading),
            on_error=self.on_error if training else "raise",
        )

    def _split(self, role: str) -> str:
        assert self._rows is not None
        return "val" if role == "test" and "test" not in self._rows.splits else role

    def check(self, role: str) -> SplitReport:
        self._examined.add(role)
        files = self.opened(role)
        assert isinstance(files, ChannelImages)
        report = SplitReport(self._split(role), files, facts={"images": len(files)})
        report.count(files.targets, self.class_names)
        report.normalised = self.mean, self.std
        if role == "train" and self.on_error == "skip":
            report.skips = (DAMAGED,)
        for path in missing_files([files.filename(index) for index in range(len(files))]):
            (report.dropped if report.skips else report.errors).add(MISSING_IMAGE, path)
        assert self._rows is not None
        if number := list(self._rows.left_out).count(report.split):
            report.left_out.add("row without a class", self._table_url(), number)
        _add_repeated(report, files, self.class_names)
        return report

    def reading(self, role: str) -> list[Any]:
        return [*super().reading(role), self.in_chans]

    def _read_rows(self) -> Rows:
        """The table; a subclass may have another layout."""
        url = self._table_url()
        table = read_table(url, **self._reading)
        needed = [self.path_column, self.label_column]
        require_columns(table, needed, url)
        for column in needed:
            require_values(table, column, url)
        splits = splits_of(table, self.split_column, self.split_seed, url)
        paths = table[self.path_column].astype(str).to_numpy(dtype=object)
        return Rows(paths, texts(table[self.label_column]).to_numpy(dtype=object), splits)

    def _find_class_names(self, rows: Rows) -> list[str]:
        if self.known is not None:
            return self.known.names
        if rows.class_names is not None:
            return rows.class_names
        training = rows.labels[rows.splits == "train"]
        if not len(training):
            _logger.warning("%s: no training rows; all give the classes", self._table_url())
        return sorted({*(training if len(training) else rows.labels)}, key=natural_key)

    def _table_url(self) -> str:
        return join(self.directory(), self.table)


def _add_repeated(report: SplitReport, files: ChannelImages, class_names: list[str]) -> None:
    """Add the files that a split lists more than once."""
    first: dict[str, tuple[int, int]] = {}
    for index, target in enumerate(files.targets.tolist()):
        path = files.filename(index)
        before = first.setdefault(os.path.normpath(path), (index, target))
        if before == (index, target):
            continue
        if before[1] == target:
            report.warnings.add("file listed twice", path)
        else:
            names = f"{class_names[before[1]]} and {class_names[target]}"
            report.warnings.add("file listed under two classes", f"{path}, as {names}")


def _known_options(augment: dict[str, Any]) -> dict[str, Any]:
    """The options, or a UserError for one that `training_transform` lacks."""
    parameters = inspect.signature(training_transform).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for name in augment:
        if name not in known:
            raise UserError(f"augment has no option {name!r}{nearest(name, known)}")
    return augment
