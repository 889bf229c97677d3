"""Headers of JPEG files: whatever is read without Pillow is what Pillow reads."""

from __future__ import annotations

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jpeg_files import broken
from PIL import Image

from fastvim.data.decoding import orientation_of
from fastvim.data.gpu.files import is_plain, open_jpeg
from fastvim.data.gpu.headers import BEGIN, plain_size


def jpeg(mode: str = "RGB", size: tuple[int, int] = (37, 29), **how: Any) -> bytes:
    file = BytesIO()
    values = np.random.default_rng(0).integers(0, 256, (*size[::-1], 4), dtype=np.uint8)
    Image.fromarray(values[..., :3]).convert(mode).save(file, "JPEG", **how)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_segment(content: bytes, marker: int, inside: bytes) -> bytes:
    return (
        content[:2]
        + bytes((0xFF, marker))
        + (len(inside) + 2).to_bytes(2, "big")
        + inside
        + content[2:]
    )


COMMON = {
    **{f"{way}": jpeg(subsampling=way) for way in ("4:4:4", "4:2:2", "4:2:0")},
    "grey": jpeg("L"),
    "optimized": jpeg(optimize=True, quality=30),
    "with a comment": jpeg(comment=b"\xff\xda of any kind"),
    "with restarts": jpeg(restart_marker_blocks=2),
    "with an unknown segment": with_segment(jpeg(), 0xE5, b"something"),
}
OTHER = {
    "upright by EXIF": jpeg(exif=Image.Exif()),
    "turned": jpeg(exif=turned()),
    "turned by XMP": with_segment(
        jpeg(), 0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    ),
    "in print colours": jpeg("CMYK"),
    "progressive": jpeg(progressive=True),
    "stored as RGB": jpeg(keep_rgb=True),
    "of Adobe": with_segment(jpeg(), 0xEE, b"Adobe\0\x64\0\0\0\0\0"),
    "with a profile": jpeg(icc_profile=b"profile"),
    "without tables": broken(jpeg()),
    "with a short JFIF": with_segment(jpeg(), 0xE0, b"JFIF\0"),
    "with a frame of its own": with_segment(jpeg(), 0xC0, jpeg("L")[-30:]),
    "with fill bytes": jpeg()[:2] + b"\xff" + jpeg()[2:],
}


def check(content: bytes) -> bool:
    """Compare an answer with Pillow's; whether there was one."""
    size = plain_size(content)
    if size is not None:
        image = Image.open(BytesIO(content))
        assert is_plain(image)
        assert image.size == size
        assert orientation_of(image) == 1
    return size is not None


@pytest.mark.parametrize("name", COMMON)
def test_common_files_need_no_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check(COMMON[name])
    monkeypatch.delattr(Image, "open")
    opened = open_jpeg(COMMON[name], "file", None)
    assert opened is not None
    assert opened.size == (37, 29)
    assert opened.orientation == 1


@pytest.mark.parametrize("name", OTHER)
def test_others_are_left_to_pillow(name: str) -> None:
    assert not check(OTHER[name]) or name == "without tables"


def test_files_that_end_early() -> None:
    content = COMMON["4:2:0"]
    scan = content.index(b"\xff\xda")
    for end in range(2, scan + 20):
        check(content[:end])
    assert plain_size(content[:scan]) is None


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from([*COMMON, *OTHER]),
    changes=st.lists(st.tuples(st.integers(2, 700), st.integers(0, 255)), max_size=4),
    gone=st.tuples(st.integers(2, 700), st.integers(0, 3)),
)
@example(name="4:2:0", changes=[], gone=(2, 0))
def test_damaged_files(name: str, changes: list[tuple[int, int]], gone: tuple[int, int]) -> None:
    content = bytearray({**COMMON, **OTHER}[name])
    for place, value in changes:
        content[place % len(content)] = value
    del content[gone[0] : sum(gone)]
    if content.startswith(BEGIN):
        check(bytes(content))
