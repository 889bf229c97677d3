"""JPEG files decoded in batches: by nvImageCodec on a GPU, by Pillow on a CPU."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvim.extras import install
from fastvim.machine import has_triton

_logger = logging.getLogger(__name__)

# Files, each of uint8 (bytes,) -> uint8 (3, H, W) on the device, or what `crops.locate` finds
# there, or None for one that it cannot.
Decoder = Callable[[Sequence[Tensor]], list[Any]]


def make_decoder(device: torch.device) -> Decoder:
    """What decodes on a device: pixels within a level of Pillow's, as a rule equal to them."""
    if device.type == "cuda":
        return _OnGPU(device)
    _logger.warning("there is no GPU to decode on: Pillow decodes in one process, not in several")
    return _by_pillow


def why_not_decoded() -> str:
    """What is missing for decoding on a GPU; "" if nothing is."""
    if torch.version.cuda is None or not has_triton():
        return "it takes an NVIDIA GPU and Triton"
    try:
        found = importlib.util.find_spec("nvidia.nvimgcodec") is not None
    except ModuleNotFoundError:
        found = False
    return "" if found else f"decoding on a GPU {install('gpu')}"


class _OnGPU:
    """Decodes on torch's current stream.

    Not by torchvision: it does not interpolate colours, of which most files hold a quarter.
    """

    def __init__(self, device: torch.device) -> None:
        # What is said of formats that are not wanted here.
        os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")
        with _silent():
            from nvidia import nvimgcodec

            self._decoder = nvimgcodec.Decoder(device_id=device.index or 0)
        self._wanted = nvimgcodec.DecodeParams(apply_exif_orientation=False)

    def __call__(self, files: Sequence[Tensor]) -> list[Any]:
        stream = torch.cuda.current_stream().cuda_stream
        values = [file.numpy() for file in files]
        return list(self._decoder.decode(values, params=self._wanted, cuda_stream=stream))


@contextmanager
def _silent() -> Iterator[None]:
    """Without what libraries in C write to standard error."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _by_pillow(files: Sequence[Tensor]) -> list[Any]:
    images: list[Tensor | None] = []
    for file in files:
        try:
            image = Image.open(BytesIO(file.numpy().tobytes())).convert("RGB")
        except Exception:  # the decoders raise nearly anything on damaged files
            images.append(None)
        else:
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
    return images
