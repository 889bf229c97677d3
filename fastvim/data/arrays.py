"""Images of any number of channels from NPY, TIFF, OME-TIFF, PNG and JPEG files.

C, H, W: channels, height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from fastvim.data.remote import UnreadableFileError, is_url, read_bytes
from fastvim.errors import UserError
from fastvim.extras import install

# tifffile's letters for an axis of channels: channel, sample, unknown, page.
CHANNEL_AXES = "CSQI"
COLOUR_PNG = (2, 4, 6)  # colour types with several samples a pixel


def read_array(
    url: str,
    *,
    attempts: int = 4,
    wait: float = 0.5,
    storage_options: dict[str, Any] | None = None,
) -> np.ndarray:
    """The image (C, H, W) in a file, of its own integer or floating type.

    An NPY file holds (C, H, W) or (H, W) and never a pickle. The axes of a TIFF file are what
    tifffile finds in it: height, width and at most one of channels, samples or pages.

    Args:
        url: a path or URL ending in a key of `DECODERS`.

    The other arguments are passed to `read_bytes`.

    Raises:
        UnreadableFileError: when the file cannot be fetched or decoded, or holds no such image.
        UserError: for another ending, or when tifffile is not installed.
    """
    path = urlsplit(url).path if is_url(url) else url
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in DECODERS:
        raise UserError(f"{url}: expected a file ending in {', '.join(DECODERS)}")
    data = read_bytes(url, attempts=attempts, wait=wait, storage_options=storage_options)
    try:
        image = DECODERS[suffix](data)
        _check(image)
    except UserError:
        raise
    except Exception as error:  # the decoders raise nearly anything on damaged files
        raise UnreadableFileError(f"{url}: unreadable image ({error})") from error
    return image


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"shape {image.shape}: expected (channels, height, width)")
    if image.dtype.kind not in "buif":
        raise ValueError(f"type {image.dtype}: expected integers or real numbers")
    if image.dtype.kind == "f" and not np.isfinite(image).all():
        raise ValueError("values that are not finite")


def _npy(data: bytes) -> np.ndarray:
    array = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    return array[None] if array.ndim == 2 else array


def _tiff(data: bytes) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f"tifffile is not installed: {install('microscopy')}") from error
    with tifffile.TiffFile(BytesIO(data)) as file:
        # tifffile reads a file cut off after a page. So the last page must say that none follows.
        count, end = len(file.pages), file.pages.next_page_offset
        if data[end : end + file.tiff.offsetsize] != bytes(file.tiff.offsetsize):
            raise ValueError(f"cut off after {count} pages")
        if len(file.series) != 1:
            raise ValueError(f"{len(file.series)} images of different kinds: expected one")
        series = file.series[0]
        axes = series.get_axes(squeeze=False)
        if any(page is None for page in series):  # tifffile would fill them with zeros
            raise ValueError("missing pages")
        array = series.asarray(squeeze=False)
    sizes = dict(zip(axes, array.shape, strict=True))
    kept = [axis for axis in axes if axis in "YX" or sizes[axis] > 1]
    channels = [axis for axis in kept if axis not in "YX"]
    if len(channels) > 1 or not set(channels) <= set(CHANNEL_AXES) or not {*"YX"} <= {*kept}:
        shown = ", ".join(f"{axis} {sizes[axis]}" for axis in axes)
        raise ValueError(f"axes {shown}: expected Y, X and at most one of channels")
    array = array.reshape([sizes[axis] for axis in kept])
    order = [kept.index(axis) for axis in (*channels, "Y", "X")]
    array = array.transpose(order)
    return array if channels else array[None]


def _picture(data: bytes) -> np.ndarray:
    # Pillow would drop 8 of the 16 bits silently. Bytes 24 and 25 are the depth and colour type.
    if data.startswith(b"\x89PNG") and data[24:25] == b"\x10" and data[25] in COLOUR_PNG:
        raise ValueError("16-bit colour PNG, of which Pillow reads 8 bits: expected TIFF or NPY")
    with Image.open(BytesIO(data)) as image:
        image.load()
    if image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


DECODERS: dict[str, Callable[[bytes], np.ndarray]] = {
    ".npy": _npy,
    ".tif": _tiff,
    ".tiff": _tiff,
    ".png": _picture,
    ".jpg": _picture,
    ".jpeg": _picture,
}
