"""Pictures that a GPU finishes in batches, and with `fastvim predict --decode gpu` decodes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import get_args

import torch

from fastvim.data.gpu.files import Opened, Pixels, gather, open_jpeg
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.headers import BEGIN
from fastvim.data.gpu.loading import Decode, resized_there, why_not_in_batches, why_pillow
from fastvim.data.gpu.planned import Planned, planned
from fastvim.data.remote import is_url, read_bytes
from fastvim.data.transforms import ImageTransform
from fastvim.errors import UserError
from fastvim.inference.inputs import Arrays, Pictures, Seen
from fastvim.storage import require_file

_logger = logging.getLogger(__name__)

DECODES = get_args(Decode)


class EncodedPictures:
    """Reads pictures for a GPU, with what is to be done to their pixels.

    Those are JPEG files as they are, or pixels: of all other files, and of those that a GPU does
    not decode as Pillow does.

    Args:
        pictures: reads pixels, and says what is wrong with a file.
        files: read JPEG files as they are; False has Pillow decode them.
    """

    batch = staticmethod(gather)

    def __init__(self, pictures: Pictures, files: bool) -> None:
        self.pictures = Pictures(pictures.reader, Pixels(pictures.transform), pictures.exif)
        self._steps = planned(pictures.transform) if files else None

    def __call__(self, path: str) -> tuple[Opened, Planned]:
        if self._steps is not None and (content := _jpeg(path)) is not None:
            file = open_jpeg(content, path, self.pictures.reader.max_pixels)
            if file is not None:
                return file, self._steps(Planned(file.upright))
        return self.pictures(path)

    def told(self) -> Seen:
        """As of `Read`."""
        return self.pictures.told()


def read_for_gpu(
    decode: str,
    read: Pictures | Arrays,
    transform: ImageTransform | None,
    device: torch.device,
    batch_size: int,
) -> tuple[EncodedPictures, DecodeAndFinish] | None:
    """What reads pictures for a GPU, and makes images of them there; None if Pillow does it all.

    Args:
        decode: one of `DECODES`: "auto" takes a GPU where there is one that can. With "cpu" it
            does what follows, where the pixels are Pillow's own.
        read: of single images.
        transform: of pictures, None for arrays.
        device: of the model.
        batch_size: images at a time.

    Raises:
        UserError: "gpu" is asked for what it does not decode.
    """

    def why_not() -> str:
        if isinstance(read, Arrays) or transform is None:
            return "the model takes arrays"
        return why_not_in_batches(transform, read.reader, device)

    if why := why_pillow("decode", decode, device, why_not):
        _logger.warning("Pillow decodes the images, not the GPU: %s", why)
    if isinstance(read, Arrays) or transform is None:
        return None
    files = why is None
    if not files and not resized_there(transform, read.reader, device, batch_size):
        return None
    finish = DecodeAndFinish(transform, read.reader)
    if device.type == "cuda":
        finish.warm_up(device, decoder=files)
    return EncodedPictures(read, files), finish


def _jpeg(path: str) -> bytes | None:
    """The content of a JPEG file; None for others, and where there is none."""
    if is_url(path):
        return read_bytes(path)
    try:
        require_file(Path(path))
        with open(path, "rb") as file:
            begin = file.read(3)
            return begin + file.read() if begin == BEGIN else None
    except (OSError, UserError):  # said by who reads it instead
        return None
