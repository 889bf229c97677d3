"""Picture files that a GPU decodes in batches: `fastvim predict --decode gpu`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from fastvim.data.gpu.files import Opened, gather, open_jpeg
from fastvim.data.gpu.finish import DecodeAndFinish
from fastvim.data.gpu.loading import Decode, why_not_in_batches, why_pillow
from fastvim.data.gpu.planned import Planned, planned
from fastvim.data.remote import is_url, read_bytes
from fastvim.data.transforms import ImageTransform
from fastvim.errors import UserError
from fastvim.inference.inputs import Arrays, Pictures, Seen
from fastvim.storage import require_file

_logger = logging.getLogger(__name__)

DECODES = get_args(Decode)


class EncodedPictures:
    """Reads JPEG files as they are, with what is to be done to their pixels.

    All other files, and those that a GPU does not decode as Pillow does, are read by Pillow.

    Args:
        pictures: reads pixels, and says what is wrong with a file.
    """

    batch = staticmethod(gather)

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self._steps = planned(pictures.transform)

    def __call__(self, path: str) -> tuple[Opened, Planned]:
        if (content := _jpeg(path)) is not None:
            file = open_jpeg(content, path, self.pictures.reader.max_pixels)
            if file is not None:
                assert self._steps is not None
                return file, self._steps(Planned(file.upright))
        return _whole(self.pictures(path), path)

    def told(self) -> Seen:
        """As of `Read`."""
        return self.pictures.told()


def decoded_in_batches(
    decode: str, read: Pictures | Arrays, transform: ImageTransform | None, device: torch.device
) -> DecodeAndFinish | None:
    """What makes images of the files of `EncodedPictures`; None if Pillow is to decode them.

    Args:
        decode: one of `DECODES`: "auto" takes a GPU where there is one that can.
        read: of single images.
        transform: of pictures, None for arrays.
        device: of the model.

    Raises:
        UserError: "gpu" is asked for what it does not decode.
    """

    def why_not() -> str:
        if isinstance(read, Arrays) or transform is None:
            return "the model takes arrays"
        return why_not_in_batches(transform, read.reader, device)

    if why := why_pillow("decode", decode, device, why_not):
        _logger.warning("Pillow decodes the images, not the GPU: %s", why)
    if why is not None or isinstance(read, Arrays) or transform is None:
        return None
    finish = DecodeAndFinish(transform, read.reader)
    if device.type == "cuda":
        finish.warm_up(device)
    return finish


def _jpeg(path: str) -> bytes | None:
    """The content of a JPEG file; None for others, and where there is none."""
    if is_url(path):
        return read_bytes(path)
    try:
        require_file(Path(path))
        with open(path, "rb") as file:
            begin = file.read(3)
            return begin + file.read() if begin == b"\xff\xd8\xff" else None
    except (OSError, UserError):  # said by who reads it instead
        return None


def _whole(pixels: Tensor, path: str) -> tuple[Opened, Any]:
    """Finished pixels (3, h, w), of which nothing is cut away."""
    size = pixels.shape[2], pixels.shape[1]
    content = pixels.movedim(0, 2).contiguous().view(-1)
    return Opened(content, False, size, 1, path), Planned(size)
