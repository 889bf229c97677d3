"""JPEG files decoded in batches: by nvImageCodec or torchvision on a GPU, by Pillow on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvim.machine import has_triton

# Files, each of uint8 (bytes,) -> uint8 (3, H, W) on the device, or what `crops.locate` finds
# there, or None for one that it cannot.
Decoder = Callable[[Sequence[Tensor]], list[Any]]


def make_decoder(device: torch.device) -> Decoder:
    """What decodes on a device.

    nvImageCodec's pixels are Pillow's within a level. torchvision's differ where colours change
    from pixel to pixel: each colour of a file serves four of them, and is not interpolated there.
    """
    if device.type != "cuda":
        return _by_pillow
    try:
        from nvidia import nvimgcodec
    except ImportError:
        return _ByTorchvision(device)
    return _ByImageCodec(nvimgcodec, device)


def why_not_decoded() -> str:
    """What is missing for decoding on a GPU of this machine; "" if nothing is."""
    if not has_triton() or torch.version.cuda is None:
        return "it takes an NVIDIA GPU and Triton"
    return ""


class _ByImageCodec:
    def __init__(self, library: Any, device: torch.device) -> None:
        self._decoder = library.Decoder(device_id=device.index or 0)
        self._wanted = library.DecodeParams(apply_exif_orientation=False)

    def __call__(self, files: Sequence[Tensor]) -> list[Any]:
        stream = torch.cuda.current_stream().cuda_stream
        values = [file.numpy() for file in files]
        images = self._decoder.decode(values, params=self._wanted, cuda_stream=stream)
        return list(images)


class _ByTorchvision:
    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, files: Sequence[Tensor]) -> list[Tensor | None]:
        from torchvision.io import ImageReadMode, decode_jpeg

        def decode(some: list[Tensor]) -> list[Tensor]:
            return decode_jpeg(some, mode=ImageReadMode.RGB, device=self._device)

        try:
            return list(decode(list(files)))
        except RuntimeError:  # which one it was, it does not tell
            pass
        images: list[Tensor | None] = []
        for file in files:
            try:
                images += decode([file])
            except RuntimeError:
                images.append(None)
        return images


def _by_pillow(files: Sequence[Tensor]) -> list[Tensor | None]:
    images: list[Tensor | None] = []
    for file in files:
        try:
            image = Image.open(BytesIO(file.numpy().tobytes())).convert("RGB")
        except Exception:  # the decoders raise nearly anything on damaged files
            images.append(None)
        else:
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return images
