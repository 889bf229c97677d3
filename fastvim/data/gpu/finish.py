"""Batches of files made into batches of normalised images, on the device that takes them."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastvim.data.decoding import UnreadableImageError
from fastvim.data.finishing import CPU, Drawn
from fastvim.data.gpu import files as places
from fastvim.data.gpu.augment import augment
from fastvim.data.gpu.crops import Windows, crop_and_resize
from fastvim.data.gpu.decoders import Decoder, Encoded, make_decoder
from fastvim.data.gpu.files import Files
from fastvim.data.gpu.planned import NOTHING, NUMBERS, size_and_filter
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import ImageTransform
from fastvim.errors import UserError

_logger = logging.getLogger(__name__)

MOST_PIXELS = 2**28  # decoded at a time, where a batch may be of photographs of any size


class Decoded(NamedTuple):
    """Images as stored.

    Attributes:
        pixels: uint8, on the device, of all images, (H, W, 3), one after the other.
        begins: int64 (B,), of each image.
        errors: why there is none at some places of the batch.
    """

    pixels: Tensor
    begins: np.ndarray
    errors: dict[int, UserError]


class DecodeAndFinish:
    """Decodes, crops, augments, normalises and erases a batch.

    A file that the device's decoder refuses is read by Pillow. There is no decoder where no file
    needs one.

    Args:
        transform: of the images, which can be `planned`.
        read: files, as Pillow does.
    """

    def __init__(self, transform: ImageTransform, read: PictureReader) -> None:
        self.finish, self.read = transform.finish, read
        self.size, self.interpolation = size_and_filter(transform.pixels)
        self._decoder: Decoder | None = None
        self._pixels: Tensor | None = None  # of images as decoded, on a GPU
        # The files of a batch, until the GPU has decoded them.
        self._kept: tuple[Files, torch.cuda.Event] | None = None

    def __call__(
        self, files: Files, targets: np.ndarray, device: torch.device = CPU
    ) -> tuple[Tensor, np.ndarray]:
        """Normalised images of training.

        Where Pillow cannot read a file either, the next image of the batch takes its place, with
        a warning.

        Args:
            files: of a batch.
            targets: int64 (B,), of the files.
            device: of the result.

        Returns:
            float32 (B, 3, h, w), and int64 (B,).

        Raises:
            UnreadableImageError: no file of the batch can be read.
        """
        decoded = self._decode(files, device)
        for error in decoded.errors.values():
            _logger.warning("%s; the next one of its batch takes its place", error)
        own, lost = np.arange(len(files.lengths)), sorted(decoded.errors)
        readable = np.setdiff1d(own, lost)
        if not len(readable):
            raise UnreadableImageError(f"{files.names[0]}: no image of its batch can be read")
        own[lost] = readable[readable.searchsorted(lost) % len(readable)]
        return self._finished(files, decoded, own, device), targets[own]

    def each(self, files: Files, device: torch.device = CPU) -> tuple[Tensor, dict[int, UserError]]:
        """Normalised images of the files that can be read.

        Args:
            files: of a batch.
            device: of the result.

        Returns:
            float32 (n, 3, h, w), and the errors of the others by their place in the batch.
        """
        images = [torch.empty(0, 3, *self.size, device=device)]
        errors: dict[int, UserError] = {}
        for first, part in places.in_parts(files, MOST_PIXELS):
            decoded = self._decode(part, device)
            errors |= {first + number: error for number, error in decoded.errors.items()}
            own = np.setdiff1d(np.arange(len(part.lengths)), sorted(decoded.errors))
            if len(own):
                images.append(self._finished(part, decoded, own, device))
        return torch.cat(images), errors

    def warm_up(self, device: torch.device, decoder: bool) -> None:
        """Load what a GPU runs, which one thread of a process can do at a time.

        Args:
            device: the GPU.
            decoder: that of files too, not the kernels alone.
        """
        if decoder:
            self._decoder = self._decoder or make_decoder(device)
        pixels = torch.zeros(8 * 8 * 3, dtype=torch.uint8, device=device)
        still, boxes = np.zeros((1, 2), dtype=bool), np.array([[0, 0, 8, 8]])
        whole, begin = np.array([self.size]), boxes[:, :2]
        window = Windows(
            pixels, begin[0, :1], boxes[:, 2:], still[0, :1], boxes, whole, begin, still
        )
        images = crop_and_resize(window, self.size, self.interpolation, device)
        augment(images, np.full((1, 1, NUMBERS), float(NOTHING)))
        self.finish.warm_up(device)

    def _finished(
        self, files: Files, decoded: Decoded, own: np.ndarray, device: torch.device
    ) -> Tensor:
        """Normalised images of some places of a batch."""
        windows = _windows(decoded.pixels, decoded.begins[own], files.plans[own], self.size)
        images = crop_and_resize(windows, self.size, self.interpolation, device)
        images = augment(images, files.operations[own])
        return self.finish(Drawn(images, torch.from_numpy(files.erased[own])), device)

    def _decode(self, files: Files, device: torch.device) -> Decoded:
        if self._kept is not None:
            self._kept[1].synchronize()
        sizes = files.plans[:, places.HEIGHT : places.WIDTH + 1]
        room = sizes.prod(1) * 3
        ends, content_ends = room.cumsum(), files.lengths.cumsum()
        begins, content_begins = ends - room, content_ends - files.lengths
        pixels = self._room(int(ends[-1]), device)
        encoded = Encoded(files.content, content_begins, files.lengths, pixels, begins, sizes)
        is_jpeg = files.plans[:, places.JPEG] > 0
        jpeg, others = np.flatnonzero(is_jpeg), np.flatnonzero(~is_jpeg)
        refused = jpeg
        if len(jpeg):
            self._decoder = self._decoder or make_decoder(device)
            refused = jpeg[self._decoder(encoded.only(jpeg))]
        for run in np.split(others, np.flatnonzero(np.diff(others) > 1) + 1) if len(others) else ():
            content = files.content[content_begins[run[0]] : content_ends[run[-1]]]
            pixels[begins[run[0]] : ends[run[-1]]].copy_(send(content, device))
        errors: dict[int, UserError] = {}
        for number in refused.tolist():
            content = files.content[content_begins[number] : content_ends[number]]
            try:
                content = self._by_pillow(content, files.names[number])
                pixels[begins[number] : ends[number]].copy_(send(content, device))
            except UnreadableImageError as error:
                errors[number] = error
        if device.type == "cuda":
            self._kept = files, torch.cuda.current_stream(device).record_event()
        return Decoded(pixels, begins, errors)

    def _by_pillow(self, content: Tensor, name: str) -> Tensor:
        """Pixels of an image as stored, not turned."""
        image = self.read(BytesIO(content.numpy().tobytes()), name, exif=False)
        return torch.from_numpy(np.array(image)).view(-1)

    def _room(self, size: int, device: torch.device) -> Tensor:
        """Memory for the pixels of a batch; on a GPU the same again, in the order of its stream."""
        if device.type != "cuda":
            return torch.empty(size, dtype=torch.uint8)
        if self._pixels is None or len(self._pixels) < size:
            self._pixels = torch.empty(size * 5 // 4, dtype=torch.uint8, device=device)
        return self._pixels


def _windows(
    pixels: Tensor, begins: np.ndarray, plans: np.ndarray, size: tuple[int, int]
) -> Windows:
    """The crops in images as they are decoded, which may lie on their sides."""
    orientation = plans[:, places.ORIENTATION]
    turned = orientation > 4
    ways = (3, 4, 7, 8), (2, 3, 6, 7)  # down, across
    mirrored = np.stack([np.isin(orientation, way) for way in ways], 1)
    stored = plans[:, [places.HEIGHT, places.WIDTH]]
    upright = np.where(turned[:, None], stored[:, ::-1], stored)
    first, last = plans[:, [places.TOP, places.LEFT]], plans[:, [places.BOTTOM, places.RIGHT]]
    boxes = np.concatenate((np.where(mirrored, upright - last, first), last - first), 1)
    whole = plans[:, [places.WHOLE_HEIGHT, places.WHOLE_WIDTH]]
    begin, flipped = (
        plans[:, [places.BEGIN_Y, places.BEGIN_X]],
        plans[:, [places.DOWN, places.ACROSS]],
    )
    flipped = flipped > 0
    begin = np.where(flipped, whole - begin - size, begin)
    return Windows(pixels, begins, stored, turned, boxes, whole, begin, mirrored ^ flipped)
