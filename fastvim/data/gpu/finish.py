"""Batches of files made into batches of normalised images, on the device that takes them."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvim.data.decoding import UnreadableImageError
from fastvim.data.finishing import CPU, Drawn
from fastvim.data.gpu import files as places
from fastvim.data.gpu.augment import augment
from fastvim.data.gpu.crops import Windows, crop_and_resize
from fastvim.data.gpu.decoders import Decoder, make_decoder
from fastvim.data.gpu.files import Files
from fastvim.data.gpu.planned import NOTHING, NUMBERS, size_and_filter
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader
from fastvim.data.transforms import ImageTransform
from fastvim.errors import UserError

_logger = logging.getLogger(__name__)

MOST_PIXELS = 2**28  # decoded at a time, where a batch may be of photographs of any size


class DecodeAndFinish:
    """Decodes, crops, augments, normalises and erases a batch.

    A file that the device's decoder refuses is read by Pillow.

    Args:
        transform: of the images, which can be `planned`.
        read: files, as Pillow does.
    """

    def __init__(self, transform: ImageTransform, read: PictureReader) -> None:
        self.finish, self.read = transform.finish, read
        self.size, self.interpolation = size_and_filter(transform.pixels)
        self._decoder: Decoder | None = None
        # Decoded images, whose memory is not torch's, until the GPU has read them.
        self._kept: tuple[list[Any], torch.cuda.Event] | None = None
        # The last batch of training with an image, whose place is the last.
        self._before: tuple[Files, np.ndarray, list[Any], int] | None = None

    def __call__(
        self, files: Files, targets: np.ndarray, device: torch.device = CPU
    ) -> tuple[Tensor, np.ndarray]:
        """Normalised images of training.

        Where Pillow cannot read a file either, the next image of the batch takes its place, with
        a warning; one of the batch before, where there is none.

        Args:
            files: of a batch.
            targets: int64 (B,), of the files.
            device: of the result.

        Returns:
            float32 (B, 3, h, w), and int64 (B,).

        Raises:
            UnreadableImageError: no file of the first batch can be read.
        """
        decoded, errors = self._decode(files, device)
        for error in errors.values():
            _logger.warning("%s; another one takes its place", error)
        own = list(range(len(decoded)))
        if len(errors) < len(own):
            own = [next(i for i in (*own[n:], *own) if i not in errors) for n in own]
            self._before = files, targets, decoded, own[0]
        elif self._before is None:
            raise UnreadableImageError(f"{files.names[0]}: no image of its batch can be read")
        else:
            files, targets, decoded, place = self._before
            own = [place] * len(own)
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
            decoded, refused = self._decode(part, device)
            errors |= {first + number: error for number, error in refused.items()}
            if own := [number for number in range(len(decoded)) if number not in refused]:
                images.append(self._finished(part, decoded, own, device))
        return torch.cat(images), errors

    def warm_up(self, device: torch.device) -> None:
        """Load decoder and kernels of a GPU, which one thread of a process can do at a time."""
        self._decoder = self._decoder or make_decoder(device)
        image = torch.zeros(3, 8, 8, dtype=torch.uint8, device=device)
        still, sizes = np.zeros((1, 2), dtype=bool), np.array([[0, 0, 8, 8]])
        window = Windows([image], still[0, :1], sizes, sizes[:, 2:], sizes[:, :2], still)
        images = crop_and_resize(window, self.size, self.interpolation, device)
        augment(images, np.full((1, 1, NUMBERS), float(NOTHING)))
        self.finish.warm_up(device)

    def _finished(
        self, files: Files, decoded: list[Any], own: list[int], device: torch.device
    ) -> Tensor:
        """Normalised images of some places of a batch."""
        windows = _windows([decoded[number] for number in own], files.plans[own], self.size)
        images = crop_and_resize(windows, self.size, self.interpolation, device)
        if device.type == "cuda":
            read = torch.cuda.current_stream(device).record_event()
            if self._kept is not None:
                self._kept[1].synchronize()
            self._kept = decoded, read
        images = augment(images, files.operations[own])
        return self.finish(Drawn(images, torch.from_numpy(files.erased[own])), device)

    def _decode(self, files: Files, device: torch.device) -> tuple[list[Any], dict[int, UserError]]:
        """The images of a batch, and why there is none at some places."""
        if self._decoder is None:
            self._decoder = make_decoder(device)
        contents = files.content.split(files.lengths.tolist())
        jpeg = files.plans[:, places.JPEG].tolist()
        encoded = [number for number, is_jpeg in enumerate(jpeg) if is_jpeg]
        decoded = self._decoder([contents[number] for number in encoded]) if encoded else []
        images: list[Any] = [None] * len(contents)
        for number, image in zip(encoded, decoded, strict=True):
            images[number] = image
        errors: dict[int, UserError] = {}
        for number, image in enumerate(images):
            if image is None:
                try:
                    images[number] = self._by_pillow(files, number, contents[number], device)
                except UnreadableImageError as error:
                    errors[number] = error
        return images, errors

    def _by_pillow(
        self, files: Files, number: int, content: Tensor, device: torch.device
    ) -> Tensor:
        """An image as stored, not turned."""
        is_jpeg, height, width = files.plans[number, places.JPEG : places.WIDTH + 1].tolist()
        if not is_jpeg:
            return _moved(content.view(height, width, 3), device)
        image = self.read(BytesIO(content.numpy().tobytes()), files.names[number], exif=False)
        return _moved(torch.from_numpy(np.array(image)), device)


def _moved(image: Tensor, device: torch.device) -> Tensor:
    """(3, H, W) on the device, of (H, W, 3) here; never waits for it."""
    return send(image, device).permute(2, 0, 1)


def _windows(images: list[Any], plans: np.ndarray, size: tuple[int, int]) -> Windows:
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
    return Windows(images, turned, boxes, whole, begin, mirrored ^ flipped)
