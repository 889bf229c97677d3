"""What is known of a set of files: what is wrong, what looks odd, what its classes have."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image

from fastvim.data.masks import Labels
from fastvim.data.moments import ChannelValues
from fastvim.data.parallel import read_in_order
from fastvim.data.pixels import MISSING_IMAGE, Brightest, highest_value, stored
from fastvim.data.remote import is_url
from fastvim.errors import UserError, counted, first_few

BLACK_AND_WHITE = (0, 255)
UNUSABLE = "image that cannot be used"
SEVERAL_IMAGES = "file of several images, of which the first is read"
MOST = 12  # classes, sizes or modes in a line


class Issue(NamedTuple):
    """A kind of mistake.

    Attributes:
        number: how often it was found.
        first: where it was found first, and what exactly.
    """

    number: int
    first: str


class Issues(dict[str, Issue]):
    """What is wrong, by kind, in the order in which the kinds came up."""

    def add(self, kind: str, where: str, number: int = 1) -> None:
        """Count some more of a kind, such as "unknown category"."""
        known = self.get(kind, Issue(0, where))
        self[kind] = known._replace(number=known.number + number)

    def __str__(self) -> str:
        """All of them in one line."""
        return "; ".join(f"{n:,} x {kind} (first: {first})" for kind, (n, first) in self.items())


class Look(NamedTuple):
    """What reading a sample shows; plain values, which a JSON file can hold.

    Attributes:
        width: of the image, in pixels.
        height: likewise.
        mode: of the image as stored.
        digest: of its pixels; "" where all have one value.
        blank: whether the image is all black or all white.
        highest: its highest value.
        white: the value that is white; 0 where that is not known.
        label: index of its class; -1 where it has none or several.
        values: how many pixels of its mask have each stored value.
        channels: what `fastvim.data.moments.seen` says, where the stored values are normalised.
        odd: what looks odd about it, to count it by.
        kind: why it cannot be used, to count it by; "" where it can.
        message: the same with the file's name.
    """

    width: int = 0
    height: int = 0
    mode: str = ""
    digest: str = ""
    blank: bool = False
    highest: float = 0
    white: float = 0
    label: int = -1
    values: tuple[tuple[int, int], ...] = ()
    channels: tuple[tuple[float, ...], ...] = ()
    odd: str = ""
    kind: str = ""
    message: str = ""


def look_at(pixels: np.ndarray, mode: str) -> Look:
    """What an image shows.

    Args:
        pixels: (H, W) or (H, W, C).
        mode: of the image as stored.
    """
    height, width = pixels.shape[:2]
    first = pixels[0, 0]
    if (pixels[0] == first).all() and (pixels == first).all():
        blank = any((first == value).all() for value in BLACK_AND_WHITE)
        return Look(width, height, mode, blank=bool(blank))
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8)
    digest.update(repr(pixels.shape).encode())
    return Look(width, height, mode, digest.hexdigest())


def look_at_picture(image: Image.Image) -> Look:
    """What an image shows that a `PictureReader` has read."""
    highest, white = highest_value(image)
    found = look_at(np.asarray(image), stored(image).mode)
    odd = SEVERAL_IMAGES if stored(image).several else ""
    return found._replace(highest=highest, white=white, odd=odd)


class Examined(Sized, Protocol):
    """A dataset whose samples can be examined as they are stored."""

    def look(self, index: int) -> Look:
        """What a sample shows; `UserError` where it cannot be used."""

    def filename(self, index: int) -> str:
        """The image's file, for messages."""

    def sources(self, index: int) -> tuple[str, ...]:
        """The files on disk that `look` reads; none for what lies behind a URL."""


class NoFiles:
    """Of a split that is streamed, or cannot be opened."""

    def __len__(self) -> int:
        return 0

    def look(self, index: int) -> Look:
        raise IndexError(index)

    def filename(self, index: int) -> str:
        raise IndexError(index)

    def sources(self, index: int) -> tuple[str, ...]:
        raise IndexError(index)


