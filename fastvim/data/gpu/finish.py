"""Batches of files made into batches of normalised images, on the device that takes them."""

from __future__ import annotations

import logging
from io import BytesIO

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
        self._kept: list[Tensor] = []  # decoded images that a GPU may still read

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
        plans = files.plans[own]
        images = crop_and_resize(_windows(decoded, plans), self.size, self.interpolation)
        self._kept = decoded
        images = augment(images, files.operations[own])
        return self.finish(Drawn(images, files.erased[own]), device), own

    def _decode(self, files: Files, device: torch.device) -> tuple[list[Tensor], list[int]]:
        """The images of a batch, and the place in it that each has."""
        if self._decoder is None:
            self._decoder = make_decoder(device)
        contents = files.content.split(files.lengths.tolist())
        jpeg = files.plans[:, places.JPEG].tolist()
        encoded = [content for content, is_jpeg in zip(contents, jpeg, strict=True) if is_jpeg]
        of_files = iter(self._decoder(encoded) if encoded else [])
        found: list[Tensor | None] = []
        for number, content in enumerate(contents):
            if jpeg[number]:
                image = next(of_files)
                found.append(self._by_pillow(files, number, device) if image is None else image)
            else:
                height, width = files.plans[number, places.HEIGHT : places.WIDTH + 1].tolist()
                found.append(content.view(height, width, 3).permute(2, 0, 1).to(device))
        own = [number for number, image in enumerate(found) if image is not None]
        if not own:
            raise UnreadableImageError(f"{files.names[0]}: no image of its batch can be read")
        following = [
            min((place for place in own if place >= n), default=own[0]) for n in range(len(found))
        ]
        return [found[place] for place in following], following  # type: ignore[misc]

    def _by_pillow(self, files: Files, number: int, device: torch.device) -> Tensor | None:
        """An image as stored, not turned; None with a warning if it cannot be read."""
        content = files.content.split(files.lengths.tolist())[number]
        try:
            image = self.read(BytesIO(content.numpy().tobytes()), files.names[number], exif=False)
        except UnreadableImageError as error:
            _logger.warning("%s; the next one of its batch takes its place", error)
            return None
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(device)


def _windows(images: list[Tensor], plans: Tensor) -> Windows:
    """The crops in images as they are decoded, which may lie on their sides."""
    rows = []
    for image, plan in zip(images, plans.tolist(), strict=True):
        _, _, _, orientation, left, top, right, bottom, across, down = plan
        if orientation > 4:
            image = image.mT
        if orientation in (3, 4, 7, 8):
            top, bottom, down = image.shape[1] - bottom, image.shape[1] - top, not down
        if orientation in (2, 3, 6, 7):
            left, right, across = image.shape[2] - right, image.shape[2] - left, not across
        sides = (top, left, bottom - top, right - left)
        rows.append((image, *sides, bool(down), bool(across)))
    return Windows(*map(list, zip(*rows, strict=True)))
