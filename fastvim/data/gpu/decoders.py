"""JPEG files decoded in batches: by nvJPEG on a GPU, by Pillow on a CPU.

B: files of a batch; H, W: height and width of an image as stored
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastvim.errors import MachineError
from fastvim.extras import install
from fastvim.machine import has_triton

_logger = logging.getLogger(__name__)

# Of nvjpeg.h.
HARDWARE, ANY_BACKEND = 3, 0
POOLS, INTERPOLATED = 1 << 1, 1 << 5
RGB_INTERLEAVED = 5
ARCHITECTURE_MISMATCH = 7  # a GPU without decoders of its own
DESTINATION = np.dtype([("channel", np.uint64, 4), ("pitch", np.uint64, 4)])


class Encoded(NamedTuple):
    """JPEG files, and where their pixels go.

    Attributes:
        content: uint8, with the files somewhere in it, on the CPU.
        begins: int64 (B,), of each file in it.
        lengths: int64 (B,), bytes of each.
        pixels: uint8, on the device, with room for each image, (H, W, 3).
        places: int64 (B,), the begin of each image in it.
        sizes: int64 (B, 2), height and width of each as its header says.
    """

    content: Tensor
    begins: np.ndarray
    lengths: np.ndarray
    pixels: Tensor
    places: np.ndarray
    sizes: np.ndarray

    def only(self, numbers: np.ndarray | list[int]) -> Encoded:
        """Some of the files."""
        return Encoded(
            self.content,
            self.begins[numbers],
            self.lengths[numbers],
            self.pixels,
            self.places[numbers],
            self.sizes[numbers],
        )


# Decodes files; the numbers of those that it cannot.
Decoder = Callable[[Encoded], list[int]]


def make_decoder(device: torch.device) -> Decoder:
    """What decodes on a device: pixels within a level of Pillow's, as a rule equal to them."""
    if device.type == "cuda":
        return _OnGPU()
    _logger.warning("there is no GPU to decode on: Pillow decodes in one process, not in several")
    return _by_pillow


def why_not_decoded() -> str:
    """What is missing for decoding on a GPU; "" if nothing is."""
    if torch.version.cuda is None or not has_triton():
        return "it takes an NVIDIA GPU and Triton"
    try:
        _library()
    except OSError:
        return f"decoding on a GPU {install('gpu')}"
    return ""


class _OnGPU:
    """Decodes on torch's current stream, without waiting for it.

    nvJPEG is called for a whole batch at once: Python's lock is given away and taken back once, not
    for each file. Files and `pixels` are the caller's to keep until the stream has come that far.
    """

    def __init__(self) -> None:
        self._library, self._handle = _library(), ctypes.c_void_p()
        arguments = None, None, POOLS | INTERPOLATED, ctypes.byref(self._handle)
        status = self._library.nvjpegCreateEx(HARDWARE, *arguments)
        if status == ARCHITECTURE_MISMATCH:
            status = self._library.nvjpegCreateEx(ANY_BACKEND, *arguments)
        if status:
            raise MachineError(f"nvJPEG does not start (status {status}): let the CPU decode")
        self._state: ctypes.c_void_p | None = None
        self._size = 0  # of the batches that the state is for

    def __call__(self, files: Encoded) -> list[int]:
        count = len(files.lengths)
        if self._decode(files):
            return []
        return [n for n in range(count) if count == 1 or not self._decode(files.only([n]))]

    def _decode(self, files: Encoded) -> bool:
        """Decode all of them; whether there was none that nvJPEG refused."""
        begins = (files.begins + files.content.data_ptr()).astype(np.uint64)
        lengths = files.lengths.astype(np.uint64)
        wanted = np.zeros(len(lengths), DESTINATION)
        wanted["channel"][:, 0] = files.places + files.pixels.data_ptr()
        wanted["pitch"][:, 0] = files.sizes[:, 1] * 3
        if not self._ready(len(lengths)):
            return False
        status = self._library.nvjpegDecodeBatched(
            *(self._handle, self._state),
            *(each.ctypes.data_as(ctypes.c_void_p) for each in (begins, lengths, wanted)),
            ctypes.c_void_p(torch.cuda.current_stream(files.pixels.device).cuda_stream),
        )
        if status:  # what the state is then, nobody says
            self._library.nvjpegJpegStateDestroy(self._state)
            self._state = None
        return status == 0

    def _ready(self, size: int) -> bool:
        """Prepare the state for batches of a size."""
        if self._state is None:
            self._state, self._size = ctypes.c_void_p(), 0
            if self._library.nvjpegJpegStateCreate(self._handle, ctypes.byref(self._state)):
                self._state = None
                return False
        if self._size != size:
            initialize = self._library.nvjpegDecodeBatchedInitialize
            self._size = (
                0 if initialize(self._handle, self._state, size, 1, RGB_INTERLEAVED) else size
            )
        return self._size == size


def _library() -> ctypes.CDLL:
    """nvJPEG for the CUDA of this torch: of its package, or where the system finds it.

    Raises:
        OSError: it is not there.
    """
    name = f"libnvjpeg.so.{(torch.version.cuda or '0').partition('.')[0]}"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob(f"*/lib/{name}")):
            return ctypes.CDLL(str(file))
    return ctypes.CDLL(name)


def _by_pillow(files: Encoded) -> list[int]:
    content, pixels = files.content.numpy(), files.pixels.numpy()
    failed = []
    for number, (begin, length) in enumerate(zip(files.begins, files.lengths, strict=True)):
        try:
            file = BytesIO(content[begin : begin + length].tobytes())
            image = np.asarray(Image.open(file).convert("RGB")).ravel()
        except Exception:  # the decoders raise nearly anything on damaged files
            failed.append(number)
        else:
            place = files.places[number]
            pixels[place : place + len(image)] = image
    return failed
