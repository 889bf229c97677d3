"""`PictureReader`: what stored values mean, which way is up, how large an image may be."""

from __future__ import annotations

import pickle
from pathlib import Path
from struct import pack
from zlib import compress, crc32

import numpy as np
import pytest
from PIL import Image

from fastvim.data.checks import check_data
from fastvim.data.images import ImageData
from fastvim.data.pixels import (
    DAMAGED,
    TOO_LARGE,
    UNKNOWN_VALUES,
    Brightest,
    PictureReader,
    UnreadableImageError,
)
from fastvim.data.pixels import stored as stored_as
from fastvim.data.transforms import to_mode
from fastvim.errors import UserError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "picture"


def pixels(path: Path, mode: str = "L", **options: object) -> np.ndarray:
    return np.asarray(PictureReader(mode, **options)(path))


def saved(path: Path, values: np.ndarray, kind: str = "TIFF", **options: object) -> Path:
    Image.fromarray(values).save(path, kind, **options)
    return path


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bits_are_the_8_bit_image(path, kind, mode):
    saved(path, GREY.astype(np.uint16) * 257, kind)
    expected = GREY if mode == "L" else np.repeat(GREY[..., None], 3, axis=2)
    np.testing.assert_array_equal(pixels(path, mode), expected)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_of_either_byte_order(path, order, compression):
    saved(path, (GREY.astype(np.uint16) * 257).astype(order), compression=compression)
    np.testing.assert_array_equal(pixels(path), GREY)


def test_16_bits_with_white_as_0(path):
    saved(path, 65535 - GREY.astype(np.uint16) * 257, tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
    np.testing.assert_array_equal(pixels(path), GREY)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_a_range_says_what_is_black_and_white(path, dtype):
    values = GREY.astype(dtype) * 10 + 100
    saved(path, values)
    np.testing.assert_array_equal(pixels(path, value_range=(100, 2650)), GREY)
    clipped = np.clip((values - 600.0) * 255 / 1000, 0, 255)
    found = pixels(path, value_range=(600, 1600))
    assert np.abs(found - clipped).max() <= 0.5 + 1e-4  # rounding
    assert {0, 255} <= set(found.ravel())


def test_floats_within_0_to_1(path):
    saved(path, GREY.astype(np.float32) / 255)
    np.testing.assert_array_equal(pixels(path), GREY)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (GREY.astype(np.int32), "int32 values 0 to 235; expected value_range"),
        (GREY.astype(np.float32), "float32 values 0 to 235; expected value_range"),
        (GREY.astype(np.float32) / 255 - 0.5, "float32 values -0.5 to .*; expected value_range"),
        (np.full((4, 4), np.nan, np.float32), "not finite"),
        (np.full((4, 4), np.inf, np.float32), "not finite"),
    ],
)
def test_values_of_unknown_meaning_are_refused(path, values, told):
    saved(path, values)
    with pytest.raises(UnreadableImageError, match=f"picture: .*{told}") as caught:
        pixels(path)
    assert caught.value.kind == UNKNOWN_VALUES
    if np.isnan(values).any():  # no range helps
        with pytest.raises(UnreadableImageError, match="not finite"):
            pixels(path, value_range=(0, 1))


def test_8_bits_and_a_range(path):
    saved(path, GREY, "PNG")
    for beyond in ((0, 4095), (0.0, 1.0)):  # of 16 bits, of floating point
        np.testing.assert_array_equal(pixels(path, value_range=beyond), GREY)
    expected = np.rint(np.clip(GREY / 100, 0, 1) * 255)
    np.testing.assert_array_equal(pixels(path, value_range=(0, 100)), expected)
    assert (pixels(path, "RGB", value_range=(0, 100)) == expected[..., None]).all()


def image_of(mode: str) -> Image.Image:
    """Red on the left, green on the right, in any mode that files have."""
    image = Image.new("RGB", (8, 4), (200, 60, 60))
    image.paste((60, 180, 90), (4, 0, 8, 4))
    if mode == "P":
        return image.quantize(2)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("P", "PNG"), ("P", "TIFF"), ("P", "GIF"), ("CMYK", "TIFF"), ("LAB", "TIFF"), ("RGBA", "PNG")],
)
def test_colours_of_any_mode(path, mode, kind):
    image_of(mode).save(path, kind)
    found = PictureReader()(path)
    assert (found.mode, stored_as(found).mode) == ("RGB", mode)
    error = np.abs(np.asarray(found).astype(int) - np.asarray(image_of("RGB")))
    assert error.max() <= 4  # LAB is rounded to 8 bits
    grey = np.asarray(image_of("RGB").convert("L")).astype(int)
    assert np.abs(pixels(path) - grey).max() <= 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [0, b"\x00\x80"])
