"""What a loading process sends for a batch that a GPU finishes: files or pixels, and what to do.

B: images of a batch; H, W: height and width of an image as stored
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor
from torch.multiprocessing import get_sharing_strategy
from torch.utils.data import get_worker_info
from torchvision.transforms import Compose

from fastvim.data.decoding import check_size, orientation_of, without_pillows_limit
from fastvim.data.gpu.headers import BEGIN, SUBSAMPLED, plain_size
from fastvim.data.gpu.planned import Planned, numbered, planned
from fastvim.data.pixels import PictureReader

END = b"\xff\xd9"  # of a JPEG file
# Of an image that is sent as pixels to be resized: a hundred photographs of more for each process
# would fill the memory that processes share.
MOST_SENT = 2**19
# Places in `Files.plans`.
JPEG, HEIGHT, WIDTH, ORIENTATION, LEFT, TOP, RIGHT, BOTTOM = range(8)
WHOLE_WIDTH, WHOLE_HEIGHT, BEGIN_X, BEGIN_Y, ACROSS, DOWN = range(8, 14)


class Files(NamedTuple):
    """The images of a batch. What is small is no tensor, which would travel in a file of its own.

    Attributes:
        content: uint8, all files one after the other: JPEG files as they are, others as the
            pixels (H, W, 3) that Pillow gives.
        lengths: int64 (B,), bytes of each.
        plans: int64 (B, 14), by the names above: whether it is a JPEG file; height, width and EXIF
            orientation as stored; the crop of the upright image, what it is resized to, and the
            corner of what is kept of that; whether the result is mirrored.
        operations: what follows the crop, float64 (B, most of an image, `NUMBERS`), in order and
            padded with rows of kind `NOTHING`.
        erased: int64 (B, 5), as `Drawn` has it.
        names: of the files, for messages; "" of pixels.
    """

    content: Tensor
    lengths: np.ndarray
    plans: np.ndarray
    operations: np.ndarray
    erased: np.ndarray
    names: list[str]


def in_parts(files: Files, most: int) -> Iterator[tuple[int, Files]]:
    """Files of at most that many pixels together, or single ones, with the place of the first."""
    pixels = (files.plans[:, HEIGHT] * files.plans[:, WIDTH]).tolist()
    starts, total = [0], 0
    for number, own in enumerate(pixels):
        total += own
        if total > most and number > starts[-1]:
            starts.append(number)
            total = own
    ends = np.cumsum(files.lengths)
    for first, last in pairwise((*starts, len(pixels))):
        begin = int(ends[first] - files.lengths[first])
        content = files.content[begin : int(ends[last - 1])]
        rest: Any = (each[first:last] for each in files[1:])
        yield first, Files(content, *rest)


class Opened(NamedTuple):
    """A file before its augmentation is drawn.

    Attributes:
        content: uint8, as of `Files`, to be read alone.
        jpeg: whether it is that of a JPEG file.
        size: width and height as stored.
        orientation: EXIF's.
        name: of the file; "" of pixels.
    """

    content: np.ndarray
    jpeg: bool
    size: tuple[int, int]
    orientation: int
    name: str

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the upright image."""
        return self.size[::-1] if self.orientation > 4 else self.size


class FileReader:
    """Opens files for `Files`, in the place of a `PictureReader`.

    Args:
        read: of whole images, where `open_jpeg` gives none.
    """

    def __init__(self, read: PictureReader) -> None:
        self.read = read

    def __call__(self, file: Any, name: str) -> Opened:
        content = file.read()
        opened = open_jpeg(content, name, self.read.max_pixels)
        return opened or decoded(self.read(BytesIO(content), name))


def open_jpeg(content: bytes, name: str, max_pixels: int | None) -> Opened | None:
    """A JPEG file that a GPU decodes as Pillow does, and fast; None for any other file.

    Those are other formats and colours, progressive JPEG files, and those whose end is missing.

    Args:
        content: of the file.
        name: of the file, for messages.
        max_pixels: of an image; None for any number.

    Raises:
        UnreadableImageError: an image of more pixels.
    """
    if content[:3] != BEGIN or content.rfind(END, -64) < 0:
        return None
    size, orientation = plain_size(content), 1
    if size is None:
        try:
            with without_pillows_limit():
                image = Image.open(BytesIO(content))
        except Exception:  # told by who reads the file instead
            return None
        if not is_plain(image):
            return None
        size, orientation = image.size, orientation_of(image)
    check_size(size, max_pixels, name)
    return Opened(np.frombuffer(content, np.uint8), True, size, orientation, name)


