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

from fastvim.data.decoding import DAMAGED, UnreadableImageError, check_size, decode, turn_values
from fastvim.data.pixels import MAX_PIXELS
from fastvim.data.remote import UnreadableFileError, is_url, read_bytes
from fastvim.errors import UserError
from fastvim.extras import install

# tifffile's letters for an axis of channels: channel, sample, unknown, page.
CHANNEL_AXES = "CSQI"
# TIFF's compressions of bytes: none, LZW, deflate (two numbers), PackBits and zstd.
BYTES_ALONE = (1, 5, 8, 32946, 32773, 50000)


def read_array(
    url: str,
    *,
    attempts: int = 4,
    wait: float = 0.5,
    storage_options: dict[str, Any] | None = None,
    max_pixels: int | None = MAX_PIXELS,
) -> np.ndarray:
    """The image (C, H, W) in a file, of its own integer or floating type.

    An NPY file holds (C, H, W) or (H, W) and never a pickle. The axes of a TIFF file are what
    tifffile finds in it: height, width and at most one of channels, samples or pages; images of one
    size that were written one by one are channels. A palette stands for its colours. PNG, JPEG and
    TIFF files are turned as their orientation tag says.

    Args:
        url: a path or URL ending in a key of `DECODERS`.
        max_pixels: of a channel; None for any number.

    The other arguments are passed to `read_bytes`.

    Raises:
        UnreadableFileError: when the file cannot be fetched or decoded, or holds no such image.
        UserError: for another ending, too many pixels, or when tifffile or imagecodecs is not
            installed.
    """
    path = urlsplit(url).path if is_url(url) else url
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in DECODERS:
        raise UserError(f"{url}: expected a file ending in {', '.join(DECODERS)}")
    data = read_bytes(url, attempts=attempts, wait=wait, storage_options=storage_options)
    try:
        image = DECODERS[suffix](data, url, max_pixels)
        _check(image)
        check_size((image.shape[2], image.shape[1]), max_pixels, url)
    except UnreadableImageError as error:
        if error.kind == DAMAGED:
            raise UnreadableFileError(str(error)) from error
        raise
    except UserError:
        raise
    except Exception as error:  # the decoders raise nearly anything on damaged files
        if "'imagecodecs'" in str(error):
            raise UserError(f"{url}: {error}: {install('microscopy')}") from error
        raise UnreadableFileError(f"{url}: unreadable image ({error})") from error
    return image


def _check(image: np.ndarray) -> None:
    if image.ndim != 3 or 0 in image.shape:
        raise ValueError(f"shape {image.shape}: expected (channels, height, width)")
    if image.dtype.kind not in "buif":
        raise ValueError(f"type {image.dtype}: expected integers or real numbers")
    with np.errstate(over="ignore"):
        if image.dtype.kind == "f" and not np.isfinite(image.astype(np.float32)).all():
            raise ValueError("values that are not finite in float32")


def _npy(data: bytes, *unused: object) -> np.ndarray:
    array = np.lib.format.read_array(BytesIO(data), allow_pickle=False)
    return array[None] if array.ndim == 2 else array


def _tiff(data: bytes, url: str, max_pixels: int | None) -> np.ndarray:
    try:
        import tifffile
    except ImportError as error:
        raise UserError(f"tifffile is not installed: {install('microscopy')}") from error
    with tifffile.TiffFile(BytesIO(data)) as file:
        # tifffile reads a file cut off after a page. So the last page must say that none follows.
        count, end = len(file.pages), file.pages.next_page_offset
        if data[end : end + file.tiff.offsetsize] != bytes(file.tiff.offsetsize):
            raise ValueError(f"cut off after {count} pages")
        series = file.series
        alike = {(each.get_axes(squeeze=True), each.shape, each.dtype) for each in series}
        one_by_one = len(alike) == 1 and series[0].ndim == 2 and not file.is_ome
        if len(series) != 1 and not one_by_one:
            raise ValueError(f"{len(series)} images of different kinds: expected one")
        page = series[0].keyframe
        check_size((page.imagewidth, page.imagelength), max_pixels, url)
        image = np.concatenate([_channels(each) for each in series])
        image = _meant(image, page)
        return turn_values(image, page.tags.valueof("Orientation", 1))


def _meant(image: np.ndarray, page: Any) -> np.ndarray:
    """The values of tifffile's image (C, H, W) as PNG files have them: a palette's colours,
    255 for a set bit, 0 for black.
    """
    photometric = page.photometric.name
    if photometric == "PALETTE":
        if len(image) > 1:
            raise ValueError(f"{len(image)} channels of palette colours: expected one")
        return (page.colormap >> 8).astype(np.uint8)[:, image[0]]
    if photometric == "YCBCR" and page.compression in BYTES_ALONE:
        raise ValueError("YCbCr colours without JPEG: expected RGB")
    if photometric == "MINISWHITE" and image.dtype.kind in "bu":
        image = ~image if image.dtype == bool else 2**page.bitspersample - 1 - image
    return image.astype(np.uint8) * 255 if image.dtype == bool else image


def _channels(series: Any) -> np.ndarray:
    """The image (C, H, W) of one of tifffile's series."""
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


def _picture(data: bytes, url: str, max_pixels: int | None) -> np.ndarray:
    known = decode(BytesIO(data), url, max_pixels)
    array = known.values
    if array is None:
        named = {"1": "L", "P": "RGB"}.get(known.image.mode, known.image.mode)
        array = np.asarray(known.image.convert(named))
    return turn_values(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), known.left)


DECODERS: dict[str, Callable[[bytes, str, int | None], np.ndarray]] = {
    ".npy": _npy,
    ".tif": _tiff,
    ".tiff": _tiff,
    ".png": _picture,
    ".jpg": _picture,
    ".jpeg": _picture,
}