def test_a_palette_with_transparency(path, transparency):
    image_of("P").save(path, "PNG", transparency=transparency)
    np.testing.assert_array_equal(pixels(path, "RGB"), np.asarray(image_of("P").convert("RGB")))


def test_one_bit_and_grey_with_alpha(path):
    bits = Image.fromarray(GREY > 100)
    bits.save(path, "PNG")
    np.testing.assert_array_equal(pixels(path), (GREY > 100) * 255)
    both = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(255 - GREY)))
    both.save(path, "PNG")
    assert (pixels(path, "RGB") == GREY[..., None]).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_exif_orientation(path, kind, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.asarray(Image.fromarray(GREY).convert(mode))
    saved(path, values, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    quarter = {5: values.swapaxes(0, 1), 6: np.rot90(values, 3), 8: np.rot90(values)}
    quarter[7] = np.rot90(values, 2).swapaxes(0, 1)
    upright = {1: values, 2: values[:, ::-1], 3: np.rot90(values, 2), 4: values[::-1], **quarter}
    found = PictureReader(mode)(path)
    np.testing.assert_array_equal(np.asarray(found), upright[orientation])
    assert stored_as(found)[1:3] == ((8, 6), orientation)
    again = PictureReader(mode).convert(found, "")  # is turned once
    np.testing.assert_array_equal(np.asarray(again), upright[orientation])
    left = PictureReader(mode)(path, exif=False)
    np.testing.assert_array_equal(np.asarray(left), values)
    if kind != "TIFF":  # which Pillow turns when it opens it
        with Image.open(path) as image:
            image.load()
        turned = PictureReader(mode).convert(image, "")
        np.testing.assert_array_equal(np.asarray(turned), upright[orientation])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_turn_nothing(path):
    saved(path, GREY, "JPEG", exif=b"Exif\0\0II*\0 and no more", quality=100, subsampling=0)
    assert np.abs(pixels(path).astype(int) - GREY).max() < 8


def test_indices_are_read_as_stored(path):
    index = image_of("P")
    index.save(path, "PNG")
    read = PictureReader(None, value_range=(0, 4095))
    np.testing.assert_array_equal(np.asarray(read(path)), np.asarray(index))
    saved(path, GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(np.asarray(read(path)), GREY.astype(np.uint16) * 257)


@pytest.mark.filterwarnings("error")
def test_the_limit_of_the_size_is_ours(path, monkeypatch):
    saved(path, GREY, "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # less than half of the image's 48
    with pytest.raises(
        UnreadableImageError, match="8x6 = 48 pixels; expected at most max_pixels 47"
    ) as e:
        pixels(path, max_pixels=47)
    assert e.value.kind == TOO_LARGE
    for limit in (48, None):
        np.testing.assert_array_equal(pixels(path, max_pixels=limit), GREY)
    assert Image.MAX_IMAGE_PIXELS == 20


def test_what_is_no_image(path):
    path.write_text("not an image")
    with pytest.raises(UnreadableImageError, match=r"picture: unreadable image .of no format that"):
        pixels(path)
    saved(path, GREY, "PNG")
    path.write_bytes(path.read_bytes()[:45])
    with pytest.raises(UnreadableImageError, match="picture: unreadable image"):
        pixels(path)
    with pytest.raises(UnreadableImageError, match="none: no such file"):
        pixels(path.with_name("none"))


def test_open_files_and_pickles(path):
    saved(path, GREY, "PNG")
    reader = pickle.loads(pickle.dumps(PictureReader("L", (0, 100), None)))
    with path.open("rb") as file:
        np.testing.assert_array_equal(np.asarray(reader(file, "a.png")), np.asarray(reader(path)))


@pytest.mark.parametrize("value_range", [(1, 1), (5, 2), (0, float("inf")), (float("nan"), 1)])
def test_ranges_that_are_none(value_range):
    with pytest.raises(UserError, match=r"value_range .*: expected two numbers, the lower first"):
        PictureReader(value_range=value_range)


def test_max_pixels_out_of_range():
    with pytest.raises(UserError, match="max_pixels 0: expected 1 or more"):
        PictureReader(max_pixels=0)


def brightest(*values: np.ndarray, path: Path, whole: bool = True, **options: object) -> str:
    found = Brightest(whole)
    for each in values:
        found.add(PictureReader("L", **options)(saved(path, each)))
    return found.warning()


def test_images_that_use_little_of_their_range(path):
    dark, bright = GREY.astype(np.uint16) * 16, GREY.astype(np.uint16) * 257
    told = brightest(dark, dark, path=path)
    assert told.startswith("the highest value is 3760, less than a quarter of 65535")
    assert told.endswith("--data.value_range [0,4095] would tell what is black and white")
    assert not brightest(dark, bright, path=path)
    assert not brightest(dark, path=path, value_range=(0, 4095))
    assert not brightest(path=path)
    assert not brightest(0 * dark, path=path)  # all black
    assert brightest(GREY // 5, path=path).count("--data.value_range [0,63]")
    assert not brightest(GREY // 5, path=path, whole=False)
    assert not brightest(GREY // 5, GREY, path=path)
    assert not brightest(dark, GREY, path=path)


def test_values_are_looked_at_only_where_they_count(path, monkeypatch):
    looked = []
    monkeypatch.setattr(Image.Image, "getextrema", lambda image: looked.append(image) or (0, 9))
    brightest(GREY, GREY, path=path, whole=False)
    assert not looked
    assert brightest(GREY, GREY, path=path)
    assert len(looked) == 2


def deep_png(values: np.ndarray) -> bytes:
    """A PNG file of 16-bit values (H, W, C), whose rows take the five filters in turn."""
    height, width, channels = values.shape
    rows = np.zeros((height + 1, (width + 1) * 2 * channels), np.uint8)
    step, out = 2 * channels, b""
    rows[1:, step:] = np.frombuffer(values.astype(">u2").tobytes(), np.uint8).reshape(height, -1)
    for y in range(1, height + 1):
        line, left = rows[y, step:].astype(int), rows[y, :-step].astype(int)
        up, corner = rows[y - 1, step:].astype(int), rows[y - 1, :-step].astype(int)
        near = np.abs(left + up - corner - np.array((left, up, corner))).argmin(axis=0)
        paeth = np.choose(near, (left, up, corner))
        guess = (0 * line, left, up, (left + up) // 2, paeth)[y % 5]
        out += bytes([y % 5]) + ((line - guess) % 256).astype(np.uint8).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    colours = {2: 4, 3: 2, 4: 6}[channels]
    header = pack(">IIBBBBB", width, height, 16, colours, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", compress(out)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bit_colours_of_png_files(path, channels):
    values = np.random.default_rng(0).integers(0, 4096, (13, 7, channels)).astype(np.uint16)
    path.write_bytes(deep_png(values))
    shown = values[..., : 1 if channels == 2 else 3]
    found = PictureReader("RGB", value_range=(0, 4095))(path)
    assert np.abs(np.asarray(found) - shown * (255 / 4095)).max() < 0.501  # rounding
    with path.open("rb") as file:
        dark = PictureReader()(file)
    assert (np.asarray(dark) == np.rint(shown / 257)).all()
    assert stored_as(dark)[3:5] == (shown.max(), 65535)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize(
    "settings", [{}, {"compression": "zlib"}, {"tile": (16, 16)}, {"rowsperstrip": 4}]
)
def test_16_bit_colours_of_tiff_files(path, order, settings):
    tifffile = pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 4096, (13, 7, 3)).astype(np.uint16)
    tifffile.imwrite(path, values, photometric="rgb", byteorder=order, **settings)
    found = PictureReader("RGB", value_range=(0, 4095))(path)
    np.testing.assert_array_equal(np.asarray(found), np.rint(values * (255 / 4095)))


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_kinds_of_tiff_that_are_refused_by_name(path, compression):
    tifffile = pytest.importorskip("tifffile")

    def told(values: np.ndarray, **options: object) -> str:
        tifffile.imwrite(path, values, compression=compression, **options)
        with pytest.raises(UnreadableImageError) as caught:
            pixels(path)
        assert caught.value.kind == UNKNOWN_VALUES
        return str(caught.value)

    planes = GREY.astype(np.uint16)[None].repeat(3, axis=0)
    assert "in separate planes" in told(planes, photometric="rgb", planarconfig="separate")
    assert "a TIFF image of shape (6, 8) and type float64" in told(GREY.astype(np.float64))
    assert "values 0 to 235; expected value_range" in told(GREY.astype(np.int16))
    assert "int8 values 0 to 47" in told((GREY // 5).astype(np.int8))
    high = GREY.astype(np.uint32) << 24
    assert f"uint32 values 0 to {high.max():g}" in told(high)
    np.testing.assert_array_equal(pixels(path, value_range=(0, 255 << 24)), GREY)


@pytest.mark.parametrize(
    ("layout", "big"), [("contig", False), ("contig", True), ("separate", False)]
)
def test_arrays_that_are_no_pictures_are_described(path, layout, big):
    """Sound files of another shape are not called damaged; files that are cut off are."""
    tifffile = pytest.importorskip("tifffile")
    planes = layout == "separate"
    values = np.zeros((5, 6, 8) if planes else (6, 8, 5), dtype=np.uint16)
    options = {"photometric": "minisblack", "planarconfig": layout}
    tifffile.imwrite(path, values, bigtiff=big, **options)
    with pytest.raises(UnreadableImageError) as caught:
        pixels(path)
    words = "type uint16 in separate planes;" if planes else "type uint16;"
    assert f"a TIFF image of shape (6, 8, 5) and {words} expected a picture" in str(caught.value)
    for version in ((1, 0), (2, 0)):
        with open(path, "wb") as file:
            np.lib.format.write_array(file, np.zeros((6, 8, 2)), version)
        with pytest.raises(UnreadableImageError) as caught:
            pixels(path)
        assert "an NPY array of shape (6, 8, 2) and type float64; expected a picture" in str(
            caught.value
        )
        assert caught.value.kind == UNKNOWN_VALUES
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(UnreadableImageError) as caught:
            pixels(path)
        assert caught.value.kind == DAMAGED


@pytest.mark.parametrize("value_range", [None, (0, 4080)])
def test_images_that_other_readers_decode(path, value_range):
    """Those of torchvision and timm's streams come as Pillow's images."""
    convert = pickle.loads(pickle.dumps(to_mode(3, value_range)))
    exif = Image.Exif()
    exif[0x0112] = 6
    saved(path, GREY.astype(np.uint16) * (257 if value_range is None else 16), "PNG", exif=exif)
    with Image.open(path) as image:
        image.load()
    found = np.asarray(convert(image))
    np.testing.assert_array_equal(found, np.rot90(GREY, 3)[..., None].repeat(3, axis=2))


@pytest.mark.parametrize(("value_range", "told"), [((0, 4095), True), ((0, 250), False)])
def test_a_range_that_no_image_needs(tmp_path, value_range, told):
    for name in ("train/ant/0.png", "train/bee/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        saved(tmp_path / name, GREY + np.uint8(len(name)), "PNG")
    data = ImageData(str(tmp_path), value_range=value_range)
    (report,) = check_data(data, ["train"])
    assert any("value_range that no image needs" in kind for kind in report.warnings) == told
    saved(tmp_path / "train/ant/1.png", GREY.astype(np.uint16) * 16, "PNG")
    (report,) = check_data(ImageData(str(tmp_path), value_range=value_range), ["train"])
    assert not any("value_range" in kind for kind in report.warnings)


def test_a_file_of_several_images_is_said(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            first, *others = (
                Image.fromarray(np.roll(GREY, shift)).convert("RGB") for shift in range(3)
            )
            first.save(tmp_path / split / name / "one.png")
    for ending in ("gif", "tif", "webp", "png"):
        path = tmp_path / "train" / "cat" / f"pages.{ending}"
        first.save(path, save_all=True, append_images=others)
        assert stored_as(PictureReader()(path)).several
    first.save(tmp_path / "val" / "cat" / "preview.mpo", save_all=True, append_images=others)
    train, val = check_data(ImageData(str(tmp_path), img_size=8), ("train", "val"))
    number, where = train.warnings["file of several images, of which the first is read"]
    assert (number, Path(where).name) == (4, "pages.gif")
    assert not any("several" in kind for kind in val.warnings)
