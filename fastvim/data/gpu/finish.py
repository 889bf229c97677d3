"""Batches of files made into batches of normalised images, on the device that takes them."""

from __future__ import annotations

import logging
from io import BytesIO
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvim.data.decoding import UnreadableImageError
from fastvim.data.finishing import CPU, Drawn, Finish
from fastvim.data.gpu import files as places
from fastvim.data.gpu.augment import augment
from fastvim.data.gpu.crops import Windows, crop_and_resize
from fastvim.data.gpu.decoders import Decoder, make_decoder
from fastvim.data.gpu.files import Files
from fastvim.data.gpu.planned import NOTHING, NUMBERS
from fastvim.data.gpu.sending import send
from fastvim.data.pixels import PictureReader

_logger = logging.getLogger(__name__)


class DecodeAndFinish:
    """Decodes, crops, augments, normalises and erases a batch.

    A file that the device's decoder refuses is read by Pillow. Where that cannot read it either,
    the next image of the batch takes its place, with a warning.

    Args:
        finish: normalises and erases.
        read: files, as Pillow does.
        size: height and width of the images.
        interpolation: of the crops.
    """

    def __init__(
        self, finish: Finish, read: PictureReader, size: tuple[int, int], interpolation: str
    ) -> None:
        self.finish, self.read = finish, read
        self.size, self.interpolation = size, interpolation
        self._decoder: Decoder | None = None
        # Decoded images, whose memory is not torch's, until the GPU has read them.
        self._kept: tuple[list[Any], torch.cuda.Event] | None = None

    def __call__(self, files: Files, device: torch.device = CPU) -> tuple[Tensor, list[int]]:
        """Normalised images.

        Args:
            files: of a batch.
            device: of the result.

        Returns:
            float32 (B, 3, h, w), and for each the place in the batch whose image it is.

        Raises:
            UnreadableImageError: no file of the batch can be read.
        """
        decoded, own = self._decode(files, device)
        windows = _windows(decoded, files.plans[own])
        images = crop_and_resize(windows, self.size, self.interpolation, device)
        if device.type == "cuda":
            read = torch.cuda.current_stream(device).record_event()
            if self._kept is not None:
                self._kept[1].synchronize()
            self._kept = decoded, read
        images = augment(images, files.operations[own])
        erased = torch.from_numpy(files.erased[own])
        return self.finish(Drawn(images, erased), device), own

    def warm_up(self, device: torch.device) -> None:
        """Load decoder and kernels of a GPU, which one thread of a process can do at a time."""
        self._decoder = self._decoder or make_decoder(device)
        image = torch.zeros(3, 8, 8, dtype=torch.uint8, device=device)
        still = np.zeros((1, 2), dtype=bool)
        window = Windows([image], still[0, :1], np.array([[0, 0, 8, 8]]), still)
        images = crop_and_resize(window, self.size, self.interpolation, device)
        augment(images, np.full((1, 1, NUMBERS), float(NOTHING)))
        self.finish.warm_up(device)

    def _decode(self, files: Files, device: torch.device) -> tuple[list[Any], list[int]]:
        """The images of a batch, and the place in it that each has."""
        if self._decoder is None:
            self._decoder = make_decoder(device)
        contents = files.content.split(files.lengths.tolist())
        jpeg = files.plans[:, places.JPEG].tolist()
        encoded = [number for number, is_jpeg in enumerate(jpeg) if is_jpeg]
        decoded = self._decoder([contents[number] for number in encoded]) if encoded else []
        images: list[Any] = [None] * len(contents)
        for number, image in zip(encoded, decoded, strict=True):
            images[number] = image
        own = list(range(len(images)))  # the place of each image
        for number, image in enumerate(images):
            if image is None:
                images[number] = self._by_pillow(files, number, contents[number], device)
        readable = [number for number in own if images[number] is not None]
        if not readable:
            raise UnreadableImageError(f"{files.names[0]}: no image of its batch can be read")
        if len(readable) < len(own):
            own = [next(i for i in (*own[n:], *own) if images[i] is not None) for n in own]
        return [images[number] for number in own], own

    def _by_pillow(
        self, files: Files, number: int, content: Tensor, device: torch.device
    ) -> Tensor | None:
        """An image as stored, not turned; None with a warning if it cannot be read."""
        is_jpeg, height, width = files.plans[number, places.JPEG : places.WIDTH + 1].tolist()
        if not is_jpeg:
            return _moved(content.view(height, width, 3), device)
        try:
            image = self.read(BytesIO(content.numpy().tobytes()), files.names[number], exif=False)
        except UnreadableImageError as error:
            _logger.warning("%s; the next one of its batch takes its place", error)
            return None
        return _moved(torch.from_numpy(np.array(image)), device)


def _moved(image: Tensor, device: torch.device) -> Tensor:
    """(3, H, W) on the device, of (H, W, 3) here; never waits for it."""
    return send(image, device).permute(2, 0, 1)


def _windows(images: list[Any], plans: np.ndarray) -> Windows:
    """The crops in images as they are decoded, which may lie on their sides."""
    _, high, wide, orientation, left, top, right, bottom, across, down = plans.T
    turned = orientation > 4
    high, wide = np.where(turned, (wide, high), (high, wide))
    mirrored = np.isin(orientation, (3, 4, 7, 8)), np.isin(orientation, (2, 3, 6, 7))
    begin = np.where(mirrored[0], high - bottom, top), np.where(mirrored[1], wide - right, left)
    boxes = np.stack((*begin, bottom - top, right - left), 1)
    both = np.stack((mirrored[0] ^ (down > 0), mirrored[1] ^ (across > 0)), 1)
    return Windows(images, turned, boxes, both)