def is_plain(image: Image.Image) -> bool:
    """Whether the decoders of a GPU take a file, and find the size and colours that Pillow does."""
    if not isinstance(image, JpegImageFile) or image.mode not in ("RGB", "L"):
        return False
    # More layers than it says it has: a second header, perhaps of another size.
    if image.info.get("progressive") or len(image.layer) != image.layers:
        return False
    if image.mode == "L":
        return True
    (brightness, *colours), names = image.layer, [layer[0] for layer in image.layer]
    as_rgb = image.info.get("adobe_transform") == 0 or bytes(names) == b"RGB"
    whole = all(layer[1:3] == (1, 1) for layer in colours)
    return not as_rgb and whole and brightness[1:3] in SUBSAMPLED


def decoded(image: Image.Image) -> Opened:
    """An image that Pillow has decoded, upright."""
    return Opened(np.asarray(image).reshape(-1), False, image.size, 1, "")


class Draw:
    """Draws the augmentation of a file that is open.

    Args:
        steps: for a `Planned` picture.
    """

    def __init__(self, steps: Compose) -> None:
        self.steps = steps

    def __call__(self, file: Opened) -> tuple[Opened, Planned]:
        return file, self.steps(Planned(file.upright))


class Pixels:
    """Makes of an image what a device finishes to the very pixels that a transform gives.

    That is the whole image where the device resizes as Pillow does, and else the transform's own
    result, of which nothing is cut away.

    Args:
        transform: to uint8 pixels (3, H, W), which can be `planned`.
    """

    def __init__(self, transform: Any) -> None:
        self.transform = transform
        steps = planned(transform)
        assert steps is not None
        self._steps = steps

    def __call__(self, image: Image.Image) -> tuple[Opened, Planned]:
        width, height = image.size
        # A high one is much memory between the two axes.
        if width * height <= MOST_SENT and height <= 2 * width:
            plan = self._steps(Planned(image.size))
            if plan.width_first:
                return decoded(image), plan
        pixels = self.transform(image)
        size = pixels.shape[2], pixels.shape[1]
        values = pixels.movedim(0, 2).contiguous().view(-1).numpy()
        return Opened(values, False, size, 1, ""), Planned(size)


def collate(samples: list[tuple[tuple[Opened, Planned], int]]) -> tuple[Files, np.ndarray]:
    """A batch of files, and the targets int64 (B,)."""
    drawn, targets = zip(*samples, strict=True)
    return gather(drawn), np.array(targets)


def gather(drawn: Sequence[tuple[Opened, Planned]]) -> Files:
    """A batch of files."""
    contents = [file.content for file, _ in drawn]
    plans = [
        (
            *(file.jpeg, *file.size[::-1], file.orientation),
            *(*plan.box, *plan.whole, *plan.begin, plan.across, plan.down),
        )
        for file, plan in drawn
    ]
    return Files(
        _joined(contents),
        np.array([len(content) for content in contents]),
        np.array(plans, dtype=np.int64),
        numbered([plan.operations for _, plan in drawn]),
        np.stack([plan.erased.numpy() for _, plan in drawn]),
        [file.name for file, _ in drawn],
    )


def _joined(contents: list[np.ndarray]) -> Tensor:
    """All of them, one after the other; in a loading process where another one reads them."""
    if get_worker_info() is None or get_sharing_strategy() != "file_descriptor":
        return torch.from_numpy(np.concatenate(contents))
    storage = torch.UntypedStorage._new_shared(sum(map(len, contents)), device="cpu")
    file, _ = storage._share_fd_cpu_()
    # Written, not copied: the first touch of a page of memory costs more than the bytes in it.
    with open(file, "wb", closefd=False) as shared:
        shared.seek(0)
        shared.writelines(content.data for content in contents)
    return torch.empty(0, dtype=torch.uint8).set_(storage)