@dataclass
class SplitReport:
    """What is known of a split.

    Attributes:
        split: its name.
        files: the samples that are left to be read.
        labels: what the values of its masks stand for; None without masks.
        errors: what a run would stop at; at first, what the lists of files tell.
        dropped: what training leaves out.
        left_out: what belongs to no split, as files that are no images.
        warnings: what looks odd; a run goes on, and says it once.
        facts: counts that are not mistakes.
        classes: what each class has, by its name, in the order of the labels.
        targets: class index of every image; None where only reading tells it, or nothing.
        unlabelled: why there are no classes, in words.
        counted: what `classes` counts: "images", "objects" or "pixels".
        sizes: images of each width and height.
        modes: images of each mode, as their files store them.
        skips: kinds of unreadable images that training replaces by others.
        read: how many samples were read.
        values: how many pixels of the masks have each stored value.
        read_labels: how many images have each label, where only reading tells it; else None.
        digests: the first sample of each content, and its label.
        blank: images all black or all white.
        brightest: the highest values of all images.
        normalised: by which means and deviations, where the stored values are.
        channels: their values.
    """

    split: str
    files: Examined
    labels: Labels | None = None
    errors: Issues = field(default_factory=Issues)
    dropped: Issues = field(default_factory=Issues)
    left_out: Issues = field(default_factory=Issues)
    warnings: Issues = field(default_factory=Issues)
    facts: dict[str, int] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    targets: np.ndarray | None = None
    unlabelled: str = ""
    counted: str = "images"
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    skips: tuple[str, ...] = ()
    read: int = 0
    values: Counter[int] = field(default_factory=Counter)
    read_labels: Counter[int] | None = None
    digests: dict[str, tuple[int, int]] = field(default_factory=dict)
    blank: int = 0
    brightest: Brightest = field(default_factory=Brightest)
    normalised: tuple[Sequence[float], Sequence[float]] | None = None
    channels: ChannelValues = field(default_factory=ChannelValues)

    def among(self, noun: str = "images") -> str:
        """`" in 300 of 20,000 images"` where some were read, "" where all were."""
        total = len(self.files)
        return "" if self.read == total else f" in {self.read:,} of {total:,} {noun}"

    def among_counted(self) -> str:
        """The same for `classes`, which only reading tells of masks and of some datasets."""
        if self.labels is not None:
            return self.among("masks")
        return "" if self.read_labels is None else self.among()

    def add(self, index: int, look: Look) -> None:
        """Count what a sample shows. `read` is set before."""
        self.values.update(dict(look.values))
        if look.kind == MISSING_IMAGE and MISSING_IMAGE in self.errors | self.dropped:
            return  # the list of files told it
        if look.kind:
            found = self.dropped if look.kind in self.skips else self.errors
            found.add(look.kind + self.among(), look.message)
            if found is self.dropped and self.targets is not None and self.classes:
                self.classes[list(self.classes)[self.targets[index]]] -= 1
            return
        if look.odd:
            self.warnings.add(look.odd + self.among(), self.files.filename(index))
        if self.read_labels is not None:
            self.read_labels[look.label] += 1
        self.sizes[look.width, look.height] += 1
        self.modes[look.mode] += 1
        self.blank += look.blank
        if look.channels:
            self.channels.add(look.width * look.height, look.channels)
        if look.white:
            self.brightest.add_value(look.highest, look.white)
        if look.digest:
            own = look.label if self.targets is None else int(self.targets[index])
            first, label = self.digests.setdefault(look.digest, (index, own))
            if label != own:
                kind = f"image with the content of one of another class{self.among()}"
                same = self.files.filename(first)
                self.warnings.add(kind, f"{self.files.filename(index)}, as {same}")

    def count(self, targets: np.ndarray, class_names: Sequence[str]) -> None:
        """Fill `classes` from the class index of every image.

        Two classes of one name, as ImageNet has, are told apart by their indices.
        """
        self.targets = targets
        counts = np.bincount(targets, minlength=len(class_names)).tolist()
        twice = {name for name, number in Counter(class_names).items() if number > 1}
        names = [f"{name} [{i}]" if name in twice else name for i, name in enumerate(class_names)]
        self.classes = dict(zip(names, counts, strict=True))

    def __str__(self) -> str:
        """A line of facts, then a line for each kind of mistake and of what looks odd."""
        facts = ", ".join(counted(number, what) for what, number in self.facts.items())
        lines = [f"{self.split}: {facts}"]
        for name, counts in (("sizes", self.sizes), ("modes", self.modes)):
            if counts:
                shown = [f"{_text(key)} ({n:,})" for key, n in counts.most_common()]
                lines.append(f"  {name}{self.among()}: {first_few(shown, MOST)}")
        if self.classes:
            shown = [f"{name} ({number:,})" for name, number in self.classes.items()]
            lines.append(
                f"  {self.counted} of each class{self.among_counted()}: {first_few(shown, MOST)}"
            )
        for issues, note in (
            (self.errors, ""),
            (self.dropped, ", left out in training"),
            (self.left_out, ", left out"),
            (self.warnings, ", looks odd"),
        ):
            for kind, (number, first) in issues.items():
                lines.append(f"  {number:,} x {kind}{note}, first: {first}")
        return "\n".join(lines)


def _text(key: str | tuple[int, int]) -> str:
    return key if isinstance(key, str) else f"{key[0]}x{key[1]}"


def examine(files: Examined, indices: list[int], workers: int) -> Iterator[Look]:
    """What the samples show, in the order of the indices.

    Args:
        files: to read.
        indices: of the samples.
        workers: samples read at a time.
    """
    for found in read_in_order(files.look, indices, workers, UserError):
        if isinstance(found, Look):
            yield found
        else:
            yield Look(kind=getattr(found, "kind", UNUSABLE), message=str(found))


def missing_files(paths: Iterable[str]) -> Iterator[str]:
    """Those of the paths where no file is; URLs are not looked up. Each folder is listed once."""
    present: dict[str, set[str]] = {}
    for path in paths:
        folder, name = os.path.split(path)
        if not is_url(path) and folder not in present:
            present[folder] = (
                set(os.listdir(folder or ".")) if os.path.isdir(folder or ".") else set()
            )
        if not is_url(path) and name not in present[folder]:
            yield path
